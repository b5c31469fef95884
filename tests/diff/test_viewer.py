"""The HTML file in a real headless Chromium, opened as from a mail: file://, no network, no error on the console."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.diff import Diff, Run, Step, between, of_run
from fxcompress.diff.page import embedded, page, typeset
from fxcompress.diff.read import run_in, run_of
from fxcompress.diff.states import states
from fxcompress.history import Graph, History, Node
from fxcompress.report import Change, Check
from tests.diff.browser import Browser
from tests.diff.large import report as large_report
from tests.passes.helpers import captured, seeded

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
COUNTS = "[...document.querySelectorAll('#before [data-key=\"{}\"] > .count')].map((e) => e.textContent)"
ITEM = "document.querySelector('#before [data-key=\"{}\"]')"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    """Four equal blocks and a head whose weight is added to as well, so that it is declined."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(4)]), nn.Linear(16, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) + (self.head.weight + x.mean()).sum()


@pytest.fixture(scope="module")
def model() -> fxc.CompiledModel:
    torch.manual_seed(0)
    passes: list[Any] = ["tidy.fold_constants", {"quant.weight_only": {"weights": "int4/channel", "range": "mse"}}, "quant.finalize"]
    return fxc.compile(Net().eval(), {"name": "mine", "passes": passes}, (seeded(4, 16),), backend="reference")


@pytest.fixture(scope="module")
def file(model: fxc.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.diff().save(tmp_path_factory.mktemp("page") / "diff.html")


@pytest.fixture
def at(browser: Browser, file: Path) -> Iterator[Any]:
    """Opens the page at a fragment; afterwards nothing may have gone wrong."""
    browser.scheme("light")
    yield lambda fragment="": (browser.open(file, fragment), browser)[1]
    assert browser.errors == []


def shown(browser: Browser, element: str) -> bool:
    return bool(
        browser.run(f"!!document.querySelector({json.dumps(element)}) && document.querySelector({json.dumps(element)}).checkVisibility()")
    )


def text(browser: Browser, element: str) -> str:
    return str(browser.run(f"document.querySelector({json.dumps(element)}).innerText"))


def items(browser: Browser) -> list[str]:
    found: list[str] = browser.run("[...document.querySelectorAll('#before [data-key]')].map((e) => e.dataset.key)")
    return found


# the file


def test_the_same_report_gives_the_same_bytes(model: fxc.CompiledModel, tmp_path: Path) -> None:
    first = model.diff().html()
    assert first == model.diff().html()
    saved = model.save(tmp_path / "out")
    assert (saved / "report.html").read_text(encoding="utf-8") == first, "report.html is this file"


def test_weights_are_not_in_it(model: fxc.CompiledModel) -> None:
    """Numbers of the data: statistics of a weight, never the weight. A weight of 512 entries is nowhere as a list of that length."""
    data = json.loads(DATA.search(model.diff().html())[1])  # type: ignore[index]

    def longest_list_of_floats(value: Any) -> int:
        if isinstance(value, dict):
            return max(map(longest_list_of_floats, value.values()), default=0)
        if isinstance(value, list):
            own = sum(isinstance(v, float) for v in value)
            return max(own, *map(longest_list_of_floats, value)) if value else 0
        return 0

    assert longest_list_of_floats(data) == 4


def test_it_names_nothing_outside(model: fxc.CompiledModel) -> None:
    html = model.diff().html()
    assert set(re.findall(r"https?://[^\s\"'`)]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "Permission is hereby granted" in html, "dagre's licence asks for its notice"
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', html)


@pytest.mark.parametrize(
    "name",
    ["</script><script>alert(1)</script>", "a\"b'c", "<!--", "]]>", "𝛼 → ü", "__proto__", "constructor", "a&amp;b", "\\"],
)
def test_no_name_is_harmful(name: str, browser: Browser, tmp_path: Path) -> None:
    """A node, a module, an op and a reason of that name: the page opens, shows it as text, and nothing of it runs."""
    shape, module = "float32[2]", f"m{name}"
    old = {"x": Node("x", "input", (), "x", "", shape), name: Node(name, name, ("x",), "%", module, shape, source=name)}
    new = {"x": old["x"], name: Node(name, name, ("x",), f"%, {name!r}", module, shape, source=name)}
    before, after = (Graph(nodes, {"": "M", module: name}, {module: ""}) for nodes in (old, new))
    found = between(Run("a", History([before])), Run(name, History([after])))
    assert embedded({name: name}).count("<") == 0
    assert json.loads(embedded({name: name})) == {name: name}
    browser.open(found.save(tmp_path / "page.html"))
    browser.run(f"location.hash = '#pass=all&node=' + encodeURIComponent({json.dumps(name)})")
    browser.wait("document.querySelector('#card h2 small')")
    assert browser.run("document.querySelector('#card h2 small').textContent") == name
    assert browser.run("document.scripts.length") == 3
    assert browser.errors == []


def test_what_turns_text_around_is_spelled_out(browser: Browser, tmp_path: Path) -> None:
    """And what ends a line. On the page, in titles and in the tab; links and search go by the name as it is."""
    name, told = "a\u202eb\u2066\xad\u2028\u2029", "a\\u202eb\\u2066\\xad\\u2028\\u2029"
    node = Node(name, name, (), name, name, "float32[2]", source=name)
    before, after = (Graph(nodes, {"": "M", name: name}, {name: ""}) for nodes in ({}, {name: node}))
    found = between(Run("a", History([before])), Run(name, History([after])))
    browser.open(found.save(tmp_path / "page.html"))
    browser.run(f"location.hash = '#pass=all&node=' + encodeURIComponent({json.dumps(name)})")
    browser.wait("document.querySelector('#card h2 small')")
    assert browser.run("document.querySelector('#card h2 small').textContent") == told
    assert told in browser.run("document.title") and told in browser.run("document.getElementById('title').title")
    shown = browser.run("document.title + ['header', '#tools', '#graph', '#overview'].map((e) => document.querySelector(e).textContent).join()")
    spoken = browser.run("[...document.querySelectorAll('[aria-label], [title]')].map((e) => e.getAttribute('aria-label') + e.title).join()")
    assert not {"\u202e", "\u2066", "\xad"} & {*shown, *spoken}
    assert browser.errors == []


# the page


def test_it_opens_on_the_table_of_passes(at: Any) -> None:
    browser = at()
    rows = browser.run("[...document.querySelectorAll('.passes tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))")
    assert [r[1] for r in rows] == ["tidy.fold_constants", "quant.weight_only", "quant.finalize"]
    assert [r[2] for r in rows] == ["exact", "bounded", "exact"]
    assert rows[1][3:5] == ["8", "1"], "eight weights, the head declined"
    assert re.fullmatch(r"[\d.]+ dB ≥ [\d.]+ dB\nat dequantize_default_\d", rows[1][5])
    assert shown(browser, "#overview") and not shown(browser, "#graph")
    heads = browser.run("[...document.querySelectorAll('section h2')].map((e) => e.innerText)")
    assert "Weights by width" in heads and "Measured on reference" not in heads, "no table without rows"


def test_choosing_a_pass_shows_its_diff(at: Any) -> None:
    browser = at()
    browser.click(".passes tbody tr:nth-child(2) a")
    browser.wait("document.body.classList.contains('at-graph')")
    assert browser.run("location.hash") == "#pass=2"
    assert text(browser, "#card h2") == "quant.weight_only"
    assert "head_weight is also read by add_4, not as a weight" in text(browser, "#card")
    browser.key("]")
    browser.wait("location.hash === '#pass=3'")
    assert text(browser, "#card h2") == "quant.finalize"


def test_equal_blocks_are_folded_with_their_number(at: Any) -> None:
    browser = at("#pass=2")
    assert "same blocks.0" in items(browser)
    assert "3 blocks as blocks.0" in browser.run(ITEM.format("same blocks.0") + ".textContent")
    assert browser.run(COUNTS.format("same blocks.0")) == ["+18"], "of all that are folded there"
    spoken = browser.run(ITEM.format("same blocks.0") + ".getAttribute('aria-label')")
    assert spoken == "3 blocks as blocks.0, blocks.1–3, 18 added"
    browser.click('#before [data-key="same blocks.0"]')
    browser.wait(ITEM.format("r:blocks.3"))
    assert "same blocks.0" not in items(browser)


def test_one_block_like_another_is_no_pile(browser: Browser, tmp_path: Path) -> None:
    """It stands as any closed module does, under its own name."""
    torch.manual_seed(0)
    pair = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))).eval()
    passes = [{"quant.weight_only": {"weights": "int8/channel"}}, "quant.finalize"]
    made = fxc.compile(pair, {"passes": passes}, (seeded(2, 4),), backend="reference")
    browser.open(made.diff().save(tmp_path / "pair.html"), "#pass=1")
    browser.wait(ITEM.format("r:1"))
    assert browser.run("document.querySelectorAll('#before .same, #before .behind').length") == 0
    assert browser.run(ITEM.format("r:1") + ".querySelector('.name').textContent") == "▸ 1"
    assert browser.run(COUNTS.format("r:1")) == ["+3"]
    assert browser.errors == []


