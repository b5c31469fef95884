"use strict";
// Elements: HTML and SVG made by hand; text always goes in as text, so no name can become markup.

const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : SPOKEN.has(name) ? visible(value) : value);
  }
  const shown = children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false);
  element.append(...shown.map((c) => (typeof c === "string" ? visible(c) : c)));
  return element;
}

const SPOKEN = new Set(["title", "aria-label"]);

// Names come from the model: what would turn the direction of text around, or isn't seen, is spelled out, as in the text of a diff.
const visible = (words) => String(words).replace(/[\p{Cf}\p{Cc}\p{Zl}\p{Zp}]/gu, (c) => (c === "\n" || c === "\t" ? c : spelled(c.codePointAt(0))));
const spelled = (code) => (code < 0x100 ? "\\x" + hex(code, 2) : code < 0x10000 ? "\\u" + hex(code, 4) : "\\U" + hex(code, 8));
const hex = (code, digits) => code.toString(16).padStart(digits, "0");

// A name that may be broken behind a dot or an underscore.
const broken = (name) => name.split(/(?<=[._])/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]));

const SIGN = { added: "+", removed: "−", changed: "~", moved: "→" };

// A state's mark has a form of its own: circle, square, diamond, arrowhead.
function mark(state, x, y) {
  const forms = {
    added: () => svg("circle", { cx: x, cy: y, r: 7.5 }),
    removed: () => svg("rect", { x: x - 7.5, y: y - 7.5, width: 15, height: 15 }),
    changed: () => svg("path", { d: `M${x} ${y - 9.5}L${x + 9.5} ${y}L${x} ${y + 9.5}L${x - 9.5} ${y}Z` }),
    moved: () => svg("path", { d: `M${x - 8} ${y - 8}H${x + 3}L${x + 10} ${y}L${x + 3} ${y + 8}H${x - 8}Z` }),
  };
  return svg("g", { class: `mark ${state}` }, forms[state](), svg("text", { x, y: y + 4.5, "text-anchor": "middle" }, SIGN[state]));
}

// The same as a piece of text: "+12 −3".
function chips(counts) {
  return STATES.filter((s) => counts[s]).map((s) => el("span", { class: `chip ${s}`, title: `${counts[s]} ${s}` }, SIGN[s] + counts[s]));
}

// side: "" for both graphs over each other, else "before" or "after": what that graph lacks is left faint.
function drawGraph(view, path, state, side, act) {
  const drawn = layout(view, path, state);
  const picture = svg("svg", { width: (drawn.w + 24) * state.zoom, height: (drawn.h + 24) * state.zoom, viewBox: `-12 -12 ${drawn.w + 24} ${drawn.h + 24}`,
    role: "group", "aria-label": side ? `graph ${side}` : "graph" });
  picture.append(arrowheads(), drawInner(view, drawn, state, side, act));
  return picture;
}

function arrowheads() {
  const head = (id) => svg("marker", { id: "head" + id, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto", class: "head " + id },
    svg("path", { d: "M0 0.5L8 4L0 7.5Z" }));
  return svg("defs", {}, ["", "added", "removed"].map(head));
}

function drawInner(view, drawn, state, side, act) {
  const group = svg("g");
  const faint = new Set(drawn.items.filter((i) => isAbsent(view, i, side)).map((i) => i.key));
  for (const edge of drawn.edges) {
    const absent = faint.has(edge.from) || faint.has(edge.to) || (side === "before" && edge.state === "added") || (side === "after" && edge.state === "removed");
    if (!absent) group.append(svg("path", { class: `edge ${edge.state}`, d: curve(edge.points), "marker-end": `url(#head${edge.state})` }));
  }
  for (const item of drawn.items) group.append(drawItem(view, item, state, side, act, faint.has(item.key)));
  return group;
}

function isAbsent(view, item, side) {
  if (!side || item.kind !== "node") return false;
  const node = view.nodes.get(item.node);
  return side === "before" ? !node.old : !node.new;
}

// Straight lines with round corners, so that an edge stays where it was laid.
function curve(points) {
  const at = ({ x, y }) => `${x.toFixed(1)} ${y.toFixed(1)}`;
  let path = `M${at(points[0])}`;
  for (let i = 1; i < points.length - 1; i++) path += `L${at(towards(points[i], points[i - 1]))}Q${at(points[i])} ${at(towards(points[i], points[i + 1]))}`;
  return path + `L${at(points[points.length - 1])}`;
}

const ROUND = 16;  // where a corner begins, at most half of the way

function towards(corner, end) {
  const share = Math.min(0.5, ROUND / (Math.hypot(end.x - corner.x, end.y - corner.y) || 1));
  return { x: corner.x + share * (end.x - corner.x), y: corner.y + share * (end.y - corner.y) };
}

function drawItem(view, item, state, side, act, absent) {
  const group = svg("g", { transform: `translate(${item.x.toFixed(1)} ${item.y.toFixed(1)})`, class: `item ${item.kind} ${stateOf(view, item)}${absent ? " absent" : ""}`,
    tabindex: absent ? null : 0, role: "button", "data-key": item.key, "aria-label": spoken(view, item), "aria-expanded": item.kind === "region" ? String(item.open) : null });
  if (item.node !== undefined && item.node === state.node) group.classList.add("selected");
  if (item.kind === "region" && state.region === item.path) group.classList.add("selected");
  group.addEventListener("click", (event) => { event.stopPropagation(); act(item); });
  group.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); act(item); } });
  if (item.kind === "same") group.append(svg("rect", { class: "behind", x: 6, y: 6, width: item.w, height: item.h, rx: 6 }), svg("rect", { class: "behind", x: 3, y: 3, width: item.w, height: item.h, rx: 6 }));
  group.append(svg("rect", { class: "box", width: item.w, height: item.h, rx: item.kind === "rest" ? 13 : item.kind === "node" ? 4 : 7 }));
  if (item.kind === "region" && item.open) openBox(view, item, group, state, side, act);
  else if (!absent) closedBox(view, item, group, state);
  return group;
}

