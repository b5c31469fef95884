"""Text, other formats, and where the sides of a diff come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress import api, checkpoint
from fxcompress.diff import Run, Step, between
from fxcompress.diff.exports import as_dot, as_model_explorer
from fxcompress.diff.read import _unfinished, model_name, run_at, run_in, run_of
from fxcompress.diff.recipes import differing
from fxcompress.diff.text import change, grouped, number, quantity
from fxcompress.history import Graph, Node
from tests.passes.helpers import lines, seeded

PASSES: list[Any] = ["tidy.fold_constants", {"quant.weight_only": {"weights": "int8/channel"}}, "quant.finalize"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return x + self.fc(x)


class Net(nn.Module):
    """Three blocks, then a weight that is added to as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(3)]), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) + (self.head.weight + x.mean()).sum()


def compiled(passes: list[Any] = PASSES, **options: Any) -> fxc.CompiledModel:
    return fxc.compile(Net().eval(), {"name": "mine", "passes": passes}, (seeded(2, 4),), backend="reference", **options)


@pytest.fixture(scope="module")
def model() -> fxc.CompiledModel:
    return compiled()


def test_the_whole_text(model: fxc.CompiledModel) -> None:
    """Operations: four linears of 2·2·4·4, four additions of 8, 8 + 16 + 16 for weight + x.mean() and its sum. Bytes: four weights of 64; then
    three of 16 with 16 of scales, one of 64. The figures are the report's own."""
    report = model.report
    worst, sqnr = report.passes[1].worst, report.passes[1].output_sqnr
    assert worst is not None and worst.figure is not None and worst.limit is not None
    flops = 4 * 64 + 4 * 8 + 8 + 16 + 16
    assert lines(model.diff().text()) == lines(
        f"""
        Net, mine

        1  tidy.fold_constants  0 sites, 0 declined
        exact: nothing to measure
        256 B, {flops} FLOP at batch=2, 17 -> 17 nodes

        2  quant.weight_only  3 sites, 1 declined
        bounded: {worst.figure:.3g} >= {worst.limit:.3g} dB at {worst.value}  output {sqnr:.1f} dB
        256 B -> 304 B, {flops} FLOP at batch=2, 17 -> 26 nodes
        declined head: head_weight is also read by add_3, not as a weight

        3  quant.finalize  3 sites, 0 declined
        exact: equal
        304 B -> 160 B, {flops} FLOP at batch=2, 26 -> 26 nodes

        in all  256 B -> 160 B, {flops} FLOP at batch=2, 17 -> 26 nodes

        2  quant.weight_only: 9 added, 3 read another value
        blocks.0.fc  (the same in blocks.1–2)
        + blocks_0_fc_weight_scale = constant weight.scale  float32[4, 1]
        + quantize_default = fxc.quantize(blocks_0_fc_weight, blocks_0_fc_weight_scale, None, 'int8', [1, -1])  int8[4, 4]
        + dequantize_default = fxc.dequantize(quantize_default, blocks_0_fc_weight_scale, None, 'int8', [1, -1])  float32[4, 4]
        linear reads dequantize_default instead of blocks_0_fc_weight

        3  quant.finalize: 6 added, 6 removed, 3 read another value
        blocks.0.fc  (the same in blocks.1–2)
        - blocks_0_fc_weight = constant weight  float32[4, 4]
        + blocks_0_fc_weight_packed = constant weight.packed  uint8[4, 4]
        + unpack_default = fxc.unpack(blocks_0_fc_weight_packed, 'int8', 4)  int8[4, 4]
        - quantize_default = fxc.quantize(blocks_0_fc_weight, blocks_0_fc_weight_scale, None, 'int8', [1, -1])  int8[4, 4]
        dequantize_default reads unpack_default instead of quantize_default
        """
    )