def test_a_block_s_card_names_those_that_are_the_same(at: Any) -> None:
    assert "The same in 3 other blocks: blocks.1–3" in text(at("#pass=2&module=blocks.0"), "#card")


def test_modules_open_and_close(at: Any) -> None:
    browser = at("#pass=2")
    browser.wait(ITEM.format("r:blocks.0"))
    was_open = browser.run(ITEM.format("r:blocks.0") + ".getAttribute('aria-expanded')") == "true"
    for expected in (not was_open, was_open):
        browser.click('#before [data-key="r:blocks.0"]')
        browser.wait(f"{ITEM.format('r:blocks.0')}.getAttribute('aria-expanded') === '{str(expected).lower()}'")
        assert ("r:blocks.0.up" in items(browser)) == expected


def test_states_are_told_by_form_and_words_too(at: Any) -> None:
    browser = at("#pass=quant.weight_only&node=dequantize_default")
    added = ITEM.format("n:dequantize_default")
    browser.wait(added)
    assert browser.run(added + ".getAttribute('aria-label')") == "fxc.dequantize dequantize_default added"
    assert browser.run(added + ".querySelector('.mark text').textContent") == "+"
    assert browser.run(added + ".querySelector('.mark').firstChild.tagName") == "circle"
    browser.open(Path(browser.run("decodeURIComponent(location.pathname)")), "#pass=3&node=quantize_default")
    removed = ITEM.format("n:quantize_default")
    browser.wait(removed)
    assert browser.run(removed + ".querySelector('.mark').firstChild.tagName") == "rect"
    assert browser.run(f"getComputedStyle({removed}.querySelector('.box')).strokeDasharray") != "none"


def test_a_node_s_card(at: Any) -> None:
    browser = at("#pass=quant.weight_only&node=dequantize_default")
    card = text(browser, "#card")
    for line in (
        "fxc.dequantize.default",
        "blocks.0.up",
        "float32[32, 16]",
        "quantize_default",
        "int4",
        "held at dequantize_default",
    ):
        assert line in card, line
    assert browser.run("document.querySelectorAll('#card .histogram .after').length") == 32
    assert "copy as recipe exclusion" in card


def test_a_card_s_loss_is_called_that_of_the_end_in_every_pass(at: Any) -> None:
    """The first pass is exact: a figure of the end may not look like its own."""
    for fragment in ("#pass=1&node=linear", "#pass=2&node=linear", "#pass=all&node=linear"):
        browser = at(fragment)
        figure = browser.run("sqnr.get('linear').toFixed(1)")
        assert re.search(rf"loss at the end\s+{figure} dB", text(browser, "#card")), fragment


