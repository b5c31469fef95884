"use strict";
// The page: what is chosen, the address that says so, the keyboard.

const state = { view: null, node: null, region: null, split: false, overlay: "none", fold: true, constants: false, zoom: 1, open: new Set([""]), unfolded: new Set() };
const $ = (id) => document.getElementById(id);

function start() {
  $("title").textContent = $("title").title = visible(data.title);
  $("overview").append(tiles(), passTable(go), ...facts());
  for (const view of views) $("choice").append(el("option", { value: view.index }, view.pass === null ? view.name : `${view.pass + 1}  ${view.name}`));
  controls();
  addEventListener("hashchange", follow);
  addEventListener("keydown", keys);
  follow();
}

function controls() {
  $("home").addEventListener("click", () => { location.hash = ""; });
  $("choice").addEventListener("change", (event) => go({ view: Number(event.target.value) }));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("split").addEventListener("change", (event) => set({ split: event.target.checked }));
  $("overlay").addEventListener("change", (event) => set({ overlay: event.target.value }));
  $("fold").addEventListener("change", (event) => set({ fold: event.target.checked }));
  $("constants").addEventListener("change", (event) => set({ constants: event.target.checked }));
  $("larger").addEventListener("click", () => zoom(1.25));
  $("smaller").addEventListener("click", () => zoom(0.8));
  $("search").addEventListener("input", search);
  $("search").addEventListener("keydown", (event) => { if (event.key === "Enter") firstFound(); if (event.key === "Escape") closeSearch(); });
  $("before").addEventListener("scroll", () => scrollAs("before", "after"));
  $("after").addEventListener("scroll", () => scrollAs("after", "before"));
  $("help").addEventListener("click", () => $("keys").showModal());
  if (!sqnr.size && !passes.length) document.querySelector("#overlay [value=loss]").remove();
  if (data.single) for (const id of ["split", "fold"]) $(id).closest("label").hidden = true;
  if (views.length === 1) for (const id of ["previous", "choice", "next"]) $(id).hidden = true;
}

// The address says what is shown, so that it can be sent: #pass=3&node=linear_4&overlay=loss. pass: a number, a pass's name, or "all", which
// goes without saying before a node. node: where no node is called so, a module, which is opened. overlay: one that isn't known shows none.
function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const view = asked.has("pass") ? views.find((v) => addresses(v).includes(asked.get("pass")))
    : ["node", "module"].some((key) => asked.has(key)) ? views[views.length - 1] : undefined;
  if (!view) {
    overview();
    return notice(location.hash.length > 1 ? `${passes.length ? "No pass" : "Nothing"} here is called “${asked.get("pass") ?? location.hash.slice(1)}”.` : "");
  }
  const fresh = state.view !== view;
  state.split = asked.has("split");
  state.overlay = [...$("overlay").options].map((o) => o.value).find((name) => name === asked.get("overlay")) ?? "none";
  if (fresh) enter(view);
  const named = (key, known) => [asked.get(key), now.get(asked.get(key))].find((name) => name && known.has(name)) ?? null;
  state.node = named("node", view.nodes);
  const meant = state.node === null ? named("node", view.tree) : null;
  state.region = named("module", view.tree) ?? meant;
  if (meant !== null) state.open.add(meant);
  const lost = [["node", state.node ?? meant], ["module", state.region]].filter(([key, found]) => asked.has(key) && found === null).map(([key]) => key);
  notice(lost.map((key) => `No ${key} here is called “${asked.get(key)}”.`).join(" "));
  if (state.node) reveal(view.nodes.get(state.node).now.region);
  if (state.region) {
    state.unfolded.add("same " + state.region);
    if (view.tree.get(state.region).parent !== null) reveal(view.tree.get(state.region).parent);
  }
  render();
  centre(fresh);
}

// A comparison has no passes to be numbered: it is its own first.
const addresses = (view) => [view.hash, view.name, ...(passes.length ? [] : ["1"])];

// What an address asks for and the page hasn't got.
function notice(words) {
  $("notice").textContent = visible(words);
  $("notice").hidden = !words;
}

function overview() {
  state.view = null;
  document.title = visible(`${data.title} – fxcompress`);
  document.body.className = "at-overview";
}

function enter(view) {
  opened(view);
  Object.assign(state, { view, open: new Set([""]), unfolded: new Set(), zoom: 1 });
  openFirst(view);
  document.body.className = state.split ? "at-graph split" : "at-graph";
  const wide = layout(view, "", state).w + 40, room = $("before").clientWidth;
  state.zoom = Math.min(1, Math.max(0.85, room / wide));  // smaller can't be read
}