def test_modules_stand_in_the_order_in_which_they_run() -> None:
    """Constants stand at the head of a graph, in the order of registration."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.last(self.first(x).relu())

    torch.manual_seed(0)
    model = Backwards().eval()
    text = api.diff(model, Backwards().eval(), (seeded(2, 4),)).text()
    assert text.index("\n  first\n") < text.index("\n  last\n")


def test_two_runs_give_the_same_text(model: fxc.CompiledModel) -> None:
    assert model.diff().text() == compiled().diff().text()


def test_changed_content_is_told_by_its_statistics() -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([0.5, -1.5, 2.0, 3.0]).repeat(4, 1))
    found = api.diff(Net().eval(), model.eval(), (seeded(2, 4),))
    assert found.whole.states == {"head_weight": "changed"}
    low, high, mean, std, checksum = found.whole.before.nodes["head_weight"].statistics
    was = f"[{low:.4g}, {high:.4g}], mean {mean:.4g}, deviation {std:.4g}, checksum {checksum:08x}"
    assert f"        content: {was} -> [-1.5, 3], mean 1, deviation {11.5**0.5 / 2:.4g}, " in found.text(), "√((0.25 + 6.25 + 1 + 4) / 4)"


def test_the_same_numbers_in_another_order_are_a_change() -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(0).clone())
    assert api.diff(Net().eval(), model.eval(), (seeded(2, 4),)).whole.states == {"head_weight": "changed"}


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (538_060_000, "538 MB"), (1.5e15, "1.5e+03 TB")])
def test_quantities(value: float, text: str) -> None:
    assert quantity(value, "B") == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (2_810_123, 2_812_456, "2.810 MB -> 2.812 MB"),
        (999, 1001, "999 B -> 1 kB"),
        (999, 998, "999 B -> 998 B"),
        (6_661_000, 6_661_053, "6.66 MB -> 6.66 MB (+53 B)"),
        (10**18, 10**18 - 1000, "1e+06 TB -> 1e+06 TB (-1 kB)"),
        (5, 5, "5 B"),
        (0, 7, "0 B -> 7 B"),
    ],
)
def test_unequal_figures_look_unequal(before: int, after: int, text: str) -> None:
    assert change(before, after, "B") == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (2.46e-6, "2.5e-6"), (1e-4, "1e-4"), (0.001234, "0.00123"), (41.06, "41.1"), (1234.0, "1230"), (3e5, "3e5")]
)
def test_figures(value: float, text: str) -> None:
    assert number(value) == text


def test_lines_that_differ_in_numbers_alone_are_counted() -> None:
    """A name's number may be missing: of two the first has none."""
    assert [*grouped(["h.0: index is read", "h.0: index_1 is read", "h.1: index_2 is read", "h.1: bias is read"])] == [
        "h.0: index is read  (and 2 alike)",
        "h.1: bias is read",
    ]