def test_the_exclusion_is_copied_and_is_a_recipe_line(at: Any, model: fxc.CompiledModel) -> None:
    browser = at("#pass=quant.weight_only&node=dequantize_default")
    browser.run("window.copied = []; navigator.clipboard.writeText = (t) => { window.copied.push(t); return Promise.resolve(); }")
    browser.click("#card .exclusion button")
    browser.wait("window.copied.length")
    line = browser.run("window.copied[0]")
    import yaml

    (options,) = yaml.safe_load(line)[0].values()
    assert options["where"] == {"exclude": ["blocks.0.up"]}
    assert options["weights"] == model.report.passes[1].options["weights"]
    again = fxc.compile(Net().eval(), {"passes": [*yaml.safe_load(line), "quant.finalize"]}, (seeded(4, 16),), backend="reference")
    assert "blocks.0.up" not in {c.module for c in again.report.passes[0].changes}


def test_where_no_exclusion_would_compile_it_says_why(at: Any) -> None:
    """Of quant.finalize none does, neither of a node nor of a module."""
    browser = at("#pass=3&node=unpack_default")
    assert browser.run("[...document.querySelectorAll('#card .exclusion')].length") == 0
    assert "Can't be left out alone: codes are stored for every quantised weight" in text(browser, "#card")
    browser = at("#pass=2&module=blocks.0")
    assert browser.run("[...document.querySelectorAll('#card .exclusion')].length") == 1, "of quant.weight_only"
    assert "Can't be left out alone" in text(browser, "#card")


def test_what_the_recipe_excludes_is_told(browser: Browser, tmp_path: Path) -> None:
    passes: list[Any] = [{"quant.weight_only": {"weights": "int8/channel", "where": {"exclude": ["blocks.[01].up"]}}}, "quant.finalize"]
    made = fxc.compile(Net().eval(), {"passes": passes}, (seeded(4, 16),), backend="reference")
    browser.open(made.diff().save(tmp_path / "excluded.html"), "#pass=all&node=linear_2")
    assert text(browser, "#card .history") == 'quant.weight_only not here: the recipe leaves it out: where: {exclude: ["blocks.[01].up"]}'
    assert browser.errors == []


def test_copying_works_without_the_clipboard_s_interface(at: Any) -> None:
    browser = at("#pass=quant.weight_only&node=dequantize_default")
    browser.run("navigator.clipboard.writeText = () => Promise.reject(new Error('refused'))")
    browser.run("document.addEventListener('copy', () => { window.copied = document.activeElement.value; })")
    browser.click("#card .exclusion button")
    browser.wait("window.copied")
    assert browser.run("window.copied").startswith("- quant.weight_only:")


def test_deep_links_open_the_way_to_the_node(at: Any) -> None:
    browser = at("#pass=2&node=dequantize_default_5")
    browser.wait(ITEM.format("n:dequantize_default_5"))
    assert "r:blocks.2" in items(browser)
    box = browser.run(
        f"(() => {{ const b = {ITEM.format('n:dequantize_default_5')}.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }})()"
    )
    assert box[0] >= 0 and box[1] >= 80 and box[2] <= 1280 - 372 and box[3] <= 800, "and it is in sight"
    assert browser.run("document.querySelector('#before .selected').dataset.key") == "n:dequantize_default_5"


def test_a_module_may_be_linked_to_as_a_node(at: Any) -> None:
    """It is opened and chosen, and can be closed again."""
    browser = at("#pass=3&node=blocks.2.up")
    assert text(browser, "#card h2") == "blocks.2.up" and not shown(browser, "#notice")
    assert browser.run("document.querySelector('#before .selected').dataset.key") == "r:blocks.2.up"
    assert "n:unpack_default_4" in items(browser)
    browser.click('#before [data-key="r:blocks.2.up"]')
    browser.wait(f"{ITEM.format('r:blocks.2.up')}.getAttribute('aria-expanded') === 'false'")


@pytest.mark.parametrize(
    ("fragment", "words"),
    [
        ("#pass=99", "No pass here is called “99”."),
        ("#node=nothing", "No node here is called “nothing”."),
        ("#nothing", "No pass here is called “nothing”."),
        ("#pass=2&node=nothing", "No node here is called “nothing”."),
        ("#pass=2&node=", "No node here is called “”."),
        ("#pass=2&module=nothing", "No module here is called “nothing”."),
        ("#%E0%A4%A", "No pass here is called “%E0%A4%A”."),
    ],
)
def test_wrong_links_do_no_harm_and_are_told(fragment: str, words: str, at: Any) -> None:
    browser = at(fragment)
    assert shown(browser, "#graph" if "=nothing" in fragment or "pass=2" in fragment else "#overview")
    assert text(browser, "#notice") == words
    browser.click("#home")
    browser.wait("document.getElementById('notice').hidden")
    assert not shown(at(""), "#notice") and not shown(at("#pass=2&node=head_weight"), "#notice")


def test_search_by_name_op_and_module(at: Any) -> None:
    browser = at("#pass=2")
    for words, first in (("dequantize_default_3", "dequantize_default_3"), ("relu blocks.2", "relu_2"), ("head", "head")):
        browser.key("/")
        browser.run("document.activeElement.value = ''")
        browser.write(words)
        browser.wait("document.querySelector('#found button')")
        assert text(browser, "#found button b") == first
    browser.key("Enter")
    browser.wait("location.hash === '#pass=2&module=head'")
    assert text(browser, "#card h2") == "head"


def test_the_keyboard_is_enough(at: Any) -> None:
    browser = at("#pass=2")
    browser.key("n")
    browser.wait("location.hash.includes('node=')")
    first = browser.run("location.hash")
    browser.key("n")
    browser.wait(f"location.hash !== {json.dumps(first)}")
    browser.key("p")
    browser.wait(f"location.hash === {json.dumps(first)}")
    browser.key("ArrowDown")
    browser.key("ArrowDown")
    assert browser.run("document.activeElement.dataset.key")
    browser.key("Escape")
    browser.wait("location.hash === '#pass=2'")
    browser.key("s")
    browser.wait("document.body.classList.contains('split')")
    browser.key("?")
    assert browser.run("document.getElementById('keys').open")


