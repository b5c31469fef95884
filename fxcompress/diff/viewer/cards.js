"use strict";
// What stands beside the graph: the pass, or the node or module that is chosen; and the first page, the table of passes.

function passTable(go) {
  const head = ["", "pass", "contract", "sites", "declined", "measured", "output", "weights", "operations", "nodes", "CPU"];
  const whole = views.find((v) => v.pass === null);
  const table = el("table", { class: "passes" },
    el("thead", {}, el("tr", {}, head.map((h, i) => el("th", { scope: "col", class: i > 2 ? "right" : "" }, h)))),
    el("tbody", {}, passes.map((pass, index) => passRow(pass, index, go))));
  const words = data.single ? "Show the graph" : passes.length ? "Show all passes as one diff" : "Show the diff";
  return el("div", { class: "scroll" }, passes.length ? table : "", el("p", {}, el("button", { class: "primary", onclick: () => go({ view: whole.index }) }, words)));
}

function passRow(pass, index, go) {
  const view = views.find((v) => v.pass === index);
  const [verdict, figure] = measured(pass);
  const cells = [
    index + 1,
    view ? linkTo(view, {}, pass.name, go) : pass.name,
    pass.contract,
    pass.fired === pass.legal ? pass.fired : `${pass.fired} of ${pass.legal}`,
    pass.declined.length,
    [el("span", { class: `verdict ${verdict}` }, wrapped(figure)), view ? worstPlace(view, pass, go) : ""],
    pass.output_sqnr === null ? "" : `${pass.output_sqnr.toFixed(1)} dB`,
    change(pass.stored, "B"),
    change(pass.flops, ""),
    pass.nodes[0] === pass.nodes[1] ? String(pass.nodes[0]) : `${pass.nodes[0]} → ${pass.nodes[1]}`,
    `${pass.cpu.toFixed(pass.cpu < 10 ? 2 : 1)} s`,
  ];
  const row = el("tr", { class: view ? "link" : "" }, cells.map((c, i) => el("td", { class: i > 2 ? "right" : "" }, String(c) === "0" && i === 4 ? "–" : typeof c === "string" ? wrapped(c) : c)));
  if (view) row.addEventListener("click", (event) => { if (!event.target.closest("a")) go({ view: view.index }); });
  return row;
}

function change([before, after], unit) {
  const words = changeOf(before, after, unit);
  return before === after ? el("span", { class: "quiet" }, words) : words;
}

// Figures that a narrow column may break before a sign or a parenthesis, and nowhere else.
const wrapped = (words) => words.split(/ (?=[≤≥→(])/).map((part, i) => [i ? " " : "", el("span", { class: "whole" }, part)]);

const ON_PURPOSE = "changed on purpose, not measured";

// [verdict, "2.6e-6 ≤ 1e-4"]: the worst measured figure. What has no limit can't fail, so it has no verdict.
function measured(pass) {
  if (pass.worst === null) return ["none", pass.fired ? (pass.checks.length ? ON_PURPOSE : "not measured") : "–"];
  return [verdictOf(pass.worst), figureOf(pass.worst, pass.unit)];
}

const verdictOf = (check) => (check.limit === null && check.verdict === "held" ? "none" : check.verdict);

// Where the worst figure was measured; nowhere in particular where all are equal.
function worstPlace(view, pass, go) {
  if (pass.worst === null || figureOf(pass.worst, pass.unit) === "equal") return "";
  const name = text(pass.worst.value), words = cut(name, 22);
  return el("div", { class: "at", title: name }, "at ", pass.worst.is_node ? linkTo(view, { node: name }, words, go) : words);
}

function figureOf(check, unit) {
  if (unit === "dB" && check.unmeasured) return ON_PURPOSE;
  if (check.figure === (unit === "dB" ? null : 0)) return "equal";
  if (check.figure === null) return "not comparable";
  const sign = unit === "dB" ? "≥" : "≤", ends = unit === "dB" ? " dB" : "";
  return `${number(check.figure)}${ends}` + (check.limit === null ? "" : ` ${sign} ${number(check.limit)}${ends}`);
}

// Operations with the sizes that they are counted at.
const atSizes = (words) => [words, data.sizes ? [" ", el("small", {}, data.sizes)] : ""];

function tiles() {
  return el("ul", { class: "tiles" }, data.tiles.map(([name, value, note]) => el("li", {}, el("span", { class: "label" }, name), el("strong", {}, wrapped(value)), el("span", { class: "note" }, note))));
}

// Columns of figures stand to the right, words to the left; where rows have names, all their columns alike.
function facts() {
  const isFigures = (rows, i) => i > 0 && rows.every((row) => /^([\d<–+−-].{0,24})?$/.test(row[i]));
  return data.tables.map(({ title, head, rows }) => {
    const named = head[0] === "" && !head.every((_, i) => i === 0 || isFigures(rows, i));
    const kinds = head.map((_, i) => (!named && isFigures(rows, i) ? "right" : rows.every((row) => row[i].length < 28) ? "short" : ""));
    const line = (cells, tag) => el("tr", {}, cells.map((c, i) => el(tag, { class: kinds[i], scope: tag === "th" ? "col" : null }, c)));
    return el("section", {}, el("h2", {}, title),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, line(head, "th")), el("tbody", {}, rows.map((row) => line(row, "td"))))));
  });
}

