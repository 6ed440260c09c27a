"use strict";
// Two models at a time: the map of distances, and the blocks of the chosen pair.
(() => {
  const { data, byId, make, plain, number, draw } = Page;
  const { heat, similarity } = data;
  const FLOOR = 1e-7;
  const LABELLED = 60;
  const { names } = similarity;
  const pairs = new Map(similarity.pairs.map(([a, b, ...values]) => [Math.min(a, b) * names.length + Math.max(a, b), values]));
  const shown = { a: 0, b: 1 };

  function distance(a, b) {
    if (a === b) return 0;
    const [i, j, n] = [Math.min(a, b), Math.max(a, b), heat.order.length];
    return heat.values[n * i - (i * (i + 1)) / 2 + j - i - 1];
  }

  const log = (value) => (value === null ? null : Math.log10(Math.max(value, FLOOR)));
  const power = (e) => (e >= 0 ? String(10 ** e) : `${(10 ** e).toFixed(-e)}`);

  function distancesFigure() {
    const { order } = heat;
    const n = order.length;
    const z = order.map((a) => order.map((b) => (a === b ? null : log(distance(a, b)))));
    const known = heat.values.filter((v) => v !== null && v > FLOOR).map(Math.log10);
    const [low, high] = known.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [0, -Infinity]);
    const ticks = Array.from({ length: Math.ceil(-low) + 1 }, (_, i) => -i).filter((e) => e >= low && e <= Math.max(high, low + 1));
    const labels = order.map((i) => plain(names[i], 22));
    const few = n <= LABELLED;
    const narrow = byId("plot-distances").clientWidth < 500;
    const axis = { range: [-0.5, n - 0.5], showgrid: false, tickvals: few ? order.map((_, i) => i) : [], ticktext: few ? labels : [], tickfont: { size: 10, color: "@muted" } };
    const map = {
      type: "heatmap", z, zmin: low, zmax: Math.max(high, low + 1), colorscale: "Cividis", hoverongaps: false, xgap: few ? 1 : 0, ygap: few ? 1 : 0,
      text: few || n <= 400 ? order.map((a, i) => order.map((b, j) => `${labels[i]}<br>${labels[j]}<br>${a === b ? "" : words(distance(a, b))}`)) : undefined,
      hovertemplate: few || n <= 400 ? "%{text}<extra></extra>" : "10^%{z:.2f}<extra></extra>",
      colorbar: { thickness: 10, outlinewidth: 0, tickvals: ticks, ticktext: ticks.map(power), tickfont: { color: "@muted" }, xpad: 4, len: 0.8, y: 0, yanchor: "bottom" },
    };
    const tree = { type: "scatter", mode: "lines", x: heat.x, y: heat.y.map((v) => v && Math.max(v, low)), yaxis: "y2", line: { color: "@muted", width: 1.2 }, hoverinfo: "skip" };
    return {
      data: heat.x.length ? [map, tree] : [map],
      layout: {
        showlegend: false, height: Math.max(380, Math.min(900, few ? 320 + 17 * n : 760)), plot_bgcolor: "@gap",
        xaxis: { ...axis, side: "bottom", tickangle: -90, showticklabels: few && !narrow },
        yaxis: { ...axis, domain: [0, heat.x.length ? 0.84 : 1], range: [n - 0.5, -0.5], showticklabels: few && !narrow },
        yaxis2: { domain: [0.85, 1], showgrid: false, zeroline: false, showticklabels: false, fixedrange: true, range: [low, high + 0.15] },
        shapes: [{ type: "rect", layer: "below", xref: "paper", yref: "paper", x0: 0, x1: 1, y0: 0.845, y1: 1, line: { width: 0 }, fillcolor: "@panel" }],
      },
    };
  }

  function words(value) {
    if (value === null) return "cannot be compared";
    return value <= FLOOR ? "the same weights" : `${number(value)} apart`;
  }

  const values = () => pairs.get(Math.min(shown.a, shown.b) * names.length + Math.max(shown.a, shown.b));

  function blocksFigure() {
    const found = values();
    const note = (text) => ({ text, xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, font: { color: "@muted", size: 13 } });
    if (!found) {
      const text = shown.a === shown.b ? "The same model twice" : "Not kept for this pair";
      return { data: [], layout: { height: 160, annotations: [note(text)], xaxis: { visible: false }, yaxis: { visible: false } } };
    }
    const rows = similarity.blocks.map((block, i) => ({ block, value: found[i] })).filter((row) => row.value !== null && row.value !== undefined);
    const top = Math.max(FLOOR, ...rows.map((row) => row.value));
    const bar = {
      type: "bar", orientation: "h", x: rows.map((row) => row.value), y: rows.map((_, i) => i), marker: { color: "@accent" },
      customdata: rows.map((row) => [plain(row.block), row.value === 0 ? "identical" : number(row.value)]),
      text: rows.map((row) => (row.value === 0 ? "identical" : "")), textposition: "outside", textfont: { size: 10, color: "@muted" },
      hovertemplate: "%{customdata[0]}: %{customdata[1]}<extra></extra>",
    };
    return {
      data: [bar],
      layout: {
        showlegend: false, height: 70 + 15 * Math.max(3, rows.length), bargap: 0.25,
        xaxis: { side: "top", range: [0, top * 1.08], nticks: 5, showticklabels: top > FLOOR },
        yaxis: { tickvals: rows.map((_, i) => i), ticktext: rows.map((row) => plain(row.block, 18)), range: [rows.length - 0.4, -0.6], showgrid: false, tickfont: { size: 10.5, color: "@muted" } },
      },
    };
  }

  function choose(a, b) {
    Object.assign(shown, { a, b });
    byId("pair-a").value = a;
    byId("pair-b").value = b;
    const found = (values() || []).filter((v) => v !== null);
    const same = found.filter((v) => v === 0).length;
    const whole = heat && a !== b ? `Whole model: ${words(distance(a, b))}. ` : "";
    byId("pair-words").textContent = `${whole}${same ? `${number(same)} of ${number(found.length)} blocks are identical.` : ""}`;
    draw("blocks", blocksFigure);
  }

  function start() {
    if (names.length < 2) return;
    for (const id of ["pair-a", "pair-b"]) byId(id).append(...names.map((name, i) => make("option", { value: i }, name)));
    const chosen = () => choose(Number(byId("pair-a").value), Number(byId("pair-b").value));
    byId("pair-a").addEventListener("change", chosen);
    byId("pair-b").addEventListener("change", chosen);
    addEventListener("model", (event) => {
      const at = names.indexOf(event.detail);
      if (at >= 0 && at !== shown.b) choose(at, shown.b);
    });
    if (heat) {
      draw("distances", distancesFigure).then((place) => {
        place.on("plotly_click", ({ points: [{ x, y }] }) => choose(heat.order[Math.round(y)], heat.order[Math.round(x)]));
      });
    }
    const [a, b] = similarity.pairs.find(([, , ...values]) => values.some((v) => v > 0)) ?? [0, 1];
    choose(a, b);
  }

  start();
})();
