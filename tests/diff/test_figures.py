"""Figures of a statically quantised network: each is the one that its words promise, wherever it is shown."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fxcompress as fxc
from fxcompress.diff import LOWERED, NOT_LOWERED, between
from fxcompress.diff.read import run_at
from fxcompress.diff.text import ON_PURPOSE, figure
from fxcompress.report import Check, PassReport, worst_of
from tests.diff.browser import Browser
from tests.passes.helpers import seeded


def network() -> nn.Module:
    """Two convolutions, whose biases become integers of 32 bits, and a linear, whose bias stays in float."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()
    layers = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return layers.eval()


@pytest.fixture(scope="module")
def model() -> fxc.CompiledModel:
    return fxc.compile(network(), "int8", (seeded(2, 3, 16, 16),), [(seeded(2, 3, 16, 16),)] * 2)


@pytest.fixture(scope="module")
def out(model: fxc.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("figures") / "out")


def done(model: fxc.CompiledModel, name: str) -> PassReport:
    return next(p for p in model.report.passes if p.name == name)


def test_a_pass_s_figure_is_the_worst_and_not_the_one_nearest_its_limit(model: fxc.CompiledModel) -> None:
    """Of a bias, whose codes have 32 bits, the SQNR is far above that of the rest and nearer its limit."""
    report = done(model, "quant.insert")
    least = min(report.checks, key=lambda c: c.figure or 0)
    nearest = min(report.checks, key=lambda c: (c.figure or 0) - (c.limit or 0))
    assert (nearest.figure or 0) > (least.figure or 0) + 20, "else the test can't tell them apart"
    assert report.worst == least
    assert f"bounded: {least.figure:.3g} >= {least.limit:.3g} dB" in model.diff().text()


@pytest.mark.parametrize(
    ("unit", "figures", "worst"), [("dB", [50.0, 41.0, None], 41.0), ("relative error", [1e-6, 0.0, 2e-6], 2e-6), ("dB", [None], None)]
)
def test_the_worst(unit: str, figures: list[float | None], worst: float | None) -> None:
    """None in dB is infinity: equal."""
    checks = [Check(site="s", value="v", figure=f, limit=0.0, verdict="held", why="") for f in figures]
    found = worst_of(checks, unit)
    assert found is not None and found.figure == worst


def test_explain_tells_the_worst_figure_of_a_site(model: fxc.CompiledModel, out: Path) -> None:
    report = done(model, "quant.insert")
    rows = [r for r in fxc.api.explain(out, "3") if r["pass"] == report.name and r["what"] == "held"]
    site = next(r["site"] for r in rows if "the worst of" in r["why"])
    least = min((c for c in report.checks if c.site == site), key=lambda c: c.figure or 0)
    assert next(r["why"] for r in rows if r["site"] == site).startswith(
        f"{least.figure:.3g} >= {least.limit:.3g} dB at {least.value}, the worst"
    )


def test_what_changed_on_purpose_is_not_equal(model: fxc.CompiledModel, out: Path) -> None:
    """A corrected bias: its codes differ, and of codes there is no SQNR; that of the float layer is measured."""
    report = done(model, "quant.bias_correction")
    (linear,) = (c for c in report.checks if not c.unmeasured)
    assert linear.value == "linear"
    assert figure(report) == f"{linear.figure:.3g} dB at linear"
    assert figure(report.model_copy(update={"checks": report.checks[:1], "worst": worst_of(report.checks[:1], "dB")})) == ON_PURPOSE
    told = {r["site"]: (r["what"], r["why"]) for r in fxc.api.explain(out, "") if r["pass"] == report.name and r["what"] != "changed"}
    assert told == {
        "0  (conv2d_default)": ("not measured", "changed on purpose, at 2 values"),
        "3  (conv2d_default_1)": ("not measured", "changed on purpose, at 2 values"),
        "8  (linear)": ("held", f"{linear.figure:.3g} dB at linear"),
    }


@pytest.mark.parametrize(
    ("node", "values"),
    [
        ("dequantize_default", ["dequantize_default"]),
        ("conv2d_default", ["dequantize_default", "dequantize_default_5", "dequantize_default_7"]),
    ],
)
def test_a_card_shows_every_check_of_its_node(node: str, values: list[str], model: fxc.CompiledModel, browser: Browser, tmp_path: Path) -> None:
    """A convolution is one site three times: for its input, its weight and its bias."""
    report = done(model, "quant.insert")
    browser.open(model.diff().save(tmp_path / "diff.html"), f"#pass={report.name}&node={node}")
    shown = browser.run(
        "[...document.querySelectorAll('#card .history > li')].map((e) => [e.innerText, e.querySelectorAll('.histogram').length])"
    )
    ours = [(words, histograms) for words, histograms in shown if words.startswith(report.name)]
    found = {c.value: c for c in report.checks}
    assert len(ours) == len(values)
    for (words, histograms), value in zip(ours, values, strict=True):
        assert f"{float(f'{found[value].figure:.3g}'):g} dB" in words and f"held at {value}" in words
        assert histograms == 1
    assert browser.errors == []