def test_the_way_back_is_the_browser_s(at: Any) -> None:
    browser = at("#pass=2")
    browser.key("n")
    first = browser.run("location.hash")
    browser.key("n")
    assert browser.run("location.hash") != first
    browser.run("history.back()")
    browser.wait(f"location.hash === {json.dumps(first)}")
    browser.wait("document.querySelector('#card h2 small').textContent === new URLSearchParams(location.hash.slice(1)).get('node')")


def test_both_sides_stand_alike(at: Any) -> None:
    """What both graphs have is at the same place on both sides; what one lacks is left out there."""
    browser = at("#pass=2&node=dequantize_default&split")
    places = [
        browser.run(
            f"Object.fromEntries([...document.querySelectorAll('#{side} [data-key]')].map((e) => [e.dataset.key, e.getAttribute('transform')]))"
        )
        for side in ("before", "after")
    ]
    assert places[0] == places[1]
    absent = [browser.run(f"[...document.querySelectorAll('#{side} .absent')].map((e) => e.dataset.key)") for side in ("before", "after")]
    assert "n:dequantize_default" in absent[0]
    assert absent[1] == []


@pytest.mark.parametrize(("overlay", "unit"), [("loss", "dB"), ("cost", "%")])
def test_overlays_are_figures(overlay: str, unit: str, at: Any) -> None:
    browser = at("#pass=all")
    assert browser.run("document.querySelectorAll('#before .figure').length") == 0
    browser.run(f"const o = document.getElementById('overlay'); o.value = '{overlay}'; o.dispatchEvent(new Event('change'))")
    figures = browser.run("[...document.querySelectorAll('#before .figure')].map((e) => e.textContent)")
    assert figures and all(f.endswith(unit) for f in figures)
    browser.run("o.value = 'none'; o.dispatchEvent(new Event('change'))")


def test_the_overlay_is_in_the_address(at: Any) -> None:
    """It is kept on the way to other places, and restored; one that isn't known is none."""
    overlay, figures = "document.getElementById('overlay').value", "document.querySelectorAll('#before .figure').length"
    browser = at("#pass=2")
    browser.run("const o = document.getElementById('overlay'); o.value = 'cost'; o.dispatchEvent(new Event('change'))")
    assert browser.run("location.hash") == "#pass=2&overlay=cost"
    browser.key("n")
    assert browser.run("location.hash").endswith("&overlay=cost") and "node=" in browser.run("location.hash")
    browser.click("#card .history a")
    browser.wait("location.hash === '#pass=2&overlay=cost'")
    browser.click("#home")
    browser.wait("document.body.className === 'at-overview'")
    browser.click(".passes tbody tr:nth-child(3) a")
    browser.wait("location.hash === '#pass=3&overlay=cost'")
    browser = at("#pass=2&node=dequantize_default&overlay=loss&split")
    assert browser.run(overlay) == "loss" and browser.run(figures) and browser.run("document.body.className") == "at-graph split"
    for other in ("", "&overlay=", "&overlay=toString"):
        browser = at(f"#pass=2{other}")
        assert (browser.run(overlay), browser.run(figures)) == ("none", 0) and not shown(browser, "#notice")


OVERLAPS = """(() => {
  const found = [], rect = (e) => e.getBoundingClientRect();
  const cross = (p, q, down) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - down && q.top < p.bottom - down;
  const pairs = (list, one) => list.forEach((p, i) => list.slice(i + 1).forEach((q) => one(p, q)));
  for (const group of document.querySelectorAll('#before g')) {
    const items = [...group.children].filter((e) => e.dataset.key);
    pairs(items.map((e) => [e.dataset.key, rect(e.querySelector('.box'))]), ([a, p], [b, q]) => { if (cross(p, q, 1)) found.push([a, b]); });
  }
  for (const item of document.querySelectorAll('#before .item')) {
    const key = item.dataset.key, box = rect(item.querySelector('.box'));
    const texts = [...item.children].filter((e) => e.tagName === 'text').map(rect);
    for (const t of texts) if (t.left < box.left || t.right > box.right + 1 || t.bottom > box.bottom + 1) found.push([key, 'text outside']);
    pairs(texts, (p, q) => { if (cross(p, q, 3)) found.push([key, 'texts overlap']); });
    const bar = item.querySelector(':scope > .bar');
    if (bar && texts.some((t) => rect(bar).top - t.bottom < 1)) found.push([key, 'a bar under the text']);
  }
  return found;
})()"""


@pytest.mark.parametrize("fragment", ["#pass=2", "#pass=3&node=unpack_default", "#pass=all&node=dequantize_default_5"])
@pytest.mark.parametrize("overlay", ["none", "loss"])
def test_nothing_overlaps(fragment: str, overlay: str, at: Any) -> None:
    browser = at(fragment)
    browser.run(
        f"document.getElementById('overlay').value = '{overlay}'; document.getElementById('overlay').dispatchEvent(new Event('change'))"
    )
    assert browser.run(OVERLAPS) == []


@pytest.mark.parametrize("overlay", ["loss", "cost"])
def test_counts_and_figures_end_at_one_line(overlay: str, at: Any) -> None:
    """Of a closed module and of a pile."""
    browser = at(f"#pass=all&overlay={overlay}")
    ends = "['.count', '.figure'].map((part) => e.querySelector(':scope > ' + part)?.getAttribute('x'))"
    found = dict(browser.run(f"[...document.querySelectorAll('#before .item')].map((e) => [e.dataset.key, {ends}])"))
    both = {key: pair for key, pair in found.items() if None not in pair}
    assert "same blocks.0" in both and all(count == figure for count, figure in both.values()), both


def test_the_check_of_overlaps_bites(at: Any) -> None:
    browser = at("#pass=quant.weight_only&node=dequantize_default")
    place = f"{ITEM.format('n:quantize_default')}.getAttribute('transform')"
    browser.run(f"{ITEM.format('n:dequantize_default')}.setAttribute('transform', {place})")
    assert ["n:quantize_default", "n:dequantize_default"] in browser.run(OVERLAPS)


