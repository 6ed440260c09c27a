"use strict";
// What every page shares: the data, the colours of the day, and plotly with both.
const Page = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const redraws = [];
  const byId = (id) => document.getElementById(id);

  // Builds an element; strings become text nodes, never markup.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  // Text for plotly, which reads tags such as <b> and <a href> in its labels.
  function plain(text, limit = 70) {
    const s = text.length <= limit ? text : text.slice(0, limit / 3) + "…" + text.slice(-Math.floor((2 * limit) / 3));
    return s.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function number(value, digits = 3) {
    if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en").replace(/,/g, "\u202f");
    const size = Math.abs(value);
    return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 1);
  }

  function percent(share) {
    const value = 100 * share;
    if (value === 0 || value >= 99.95) return `${value.toFixed(0)}\u202f%`;
    return value >= 1e-4 ? `${Number(value.toPrecision(3))}\u202f%` : `${value.toExponential(1)}\u202f%`;
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  // Replaces "@name" by the colour of that name, only where plotly expects a colour: a layer may be called "@ink".
  function painted(value, key = "") {
    if (typeof value === "string") return /color$/i.test(key) && value.startsWith("@") ? colour(value.slice(1)) : value;
    if (Array.isArray(value)) return value.map((v) => painted(v, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k)]));
  }

  const AXIS = {
    fixedrange: true, automargin: true, zeroline: false, gridcolor: "@line", linecolor: "@line",
    tickfont: { size: 11.5, color: "@muted" }, ticks: "",
  };

  function axis(own = {}) {
    const title = own.title ? { standoff: 10, font: { size: 12.5, color: "@muted" }, ...own.title } : undefined;
    return { ...AXIS, ...own, title };
  }

  function dressed(layout) {
    return painted({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: true, dragmode: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "@ink" },
      margin: { l: 8, r: 12, t: 8, b: 8 }, barcornerradius: 3,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", itemclick: false, itemdoubleclick: false },
      hoverlabel: { bgcolor: "@raised", bordercolor: "@line", font: { color: "@ink", size: 12.5 }, align: "left" },
      ...layout, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    });
  }

  const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };

  // Draws figure() into the place called name, now and whenever the colour scheme turns.
  function draw(name, figure) {
    const place = byId(`plot-${name}`);
    const show = () => {
      const { data: traces, layout } = figure();
      return Plotly.react(place, painted(traces), dressed(layout), CONFIG);
    };
    if (!redraws.some((r) => r.name === name)) redraws.push({ name, show: () => redraws.find((r) => r.name === name).now() });
    redraws.find((r) => r.name === name).now = show;
    return show();
  }

  const redraw = () => redraws.forEach((r) => r.show());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // Figures that the result's figures.py made whole.
  function drawAll() {
    for (const [name, figure] of Object.entries(data.figures || {})) {
      draw(name, () => ({ data: figure.data, layout: { showlegend: figure.data.length > 1, ...figure.layout } }));
    }
  }

  return { data, byId, make, plain, number, percent, colour, draw, drawAll };
})();
Page.drawAll();