// The card of a view: what the pass did, where, and what it left alone.
function viewCard(view, go) {
  if (data.single) return moduleCard(view, "", go);
  const pass = view.pass === null ? null : passes[view.pass];
  const counts = view.tree.get("").counts;
  const parts = [el("h2", {}, view.name), el("p", { class: "chips" }, Object.keys(counts).length ? chips(counts) : "nothing changed in the graph")];
  if (!pass) parts.push(rows(data.tiles.map(([name, value, note]) => [name[0].toLowerCase() + name.slice(1), [value, " ", el("small", {}, note)]])));
  if (pass) {
    const [verdict, figure] = measured(pass);
    parts.push(rows([
      ["contract", pass.contract], ["measured", [el("span", { class: `verdict ${verdict}` }, figure + (pass.unit === "dB" || figure === "equal" || pass.worst === null ? "" : " relative error")), worstPlace(view, pass, go)]],
      pass.output_sqnr !== null && ["output SQNR", `${pass.output_sqnr.toFixed(1)} dB`],
      ["sites", `${pass.fired} of ${pass.legal}`], ["weights", change(pass.stored, "B")], ["operations", atSizes(change(pass.flops, ""))], ["CPU time", `${pass.cpu} s`]]));
    parts.push(...pass.notes.map((n) => el("p", { class: "noted" }, n)));
  }
  if (data.renamed.length) parts.push(more(`${data.renamed.length} renamed modules`, data.renamed.map(text), (path) => el("span", {}, moduleLink(view, path, go), " there ", broken(was.get(path)))));
  parts.push(...changedList(view, go));
  if (pass && pass.declined.length) parts.push(declinedList(view, pass, go));
  if (pass && Object.keys(pass.options).length) parts.push(el("h3", {}, "options"), rows(Object.entries(pass.options).map(([k, v]) => [k, el("code", {}, JSON.stringify(v))])));
  return parts;
}

function changedList(view, go) {
  const names = [...view.nodes.values()].filter((n) => n.state).map((n) => n.name);
  if (!names.length) return [];
  return [more(`${names.length} changed nodes`, names, (name) => nodeLink(view, name, go))];
}

function declinedList(view, pass, go) {
  const item = (d) => el("li", {}, view.nodes.has(text(d.site)) ? nodeLink(view, text(d.site), go) : el("b", {}, text(d.site)), el("p", {}, text(d.reason)));
  return el("details", { open: pass.declined.length < 20 }, el("summary", {}, `${pass.declined.length} declined`), el("ul", { class: "declined" }, pass.declined.slice(0, 300).map(item)));
}

