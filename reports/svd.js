"use strict";
// Layers: heat map, table, and the spectrum of the chosen one, all from the same columns.
(() => {
  const { data, byId, make, plain, number, percent, draw } = Page;
  const columns = data.layers;
  const layers = (columns.name || []).map((_, i) => {
    const layer = Object.fromEntries(Object.entries(columns).map(([field, values]) => [field, values[i]]));
    return Object.assign(layer, { index: i, identical: layer.frobenius === 0 });
  });
  const k = data.k;
  const shown = { mode: "signal", component: "", chosen: null };
  const rows = new Map();
  let order = layers;

  // -- what a null means, in words
  function rankWords(layer) {
    if (layer.identical) return "0";
    if (layer.signal_rank !== null) return number(layer.signal_rank);
    if (layer.hidden) return "below precision";
    return layer.signal_rank_at_least ? `≥ ${number(layer.signal_rank_at_least)}` : "unknown";
  }

  function atLeast(value, bound, layer) {
    if (layer.identical) return "0";
    if (value !== null) return number(value);
    return bound ? `≥ ${number(bound)}` : "unknown";
  }

  const signalWords = (layer, value, write) =>
    layer.identical ? "identical" : value !== null ? write(value) : layer.hidden ? "below precision" : "unknown";
  const share = (layer, value) => (layer.identical ? "identical" : value === null ? "unknown" : percent(value));

  const CELLS = {
    name: (x) => x.name,
    block: (x) => x.block,
    relative: (x) => (x.relative === null ? "unknown" : percent(x.relative)),
    signal_rank: rankWords,
    signal_at_k: (x) => signalWords(x, x.signal_at_k, percent),
    raw_at_k: (x) => share(x, x.raw_at_k),
    signal_k_90: (x) => (x.identical ? "0" : signalWords(x, x.signal_k_90, number)),
    k_90: (x) => atLeast(x.k_90, x.k_90_at_least, x),
    noise_share: (x) => share(x, x.noise_share),
    role: (x) => x.role,
    shape: (x) => x.shape.join(" × "),
    solver: (x) => x.solver,
  };
  const MUTED = new Set(["unknown", "below precision", "identical"]);
  const SORT = {
    shape: (x) => x.entries,
    signal_rank: (x) => (x.identical ? 0 : x.signal_rank ?? (x.signal_rank_at_least || null)),
    signal_k_90: (x) => (x.identical ? 0 : x.signal_k_90),
    k_90: (x) => (x.identical ? 0 : x.k_90 ?? x.k_90_at_least),
  };

  // -- table
  // Long names may wrap after a dot.
  const breakable = (name) => name.split(/(?<=\.)/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));

  function row(layer) {
    const cells = Object.entries(CELLS).map(([key, write]) => {
      const text = write(layer);
      if (key === "name") return make("td", { class: "name" }, make("button", { type: "button" }, ...breakable(text)));
      const numeric = !["block", "role", "solver"].includes(key);
      return make("td", { class: [numeric && "n", MUTED.has(text) && "muted"].filter(Boolean).join(" ") }, text);
    });
    const tr = make("tr", { "data-index": layer.index }, ...cells);
    rows.set(layer.index, tr);
    return tr;
  }

  function sortBy(key, down) {
    const value = SORT[key] || ((x) => x[key]);
    const known = (v) => v !== null && v !== undefined;
    order = [...layers].sort((a, b) => {
      const [p, q] = [value(a), value(b)];
      if (!known(p) || !known(q)) return known(q) - known(p);
      const c = typeof p === "number" ? p - q : p.localeCompare(q, "en", { numeric: true });
      return (down ? -c : c) || a.index - b.index;
    });
    byId("rows").append(...order.map((x) => rows.get(x.index)));
  }

  function onHead(event) {
    const button = event.target.closest("button[data-key]");
    if (!button) return;
    const head = button.parentElement;
    const firstDown = head.classList.contains("n");
    const was = head.getAttribute("aria-sort");
    const down = was === "none" ? firstDown : was === "ascending";
    document.querySelectorAll("#layers th").forEach((th) => th.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    sortBy(button.dataset.key, down);
  }

  const STATES = { changed: (x) => !x.identical, identical: (x) => x.identical, hidden: (x) => x.hidden };

  function filter() {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = STATES[byId("state").value] || (() => true);
    let n = 0;
    for (const layer of layers) {
      const text = `${layer.name} ${layer.component} ${layer.block} ${layer.role} ${layer.solver}`.toLowerCase();
      const visible = wanted(layer) && words.every((w) => text.includes(w));
      rows.get(layer.index).hidden = !visible;
      n += visible;
    }
    byId("shown").textContent = `${number(n)} of ${number(layers.length)} layers`;
  }

  // -- heat map
  const inHeat = () => layers.filter((x) => !shown.component || x.component === shown.component);

  function groups(list) {
    const found = [];
    list.forEach((layer, y) => {
      const last = found[found.length - 1];
      if (last && last.block === layer.block && last.component === layer.component) last.end = y;
      else found.push({ block: layer.block, component: layer.component, start: y, end: y });
    });
    return found;
  }

  function labelled(found, pixels) {
    let free = -1;
    return found.filter((g) => {
      const middle = ((g.start + g.end + 1) / 2) * pixels;
      if (middle < free) return false;
      free = middle + 13;
      return true;
    });
  }

  function energies(layer) {
    const curve = layer.identical ? null : shown.mode === "signal" ? layer.signal : layer.raw;
    return data.ks.map((n) => (curve ? curve[layer.ks.indexOf(n)] ?? null : null));
  }

  function heatFigure() {
    const list = inHeat();
    const pixels = Math.max(2.5, Math.min(18, 860 / Math.max(1, list.length)));
    const found = groups(list);
    const named = labelled(found, pixels);
    const edges = found.slice(1).map((g) => ({
      type: "line", x0: -0.5, x1: data.ks.length - 0.5, y0: g.start - 0.5, y1: g.start - 0.5,
      line: { color: "@panel", width: 1 },
    }));
    const at = list.indexOf(shown.chosen);
    const mark = at < 0 ? [] : [{
      type: "rect", x0: -0.5, x1: data.ks.length - 0.5, y0: at - 0.5, y1: at + 0.5, line: { color: "@mark", width: 1.5 },
    }];
    return {
      data: [{
        type: "heatmap", z: list.map(energies), zmin: 0, zmax: 1, colorscale: "Cividis", hoverongaps: true,
        customdata: list.map((x) => data.ks.map(() => [plain(x.name, 60), x.index])),
        text: list.map((x) => energies(x).map((e) => (e === null ? (x.identical ? "identical" : x.hidden ? "below storage precision" : "unknown") : percent(e)))),
        hovertemplate: "%{customdata[0]}<br>%{text} at k = %{x}<extra></extra>",
        colorbar: { thickness: 10, outlinewidth: 0, tickformat: ".0%", len: 1, lenmode: "fraction", tickfont: { size: 11, color: "@muted" }, x: 1.01, xpad: 4 },
      }],
      layout: {
        height: 60 + pixels * list.length, showlegend: false, shapes: [...edges, ...mark], plot_bgcolor: "@gap",
        xaxis: { side: "top", tickvals: data.ks.map((_, i) => i), ticktext: data.ks.map(String), title: { text: "energy in the first k ranks, k =" }, showgrid: false },
        yaxis: {
          range: [list.length - 0.5, -0.5], showgrid: false,
          tickvals: named.map((g) => (g.start + g.end) / 2), ticktext: named.map((g) => plain(g.block, 18)),
        },
      },
    };
  }

  // -- the chosen layer
  function facts(layer) {
    const identical = layer.identical_entries === null ? "unknown" : percent(layer.identical_entries / layer.entries);
    const plainNumber = (v) => (v === null ? "unknown" : number(v));
    return [
      ["Signal rank", layer.identical ? "0 (identical)" : layer.hidden ? "below storage precision" : rankWords(layer)],
      ["Change", CELLS.relative(layer)],
      [`Signal at ${k}`, CELLS.signal_at_k(layer)],
      [`Raw at ${k}`, CELLS.raw_at_k(layer)],
      ["Signal k₉₀ / k₉₉", `${CELLS.signal_k_90(layer)} / ${layer.identical ? "0" : signalWords(layer, layer.signal_k_99, number)}`],
      ["Raw k₉₀ / k₉₉", `${CELLS.k_90(layer)} / ${atLeast(layer.k_99, layer.k_99_at_least, layer)}`],
      ["Stable rank", plainNumber(layer.stable_rank)],
      ["Effective rank", plainNumber(layer.effective_rank)],
      ["Participation", plainNumber(layer.participation_ratio)],
      ["Equal entries", identical],
      ["Noise share", CELLS.noise_share(layer)],
      ["Solver", layer.solver],
    ];
  }

  const line = (name, colour, x, y, more = {}) => ({
    name, x, y, mode: "lines", line: { color: colour, width: 2.2, ...more.line }, hovertemplate: more.hover, hoverinfo: more.hover ? undefined : "skip",
  });

  const POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256];

  function spectrumFigure() {
    const layer = shown.chosen;
    const values = layer.values.map((v, i) => [i + 1, v]).filter(([, v]) => v > 0);
    const edge = layer.noise_edge > 0 ? layer.noise_edge : null;
    const top = Math.max(...values.map(([, v]) => v), edge || 0) * 1.6;
    const bottom = Math.min(...values.map(([, v]) => v), edge || Infinity) / 1.6;
    const last = values.length ? values[values.length - 1][0] : 1;
    const traces = [{
      name: "singular values", x: values.map((v) => v[0]), y: values.map((v) => v[1]), mode: "lines+markers",
      line: { color: "@accent", width: 1.5 }, marker: { color: "@accent", size: 4.5 }, hovertemplate: "σ<sub>%{x}</sub> = %{y:.3g}<extra></extra>",
    }];
    if (edge) traces.push(line("noise edge", "@raw", [0.9, Math.max(last, 2)], [edge, edge], { line: { dash: "dash", width: 1.8 } }));
    const rank = layer.signal_rank;
    if (rank) traces.push(line(`signal rank ${number(rank)}`, "@signal", [rank + 0.5, rank + 0.5], [bottom, top], { line: { dash: "dot", width: 1.8 } }));
    return {
      data: traces,
      layout: {
        height: 250, annotations: values.length ? [] : [note(layer.identical ? "Identical: nothing changed" : "No singular values kept")],
        xaxis: { type: "log", tickvals: POWERS, ticktext: POWERS.map(String), range: [Math.log10(0.9), Math.log10(Math.max(last, 2) * 1.1)], title: { text: "index" } },
        yaxis: { type: "log", exponentformat: "power", dtick: 1, ...(values.length ? { range: [Math.log10(bottom), Math.log10(top)] } : {}), title: { text: "singular value" } },
      },
    };
  }

  const note = (text) => ({ text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { color: "@muted", size: 13 } });

  function energyFigure() {
    const layer = shown.chosen;
    const x = layer.ks;
    const hover = (name) => `${name} at %{x}: %{y:.2%}<extra></extra>`;
    const traces = [
      line("Gaussian null", "@null", x, layer.null, { line: { dash: "dash" }, hover: hover("null") }),
    ];
    if (!layer.identical) {
      traces.push(
        { x, y: layer.low, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false },
        { x, y: layer.high, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, fill: "tonexty", fillcolor: "@raw-band" },
        {
          ...line("raw delta", "@raw", x, layer.raw), mode: "lines+markers", marker: { size: 5, color: "@raw" }, hoverinfo: undefined,
          customdata: layer.low.map((v, i) => [v, layer.high[i]]),
          hovertemplate: "raw at %{x}: %{y:.2%}<br>certified %{customdata[0]:.4%} to %{customdata[1]:.4%}<extra></extra>",
        },
      );
      if (layer.signal) traces.push({ ...line("signal", "@signal", x, layer.signal, { hover: hover("signal") }), mode: "lines+markers", marker: { size: 5, color: "@signal" } });
      if (layer.noise_share > 0.0005) traces.push(line("noise floor", "@muted", [x[0], x[x.length - 1]], [1 - layer.noise_share, 1 - layer.noise_share], { line: { dash: "dot", width: 1.4 } }));
    }
    return {
      data: traces,
      layout: {
        height: 265, annotations: layer.identical ? [note("Identical: no energy to share out")] : [],
        xaxis: { type: "log", tickvals: x, ticktext: x.map(String), title: { text: "ranks kept, k" } },
        yaxis: { range: [0, 1.04], tickformat: ".0%" },
      },
    };
  }

  function choose(layer, { open = true, focus = false } = {}) {
    if (!layer) return;
    rows.get(shown.chosen?.index)?.removeAttribute("aria-current");
    shown.chosen = layer;
    const tr = rows.get(layer.index);
    tr.setAttribute("aria-current", "true");
    reveal(tr);
    byId("detail-name").textContent = layer.name;
    byId("detail-where").textContent = [layer.component, layer.block, layer.role, layer.shape.join(" × ")].filter(Boolean).join(" · ");
    byId("detail-facts").replaceChildren(...facts(layer).flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]));
    if (open) byId("detail").classList.add("open");
    draw("spectrum", spectrumFigure);
    draw("layer-energy", energyFigure);
    draw("heat", heatFigure);
    if (focus) byId("detail-name").focus({ preventScroll: true });
  }

  // Moves the table's own box only: scrollIntoView would move the page under the reader.
  function reveal(tr) {
    const box = tr.closest(".scroll");
    const [top, bottom] = [tr.offsetTop - 40, tr.offsetTop + tr.offsetHeight];
    if (top < box.scrollTop) box.scrollTop = top;
    else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
  }

  function step(by) {
    const visible = order.filter((x) => !rows.get(x.index).hidden);
    choose(visible[(visible.indexOf(shown.chosen) + by + visible.length) % visible.length]);
  }

  function close() {
    byId("detail").classList.remove("open");
    rows.get(shown.chosen?.index)?.querySelector("button").focus({ preventScroll: true });
  }

  function start() {
    byId("rows").append(...layers.map(row));
    filter();
    byId("filter").addEventListener("input", filter);
    byId("state").addEventListener("change", filter);
    document.querySelector("#layers thead").addEventListener("click", onHead);
    byId("rows").addEventListener("click", (event) => choose(layers[event.target.closest("tr")?.dataset.index]));
    byId("heat-component").addEventListener("change", (e) => { shown.component = e.target.value; draw("heat", heatFigure); });
    document.querySelectorAll("input[name=mode]").forEach((input) =>
      input.addEventListener("change", () => { shown.mode = input.value; draw("heat", heatFigure); }));
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));
    byId("close").addEventListener("click", close);
    addEventListener("keydown", (e) => { if (e.key === "Escape") close(); });
    draw("heat", heatFigure).then((place) => {
      place.on("plotly_click", (event) => choose(layers[event.points[0].customdata[1]]));
    });
    choose(layers.find((x) => !x.identical && !x.hidden) || layers[0], { open: false });
  }

  start();
})();
