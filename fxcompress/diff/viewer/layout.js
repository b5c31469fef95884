"use strict";
// Where everything stands. Each open module is laid out by itself (@dagrejs/dagre 3.1.3), inner ones first, so that no layout is ever large.

const SIZE = { node: 38, region: 46, head: 30, pad: 12, char: 7.3, most: 48 };

// What of a module is shown: [{key, kind, ...}] in order. kind: node, region (closed or open), rest (unchanged nodes), same (blocks like
// another one), part (of a module with too many entries).
function shown(view, path, state) {
  const region = view.tree.get(path);
  const entries = region.entries.filter((e) => e.region !== undefined || isShown(view, e.node, state));
  const folding = state.fold && entries.some((e) => isChanged(view, e)) && !state.unfolded.has(path);
  const items = [];
  let rest = null;
  for (const entry of entries) {
    const first = entry.region !== undefined && !state.unfolded.has("same " + entry.region) ? view.folded.get(entry.region) : undefined;
    if (folding && !isChanged(view, entry) && !isWanted(view, entry, state)) {
      const inputs = entry.node !== undefined && isInput(view.nodes.get(entry.node));
      if (!rest || rest.inputs !== inputs) items.push((rest = { kind: "rest", key: "rest " + keyOf(entry), of: path, inputs, keys: [] }));
      rest.keys.push(keyOf(entry));
    } else if (first !== undefined) {
      const known = items.find((i) => i.kind === "same" && i.first === first);
      if (known) known.keys.push(keyOf(entry));
      else items.push({ kind: "same", key: "same " + first, first, of: path, keys: [keyOf(entry)] });
    } else {
      rest = null;
      items.push(itemOf(entry, state));
    }
  }
  const isPile = (i) => (i.kind !== "rest" && i.kind !== "same") || i.keys.length > 1;
  return parted(items.map((i) => (isPile(i) ? i : single(i.keys[0], state))), path, state);
}

const keyOf = (entry) => (entry.region !== undefined ? "r:" + entry.region : "n:" + entry.node);
const single = (key, state) => itemOf(key[0] === "r" ? { region: key.slice(2) } : { node: key.slice(2) }, state);

function itemOf(entry, state) {
  if (entry.node !== undefined) return { kind: "node", key: keyOf(entry), node: entry.node, keys: [keyOf(entry)] };
  return { kind: "region", key: keyOf(entry), path: entry.region, open: state.open.has(entry.region), keys: [keyOf(entry)] };
}

// Constants are named where they are read. They stand as nodes of their own where they changed or went, and where that is asked for.
function isShown(view, name, state) {
  const node = view.nodes.get(name);
  return !isConstant(node) || (node.state !== "" && node.state !== "added") || state.constants || name === state.node;
}

const isChanged = (view, entry) => (entry.region !== undefined ? STATES.some((s) => view.tree.get(entry.region).counts[s]) : view.nodes.get(entry.node).state !== "");
const isWanted = (view, entry, state) =>
  entry.node !== undefined ? entry.node === state.node : state.open.has(entry.region) && !!state.node && chainOf(view.tree, view.nodes.get(state.node).now.region).includes(entry.region);

// More than SIZE.most items become closed parts of that many; an open part shows its own.
function parted(items, path, state) {
  if (items.length <= SIZE.most * 1.5) return items;
  const made = [];
  for (let start = 0; start < items.length; start += SIZE.most) {
    const inside = items.slice(start, start + SIZE.most), key = `part ${path} ${start}`;
    const wanted = inside.some((i) => i.node !== undefined && i.node === state.node);
    if (state.open.has(key) || wanted) made.push(...inside);
    else made.push({ kind: "part", key, inside, of: path, keys: inside.flatMap((i) => i.keys) });
  }
  return made;
}

function layout(view, path, state) {
  const items = shown(view, path, state);
  const owner = new Map();
  for (const item of items) {
    measure(view, item, state);
    for (const key of item.keys) owner.set(key, item.key);
  }
  const edges = new Map();
  for (const edge of view.tree.get(path).edges.values()) {
    const from = owner.get(edge.from), to = owner.get(edge.to);
    if (from === undefined || to === undefined || from === to) continue;
    const key = from + "\n" + to, known = edges.get(key);
    edges.set(key, { from, to, state: known && known.state !== edge.state ? "" : edge.state });
  }
  return placed(items, [...edges.values()]);
}

function measure(view, item, state) {
  if (item.kind === "region" && item.open) {
    item.inner = layout(view, item.path, state);
    const region = view.tree.get(item.path);
    const head = (localName(item.path, region.parent).length + region.kind.length + 6) * SIZE.char;
    item.w = Math.max(item.inner.w + 2 * SIZE.pad, head);
    item.h = item.inner.h + SIZE.head + SIZE.pad;
    return;
  }
  const lines = label(view, item);
  const marks = item.kind === "node" ? 24 : countsOf(view, item.keys).reduce((sum, [words]) => sum + words.length * 8 + 8, 12);
  const figure = state.overlay === "none" ? 0 : 68;
  item.lines = lines;
  item.w = Math.max(92, 26 + Math.max(lines[0].length * SIZE.char + marks + (item.kind === "region" || item.kind === "part" ? 16 : 0), lines[1].length * SIZE.char * 0.88 + (item.kind === "node" ? 8 : 0) + figure));
  item.h = item.kind === "region" || item.kind === "same" || item.kind === "part" ? SIZE.region : item.kind === "rest" ? 26 : SIZE.node + (figure ? 3 : 0);  // room for the bar
}