// A list that grows when asked, so that thousands cost nothing.
function more(title, items, one) {
  const list = el("ul", { class: "names" });
  let count = 0;
  const button = el("button", { onclick: () => grow(100) });
  const grow = (by) => {
    list.append(...items.slice(count, count + by).map((i) => el("li", {}, one(i))));
    count = Math.min(items.length, count + by);
    button.textContent = `${items.length - count} more`;
    button.hidden = count === items.length;
  };
  grow(40);
  return el("details", {}, el("summary", {}, title), list, button);
}

function nodeLink(view, name, go) {
  const node = view.nodes.get(name);
  const state = node ? node.state : "";
  const link = linkTo(view, { node: name }, broken(name), go);
  return state ? [el("span", { class: `chip ${state}`, title: state }, SIGN[state]), link] : link;
}

function rows(pairs) {
  return el("dl", {}, pairs.filter(Boolean).filter(([, v]) => v !== "" && v !== null).map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
}

function nodeCard(view, name, go) {
  const node = view.nodes.get(name), now = node.now;
  const parts = [
    el("h2", {}, shortOp(now.op) + " ", el("small", {}, broken(name))),
    node.state ? el("p", { class: "chips" }, el("span", { class: `chip ${node.state}` }, `${SIGN[node.state]} ${node.state}`)) : "",
    rows([
      was.has(name) && ["named there", was.get(name)],
      ["op", el("code", {}, now.op)],
      ["module", now.region ? moduleLink(view, now.region, go) : "root"],
      was.has(now.region) && ["module there", was.get(now.region)],
      ["value", valueOf(node)],
      [isConstant(node) ? "constant" : "arguments", el("code", {}, broken(argumentsOf(now)))],
      node.old && node.new && argumentsOf(node.old) !== argumentsOf(now) && ["were", el("code", {}, argumentsOf(node.old))],
      node.state === "moved" && ["was in", node.old.region || "root"],
      now.source && ["source", el("code", {}, now.source)],
      ["operations", now.flops ? atSizes(quantity(now.flops, "")) : ""], ["stored", now.stored ? quantity(now.stored, "B") : ""],
      view.pass !== null && passes[view.pass].moved.has(name) && ["moved by", `${number(100 * passes[view.pass].moved.get(name))}%`],
      (sqnr.has(name) || sqnrThere.has(name)) && ["loss at the end", [...(sqnrThere.size ? [endLoss(sqnrThere, name)] : []), endLoss(sqnr, name)].join(" → ")],
    ]),
    statistics(node),
    links("reads", now.inputs, view, go), links("read by", [...new Set(view.readers.get(name) || [])], view, go),
    ...journal(view, node, go),
  ];
  return parts;
}

const endLoss = (losses, name) => (!losses.has(name) ? "–" : losses.get(name) === null ? "none" : `${losses.get(name).toFixed(1)} dB`);
const argumentsOf = (node) => {
  let next = 0;
  return node.attributes.replace(/%/g, () => node.inputs[next++] ?? "%");
};
const valueOf = (node) => (node.old && node.new && node.old.shape !== node.new.shape ? `${node.old.shape} → ${node.new.shape}` : node.now.shape);

function statistics(node) {
  const columns = [["before", node.old], ["after", node.new]].filter(([, n]) => n && n.statistics.length);
  if (!columns.length) return "";
  const names = ["least", "greatest", "mean", "deviation"];
  return el("table", { class: "statistics" }, el("thead", {}, el("tr", {}, el("th", {}, ""), columns.map(([k]) => el("th", { class: "right", scope: "col" }, k)))),
    el("tbody", {}, names.map((n, i) => el("tr", {}, el("td", {}, n), columns.map(([, c]) => el("td", { class: "right" }, number(c.statistics[i], 4)))))));
}

function links(title, names, view, go) {
  const known = names.filter((n) => view.nodes.has(n));
  if (!known.length) return "";
  return el("div", { class: "links" }, el("h3", {}, title), el("ul", { class: "names" }, known.slice(0, 30).map((n) => el("li", {}, nodeLink(view, n, go))), known.length > 30 ? el("li", {}, `and ${known.length - 30} more`) : ""));
}

// What passes did here and why, what was measured, what they declined; each with the line that leaves the place out of the recipe.
function journal(view, node, go) {
  const parts = [];
  for (const [index, site] of sitesOf.get(node.name) || []) {
    parts.push(el("li", {}, passLink(index, go), " ", text(site.reason) || "touched it", checksFor(index, node, site), exclusion(passes[index], site.exclude)));
  }
  for (const [index, site] of sweptBy.get(node.name) || [])
    parts.push(el("li", {}, passLink(index, go), " removed it, since nothing reads it after this: ", text(site.reason), exclusion(passes[index], site.exclude)));
  for (const [kind, words] of [["declined", " declined: "], ["excluded", " not here: "]])
    for (const [index, left] of leftAt(node, kind)) parts.push(el("li", { class: "declined" }, passLink(index, go), words, text(left.reason)));
  for (const [side, pass, site] of inSides("sites", (s) => s.names.includes(node.name)))
    parts.push(el("li", {}, el("b", {}, side.name), ` ${pass.name}: ${site.reason || "touched it"}`, site.figure ? el("p", {}, `${site.figure}`) : "", exclusion(pass, site.exclude)));
  for (const [side, pass, left] of inSides("left", (l) => isAt(node, l.site, l.module)))
    parts.push(el("li", { class: "declined" }, el("b", {}, side.name), ` ${pass.name} ${left.reason}`));
  return whatPassesDid(parts);
}

// Rows, and what is to be known of the exclusions among them.
function whatPassesDid(rows) {
  const offers = rows.some((row) => row.querySelector(".exclusion"));
  return rows.length ? [el("h3", {}, data.single ? "what recipes would do here" : "what passes did here"), el("ul", { class: "history" }, rows), offers ? el("p", { class: "why" }, BESIDES) : ""] : [];
}

const BESIDES = "Exclusions: what shares a value or a weight with a place that is left out goes with it.";

const passLink = (index, go) => linkTo(views.find((v) => v.pass === index), {}, passes[index].label, go);

// A link to another place of the page, which keeps the overlay and the sides; its address is for other tabs.
function linkTo(view, place, words, go) {
  const link = el("a", { href: address({ view, ...place }) }, words);
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go({ view: view.index, ...place });
  });
  return link;
}