CONTRAST = """((faults) => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const behind = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const c = rgb(getComputedStyle(at).backgroundColor);
      if (c.length < 4 || c[3] > 0.99) return c;
    }
  };
  const isText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || !isText(e) || e.disabled || e.closest('script, style, option')) continue;
    const isSvg = e.namespaceURI.endsWith('svg'), style = getComputedStyle(e), fill = (at) => rgb(getComputedStyle(at).fill);
    const mark = isSvg && e.closest('.mark'), item = isSvg && e.closest('.item');
    const ground = mark ? fill(mark.firstChild) : item ? fill(item.querySelector('.box')) : behind(e);
    const found = ratio(rgb(isSvg ? style.fill : style.color), ground);
    if (found < 4.5) faults.push([e.className.baseVal ?? e.className, e.textContent.slice(0, 30), found.toFixed(2)]);
  }
  for (const e of document.querySelectorAll('input[placeholder]')) {
    const style = getComputedStyle(e, '::placeholder'), found = style.opacity === '1' ? ratio(rgb(style.color), behind(e)) : 0;
    if (found < 4.5) faults.push([e.id, e.placeholder, found.toFixed(2)]);
  }
  return faults;
})([])"""


OUTLINES = """((faults) => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const check = (what, line, ...grounds) => {
    for (const g of grounds) if (ratio(rgb(line), rgb(g)) < 3) faults.push([what, ratio(rgb(line), rgb(g)).toFixed(2)]);
  };
  const page = getComputedStyle(document.body).backgroundColor;
  for (const item of document.querySelectorAll('#before .item:not(.absent)')) {
    const box = getComputedStyle(item.querySelector('.box')), around = item.parentElement.closest('.item');
    check(item.dataset.key, box.stroke, box.fill, around ? getComputedStyle(around.querySelector('.box')).fill : page);
  }
  for (const control of document.querySelectorAll('#tools button, #tools select, header button, header input')) {
    const style = getComputedStyle(control), isBox = control.type === 'checkbox';
    if (control.checkVisibility() && !control.disabled && !isBox) check(control.id, style.borderTopColor, style.backgroundColor);
  }
  return faults;
})([])"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fragment", ["#pass=2", "#pass=3&node=unpack_default", "#pass=all&module=blocks.0"])
def test_outlines_are_seen(scheme: str, fragment: str, at: Any) -> None:
    """WCAG AA asks 3 : 1 of what tells a control or a figure from its ground."""
    browser = at(fragment)
    browser.scheme(scheme)
    assert browser.run(OUTLINES) == []


def test_the_check_of_outlines_bites(at: Any) -> None:
    browser = at("#pass=2")
    browser.run(
        "document.documentElement.style.setProperty('--outline', getComputedStyle(document.documentElement).getPropertyValue('--line'))"
    )
    assert len(browser.run(OUTLINES)) > 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fragment", ["", "#pass=2&overlay=loss", "#pass=3&node=quantize_default", "#pass=all&module=blocks.0&overlay=cost"])
def test_contrast_is_that_of_wcag_aa(scheme: str, fragment: str, at: Any) -> None:
    browser = at(fragment)
    browser.scheme(scheme)
    assert browser.run(CONTRAST) == []


def test_the_check_of_contrast_bites(at: Any) -> None:
    browser = at()
    browser.run("document.querySelector('.tiles .label').style.color = '#999'")
    assert len(browser.run(CONTRAST)) == 1


def test_dark_is_dark(at: Any) -> None:
    browser = at()
    grounds = []
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        grounds.append(browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"))
    assert min(grounds[0]) > 200 and max(grounds[1]) < 60


def test_it_prints(at: Any) -> None:
    assert at("#pass=2").pdf().startswith(b"%PDF")


def test_the_pass_table_is_printed_whole(at: Any) -> None:
    """On landscape A4 less its margins: nothing scrolls or is wider than the page, and a heading stays with what follows."""
    browser = at()
    browser.send("Emulation.setDeviceMetricsOverride", width=1046, height=718, deviceScaleFactor=1, mobile=False)
    browser.send("Emulation.setEmulatedMedia", media="print")
    try:
        browser.run(
            "document.querySelectorAll('.passes tbody td:nth-child(6)').forEach((e) => e.append(' in a long sentence of why'.repeat(5)))"
        )
        assert browser.run("document.documentElement.scrollWidth") <= 1046
        assert browser.run("[...document.querySelectorAll('table')].every((e) => e.getBoundingClientRect().right <= innerWidth + 1)")
        assert browser.run("[...document.querySelectorAll('.scroll')].every((e) => getComputedStyle(e).overflowX === 'visible')")
        assert browser.run("[...document.querySelectorAll('h2')].every((e) => getComputedStyle(e).breakAfter === 'avoid')")
    finally:
        browser.send("Emulation.setEmulatedMedia", media="")
        browser.send("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)


def test_at_1280_nothing_is_cut_off(at: Any) -> None:
    browser = at()
    assert browser.run("document.documentElement.scrollWidth") <= 1280
    assert browser.run("[...document.querySelectorAll('.scroll')].every((e) => e.scrollWidth <= e.clientWidth + 1)")


BOXES = "['before', 'after', 'card'].map((id) => document.getElementById(id).getBoundingClientRect()).map((b) => [b.width, b.height])"


@pytest.mark.parametrize("width", [900, 600])
@pytest.mark.parametrize("fragment", ["", "#pass=2&node=dequantize_default", "#pass=2&node=dequantize_default&split"])
def test_narrow_windows(width: int, fragment: str, at: Any) -> None:
    """Nothing is cut off at the side, the tools of 900 columns stand in one line, and the graph has at least half the width."""
    browser = at()
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    try:
        browser = at(fragment)
        assert browser.run("document.documentElement.scrollWidth") <= width
        if not fragment:
            assert width < 900 or browser.run("document.querySelector('.passes').scrollWidth") <= width
            return
        assert width < 900 or browser.run("document.getElementById('tools').clientHeight") < 50
        widths, heights = zip(*browser.run(BOXES), strict=True)
        assert sum(widths[:2]) >= width / 2 and heights[0] >= 200 and heights[2] >= 200
    finally:
        browser.send("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)


SCROLLED = "['before', 'after'].map((id) => [document.getElementById(id).scrollLeft, document.getElementById(id).scrollTop].map(Math.round))"


def test_both_sides_move_together(at: Any) -> None:
    """However they are moved: by either side's wheel, by changing the size, by coming to the second side."""
    browser = at("#pass=all")
    browser.run("state.unfolded.add('same blocks.0'); for (const b of [0, 1, 2, 3]) state.open.add('blocks.' + b); set({ zoom: 2.5 })")
    browser.run("document.getElementById('before').scrollTo(40, 100)")
    browser.key("s")
    browser.wait("document.body.classList.contains('split')")
    before, after = browser.run(SCROLLED)
    assert before == after and before[1] > 0
    for x in (200, 700):
        last = browser.run(SCROLLED)
        browser.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=400, deltaX=0, deltaY=90)
        browser.wait(f"JSON.stringify({SCROLLED}) !== {json.dumps(json.dumps(last, separators=(',', ':')))}")
        browser.wait(f"(([a, b]) => String(a) === String(b))({SCROLLED})")
    middle = "(() => { const p = document.getElementById('before'); return (p.scrollTop + p.clientHeight / 2) / state.zoom; })()"
    was = browser.run(middle)
    browser.key("-")
    assert abs(browser.run(middle) - was) < 5, "what is in the middle stays there"
    before, after = browser.run(SCROLLED)
    assert before == after