// Open the way to the first change, as long as there is one way to go and what opens is small.
function openFirst(view) {
  let path = "";
  for (let depth = 0; depth < 4; depth++) {
    const inner = view.tree.get(path).entries.filter((e) => e.region !== undefined && !view.folded.has(e.region)).map((e) => e.region);
    const ways = inner.filter((p) => isChanged(view, { region: p }));
    const next = inner.length === 1 ? inner[0] : ways[0];
    if (next === undefined || (ways.length > 3 && depth > 1) || shown(view, next, state).length > 60) return;
    state.open.add(next);
    path = next;
  }
}

function reveal(path) {
  for (const at of chainOf(state.view.tree, path)) {
    state.open.add(at);
    state.unfolded.add("same " + at);
  }
}

function address({ view = state.view, node = null, region = null, split = state.split } = {}) {
  const parts = new URLSearchParams({ pass: view.hash });
  if (node) parts.set("node", node);
  if (region) parts.set("module", region);
  if (state.overlay !== "none") parts.set("overlay", state.overlay);
  return "#" + parts + (split ? "&split" : "");
}

function go({ view, node = null, region = null }) {
  const next = address({ view: view === undefined ? state.view : views[view], node, region });
  if (next === location.hash) return;
  history.pushState(null, "", next);
  follow();
}

function set(changes) {
  Object.assign(state, changes);
  if ("split" in changes || "overlay" in changes) history.replaceState(null, "", address({ node: state.node, region: state.region }));
  render();
}

function step(by) {
  const index = views.indexOf(state.view) + by;
  if (state.view && views[index]) go({ view: index });
}

// What is in the middle stays there.
function zoom(by) {
  const pane = $("before"), was = state.zoom;
  const middle = [pane.scrollLeft + pane.clientWidth / 2, pane.scrollTop + pane.clientHeight / 2];
  set({ zoom: Math.min(3, Math.max(0.2, state.zoom * by)) });
  pane.scrollLeft = middle[0] * state.zoom / was - pane.clientWidth / 2;
  pane.scrollTop = middle[1] * state.zoom / was - pane.clientHeight / 2;
  scrollAs("before", "after");
}

function scrollAs(from, to) {
  $(to).scrollLeft = $(from).scrollLeft;
  $(to).scrollTop = $(from).scrollTop;
}

function act(item) {
  if (item.kind === "node") return go({ node: item.node });
  if (item.kind === "region") {
    item.open ? state.open.delete(item.path) : state.open.add(item.path);
    return state.region === item.path ? render() : go({ region: item.path });
  }
  if (item.kind === "rest") state.unfolded.add(item.of);
  if (item.kind === "part") state.open.add(item.key);
  if (item.kind === "same") for (const key of item.keys) state.unfolded.add("same " + key.slice(2));
  render();
}

function render() {
  const { view } = state;
  if (!view) return;
  const started = performance.now();
  document.body.className = state.split ? "at-graph split" : "at-graph";
  for (const id of ["split", "fold", "constants"]) $(id).checked = state[id];
  document.title = visible([state.node ?? state.region, view.name, data.title, "fxcompress"].filter(Boolean).join(" – "));
  $("overlay").value = state.overlay;
  $("choice").value = String(view.index);
  $("previous").disabled = views.indexOf(view) === 0;
  $("next").disabled = views.indexOf(view) === views.length - 1;
  const kept = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : undefined;
  $("before").replaceChildren(drawGraph(view, "", state, state.split ? "before" : "", act));
  $("after").replaceChildren(...(state.split ? [drawGraph(view, "", state, "after", act)] : []));
  scrollAs("before", "after");
  if (kept) focusOn(kept);
  card();
  document.body.dataset.rendered = (performance.now() - started).toFixed(1);
}

function card() {
  const { view, node, region } = state;
  const parts = node ? nodeCard(view, node, go) : region ? moduleCard(view, region, go) : viewCard(view, go);
  const close = node || region ? el("button", { class: "close", "aria-label": "close", onclick: () => go({}) }, "×") : "";
  $("card").replaceChildren(close, ...[parts].flat(Infinity).filter((p) => p !== "" && p));
}

const itemElement = (key) => [...document.querySelectorAll("#before [data-key]")].find((e) => e.dataset.key === key);