const stateOf = (view, item) => (item.kind === "node" ? view.nodes.get(item.node).state : "");

function spoken(view, item) {
  if (item.kind === "node") return `${shortOp(view.nodes.get(item.node).now.op)} ${item.node} ${stateOf(view, item)}`.trim();
  const counts = countsOf(view, item.keys).map(([words, s]) => `${words.slice(1)} ${s}`);
  return [...(item.kind === "region" ? [`module ${item.path}`] : item.lines.filter(Boolean)), ...counts].join(", ");
}

function openBox(view, item, group, state, side, act) {
  const region = view.tree.get(item.path);
  group.append(svg("path", { class: "rule", d: `M0 ${SIZE.head - 4}H${item.w}` }));
  group.append(svg("text", { class: "name", x: 12, y: 18 }, "▾ " + cut(localName(item.path, region.parent))));
  group.append(svg("text", { class: "kind", x: item.w - 10, y: 18, "text-anchor": "end" }, region.kind));
  const inner = svg("g", { transform: `translate(${((item.w - item.inner.w) / 2).toFixed(1)} ${SIZE.head})` }, drawInner(view, item.inner, state, side, act));
  inner.addEventListener("click", (event) => event.stopPropagation());
  group.append(inner);
}

function closedBox(view, item, group, state) {
  const isNode = item.kind === "node", left = isNode ? 12 : 14;
  if (item.kind === "rest") {
    group.append(svg("text", { class: "kind", x: item.w / 2, y: 17, "text-anchor": "middle" }, item.lines[0]));
    return;
  }
  const expandable = { region: "▸ ", part: "▸ ", same: "" }[item.kind] || "";
  const y = isNode ? 16 : 19;
  group.append(svg("text", { class: "name", x: left, y }, expandable + item.lines[0]), svg("text", { class: "kind", x: left, y: y + 15 }, item.lines[1]));
  if (isNode && stateOf(view, item)) group.append(mark(stateOf(view, item), item.w - 14, 14));
  if (!isNode) countMarks(view, item, group);
  if (state.overlay !== "none") overlay(view, item, group, state);
}

function countMarks(view, item, group) {
  let x = item.w - 12;
  for (const [words, s] of countsOf(view, item.keys).reverse()) {
    group.append(svg("text", { class: `count ${s}`, x, y: 19, "text-anchor": "end" }, words));
    x -= words.length * 8 + 8;
  }
}

// A bar along the foot and the figure: loss in dB (darker is worse) or share of the operations (longer is more).
function overlay(view, item, group, state) {
  const [words, share] = state.overlay === "loss" ? lossFigure(view, item) : costFigure(view, item);
  if (words === "") return;
  const y = item.kind === "node" ? 31 : 34;
  group.append(svg("rect", { class: `bar ${state.overlay}`, x: 1, y: item.h - 4, width: Math.max(2, (item.w - 2) * share), height: 3 }));
  group.append(svg("text", { class: "figure", x: item.w - (item.kind === "node" ? 8 : 12), y, "text-anchor": "end" }, words));
}

const WORST = 10, BEST = 60;  // dB: where the bar is full, and where it is gone

function lossFigure(view, item) {
  const figures = item.keys.map((k) => (k[0] === "r" ? lossIn(view, k.slice(2)) : lossAt(view, view.nodes.get(k.slice(2))) ?? Infinity));
  const least = Math.min(...figures);
  return Number.isFinite(least) ? [`${least.toFixed(1)} dB`, Math.min(1, Math.max(0, (BEST - least) / (BEST - WORST)))] : ["", 0];
}

function costFigure(view, item) {
  const all = view.tree.get("").flops || 1;
  const own = item.keys.reduce((sum, k) => sum + (k[0] === "r" ? view.tree.get(k.slice(2)).flops : (view.nodes.get(k.slice(2)).new || { flops: 0 }).flops), 0);
  return own ? [own / all < 0.0005 ? "<0.1%" : `${(100 * own / all).toFixed(1)}%`, own / all] : ["", 0];
}

// Before as a line, after as filled bars, on one axis.
function histogram(check) {
  const [low, high, before, after] = check.histogram, width = 300, height = 64, step = width / before.length;
  const level = (c) => height - 4 - (c / 63) * (height - 8);
  const bars = [...after].map((c, i) => svg("rect", { class: "after", x: i * step + 0.5, y: level(digit(c)), width: step - 1, height: height - 4 - level(digit(c)) }));
  const line = [...before].map((c, i) => `${i ? "L" : "M"}${(i * step).toFixed(1)} ${level(digit(c)).toFixed(1)}H${((i + 1) * step).toFixed(1)}`).join("");
  return el("figure", { class: "histogram" },
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "histogram before (line) and after (bars)" }, bars, svg("path", { class: "before", d: line }), svg("path", { class: "axis", d: `M0 ${height - 4}H${width}` })),
    el("figcaption", {}, el("span", {}, number(low)), el("span", {}, "▭ before   ▮ after"), el("span", {}, number(high))));
}

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const digit = (character) => DIGITS.indexOf(character);