function checksFor(index, node, site) {
  const own = passes[index].checks.filter((c) => c.site === site.index);
  const isQuiet = (c) => c.verdict === "held" && !c.histogram && (c.unmeasured || !c.figure);
  const quiet = [false, true].map((unmeasured) => own.filter((c) => isQuiet(c) && c.unmeasured === unmeasured)), rest = own.filter((c) => !isQuiet(c));
  const unit = passes[index].unit, seen = (check) => (check.unmeasured && unit === "dB" && check.verdict === "held" ? "none" : verdictOf(check));
  const line = (check, place) => el("div", { class: "check" },
    el("span", { class: `verdict ${seen(check)}` }, figureOf(check, unit) + (seen(check) === "none" ? "" : ` ${check.verdict}`)), " at ", broken(place), check.why ? el("p", {}, check.why) : "",
    check.histogram ? histogram(check) : "");
  const alike = (same) => (same.length ? line(same[0], same.length > 1 ? `${same.length} values` : text(same[0].value)) : "");
  const first = (c) => (text(c.value) === node.name ? 0 : 1);
  rest.sort((a, b) => first(a) - first(b));
  const all = (checks) => checks.map((c) => line(c, text(c.value)));
  const hidden = rest.length > MOST + 1 ? rest.splice(MOST) : [];
  return [...all(rest), ...quiet.map(alike), hidden.length ? opening(`${hidden.length} more checks`, () => all(hidden)) : ""];
}

const MOST = 5;  // checks with a histogram that a card shows at once

// Something that is made when it is opened for the first time.
function opening(title, make) {
  const details = el("details", {}, el("summary", {}, title));
  details.addEventListener("toggle", () => details.append(...make()), { once: true });
  return details;
}