def test_how_far_a_pass_moved_a_weight() -> None:
    """A norm's gain of 3 goes into the weight that reads it: |3 w - w| / |w| = 2. In each block, with figures of its own."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 4)) for _ in range(3)])
            for block in self.blocks:
                nn.init.constant_(block[0].weight, 3.0)

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    model = fxc.compile(Normed().eval(), {"passes": ["tidy.fold_norm_gain"]}, (seeded(2, 4),), backend="reference")
    told = model.diff().text()
    assert told.count("  moved by 200%\n") == 1
    assert "  blocks.0.1  (the same in blocks.1–2, with contents of their own)\n" in told
    written = model.diff().summary()["steps"][0]["written"]
    assert {written[f"blocks_{i}_1_weight"]["moved"] for i in range(3)} == {2.0}


# where the sides come from


def test_an_artifact(model: fxc.CompiledModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "out")
    assert api.diff(folder).text() == model.diff().text() == fxc.load(folder).diff().text()


def test_an_artifact_without_its_history(model: fxc.CompiledModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "out")
    (folder / "history.json").unlink()
    with pytest.raises(fxc.ArtifactError, match="the artifact is incomplete"):
        api.diff(folder)


def test_checkpoints_of_a_run(tmp_path: Path, model: fxc.CompiledModel) -> None:
    """After one pass and after three; what lies between is what the other two did."""
    program = fxc.capture(Net().eval(), (seeded(2, 4),))
    options: dict[str, Any] = {"backend": "reference"}
    fxc.compile(program, {"passes": PASSES}, checkpoint=tmp_path / "late", **options)
    fxc.compile(program, {"passes": PASSES[:1]}, checkpoint=tmp_path / "early", **options)
    assert [p.name for p in run_at(tmp_path / "early").passes] == ["tidy.fold_constants"]
    assert run_at(tmp_path / "early").title == "Net, unnamed, checkpoint"
    assert api.diff(tmp_path / "early", tmp_path / "late").title == "early: Net, unnamed, checkpoint → late: Net, unnamed, checkpoint"
    found = api.diff(tmp_path / "early", tmp_path / "late")
    assert found.was == {}
    assert {found.whole.nodes[n].op for n in found.whole.states} == {
        "constant",
        "fxc.unpack.default",
        "fxc.dequantize.default",
        "aten.linear.default",
    }
    assert found.whole.before == run_at(tmp_path / "early").history.graphs[-1]


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The checkpoint of a run that ended in its second pass of three."""

    def stop(name: str, finished: int, *_: object) -> None:
        if finished == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(checkpoint=tmp_path / "killed", progress=stop)
    return tmp_path / "killed"


def test_an_unfinished_run_says_so(killed: Path, model: fxc.CompiledModel, tmp_path: Path) -> None:
    """With its recipe, what it has and what it lacks; alone, and where it is compared."""
    told = "1 of 3 passes finished; still to come: quant.weight_only, quant.finalize"
    assert api.diff(killed).text().splitlines()[:3] == ["Net, mine, checkpoint", told, ""]
    assert api.diff(killed).summary()["runs"][0]["unfinished"] == told
    assert '["Not a finished run","1 of 3 passes finished","still to come: quant.weight_only, quant.finalize"]' in api.diff(killed).html()
    found = api.diff(killed, model.save(tmp_path / "out"))
    assert found.text().splitlines()[1] == f"killed: Net, mine, checkpoint: {told}"
    assert f'["not a finished run","{told}","–"]' in found.html()
    assert all("finished" not in made for made in (model.diff().text(), model.diff().summary()["runs"][0]["unfinished"]))
    compiled(checkpoint=killed)
    assert run_at(killed).unfinished == ""


def test_what_is_lowered_last_is_told(killed: Path) -> None:
    """All passes are through, and there is no artifact yet; a checkpoint from before plans were kept knows less."""
    compiled(checkpoint=killed)
    state = {**checkpoint.stored_state(killed), "is_lowered": False}
    assert _unfinished(state) == "3 of 3 passes finished; still to come: lowering to the backend"
    assert _unfinished({**state, "plan": None}).startswith("3 passes finished, and no artifact made; the checkpoint doesn't say")


class Three(nn.Module):
    """Blocks that run in some order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [Block() for _ in range(3)]
        self.blocks = nn.ModuleList([blocks[i] for i in order])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_that_changed_places_each_say_so() -> None:
    """All three read another value than before, and not alike: none is folded into another."""
    told = api.diff(Three(0, 1, 2).eval(), Three(1, 0, 2).eval(), (seeded(2, 4),)).text()
    assert "(the same in" not in told and "alike" not in told
    assert "renamed blocks.0 -> blocks.1\nrenamed blocks.1 -> blocks.0\n" in told
    assert all(f"\n  blocks.{i}" in told for i in range(3))


def test_a_run_against_its_model_changes_what_its_passes_did(model: fxc.CompiledModel) -> None:
    """What reads another value in the place of its own isn't counted, in either order."""
    assert model.diff(Net().eval()).whole.states == model.diff().whole.states
    turned = {"added": "removed", "removed": "added"}
    assert fxc.diff(model, Net().eval()).whole.states == {name: turned[state] for name, state in model.diff().whole.states.items()}