def test_the_tab_says_what_is_shown(at: Any) -> None:
    browser = at()
    assert browser.run("document.title") == "Net, mine – fxcompress"
    browser.key("]")
    browser = at("#pass=2&node=dequantize_default")
    assert browser.run("document.title") == "dequantize_default – quant.weight_only – Net, mine – fxcompress"
    browser.click("#home")
    browser.wait("document.title === 'Net, mine – fxcompress'")


def test_a_minus_is_one(at: Any) -> None:
    """Not a hyphen, in figures; names keep theirs."""
    browser = at("#pass=2&node=blocks_0_up_weight")
    assert re.search(r"least\s+−0\.\d", text(browser, "#card")) and not re.search(r"\s-\d", text(browser, "#card .statistics"))
    assert (
        typeset("6.66 MB (-53 B); 8.1e-07 <= 0.0001; w8a8-llm; conv-2; 3 >= -1")
        == "6.66 MB (−53 B); 8.1e−07 ≤ 0.0001; w8a8-llm; conv-2; 3 ≥ −1"
    )


def test_a_node_that_went_by_itself_says_why(at: Any) -> None:
    """The float weight: packing took its quantiser away, and no site names it."""
    browser = at("#pass=3&node=blocks_0_up_weight")
    card = text(browser, "#card")
    assert "quant.finalize removed it, since nothing reads it after this: " in card
    assert "Can't be left out alone: codes are stored" in card


def test_what_reads_another_value_says_what_it_read(at: Any) -> None:
    browser = at("#pass=2&node=linear")
    now, were = r"arguments\s+x, dequantize_default, blocks_0_up_bias\s+", r"were\s+x, blocks_0_up_weight, blocks_0_up_bias"
    assert re.search(now + were, text(browser, "#card"))


def test_all_checks_of_a_site_can_be_seen(browser: Browser, tmp_path: Path) -> None:
    """Five at once, the others when they are asked for."""
    shape, names = "float32[2]", [f"v{i}" for i in range(9)]
    nodes = {"x": Node("x", "input", (), "x", "", shape)} | {n: Node(n, "mine.op", ("x",), "%", "", shape) for n in names}
    graph = Graph(nodes, {"": "M"}, {})
    checks = [Check(site="s  (v0)", value=n, figure=30.0 + i, limit=20.0, verdict="held", why="") for i, n in enumerate(names)]
    change = Change(site="s  (v0)", module="", reason="why", replaced={}, inserted=(), touched=("v0",), constants=(), erased=())
    done = large_report(0, graph, graph, [change], checks).model_copy(update={"declined": (), "unit": "dB"})
    browser.open(of_run(Run("many", History([graph, graph]), [done])).save(tmp_path / "many.html"), "#pass=1&node=v0")
    count = "document.querySelectorAll('#card .check').length"
    assert browser.run(count) == 5 and text(browser, "#card .history summary") == "4 more checks"
    browser.click("#card .history summary")
    browser.wait(f"{count} === 9")
    assert "38 dB ≥ 20 dB held at v8" in text(browser, "#card")
    assert browser.errors == []


# comparisons


class Renamed(Net):
    """The same under other names, with one linear more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages, self.last = nn.ModuleList([Block() for _ in range(4)]), nn.Linear(16, 8)
        self.more = nn.Linear(8, 8)
        del self.blocks, self.head

    def forward(self, x):
        for block in self.stages:
            x = block(x)
        return self.more(self.last(x) + (self.last.weight + x.mean()).sum())


@pytest.fixture(scope="module")
def compared(model: fxc.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised artifact against another of the renamed model."""
    folder = tmp_path_factory.mktemp("compared")
    passes: list[Any] = [{"quant.weight_only": {"weights": "int8/channel"}}, "quant.finalize"]
    other = fxc.compile(Renamed().eval(), {"name": "other", "passes": passes}, (seeded(4, 16),), backend="reference")
    return fxc.diff(fxc.load(model.save(folder / "old")), other.save(folder / "new")).save(folder / "diff.html")