// The pass with its options and one place left out, by the globs that do so; or why that can't be.
function exclusion(pass, globs) {
  if (pass.whole) return el("p", { class: "why" }, `Can't be left out alone: ${pass.whole}.`);
  if (!globs.length) return el("p", { class: "why" }, "Can't be left out alone: a recipe has no name that means this place and no other.");
  const asked = pass.options.where || {};
  const where = { ...asked, exclude: [...(asked.exclude || []), ...globs] };
  const line = `- ${pass.name}: ${flow({ ...pass.options, where })}`;
  const button = el("button", { class: "copy", title: line }, "copy as recipe exclusion");
  button.addEventListener("click", async () => {
    await copy(line);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy as recipe exclusion"; }, 1500);
  });
  return el("div", { class: "exclusion" }, el("code", {}, line), button);
}

// Plain data as YAML in one line, its texts quoted.
function flow(value) {
  if (Array.isArray(value)) return `[${value.map(flow).join(", ")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([key, inner]) => `${key}: ${flow(inner)}`).join(", ")}}`;
}

// The clipboard interface is refused in some file:// settings; a selected text field isn't.
async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    const field = el("textarea", {});
    field.value = words;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

const moduleLink = (view, path, go) => linkTo(view, { region: path }, broken(path), go);

function moduleCard(view, path, go) {
  const region = view.tree.get(path), loss = lossIn(view, path), all = view.tree.get("").flops;
  const place = rows([
    was.has(path) && ["named there", was.get(path)],
    ["class", region.kind], ["nodes", String(region.size)],
    ["operations", region.flops ? atSizes(`${quantity(region.flops, "")} (${(100 * region.flops / all).toFixed(1)}%)`) : ""],
    ["weights", region.stored ? quantity(region.stored, "B") : ""],
    Object.hasOwn(data.formulas, path) && ["formula", el("code", {}, data.formulas[path])],
    Number.isFinite(loss) && ["worst loss", `${loss.toFixed(1)} dB`]]);
  const same = [...view.folded].filter(([, first]) => first === path).map(([other]) => other);
  const within = (module) => path === "" || module === path || module.startsWith(path + ".");
  const done = (pass, by, sites, left, own = path) => !sites.length && !left.length ? "" : el("li", {}, by,
    sites.length ? ` ${data.single ? "would change" : "changed"} ${counted(sites.length, "site")}` : "", sites.length && path ? exclusion(pass, sites.every((s) => s.exclude.length) ? [own.replace(/[[*?]/g, "[$&]")] : []) : "",
    left.length ? more(`${data.single ? "would leave" : "left"} ${counted(left.length, "place")} alone`, left, ([name, why]) => el("span", {}, view.nodes.has(name) ? nodeLink(view, name, go) : el("b", {}, name), " ", why)) : "");
  const leftBy = (pass) => [["declined", "declined: "], ["excluded", "not here: "]].flatMap(([kind, words]) =>
    pass[kind].filter((l) => within(text(l.module))).map((l) => [text(l.site), words + text(l.reason)]));
  const rowsOf = [
    ...sides.flatMap((side, number) => side.passes.map((pass) => done(pass, [el("b", {}, side.name), ` ${pass.name}`], pass.sites.filter((s) => within(s.module)), pass.left.filter((l) => within(l.module)).map((l) => [l.site, l.reason]), (number && was.get(path)) || path))),
    ...passes.map((pass, index) => done(pass, passLink(index, go), pass.sites.filter((s) => within(text(s.module))), leftBy(pass))),
  ].filter((row) => row !== "");
  return [
    el("h2", {}, path || data.root), el("p", { class: "chips" }, chips(region.counts)), place,
    same.length ? el("p", {}, `The same in ${counted(same.length, "other block")}: ${blockNames(same.map((other) => "r:" + other))}`) : "",
    ...whatPassesDid(rowsOf),
  ];
}

const counted = (count, words) => `${count} ${words}${count === 1 ? "" : "s"}`;