def test_two_programs() -> None:
    found = api.diff(fxc.capture(Net().eval(), (seeded(2, 4),)), Net().eval(), (seeded(2, 4),))
    assert found.whole.states == {}
    same = "no node differs: the same operations, arguments, shapes and weights\n"
    assert found.text() == f"the first, Net → the second, Net\n\nin all  256 B, 328 FLOP, 17 -> 17 nodes\noperations at batch=2\n{same}"
    assert found.is_same and found.summary()["is_same"]
    other = Net()
    with torch.no_grad():
        other.head.weight.mul_(2)
    found = api.diff(Net().eval(), other.eval(), (seeded(2, 4),))
    assert not found.is_same and same not in found.text()
    assert same not in fxc.inspect(Net().eval(), (seeded(2, 4),)).diff.text(), "of one graph there is nothing to say"


class Otherwise(Net):
    """Its argument has another name."""

    def forward(self, hidden, *, gain=None):
        made = super().forward(hidden)
        return made if gain is None else made * gain


class Scaled(Net):
    def forward(self, x, scale=None):
        made = super().forward(x)
        return made if scale is None else made * scale


EXAMPLES: dict[str, Any] = {"order": (seeded(2, 4),), "name": {"x": seeded(2, 4)}, "two": {"x": seeded(2, 4), "scale": seeded(4)}}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_arguments_of_other_names_are_taken_in_order(example: Any) -> None:
    """From a compiled model, a program, and an example given for both."""
    program = fxc.capture(Scaled().eval(), example)
    made = fxc.compile(program, {"passes": ["tidy.fold_constants"]}, backend="reference")
    for found in (made.diff(Otherwise().eval()), fxc.diff(program, Otherwise().eval()), fxc.diff(Scaled().eval(), Otherwise().eval(), example)):
        assert all(found.whole.nodes[n].op == "input" for n in found.whole.states), "what they are called, at most"


def test_each_side_has_its_own_example() -> None:
    found = fxc.diff(Net().eval(), Otherwise().eval(), (seeded(2, 4),), second_inputs={"hidden": seeded(2, 4), "gain": seeded(4)})
    assert "added" in found.whole.states.values()
    with pytest.raises(fxc.InputError, match="the inputs don't fit"):
        fxc.diff(Net().eval(), Otherwise().eval(), (seeded(2, 4),), second_inputs={"x": seeded(2, 4)})


def test_the_summary_says_what_the_text_says(model: fxc.CompiledModel) -> None:
    """Every word of the text beside its own phrases, and what is folded there."""
    found = model.diff().summary()
    (side,) = found["runs"]
    _, second, third = side["passes"]
    assert [d["reason"] for d in second["declined"]] == ["head_weight is also read by add_3, not as a weight"]
    assert (second["fired"], second["worst"]["limit"], second["bytes"]) == (3, model.report.passes[1].worst.limit, [256, 304])  # type: ignore[union-attr]
    assert (third["nodes"], found["nodes"], found["bytes"]) == ([26, 26], [17, 26], [256, 160])
    assert side["output_sqnr"]["on the backend"] == model.report.output_sqnr
    step = found["steps"][2]
    assert step["alike"] == {"blocks.1": "blocks.0", "blocks.2": "blocks.0"}
    assert step["written"]["dequantize_default"]["was"].startswith("dequantize_default = fxc.dequantize(quantize_default, ")
    held = json.dumps(found)
    for line in model.diff().text().partition("2  quant.weight_only: ")[2].splitlines():
        if " = " in line:
            assert json.dumps(line.strip().lstrip("+-~ "))[1:-1] in held
    compared = api.diff(Net().eval(), Net().eval(), (seeded(2, 4),)).summary()
    assert [r["title"] for r in compared["runs"]] == ["the first, Net", "the second, Net"]


