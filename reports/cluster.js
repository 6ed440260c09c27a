"use strict";
// The family tree: rows from what is unfolded, lines and boxes as SVG, search, and the evidence beside it.
const Forest = (() => {
  const { data, byId, make, number, percent } = Page;
  const [COLUMN, WIDTH, HEIGHT, ROW, PAD] = [212, 142, 24, 31, 10];
  const GAP = COLUMN - WIDTH - 3;
  const START_ROWS = 70;
  const READABLE = 0.8; // a smaller picture is scrolled instead
  const nodes = data.nodes.map(([name, kind, family, column, parent], index) => ({ name, kind, family, column, parent, index, children: [], below: 0 }));
  const edges = data.edges.map((edge, index) => ({ ...edge, index, parent: nodes[edge.ends[0]], child: nodes[edge.ends[1]] }));
  const into = new Map(nodes.map((node) => [node, []]));
  edges.forEach((edge) => into.get(edge.child).push(edge));
  const facts = new Map(Object.entries(data.facts));
  const folded = new Set();
  const shown = { zoom: 1, edge: null, node: null, hits: [], at: -1 };
  const box = byId("forest");
  let drawn = { width: 0, height: 0, svg: null };

  for (const node of nodes) if (node.parent >= 0) nodes[node.parent].children.push(node);
  for (const node of [...nodes].reverse()) if (node.parent >= 0) nodes[node.parent].below += node.below + 1;

  function svg(tag, attributes = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  // -- layout: every visible leaf has a row of its own, every parent stands at the middle of its children
  const open = (node) => node.children.length > 0 && !folded.has(node.index);

  function place() {
    let y = PAD;
    for (const node of nodes) {
      const parent = nodes[node.parent];
      node.visible = !parent || (parent.visible && open(parent));
      if (!parent && node.index) y += ROW / 3;
      if (!node.visible) continue;
      node.x = PAD + node.column * COLUMN;
      if (!open(node)) { node.y = y; y += ROW; }
    }
    for (const node of [...nodes].reverse()) {
      if (node.visible && open(node)) node.y = (node.children[0].y + node.children[node.children.length - 1].y) / 2;
    }
    const right = nodes.reduce((far, node) => (node.visible ? Math.max(far, node.x) : far), 0);
    return { width: right + WIDTH + 46, height: y + PAD };
  }

  // The nearest visible ancestor stands for a folded node.
  function standing(node) {
    while (!node.visible) node = nodes[node.parent];
    return node;
  }

  // -- drawing
  const short = (name, limit = 18) => (name.length <= limit ? name : name.slice(0, limit / 3) + "…" + name.slice(-Math.floor((2 * limit) / 3)));

  // From the right of a box to the left of another; a long way runs between two rows, so that few boxes are crossed.
  function curve(from, to) {
    const [x0, y0, x1, y1] = [from.x + WIDTH, from.y + HEIGHT / 2, to.x - 3, to.y + HEIGHT / 2];
    if (x1 <= x0) return `M${x0} ${y0}C${x0 + 50} ${y0} ${x1 - 50} ${y1} ${x1} ${y1}`;
    const [left, right] = [x0 + GAP, x1 - GAP];
    if (right <= x0 + 1) return `M${x0} ${y0}C${(x0 + x1) / 2} ${y0} ${(x0 + x1) / 2} ${y1} ${x1} ${y1}`;
    const lane = y1 + (y0 < y1 ? -ROW / 2 : ROW / 2);
    return `M${x0} ${y0}C${x0 + GAP / 2} ${y0} ${x0 + GAP / 2} ${lane} ${left} ${lane}H${right}C${right + GAP / 2} ${lane} ${right + GAP / 2} ${y1} ${x1} ${y1}`;
  }

  function line(edge) {
    const [from, to] = [standing(edge.parent), edge.child];
    if (!to.visible || from === to) return null;
    const path = curve(from, to);
    const kind = ["edge", edge.relation, edge.declared && "declared", edge === shown.edge && "chosen"].filter(Boolean).join(" ");
    const opacity = edge === shown.edge ? 1 : 0.3 + 0.7 * edge.confidence;
    return svg("g", { class: kind, "data-edge": edge.index, opacity },
      svg("path", { d: path, class: "grip" }), svg("path", { d: path, "marker-end": edge.directed ? "url(#arrow)" : null }));
  }

  // The words at the end of a node's lines, those from above above.
  function labels(node) {
    const found = into.get(node).filter((edge) => edge.label && standing(edge.parent) !== node);
    found.sort((a, b) => standing(a.parent).y - standing(b.parent).y || a.index - b.index);
    const middle = node.y + HEIGHT / 2 + 4;
    const step = found.length === 2 ? 17 : 11; // two stand above and below their lines
    const lone = found.length === 1 ? (standing(found[0].parent).y > node.y + 1 ? 10 : -8) : 0;
    return found.map((edge, i) => svg("text", {
      x: node.x - 12, y: middle + lone + step * (i - (found.length - 1) / 2), class: "factor", "text-anchor": "end", "data-edge": edge.index,
    }, edge.label));
  }

  function body(node) {
    const hit = shown.hits.includes(node);
    const kind = ["node", node.kind, hit && "hit", shown.hits.length && !hit && "dim", node === shown.node && "chosen"].filter(Boolean).join(" ");
    const colour = node.family >= 0 ? `var(--f${node.family % 10})` : "var(--null)";
    const parts = [
      svg("title", {}, node.name),
      svg("rect", { x: node.x, y: node.y, width: WIDTH, height: HEIGHT, rx: 7, class: "box" }),
      node.kind === "unobserved" ? "" : svg("rect", { x: node.x, y: node.y, width: 6, height: HEIGHT, rx: 3, fill: colour }),
      svg("text", { x: node.x + 13, y: node.y + 16.5 }, short(node.name)),
    ];
    return svg("g", { class: kind, "data-node": node.index }, ...parts);
  }

  function toggle(node) {
    if (!node.children.length) return null;
    const [x, y] = [node.x + WIDTH + 9, node.y + HEIGHT / 2];
    const shut = folded.has(node.index);
    const words = shut ? `+${node.below}` : "−";
    const wide = shut ? 13 + 7 * words.length : 15;
    return svg("g", { class: shut ? "toggle shut" : "toggle", "data-toggle": node.index },
      svg("title", {}, shut ? `Unfold ${node.below} below` : "Fold"),
      svg("rect", { x: x - 7.5, y: y - 7.5, width: wide, height: 15, rx: 7.5 }),
      svg("text", { x: x - 7.5 + wide / 2, y: y + 3.8, "text-anchor": "middle" }, words));
  }

  function draw() {
    const { width, height } = place();
    const seen = nodes.filter((node) => node.visible);
    const arrow = svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto" }, svg("path", { d: "M0 0.8L7.5 4L0 7.2z" }));
    // The chosen line lies on top of the others
    const lines = [...edges].sort((a, b) => (a === shown.edge) - (b === shown.edge)).map(line);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "forest" }, svg("defs", {}, arrow),
      ...lines.filter(Boolean), ...seen.flatMap(labels), ...seen.map(toggle).filter(Boolean), ...seen.map(body));
    drawn = { width, height, svg: root };
    box.replaceChildren(root);
    scale();
  }

  function scale() {
    drawn.svg.setAttribute("width", drawn.width * shown.zoom);
    drawn.svg.setAttribute("height", drawn.height * shown.zoom);
  }

  function zoom(to) {
    const before = shown.zoom;
    shown.zoom = Math.max(0.15, Math.min(3, to));
    const ratio = shown.zoom / before;
    const [x, y] = [box.scrollLeft + box.clientWidth / 2, box.scrollTop + box.clientHeight / 2];
    scale();
    box.scrollTo(x * ratio - box.clientWidth / 2, y * ratio - box.clientHeight / 2);
  }

  const fit = () => zoom(Math.min(1, (box.clientWidth - 4) / drawn.width));

  // -- folding: of a large tree only the upper columns are open at first
  function fold(rows) {
    folded.clear();
    for (let column = Math.max(0, ...nodes.map((n) => n.column)); column >= 0; column -= 1) {
      place();
      if (nodes.filter((n) => n.visible && !open(n)).length <= rows) return;
      nodes.filter((n) => n.column === column && n.children.length).forEach((n) => folded.add(n.index));
    }
  }

  function reveal(node) {
    for (let up = nodes[node.parent]; up; up = nodes[up.parent]) folded.delete(up.index);
    draw();
    box.scrollTo({
      left: (node.x + WIDTH / 2) * shown.zoom - box.clientWidth / 2, top: node.y * shown.zoom - box.clientHeight / 2,
      behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
    });
  }

  // -- search
  function find() {
    const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (node) => [node.name, ...(facts.get(node.name) || []).slice(0, 3)].join(" ").toLowerCase();
    shown.hits = words.length ? nodes.filter((node) => words.every((w) => text(node).includes(w))) : [];
    shown.at = -1;
    byId("found").textContent = words.length ? `${number(shown.hits.length)} of ${number(nodes.length)}` : "";
    if (shown.hits.length) next();
    else draw();
  }

  function next() {
    if (!shown.hits.length) return;
    shown.at = (shown.at + 1) % shown.hits.length;
    byId("found").textContent = `${number(shown.at + 1)} of ${number(shown.hits.length)} found`;
    reveal(shown.hits[shown.at]);
  }

  // -- the panel beside the tree
  function panel(title, where, terms, ...parts) {
    byId("detail-name").textContent = title;
    byId("detail-where").textContent = where;
    byId("detail-facts").replaceChildren(...terms.filter(([, value]) => value).flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]));
    byId("detail-list").replaceChildren(...parts);
  }

  function reasons(edge) {
    const items = edge.evidence.map(([source, words, value]) =>
      make("li", {}, make("span", { class: "badge" }, source), ` ${words}`, value === null ? "" : make("small", { class: "muted" }, ` ${number(value)}`)));
    return items.length ? make("ul", { class: "evidence" }, ...items) : make("p", { class: "note" }, "No evidence is recorded.");
  }

  function chooseEdge(edge) {
    Object.assign(shown, { edge, node: null });
    mark(edge.index);
    const terms = [["Confidence", percent(edge.confidence)], ["Coefficient", edge.interval ? `${edge.label} (${edge.interval})` : ""],
      ["Distance", edge.distance === null ? "" : number(edge.distance)], ["Direction", edge.directed ? "" : "not known"]];
    panel(edge.child.name, edge.words, terms, make("h4", {}, "Evidence"), reasons(edge));
    draw();
  }

  function chooseNode(node) {
    Object.assign(shown, { edge: null, node });
    mark(null);
    const known = facts.get(node.name);
    const terms = known ? ["Root", "Family", "File", "Size", "Licence"].map((term, i) => [term, known[i]]) : [];
    const origins = edges.filter((edge) => edge.child === node || (edge.parent === node && !edge.directed));
    const out = edges.filter((edge) => edge.parent === node && edge.directed);
    const list = (title, found, name) => (found.length ? [make("h4", {}, title), make("ul", { class: "links" }, ...found.map((edge) =>
      make("li", {}, make("button", { type: "button", "data-edge": edge.index }, name(edge)))))] : []);
    const where = node.kind === "unobserved" ? "An ancestor that no file here is" : node.kind === "adapter" ? "Adapter" : "";
    panel(node.name, where, terms, ...list("Made from", origins, (e) => (e.child === node ? e.words : `kin of ${e.child.name}, older or younger`)), ...list(`Made of it (${out.length})`, out.slice(0, 100), (e) => e.child.name));
    draw();
    if (known) dispatchEvent(new CustomEvent("model", { detail: node.name }));
  }

  function mark(index) {
    document.querySelectorAll("#rows tr[aria-current]").forEach((tr) => tr.removeAttribute("aria-current"));
    if (index !== null) document.querySelector(`#rows tr[data-index="${index}"]`)?.setAttribute("aria-current", "true");
  }

  function onClick(event) {
    const at = (name) => event.target.closest(`[data-${name}]`)?.dataset[name];
    if (at("toggle") !== undefined) {
      const index = Number(at("toggle"));
      if (!folded.delete(index)) folded.add(index);
      draw();
    } else if (at("edge") !== undefined) chooseEdge(edges[at("edge")]);
    else if (at("node") !== undefined) chooseNode(nodes[at("node")]);
    else return;
    byId("detail").classList.toggle("open", at("toggle") === undefined);
  }

  // -- dragging; a drag is not a click
  function drag() {
    let from = null;
    box.addEventListener("pointerdown", (e) => {
      if (e.pointerType === "mouse" && e.button === 0) from = { x: e.clientX, y: e.clientY, left: box.scrollLeft, top: box.scrollTop, moved: false };
    });
    addEventListener("pointermove", (e) => {
      if (!from) return;
      const [dx, dy] = [e.clientX - from.x, e.clientY - from.y];
      if (Math.abs(dx) + Math.abs(dy) > 4) from.moved = true;
      if (from.moved) box.scrollTo(from.left - dx, from.top - dy);
    });
    addEventListener("pointerup", () => setTimeout(() => { from = null; }));
    box.addEventListener("click", (e) => { if (!from?.moved) onClick(e); });
    box.addEventListener("wheel", (e) => {
      if (!e.ctrlKey) return;
      e.preventDefault();
      zoom(shown.zoom * (e.deltaY < 0 ? 1.15 : 1 / 1.15));
    }, { passive: false });
  }

  function copy(button) {
    const text = button.previousElementSibling.textContent;
    const done = () => { button.textContent = "Copied"; };
    const select = () => { getSelection().selectAllChildren(button.previousElementSibling); button.textContent = "Selected: copy it now"; };
    navigator.clipboard ? navigator.clipboard.writeText(text).then(done, select) : select();
  }

  function start() {
    fold(START_ROWS);
    draw();
    if (nodes.length) chooseNode(nodes[data.chosen]);
    if (data.chosen) reveal(nodes[data.chosen]);
    if (drawn.width * READABLE < box.clientWidth) fit();
    drag();
    byId("find").addEventListener("input", find);
    byId("find").addEventListener("keydown", (e) => { if (e.key === "Enter") next(); });
    byId("zoom-in").addEventListener("click", () => zoom(shown.zoom * 1.25));
    byId("zoom-out").addEventListener("click", () => zoom(shown.zoom / 1.25));
    byId("fit").addEventListener("click", fit);
    byId("unfold").addEventListener("click", () => { folded.clear(); draw(); });
    byId("fold").addEventListener("click", () => { fold(START_ROWS / 4); draw(); });
    byId("detail-list").addEventListener("click", onClick);
    byId("rows").addEventListener("click", (e) => {
      const edge = edges[e.target.closest("tr")?.dataset.index];
      if (!edge) return;
      chooseEdge(edge);
      reveal(edge.child);
      byId("detail").classList.add("open");
      byId("detail-name").scrollIntoView({ block: "nearest" });
    });
    byId("close").addEventListener("click", () => byId("detail").classList.remove("open"));
    addEventListener("keydown", (e) => { if (e.key === "Escape") byId("detail").classList.remove("open"); });
    document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", () => copy(button)));
  }

  start();
  return { nodes, edges };
})();