def test_a_comparison_says_what_it_compares(browser: Browser, compared: Path) -> None:
    """Folders, SQNR of both sides, the sizes of the operations, and a size that can be read."""
    browser.open(compared)
    title = browser.run("document.title")
    assert title.endswith("new: Renamed, other – fxcompress") and "Net, mine → " in title
    assert re.fullmatch(r"[\d.]+ dB → [\d.]+ dB", browser.run("[...document.querySelectorAll('.tiles li')].at(-1).children[1].innerText"))
    assert "at batch=4" in text(browser, ".tiles")
    rows = browser.run("[...document.querySelector('section').querySelectorAll('tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))")
    assert ["recipe", "mine", "other"] in rows and ["model", "Net", "Renamed"] in rows
    for fragment in ("#pass=comparison", "#pass=1", "#pass=all"):
        browser.open(compared, fragment)
        assert shown(browser, "#graph") and not shown(browser, "#notice"), fragment
    assert browser.run("state.zoom") >= 0.85
    assert "dB" in text(browser, "#card")
    assert browser.errors == []


def test_a_comparison_s_cards_tell_what_the_passes_of_each_side_did(browser: Browser, compared: Path) -> None:
    """Under the names that are shown, though the second side knows the block by another."""
    browser.open(compared, "#pass=all&node=dequantize_default_2")
    first, second = browser.run("[...document.querySelectorAll('#card .history li')].map((e) => e.innerText)")[:2]
    for told, side, bits, block in ((first, "Net, mine", 4, "blocks.1.up"), (second, "new", 8, "stages.1.up")):
        start = rf"{side} quant\.weight_only: int{bits} in blocks of \[1, -1\]\s+[\d.]+ ≥ [\d.]+ dB at dequantize_default_2\s+"
        assert re.fullmatch(start + rf'- quant\.weight_only: .*where: {{exclude: \["{block}"\]}}}}\s+copy as recipe exclusion', told)
    browser.open(compared, "#pass=all&module=blocks.1")
    told = browser.run("[...document.querySelectorAll('#card .history li')].map((e) => e.innerText)")
    sides = [(side, name) for side in ("Net, mine", "new") for name in ("quant.weight_only", "quant.finalize")]
    assert len(told) == 4 and all(t.startswith(f"{side} {name} changed 2 sites\n") for t, (side, name) in zip(told, sides, strict=True))
    browser.open(compared, "#pass=all&node=add_4")
    assert browser.errors == []


def test_a_comparison_s_cards_tell_the_losses_of_both_sides(browser: Browser, compared: Path) -> None:
    browser.open(compared, "#node=linear_2&overlay=loss")
    told = re.search(r"loss at the end\s+([\d.]+) dB → ([\d.]+) dB", text(browser, "#card"))
    assert told and float(told[1]) + 6 < float(told[2]), "4 bits, then 8"
    assert f"{told[2]} dB" in browser.run(ITEM.format("n:linear_2") + ".textContent")
    assert browser.errors == []


def test_inspection_tells_what_recipes_would_do_at_a_place(browser: Browser, tmp_path: Path) -> None:
    """Sites and reasons, on the card of a node and of a module; no losses, which nobody has measured."""
    found = fxc.inspect(Net().eval(), (seeded(4, 16),), recipes=["int8-weight-only"])
    browser.open(found.save(tmp_path / "inspect.html"), "#node=linear")
    card = text(browser, "#card")
    assert "what recipes would do here" in card and "int8-weight-only quant.weight_only: int8 in blocks of [1, -1]" in card
    browser.open(tmp_path / "inspect.html", "#module=blocks.1")
    assert "int8-weight-only quant.weight_only would change 2 sites" in text(browser, "#card")
    browser.open(tmp_path / "inspect.html", "#module=head")
    browser.run("for (const d of document.querySelectorAll('#card details')) d.open = true")
    assert "declined: head_weight is also read by add_4, not as a weight" in text(browser, "#card")
    assert browser.run("[...document.getElementById('overlay').options].map((o) => o.value)") == ["none", "cost"]
    assert browser.errors == []


def test_renamed_modules_are_listed_and_found_by_either_name(browser: Browser, compared: Path) -> None:
    browser.open(compared, "#pass=all")
    assert browser.run("[...document.querySelectorAll('#card summary')].map((e) => e.innerText)")[0] == "5 renamed modules"
    browser.run("document.querySelector('#card details').open = true")
    assert "blocks.0 there stages.0" in text(browser, "#card") and "head there last" in text(browser, "#card")
    for words, first in (("stages.2", "blocks.2"), ("last", "head")):
        browser.key("/")
        browser.run("document.activeElement.value = ''")
        browser.write(words)
        browser.wait(f"document.querySelector('#found button b')?.innerText === {json.dumps(first)}")
    browser.open(compared, "#pass=all&module=stages.1.up")
    assert text(browser, "#card h2") == "blocks.1.up" and not shown(browser, "#notice")
    assert browser.errors == []


OUTSIDE = """(() => {
  const found = [];
  for (const group of document.querySelectorAll('#before g')) {
    const edges = [...group.children].filter((e) => e.classList.contains('edge'));
    const holder = group.closest('.item'), outer = holder ? holder.querySelector('.box') : document.querySelector('#before svg');
    const frame = outer.getBoundingClientRect();
    for (const edge of edges) {
      const box = edge.getBoundingClientRect(), wide = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (wide || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) found.push(edge.getAttribute('d'));
    }
  }
  return found;
})()"""


def test_no_edge_leaves_its_frame(browser: Browser, tmp_path: Path) -> None:
    """Long ways past many boxes swing out beyond them, to both sides: what is drawn is as wide as its edges."""
    names = [f"n{i}" for i in range(12)]
    nodes = {x: Node(x, "input", (), x, "", "float32[2]") for x in "xyz"}
    for before, name in zip(["x", *names], names, strict=False):
        nodes[name] = Node(name, "mine.op", (before, *"xyz"), "%, %, %, %", "", "float32[2]")
    graph = Graph(nodes, {"": "M"}, {})
    browser.open(of_run(Run("long", History([graph]))).save(tmp_path / "long.html"), "#pass=all&node=n3")
    browser.wait(ITEM.format("n:n11"))
    assert browser.run(OUTSIDE) == []
    browser.run("document.querySelector('#before .edge').setAttribute('d', 'M-900 0L0 0')")
    assert len(browser.run(OUTSIDE)) == 1