def test_content_and_place_of_what_changed_are_in_the_summary() -> None:
    other = Net()
    with torch.no_grad():
        other.head.weight.mul_(2)
    written = fxc.diff(Net().eval(), other.eval(), (seeded(2, 4),)).summary()["steps"][0]["written"]
    assert written["head_weight"]["content"] != written["head_weight"]["content_was"]


@pytest.mark.parametrize(("a", "b"), [((2, True), (6, True)), ((6, True), (2, True)), ((2, False), (6, True)), ((6, True), (2, False))])
def test_examples_of_other_sizes_save_nothing(a: tuple[int, bool], b: tuple[int, bool]) -> None:
    """Operations are compared at one size: the first one's, or the one that a side is fixed to."""
    sides = [fxc.capture(Net().eval(), (seeded(batch, 4),), dynamic=None if dynamic else False) for batch, dynamic in (a, b)]
    found = api.diff(*sides)
    fixed = next((batch for batch, dynamic in (a, b) if not dynamic), a[0])
    assert found.whole.before.flops == found.whole.after.flops == (4 * 32 + 4 * 4 + 4) * fixed + 16 + 16
    assert "FLOP ->" not in found.text()


def test_sizes_that_cannot_be_the_same_are_told() -> None:
    sides = [fxc.capture(Net().eval(), (seeded(batch, 4),), dynamic=False) for batch in (2, 6)]
    assert api.diff(*sides).sizes == "each at the sizes of its own example: an input is [2, 4] and [6, 4]"
    run = run_of(fxc.capture(Net().eval(), (seeded(2, 4),)))
    old = Run("old", replace(run.history, sizes={}))
    assert between(old, old).sizes == "each at the sizes of its own example: nothing says what batch was"
    graph = run.history.graphs[0]
    bad = Graph({n: replace(v, formula="__import__('os')" if v.formula else "") for n, v in graph.nodes.items()}, graph.kinds, graph.parents)
    assert "can't be computed" in between(run, Run("bad", replace(run.history, graphs=[bad]))).sizes


def test_a_compiled_model_and_another(model: fxc.CompiledModel) -> None:
    other = compiled([PASSES[0], {"quant.weight_only": {"weights": "int4/channel"}}, PASSES[2]])
    found = other.diff(model)
    assert set(found.whole.states.values()) == {"changed"}
    assert any("'int4'" in line and line.startswith("    ~") for line in found.text().splitlines())


def test_recipes_of_two_runs_are_compared(model: fxc.CompiledModel, tmp_path: Path) -> None:
    """Options that differ, what only one says, and passes that only one has; nothing against itself or a model."""
    mine: list[Any] = [{"quant.weight_only": {"weights": "int4/channel", "where": {"exclude": ["head"]}}}, "quant.finalize"]
    found = compiled(mine).diff(model)
    first, _ = found.labels
    start = found.text().index("recipe options that differ")
    assert found.text()[start:].splitlines()[1:5] == [
        "   quant.weight_only  weights: int8/channel -> int4/channel",
        '   quant.weight_only  where: – -> {exclude: ["head"]}',
        f"   tidy.fold_constants  only in {first}",
        "",
    ]
    assert found.summary()["recipes"][1] == {
        "pass": "quant.weight_only",
        "option": "weights",
        "first": "int8/channel",
        "second": "int4/channel",
    }
    assert found.summary()["recipes"][0] == {"pass": "tidy.fold_constants", "option": "", "first": "runs", "second": "–"}
    assert '"title":"Recipe options that differ","head":["pass","option",' in found.html()
    for same in (model.diff(model), model.diff(Net().eval())):
        assert same.summary()["recipes"] == [] and "recipe options" not in same.text() and "Recipe options" not in same.html()


