"use strict";
// The data of the page as objects: nodes, graphs, and views, which are two graphs laid over each other.

const data = JSON.parse(document.getElementById("data").textContent);
const text = (index) => data.texts[index];

// A node's row without the last fields that are 0 or empty; of a later version only the fields that differ, by place, and "of" which.
const rowsOfNodes = [];
for (const row of data.nodes)
  rowsOfNodes.push(Array.isArray(row) ? row : Array.from({ length: 11 }, (_, i) => row[i] ?? rowsOfNodes[row.of][i]));

// A constant's name may stand behind a dot, as it is in its module.
const told = (op, attributes, region) => (op === "constant" && attributes.startsWith(".") ? region + attributes : attributes);

const versions = rowsOfNodes.map(
  ([name, op, inputs, attributes, region, shape, source, flops = 0, stored = 0, statistics = [], revision = 0]) => ({
    name: text(name), op: text(op), inputs: inputs.map(text), attributes: told(text(op), text(attributes), text(region)), region: text(region),
    shape: text(shape), source: text(source), flops, stored, statistics, revision,
  }));

// Per graph the order of its node versions, made from the one before; and its modules, [path, class, parent] each.
const orders = [];
const regionRows = [];
for (let index = 0; index < data.steps.length; index++) {
  orders.push(applied(orders[index - 1] || [], data.steps[index]));
  regionRows.push(data.regions[index] || regionRows[index - 1]);
}

// Places and versions are written as steps from the one before.
function applied(old, step) {
  const dropped = new Set();
  let place = 0, version = 0, next = 0;
  for (const gap of step.drop) dropped.add((place += gap));
  const kept = old.filter((_, at) => !dropped.has(at)), made = [];
  place = 0;
  for (let i = 0; i < step.put.length; i += 2) {
    place += step.put[i];
    version += step.put[i + 1];
    while (made.length < place) made.push(kept[next++]);
    made.push(version);
  }
  return made.concat(kept.slice(next));
}

const graphs = new Map();
function graphAt(index) {
  if (!graphs.has(index)) graphs.set(index, new Map(orders[index].map((v) => [versions[v].name, versions[v]])));
  return graphs.get(index);
}

const sqnr = new Map(data.sqnr.map(([name, figure]) => [text(name), figure]));
const sqnrThere = new Map(data.sqnr_there.map(([name, figure]) => [text(name), figure]));  // of the first, where two are compared
const was = new Map(data.was.map(([name, other]) => [text(name), text(other)]));
const now = new Map([...was].map(([name, other]) => [other, name]));
const VERDICTS = ["held", "broken", "unverified"];
const passes = data.passes.map((pass) => ({
  ...pass,
  declined: pass.declined.map(([site, module, reason]) => ({ site, module, reason })),
  excluded: pass.excluded.map(([site, module, reason]) => ({ site, module, reason })),
  moved: new Map(pass.moved.map(([name, by]) => [text(name), by])),
  sites: pass.sites.map(([node, module, reason, exclude, ...names], index) =>
    ({ index, node, module, reason, exclude: exclude === 0 ? [text(module)] : exclude.map(text), names })),
  checks: pass.checks.map(([site, value, figure, limit, verdict, why, unmeasured, ...histogram]) => ({
    site, value, figure, limit, unmeasured: !!unmeasured, verdict: VERDICTS[verdict], why: text(why), histogram: histogram.length ? histogram : null })),
}));
const views = data.views.map((view, index) => ({ ...view, index }));
const STATES = ["added", "removed", "changed", "moved"];

// A view's nodes, in the order of the graph after, and its modules as a tree. Made once, at first sight.
function opened(view) {
  if (view.nodes) return view;
  const before = graphAt(view.before), after = graphAt(view.after);
  view.nodes = merged(before, after);
  for (const name of view.changed) view.nodes.get(text(name)).state = "changed";
  for (const name of view.moved) view.nodes.get(text(name)).state = "moved";
  view.folded = new Map(view.alike.flatMap(([first, ...paths]) => paths.map((path) => [text(path), text(first)])));
  view.tree = treeOf(view);
  connect(view);
  return view;
}