@pytest.mark.parametrize("name", ["größe_layer", "linear", "größe_layer.weight"])
def test_explain_knows_an_operation_by_its_own_name(name: str, tmp_path: Path) -> None:
    """As it stands in the parentheses of a site."""
    layers = nn.Sequential(OrderedDict({"größe_layer": nn.Linear(8, 8), "relu": nn.ReLU()})).eval()
    report = fxc.compile(layers, "int8-weight-only", (seeded(2, 8),), backend="reference").save(tmp_path / "out")
    rows = [r for r in fxc.api.explain(report, name) if r["pass"] == "quant.weight_only"]
    assert [(r["site"], r["what"]) for r in rows] == [("größe_layer  (linear)", "changed"), ("größe_layer  (linear)", "held")]


def test_explain_knows_what_was_done_to_a_value_of_a_module(out: Path) -> None:
    """The ReLU's result is quantised where the convolution after it reads it."""
    rows = [r for r in fxc.api.explain(out, "2") if r["pass"] == "quant.insert"]
    assert [(r["site"], r["what"], r["why"]) for r in rows][:1] == [("3  (conv2d_default_1)", "changed", "relu as uint8/tensor")]
    assert [r["why"].split(" at ")[1] for r in rows if r["what"] == "held"] == ["dequantize_default_1, the worst of 3 values"]


def test_operations_are_told_with_their_sizes(browser: Browser, tmp_path: Path) -> None:
    """A language model with a cache is counted at the second half of the call: 8 of 16 tokens, behind 8 past ones."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    found = fxc.inspect(transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(32).reshape(2, 16)})
    sizes = found.facts()["sizes"]
    assert sorted(sizes.values()) == [2, 8, 8] and found.facts()["regions"][0]["flops"] > 0
    told = f"at {', '.join(f'{name}={size}' for name, size in sizes.items())}"
    assert f"FLOP {told}, " in found.diff.text()
    browser.open(found.save(tmp_path / "inspect.html"))
    page = browser.run("document.body.innerText")
    assert f"Modules, {told}" in page and told in browser.run("document.querySelector('.tiles').innerText")
    browser.open(tmp_path / "inspect.html", "#pass=all&node=linear")
    assert told in browser.run("document.querySelector('#card').innerText")
    assert browser.errors == []


def test_the_output_is_compared_with_what_was_measured_where_it_was(model: fxc.CompiledModel, out: Path) -> None:
    """A checkpoint isn't lowered yet: its figure is the interpreter's, and so is the artifact's beside it."""
    finished = replace(run_at(out), report=model.report.model_copy(update={"output_sqnr": 47.25}))  # kernels that round lose more than these
    kept = replace(finished, report=None)
    before, after = finished.sqnrs[NOT_LOWERED], finished.sqnrs[LOWERED]
    assert before is not None and after == 47.25 and abs(before - after) > 1, "else the test can't tell them apart"
    assert f"output SQNR {before:.1f} dB -> {before:.1f} dB before lowering\n" in between(kept, finished).text()
    assert f"output SQNR {after:.1f} dB -> {after:.1f} dB on the backend\n" in between(finished, finished).text()
    assert f"output SQNR – -> {after:.1f} dB on the backend\n" in between(replace(kept, passes=()), finished).text()
    assert f"– → {after:.1f} dB" in between(replace(kept, passes=()), finished).html()
    unlike = between(replace(finished, passes=()), kept)
    assert f"output SQNR {after:.1f} dB on the backend -> {before:.1f} dB before lowering\n" in unlike.text()
    for words in (f"{before:.1f} dB → {before:.1f} dB", "lowest output, before lowering", "output SQNR, on the backend"):
        assert words in between(kept, finished).html()
    assert f"{after:.1f} dB on the backend → {before:.1f} dB before lowering" in unlike.html()


def test_a_forecast_counts_sites_as_a_compilation_does(model: fxc.CompiledModel) -> None:
    """A convolution is a site for its input, its weight and its bias, and again for every other pass."""
    (row,) = fxc.inspect(network(), (seeded(2, 3, 16, 16),), recipes=["int8"]).facts()["recipes"]
    places = {c.site for p in model.report.passes for c in p.changes}
    assert row["sites"] == sum(p.fired for p in model.report.passes) > len(places)