def test_a_pass_that_is_named_again_has_a_number() -> None:
    mine: list[Any] = ["tidy.fold_constants", "tidy.fold_constants", *PASSES[1:]]
    found = compiled(mine).diff(compiled()).summary()["recipes"]
    assert [(d["pass"], d["option"], d["first"], d["second"]) for d in found] == [("tidy.fold_constants (2)", "", "–", "runs")]


def test_another_order_of_passes_is_told(model: fxc.CompiledModel) -> None:
    fold, weights, codes = model.report.passes
    runs = [
        Run(title, model.diff().runs[0].history, passes) for title, passes in (("a", (fold, weights, codes)), ("b", (weights, fold, codes)))
    ]
    found = [(d.name, d.option, d.first, d.second) for d in differing(between(*runs))]
    assert found == [
        ("tidy.fold_constants", "place", "1 of 3 in both", "2 of 3 in both"),
        ("quant.weight_only", "place", "2 of 3 in both", "1 of 3 in both"),
    ]


def test_folders_are_named_as_far_as_they_differ(model: fxc.CompiledModel, tmp_path: Path) -> None:
    places = [model.save(tmp_path / name) for name in ("a/out", "b/out", "a/other")]
    titles = [api.diff(places[i], places[j]).title for i, j in ((0, 1), (0, 2), (0, 0))]
    assert titles == [
        "a/out: Net, mine → b/out: Net, mine",
        "out: Net, mine → other: Net, mine",
        "the first, out: Net, mine → the second, out: Net, mine",
    ]
    assert api.diff(places[0]).title == "Net, mine", "a run's page is the same wherever it lies"
    assert api.diff(places[0], places[1]).text().count("\nof ") == 2


@pytest.mark.parametrize(
    ("origin", "shown"),
    [
        ("GGUF LlamaForCausalLM from /home/me/models/smol.gguf", "GGUF LlamaForCausalLM from smol.gguf"),
        ("diffusers unet from C:\\models\\unet", "diffusers unet from unet"),
        ("package.module:function", "package.module:function"),
        ("", "Net"),
    ],
)
def test_titles_name_no_folders(origin: str, shown: str, model: fxc.CompiledModel) -> None:
    """A page that was sent by mail says nothing of its sender's machine."""
    assert model_name(origin, run_in(model.folder).history) == shown


def test_a_model_takes_the_example_of_what_it_is_compared_with(model: fxc.CompiledModel, tmp_path: Path) -> None:
    """Of a compiled model, an artifact and a program, on either side."""
    folder = model.save(tmp_path / "out")
    program = fxc.capture(Net().eval(), (seeded(2, 4),), dynamic=False)
    for other in (model, folder, program):
        found, back = api.diff(other, Net().eval()), api.diff(Net().eval(), other)
        assert found.sizes.startswith("at ")
        assert {"added": "removed", "removed": "added"}.get(back.whole.states.get("unpack_default", "")) == found.whole.states.get(
            "unpack_default"
        )
    assert api.diff(program, Net().eval()).whole.states == {}, "fixed where that is"
    assert model.diff(Net().eval()).whole.states == api.diff(Net().eval(), model).whole.states != {}, (
        "the model as it was is what it differs from"
    )
    with pytest.raises(fxc.InputError, match="no example inputs"):
        api.diff(Net().eval(), Net().eval())


@pytest.mark.parametrize("name", ["llama", "unet2d_cond"])
def test_a_real_model_is_captured_as_the_compiled_one_was(name: str) -> None:
    """Cache, roles and arguments by name included: nothing differs."""
    from tests.passes.helpers import zoo
    from tests.zoo import ZOO

    program, (module, _) = zoo(name), ZOO[name]()
    assert program.symbols
    found = api.diff(program, module)
    assert found.whole.states == {}
    assert found.sizes == f"at {', '.join(f'{k}={v}' for k, v in run_of(program).history.sizes.items())}"