// ["+12", "added"] and so on, of all that an item stands for.
function countsOf(view, keys) {
  const of = (key, s) => (key[0] === "r" ? view.tree.get(key.slice(2)).counts[s] || 0 : Number(view.nodes.get(key.slice(2)).state === s));
  const counts = STATES.map((s) => [keys.reduce((sum, key) => sum + of(key, s), 0), s]);
  return counts.filter(([count]) => count).map(([count, s]) => [SIGN[s] + count, s]);
}

// The two lines on a closed item.
function label(view, item) {
  if (item.kind === "node") {
    const node = view.nodes.get(item.node);
    return [cut(isConstant(node) ? node.now.attributes.split(".").slice(-2).join(".") : shortOp(node.now.op)), cut(isConstant(node) ? node.now.shape : item.node)];
  }
  if (item.kind === "rest") return [`${sizeOf(view, item.keys)} ${item.inputs ? "inputs" : "unchanged"}`, ""];
  if (item.kind === "part") return [`${sizeOf(view, item.keys)} nodes`, `from ${cut(item.keys[0].slice(2))}`];
  if (item.kind === "same") return [`${item.keys.length} blocks as ${cut(item.first)}`, cut(blockNames(item.keys))];
  const region = view.tree.get(item.path);
  return [cut(localName(item.path, region.parent)), `${cut(region.kind || "module")} · ${region.size}`];
}

const cut = (words, most = 34) => {
  const seen = visible(words);
  return seen.length > most ? seen.slice(0, most - 1) + "…" : seen;
};
const sizeOf = (view, keys) => keys.reduce((sum, key) => sum + (key[0] === "r" ? view.tree.get(key.slice(2)).size : 1), 0);

// "layers.1–29", "0, 2".
function blockNames(keys) {
  const numbers = keys.map((key) => Number(key.match(/(\d+)$/)[1]));
  const runs = [];
  for (const n of numbers) {
    const last = runs[runs.length - 1];
    if (last && last[1] === n - 1) last[1] = n;
    else runs.push([n, n]);
  }
  const stem = keys[0].slice(2).replace(/\d+$/, "").split(".").slice(-2).join(".");
  return stem + runs.map(([a, b]) => (a === b ? a : `${a}–${b}`)).join(", ");
}

function placed(items, edges) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 26, marginx: 2, marginy: 4 });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const item of items) graph.setNode(item.key, { width: item.w, height: item.h });
  for (const edge of edges) graph.setEdge(edge.from, edge.to);
  if (items.length) dagre.layout(graph);
  for (const item of items) {
    const at = graph.node(item.key);
    item.x = at.x - item.w / 2;
    item.y = at.y - item.h / 2;
  }
  const byKey = new Map(items.map((item) => [item.key, item])), tallest = new Map();  // half of the tallest of each row, by where its middle is
  for (const { y, h } of items) tallest.set(Math.round(y + h / 2), Math.max(h / 2, tallest.get(Math.round(y + h / 2)) ?? 0));
  for (const edge of edges) edge.points = upright(graph.edge(edge.from, edge.to).points, byKey.get(edge.from), byKey.get(edge.to), tallest);
  return { items, edges, ...framed(items, edges) };
}

// An edge runs straight down beside the boxes of a row that it passes, comes from or goes to, however tall they are.
function upright(points, from, to, tallest) {
  const half = (y) => tallest.get(Math.round(y)) ?? 0, down = from.y + from.h / 2 <= to.y + to.h / 2 ? 1 : -1;  // up where order changed
  const inner = points.slice(1, -1).flatMap(({ x, y }) => (half(y) ? [{ x, y: y - down * half(y) }, { x, y: y + down * half(y) }] : [{ x, y }]));
  return [...ending(points[0], from, down, half), ...inner, ...ending(points[points.length - 1], to, -down, half).reverse()];
}

// The end below a box (way 1) or above it (-1), and where it comes out of its row, if others there are taller.
function ending(point, box, way, half) {
  const middle = box.y + box.h / 2, row = half(middle), x = Math.min(box.x + box.w - 8, Math.max(box.x + 8, point.x));
  const end = { x, y: middle + way * box.h / 2 };
  return row > box.h / 2 ? [end, { x, y: middle + way * row }] : [end];
}

// Edges may swing out further than any box: all is moved to start at 0.
function framed(items, edges) {
  const points = edges.flatMap((e) => e.points);
  const all = (k, size) => [...items.flatMap((i) => [i[k], i[k] + i[size]]), ...points.map((p) => p[k])];
  const [left, right] = [Math.min(...all("x", "w")), Math.max(...all("x", "w"))];
  if (!items.length) return { w: 60, h: 10 };
  for (const at of [...items, ...points]) at.x -= left;
  return { w: right - left, h: Math.max(...all("y", "h")) };
}