function focusOn(key) {
  const found = itemElement(key);
  if (found) found.focus({ preventScroll: true });
}

function centre(fresh) {
  if (fresh) $("before").scrollLeft = ($("before").scrollWidth - $("before").clientWidth) / 2;
  const key = state.node ? "n:" + state.node : state.region ? "r:" + state.region : null;
  const found = key ? itemElement(key) : fresh ? document.querySelector("#before .item:is(.added, .removed, .changed, .moved)") : null;
  if (!found) return;
  const box = found.getBoundingClientRect(), pane = $("before").getBoundingClientRect();
  if (box.top < pane.top || box.bottom > pane.bottom) $("before").scrollTop += box.top - pane.top - Math.max(20, (pane.height - box.height) / 3);
  if ((key && fresh) || (box.left < pane.left || box.right > pane.right)) $("before").scrollLeft += box.left + box.width / 2 - pane.left - pane.width / 2;
}

// Search by name, op or module path, in the view's nodes and modules.
function search() {
  const words = $("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const view = opened(state.view || views.find((v) => v.pass === null) || views[0]);
  const fits = (line) => words.every((w) => line.toLowerCase().includes(w));
  const there = (name) => (was.has(name) ? ` · there ${was.get(name)}` : "");
  const found = [];
  if (words.length) {
    for (const region of view.tree.values()) if (region.path && fits(region.path + " " + region.kind + there(region.path))) found.push({ region: region.path, note: region.kind + there(region.path) });
    for (const node of view.nodes.values()) if (fits(`${node.name} ${node.now.op} ${node.now.region} ${isConstant(node) ? node.now.attributes : ""}${there(node.name)}`)) found.push({ node: node.name, note: `${shortOp(node.now.op)} · ${node.now.region}${there(node.name)}` });
  }
  const choose = (f) => { closeSearch(); go({ view: view.index, ...f }); };
  $("found").replaceChildren(...found.slice(0, 60).map((f) => el("li", {}, el("button", { onclick: () => choose({ node: f.node ?? null, region: f.region ?? null }) }, el("b", {}, f.node ?? f.region), el("span", {}, f.note)))),
    el("li", { class: "quiet" }, words.length ? `${found.length} found` : ""));
  $("found").hidden = !words.length;
}

function firstFound() {
  const first = $("found").querySelector("button");
  if (first) first.click();
}

function closeSearch() {
  $("found").hidden = true;
  $("search").blur();
}

// The changed nodes in order, one after the other.
function nextChange(by) {
  const names = [...state.view.nodes.values()].filter((n) => n.state).map((n) => n.name);
  if (!names.length) return;
  const at = state.node ? names.indexOf(state.node) : by > 0 ? -1 : 0;
  go({ node: names[(at + by + names.length) % names.length] });
}

// The item above, below, left or right of the one in focus.
function neighbour(dx, dy) {
  const all = [...document.querySelectorAll("#before [data-key][tabindex]")], here = document.activeElement;
  if (!all.includes(here)) return all[0] && all[0].focus();
  const middle = (e) => { const b = e.querySelector(".box").getBoundingClientRect(); return [b.left + b.width / 2, b.top + Math.min(b.height / 2, 20)]; };
  const [x, y] = middle(here);
  const ranked = all.filter((e) => e !== here).map((e) => {
    const [ex, ey] = middle(e), along = (ex - x) * dx + (ey - y) * dy, across = Math.abs((ex - x) * dy) + Math.abs((ey - y) * dx);
    return [along > 4 ? along + 3 * across : Infinity, e];
  }).sort((a, b) => a[0] - b[0]);
  if (ranked.length && ranked[0][0] < Infinity) {
    ranked[0][1].focus();
    ranked[0][1].scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}

const KEYS = {
  "/": () => $("search").focus(), "?": () => $("keys").showModal(),
  n: () => nextChange(1), p: () => nextChange(-1), "[": () => step(-1), "]": () => step(1),
  s: () => set({ split: !state.split }), "+": () => zoom(1.25), "-": () => zoom(0.8),
  ArrowDown: () => neighbour(0, 1), ArrowUp: () => neighbour(0, -1), ArrowLeft: () => neighbour(-1, 0), ArrowRight: () => neighbour(1, 0),
  Escape: () => (state.node || state.region ? go({}) : (location.hash = "")),
};

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || $("keys").open) return;
  const run = KEYS[event.key];
  if (!run || (!state.view && !["/", "?"].includes(event.key))) return;
  event.preventDefault();
  run();
}

start();