CROSSED = """(() => {
  const found = [];
  const walk = (drawn) => {
    for (const { from, to, points } of drawn.edges) {
      const path = svg("path", { d: curve(points) }), length = path.getTotalLength();
      for (const item of drawn.items.filter((i) => i.key !== from && i.key !== to))
        for (let at = 0; at <= length; at += 3) {
          const { x, y } = path.getPointAtLength(at);
          if (x > item.x + 1 && x < item.x + item.w - 1 && y > item.y + 1 && y < item.y + item.h - 1) found.push([from, to, item.key, at]);
        }
    }
    for (const item of drawn.items) if (item.inner) walk(item.inner);
  };
  walk(layout(state.view, "", state));
  return found;
})()"""


def test_no_edge_runs_behind_a_box(browser: Browser, tmp_path: Path) -> None:
    """A tall open module stands in a row with small nodes: edges from above to those, and past it, keep clear of it."""

    def node(name: str, *inputs: str, region: str = "") -> Node:
        return Node(name, "mine.op" if inputs else "input", inputs, ", ".join("%" * len(inputs)) or name, region, "float32[2]")

    names = [f"t{i}" for i in range(20)]
    tall = [node(name, before, region="tall") for before, name in zip(["x", *names], names, strict=False)]
    made = [node("x"), node("y"), *tall, node("small", "x", "y"), node("last", "t19", "small", "y", "x")]
    graph = Graph({n.name: n for n in made}, {"": "M", "tall": "Tall"}, {"tall": ""})
    browser.open(of_run(Run("tall", History([graph]))).save(tmp_path / "tall.html"), "#pass=all&node=t3")
    browser.wait(ITEM.format("n:t19"))
    assert browser.run(CROSSED) == []
    assert browser.run(CROSSED.replace("curve(points)", "'M0 0L' + (drawn.w / 2) + ' ' + drawn.h")) != []


class Order(nn.Module):
    """A relu behind the second linear, or before it."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.early = nn.Linear(8, 8), nn.Linear(8, 8), early

    def forward(self, x):
        return self.b(self.a(x).relu()) if self.early else self.b(self.a(x)).relu()


def test_what_ran_in_another_order_points_back(browser: Browser, tmp_path: Path) -> None:
    """The edge that went from the linear down to the relu runs up to it now, from box to box."""
    found = fxc.diff(Order(False).eval(), Order(True).eval(), (seeded(2, 8),))
    browser.open(found.save(tmp_path / "order.html"), "#node=linear_1")
    drawn = "layout(state.view, '', state)"
    (edge,) = browser.run(f"{drawn}.edges.filter((e) => e.from === 'r:b' && e.to === 'n:relu')")
    boxes = browser.run(f"Object.fromEntries({drawn}.items.map((i) => [i.key, [i.y, i.y + i.h]]))")
    assert edge["state"] == "removed" and boxes["r:b"][0] > boxes["n:relu"][1]
    assert [edge["points"][0]["y"], edge["points"][-1]["y"]] == pytest.approx([boxes["r:b"][0], boxes["n:relu"][1]])
    assert browser.run(CROSSED) == []
    assert browser.errors == []


def test_inputs_that_did_not_change_are_told_as_such(at: Any) -> None:
    browser = at("#pass=2")
    assert browser.run("shown(state.view, '', state)[0].node") == "x", "one stands as it is"


# other diffs


def empty() -> Diff:
    graph = Graph({}, {"": ""}, {})
    return Diff([], Step("all passes", graph, graph, {}), [Run("nothing", History([graph]))])


def test_an_empty_run(browser: Browser, tmp_path: Path) -> None:
    browser.open(empty().save(tmp_path / "empty.html"))
    assert shown(browser, "#overview")
    browser.open(tmp_path / "empty.html", "#pass=all")
    assert shown(browser, "#graph")
    assert browser.errors == []


def test_two_unrelated_programs(browser: Browser, tmp_path: Path) -> None:
    first, second = captured(nn.Conv2d(1, 2, 3), seeded(2, 1, 8, 8)), captured(Net(), seeded(2, 16))
    browser.open(between(run_of(first), run_of(second)).save(tmp_path / "two.html"), "#pass=all")
    browser.wait("document.querySelector('#before .item.removed') && document.querySelector('#before .item.added')")
    assert browser.errors == []


def test_a_program_without_modules_is_shown_in_parts(browser: Browser, tmp_path: Path) -> None:
    """A flat graph of 3 000 nodes: dagre never sees more than one part of it."""
    nodes = {"n0": Node("n0", "input", (), "n0", "", "float32[2]")}
    nodes |= {f"n{i}": Node(f"n{i}", "aten.relu.default", (f"n{i - 1}",), "%", "", "float32[2]") for i in range(1, 3000)}
    run = Run("flat", History([Graph(nodes, {"": "M"}, {})]))
    browser.open(of_run(run).save(tmp_path / "flat.html"), "#pass=all")
    assert browser.run("document.querySelectorAll('#before .part').length") == 3000 // 48 + 1
    browser.click("#before .part")
    browser.wait("document.querySelectorAll('#before .node').length === 48")
    assert browser.errors == []


def test_states_of_a_whole_run(model: fxc.CompiledModel) -> None:
    """A reader of a quantised weight hasn't changed: it reads what stands for the weight."""
    run = run_in(model.folder)
    found = of_run(run).whole.states
    assert set(found.values()) == {"added", "removed"}
    assert {run.history.graphs[-1].nodes[n].op for n, s in found.items() if s == "added"} == {
        "constant",
        "fxc.unpack.default",
        "fxc.dequantize.default",
    }
    assert found == states(
        run.history.graphs[0], run.history.graphs[-1], {f"blocks_{i}_{w}_weight": f"dequantize_default{s}" for (i, w), s in NAMES.items()}
    )
    assert page(of_run(run)) == model.diff().html()


NAMES = {(i, w): f"_{2 * i + j}" if 2 * i + j else "" for i in range(4) for j, w in enumerate(("up", "down"))}