function merged(before, after) {
  const nodes = new Map();
  const add = (name, old, node) => nodes.set(name, { name, old, new: node, now: node || old, state: !old ? "added" : !node ? "removed" : "" });
  const waiting = new Map();
  let gone = [];
  for (const name of before.keys()) {
    if (!after.has(name)) gone.push(name);
    else { waiting.set(name, gone); gone = []; }
  }
  for (const [name, node] of after) {
    for (const removed of waiting.get(name) || []) add(removed, before.get(removed), undefined);
    add(name, before.get(name), node);
  }
  for (const removed of gone) add(removed, before.get(removed), undefined);
  return nodes;
}

function treeOf(view) {
  const tree = new Map();
  for (const [path, kind, parent] of regionRows[view.before].concat(regionRows[view.after]))
    if (!tree.has(text(path)))
      tree.set(text(path), { path: text(path), kind: text(kind), parent: text(path) ? text(parent) : null,
        entries: [], edges: new Map(), counts: {}, size: 0, flops: 0, stored: 0, loss: null });
  // A module stands where its first op runs: its constants stand at the head of the graph and say nothing about that.
  const seen = new Set([""]), all = [...view.nodes.values()];
  const place = (node) => {
    const chain = chainOf(tree, node.now.region);
    for (let i = 1; i < chain.length; i++)
      if (!seen.has(chain[i])) { seen.add(chain[i]); tree.get(chain[i - 1]).entries.push({ region: chain[i] }); }
    tree.get(node.now.region).entries.push({ node: node.name });
    for (const path of chain) count(tree.get(path), node);
  };
  const first = all.filter((n) => isConstant(n) && !n.now.region);
  for (const node of [...first, ...all.filter((n) => !isConstant(n)), ...all.filter((n) => isConstant(n) && n.now.region)]) place(node);
  return tree;
}

function count(region, node) {
  region.size++;
  if (node.state) region.counts[node.state] = (region.counts[node.state] || 0) + 1;
  if (!node.new) return;
  region.flops += node.new.flops;
  region.stored += node.new.stored;
}

// The modules a path is in, outermost first, with itself.
function chainOf(tree, path) {
  const chain = [];
  for (let at = path; at !== null && at !== undefined; at = tree.get(at).parent) chain.unshift(at);
  return chain;
}

// Readers of every node; and per module the edges between its own entries.
function connect(view) {
  view.readers = new Map();
  const chains = new Map();
  const chain = (name) => {
    if (!chains.has(name)) chains.set(name, [...chainOf(view.tree, view.nodes.get(name).now.region).map((p) => "r:" + p), "n:" + name]);
    return chains.get(name);
  };
  const join = (from, to, state) => {
    const a = chain(from), b = chain(to);
    let depth = 0;
    while (a[depth + 1] === b[depth + 1] && depth + 1 < a.length && depth + 1 < b.length) depth++;
    if (a[depth + 1] === undefined || b[depth + 1] === undefined) return;
    const edges = view.tree.get(a[depth].slice(2)).edges, key = a[depth + 1] + "\n" + b[depth + 1];
    const known = edges.get(key);
    edges.set(key, { from: a[depth + 1], to: b[depth + 1], state: known && known.state !== state ? "" : state });
  };
  for (const node of view.nodes.values()) {
    const olds = node.old ? node.old.inputs : [], news = node.new ? node.new.inputs : [];
    for (const input of new Set([...olds, ...news])) {
      const was = node.old && olds.includes(input), is = node.new && news.includes(input);
      join(input, node.name, was && is ? "" : is ? "added" : "removed");
      listAt(view.readers, input).push(node.name);
    }
  }
}