def test_every_object_of_a_checkpoint_is_checked(tmp_path: Path) -> None:
    """Also those that a diff has no need to read."""
    fxc.compile(fxc.capture(Net().eval(), (seeded(2, 4),)), {"passes": PASSES}, backend="reference", checkpoint=tmp_path / "run")
    run_at(tmp_path / "run")
    for file in sorted((tmp_path / "run/objects").iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(fxc.ArtifactError, match="the checkpoint was altered") as caught:
            api.diff(tmp_path / "run")
        assert caught.value.where == str(file)
        file.write_bytes(content)
    file.unlink()
    with pytest.raises(fxc.ArtifactError, match="the checkpoint is incomplete"):
        api.diff(tmp_path / "run")


def test_a_checkpoint_is_explained(tmp_path: Path) -> None:
    made = fxc.compile(fxc.capture(Net().eval(), (seeded(2, 4),)), {"passes": PASSES}, backend="reference", checkpoint=tmp_path / "run")
    rows = api.explain(tmp_path / "run", "blocks.0.fc")
    assert [(r["pass"], r["what"]) for r in rows[:2]] == [("quant.weight_only", what) for what in ("changed", "held")]
    assert rows == api.explain(made.save(tmp_path / "out"), "blocks.0.fc")


class Twice(nn.Module):
    """The second convolution reads what the first, which stores its result, quantises."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = self.first(x).relu()
        return x + self.second(x)


def test_what_is_excluded_is_told_where_another_site_changes_its_value(tmp_path: Path) -> None:
    """The site stands at the node that the recipe leaves out, as the reader of the value, on behalf of the other."""
    insert = {"quant.insert": {"weights": "int8/channel", "activations": "uint8/tensor", "where": {"exclude": ["second"]}}}
    feed = [seeded(1, 3, 8, 8)]
    made = fxc.compile(Twice().eval(), {"passes": [insert, "quant.finalize"]}, (feed[0],), feed, backend="onnxruntime")
    rows = [(r["pass"], r["what"], r["why"]) for r in api.explain(made.save(tmp_path / "out"), "second")]
    assert ("quant.insert", "changed", "relu as uint8/tensor") in rows
    assert ("quant.insert", "excluded", 'the recipe leaves it out: where: {exclude: ["second"]}') in rows
    assert not [r for r in api.explain(tmp_path / "out", "first") if r["what"] == "excluded"]


def test_diff_is_a_function() -> None:
    """The package of that name is imported as fxcompress.diff all the same."""
    import importlib

    assert fxc.diff is api.diff
    assert importlib.import_module("fxcompress.diff").of_run is not None


def test_a_place_that_cannot_be_written(model: fxc.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fxc.ArtifactError, match="the file can't be written"):
        model.diff().save(tmp_path / "file/diff.html")


# other formats


def test_networkx(model: fxc.CompiledModel) -> None:
    graph = model.diff().graph()
    step = model.diff().whole
    assert set(graph.nodes) == set(step.nodes)
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.nodes["unpack_default"]["state"] == "added" and graph.nodes["linear"]["state"] == "same"
    assert graph.edges["blocks_0_fc_weight", "linear"]["graph"] == "before"
    assert graph.edges["dequantize_default", "linear"]["graph"] == "after"
    assert graph.edges["linear", "add"]["graph"] == "both"


def test_dot(model: fxc.CompiledModel) -> None:
    made = as_dot(model.diff().whole)
    assert made.count("{") == made.count("}")
    assert '"unpack_default" [label="+ fxc.unpack.default\\nunpack_default", color="#136c31", penwidth=2];' in made
    assert 'subgraph "cluster blocks.0.fc" { label="blocks.0.fc";' in made
    assert '"blocks_0_fc_weight" -> "linear" [style=dashed];' in made


def test_dot_quotes_names() -> None:
    graph = Graph({'a"b\\': Node('a"b\\', "op", (), "", "", "")}, {"": ""}, {})
    assert '"a\\"b\\\\" [label="op\\na\\"b\\\\"];' in as_dot(Step("", graph, graph, {}))


def test_dot_spells_out_what_turns_text_around() -> None:
    name = "a\u202eb\u2066"
    graph = Graph({name: Node(name, "op", (), "", name, "")}, {"": "", name: name}, {name: ""})
    made = as_dot(Step("", graph, graph, {}))
    assert not set(made) & set(name) - {"a", "b"}
    assert '[label="op\\na\\\\u202eb\\\\u2066"]' in made


def test_model_explorer(model: fxc.CompiledModel) -> None:
    """Every edge starts at a node of its own graph; a module is a path of namespaces."""
    made = json.loads(as_model_explorer(model.diff()))
    assert [g["id"] for g in made["graphs"]] == ["before", "after"]
    for graph in made["graphs"]:
        names = {n["id"] for n in graph["nodes"]}
        assert all(e["sourceNodeId"] in names for n in graph["nodes"] for e in n["incomingEdges"])
    linear = next(n for n in made["graphs"][1]["nodes"] if n["id"] == "linear")
    assert linear["namespace"] == "blocks.0/fc"
    assert [e["sourceNodeId"] for e in linear["incomingEdges"]] == ["x", "dequantize_default"]
    assert len(json.loads(as_model_explorer(fxc.inspect(Net().eval(), (seeded(2, 4),)).diff))["graphs"]) == 1


@pytest.mark.parametrize(
    ("format", "start"), [("html", "<!doctype html>"), ("text", "Net, mine"), ("dot", "digraph {"), ("model-explorer", "{")]
)
def test_formats_are_saved(format: Any, start: str, model: fxc.CompiledModel, tmp_path: Path) -> None:
    assert model.diff().save(tmp_path / "deep/file", format).read_text(encoding="utf-8").startswith(start)


@pytest.mark.parametrize(
    ("name", "format", "do"),
    [
        ("y.dot", "html", "name it y.html, or ask for the format 'dot'"),
        ("y.txt", "html", "name it y.html, or ask for the format 'text'"),
        ("x.json", "html", "name it x.html, or ask for the format 'model-explorer'"),
        ("x.pdf", "html", "name it x.html"),
        ("x.HTML", "dot", "name it x.dot, or ask for the format 'html'"),
        (3, "html", "pass a str or a Path, such as 'diff.html'"),
    ],
)
def test_a_file_is_what_it_is_called(name: Any, format: Any, do: str, model: fxc.CompiledModel, tmp_path: Path) -> None:
    place = tmp_path / name if isinstance(name, str) else name
    with pytest.raises(fxc.InputError) as caught:
        model.diff().save(place, format)
    assert caught.value.do == do
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "format"), [("a.htm", "html"), ("a.gv", "dot"), ("a.log", "text")])
def test_a_file_of_another_usual_name_is_saved(name: str, format: Any, model: fxc.CompiledModel, tmp_path: Path) -> None:
    assert model.diff().save(str(tmp_path / name), format).is_file()


def test_an_inspection_is_no_other_file() -> None:
    with pytest.raises(fxc.InputError, match="isn't called so"):
        fxc.inspect(Net().eval(), (seeded(2, 4),)).save("x.json")


HOSTILE = "\x1b[31mred\nblue"


def test_names_cannot_drive_a_terminal() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(HOSTILE, nn.Linear(4, 4))

        def forward(self, x):
            return getattr(self, HOSTILE)(x)

    told = fxc.compile(Named().eval(), {"name": "t", "passes": PASSES}, (torch.randn(2, 4),), backend="reference").diff().text()
    assert "\x1b" not in told
    assert "\\x1b[31mred\\nblue" in told