// What the passes did at a node: [pass, site] each; after which it went because nothing read it any more; and what was measured there.
const sitesOf = new Map();
const sweptBy = new Map();
const checksOf = new Map();
for (const [index, pass] of passes.entries()) {
  for (const site of pass.sites)
    for (const name of new Set([site.node, ...site.names])) listAt(sitesOf, text(name)).push([index, site]);
  for (const [name, ...sites] of pass.swept) for (const site of sites) listAt(sweptBy, text(name)).push([index, pass.sites[site]]);
  for (const check of pass.checks) listAt(checksOf, text(check.value)).push([index, check]);
}

// The same of the sides of a comparison, which only say it: [side, pass, site] and [side, pass, place left alone].
const sides = data.sides.map(({ name, passes }) => ({ name, passes: passes.map((pass) => ({ ...pass,
  sites: pass.sites.map(([module, reason, figure, exclude, ...names]) => ({ module: text(module), reason: text(reason), figure: text(figure), exclude: exclude.map(text), names: names.map(text) })),
  left: pass.left.map(([site, module, reason]) => ({ site: text(site), module: text(module), reason: text(reason) })) })) }));
const inSides = (kind, fits) => sides.flatMap((side) => side.passes.flatMap((pass) => pass[kind].filter(fits).map((found) => [side, pass, found])));

function listAt(map, key) {
  if (!map.has(key)) map.set(key, []);
  return map.get(key);
}

// kind: "declined" by a pass, or "excluded" by the recipe.
function leftAt(node, kind) {
  const found = [];
  for (const [index, pass] of passes.entries())
    for (const left of pass[kind])
      if (isAt(node, text(left.site), text(left.module)))
        found.push([index, left]);
  return found;
}

const isAt = (node, site, module) => site === node.name || (module === node.now.region && node.now.region !== "" && isMain(node));
const isMain = (node) => node.now.op !== "constant" && node.now.op !== "input";
const isInput = (node) => node.now.op === "input";
const isConstant = (node) => node.now.op === "constant";
const shortOp = (op) => op.replace(/^aten\./, "").replace(/\.default$/, "");
const localName = (path, parent) => (parent && path.startsWith(parent + ".") ? path.slice(parent.length + 1) : path) || data.root;

// The loss at a node, in dB: in a pass's view what the pass's contract measured there, else how far the value is from the captured one's.
function lossAt(view, node) {
  if (view.pass !== null) {
    const own = (checksOf.get(node.name) || []).filter(([pass, check]) => pass === view.pass && !check.unmeasured && check.figure !== null);
    return own.length && passes[view.pass].unit === "dB" ? Math.min(...own.map(([, check]) => check.figure)) : null;
  }
  return sqnr.get(node.name) ?? null;
}

function lossIn(view, path) {
  const region = view.tree.get(path);
  if (region.loss === null) {
    const figures = region.entries.map((e) => (e.region !== undefined ? lossIn(view, e.region) : lossAt(view, view.nodes.get(e.node)) ?? Infinity));
    region.loss = Math.min(Infinity, ...figures);
  }
  return region.loss;
}

function quantity(value, unit, digits = 3) {
  let size = value, prefix = "";
  for (const next of ["k", "M", "G", "T"]) {
    if (Math.abs(size) < 1000) break;
    size /= 1000;
    prefix = next;
  }
  return `${digits === 3 ? Number(size.toPrecision(3)) : size.toPrecision(digits)} ${prefix}${unit}`.trim();
}

// Two figures in four digits where three don't tell them apart; what four don't either is told by the difference.
function changeOf(before, after, unit) {
  for (const digits of [3, 4]) {
    const [a, b] = [quantity(before, unit, digits), quantity(after, unit, digits)];
    if (before === after) return a;
    if (a !== b) return `${a} → ${b}`;
  }
  return `${quantity(before, unit)} → ${quantity(after, unit)} (${after > before ? "+" : "−"}${quantity(Math.abs(after - before), unit)})`;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return (size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1).replace(/\.0e/, "e").replace("+", "") : String(Number(value.toPrecision(digits)))).replace(/-/g, "−");
}
