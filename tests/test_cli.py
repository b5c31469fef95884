"""The command line: every command as text and as JSON, the exit codes scripts rely on, and Ctrl-C."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

import fxcompress as fxc
from fxcompress import cli, registry
from fxcompress.diff.journal import BESIDES
from fxcompress.passes.quant import finalize, weight_only
from fxcompress.recipe import shipped

MODELS = '''
import torch
from torch import nn


class Tapped(nn.Module):
    """fc2's weight is added to as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu()) + self.fc2.weight.sum()


def with_example():
    return Tapped().eval(), (torch.ones(2, 8),)


def alone():
    return Tapped().eval()


def example():
    return {"x": torch.ones(3, 8)}


def training():
    return Tapped(), (torch.ones(2, 8),)


class Named(Tapped):
    def forward(self, hidden):
        return super().forward(hidden)


def other():
    return Named().eval()


def hidden():
    return {"hidden": torch.ones(3, 8)}


def broken():
    return missing
'''
RECIPE = "name: mine\npasses: [{quant.weight_only: {weights: int8/channel}}, quant.finalize]\nbackend: reference\n"
WITH_EXAMPLE = "cli_models:with_example"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with models and a recipe."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "err", cli.Console(stderr=True, highlight=False, width=200))
    monkeypatch.setattr(cli, "out", cli.Console(highlight=False, width=200))
    yield tmp_path
    sys.modules.pop("cli_models", None)


def call(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def as_json(*args: object, code: int = 0) -> Any:
    result = call(*args, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def text(*args: object, code: int = 0) -> str:
    result = call(*args)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def out(place: Path) -> Path:
    text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out")
    return place / "out"


# compile


def test_compile(place: Path) -> None:
    shown = text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out")
    assert "cli_models:with_example -> out" in shown
    assert "quant.weight_only" in shown
    assert "1/2" in shown, "one of two sites"
    assert re.search(r"quant.finalize +│ +\S+ │ +0 │ equal +│", shown), "not a dash in dB"
    assert ": fc2_weight is also read by sum_1, not as a weight" in shown
    x = torch.randn(5, 8)
    assert fxc.load(place / "out")(x).shape == (5, 4)


def test_compile_as_json(place: Path) -> None:
    report = as_json("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out")
    assert report == json.loads((place / "out/report.json").read_text())
    assert [p["fired"] for p in report["passes"]] == [1, 1]


def test_compile_says_where_contracts_were_not_checked(place: Path) -> None:
    shown = text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out", "--check", "off")
    assert "contracts were not checked pass by pass (check=off)" in shown
    assert as_json("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out", "--check", "end")["check"] == "end"


def test_compile_with_examples(place: Path) -> None:
    """From a function, from tensors, and the model's own replaced."""
    assert as_json("compile", "cli_models:alone", "-r", "mine.yaml", "-o", "a", "--example", "cli_models:example")["passes"]
    save_file({"x": torch.ones(4, 8)}, place / "x.safetensors")
    as_json("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "b", "--example", "x.safetensors")
    assert as_json("bench", "b", "--runs", 1)["inputs"] == {"x": [4, 8]}


def test_compile_a_shipped_recipe_on_another_backend(place: Path) -> None:
    report = as_json("compile", WITH_EXAMPLE, "-r", "int8-weight-only", "-o", "out", "--backend", "reference")
    assert (report["recipe"]["name"], report["backend"]["name"]) == ("int8-weight-only", "reference")


def test_compile_replaces_its_own_output_only(out: Path) -> None:
    text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out")
    (out.parent / "other").mkdir()
    (out.parent / "other/file").write_text("mine")
    shown = text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "other", code=1)
    assert shown.startswith("ArtifactError: the output folder holds something else\n")
    assert (out.parent / "other/file").read_text() == "mine"


ERRORS: dict[str, tuple[list[str], dict[str, str]]] = {
    "an unknown recipe": (
        [WITH_EXAMPLE, "-r", "int8-wieght-only", "-o", "out"],
        {
            "error": "RecipeError",
            "what": "unknown recipe 'int8-wieght-only'",
            "where": "",
            "why": "did you mean 'int8-weight-only'?",
            "state": "",
            "do": "name a shipped recipe or a .yaml file",
        },
    ),
    "no example": (
        ["cli_models:alone", "-r", "mine.yaml", "-o", "out"],
        {
            "error": "InputError",
            "what": "no example inputs",
            "where": "cli_models:alone",
            "why": "capture runs the model once on them",
            "state": "",
            "do": "--example FILE.safetensors, or --example package.module:function",
        },
    ),
    "a model in train mode": (
        ["cli_models:training", "-r", "mine.yaml", "-o", "out"],
        {
            "error": "CaptureError",
            "what": "the model is in train mode",
            "where": "<root>",
            "why": "3 modules have training=True",
            "state": "",
            "do": "model.eval()",
        },
    ),
    "an unreadable example": (
        [WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out", "--example", "no.safetensors"],
        {
            "error": "InputError",
            "what": "the example inputs can't be read",
            "where": "no.safetensors",
            "why": "No such file or directory: no.safetensors",
            "state": "",
            "do": "write them with safetensors.torch.save_file",
        },
    ),
}


@pytest.mark.parametrize(("args", "expected"), ERRORS.values(), ids=ERRORS)
def test_errors(args: list[str], expected: dict[str, str], place: Path) -> None:
    """As JSON every field, as text the whole message on standard error; exit code 1 and nothing written."""
    assert as_json("compile", *args, code=1) == expected
    result = call("compile", *args)
    lines = [f"  {k:<6}{expected[k]}" for k in ("where", "why", "state", "do") if expected[k]]
    assert result.stderr == "\n".join([f"{expected['error']}: {expected['what']}", *lines]) + "\n"
    assert result.stdout == ""
    assert result.exit_code == 1
    assert not (place / "out").exists()


WRONG_USAGE = [
    ["compile", WITH_EXAMPLE, "-o", "out"],
    ["compile", WITH_EXAMPLE, "-r", "mine.yaml"],
    ["compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out", "--check", "some"],
    ["compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out", "--chekc", "each"],
    ["bench", "out", "--runs", "0"],
    ["bench", "out", "--runs", "many"],
    ["explain", "out"],
    ["diff"],
    ["diff", WITH_EXAMPLE, "--text", "--json"],
    ["inspect"],
    ["no-such-command"],
    [],
]


@pytest.mark.parametrize("args", WRONG_USAGE, ids=" ".join)
def test_wrong_usage_exits_2(args: list[str], place: Path) -> None:
    assert call(*args).exit_code == 2


# the other commands


def test_inspect(place: Path) -> None:
    facts = as_json("inspect", WITH_EXAMPLE)
    assert facts["inputs"] == {"x": ["batch", 8]}
    assert facts["outputs"] == {"output": ["batch", 4]}
    assert facts["origin"] == WITH_EXAMPLE
    rows = {r["path"]: r for r in facts["regions"]}
    assert {k: r["class"] for k, r in rows.items()} == {"": "Tapped", "fc1": "Linear", "fc2": "Linear"}
    assert rows[""]["parameters"] == 8 * 8 + 8 + 8 * 4 + 4
    assert rows["fc1"]["parameters"] == 8 * 8 + 8
    assert rows[""]["nodes"] == 1 + 4 + 2 + 1 + 2  # input, parameters, linears, relu, sum and addition
    shown = text("inspect", WITH_EXAMPLE)
    assert "input x [batch, 8]" in shown
    assert "fc1" in shown


def test_inspect_with_recipes_and_a_file(place: Path) -> None:
    facts = as_json("inspect", WITH_EXAMPLE, "--recipes", "-o", "inspect.html")
    assert [r["recipe"] for r in facts["recipes"]] == shipped()
    assert (place / "inspect.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    shown = text("inspect", WITH_EXAMPLE, "--recipes")
    assert "w8a8-llm: reparam.smooth would decline " in shown
    assert "operations: " in shown


def test_inspect_with_an_example(place: Path) -> None:
    assert as_json("inspect", "cli_models:alone", "--example", "cli_models:example")["inputs"] == {"x": ["batch", 8]}
    assert as_json("inspect", "cli_models:alone", code=1)["what"] == "no example inputs"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("example_inputs=(tensor, ...) or {name: tensor}", "--example FILE.safetensors, or --example package.module:function"),
        ('component="unet"', "--component unet"),
        ('backend="reference" runs it; or say int4', "--backend reference runs it; or say int4"),
        ("compile again with x in example_inputs, or leave it out", "compile again with x in --example, or leave it out"),
        ("a unet component = one", "a unet component = one"),
    ],
)
def test_messages_name_the_options_of_the_command_line(said: str, shown: str) -> None:
    assert cli.spoken(said) == shown


@pytest.mark.parametrize("command", [["inspect"], ["diff"], ["compile", "-r", "mine.yaml", "-o", "out"]], ids=lambda c: c[0])
def test_an_exception_of_the_user_s_own_code(command: list[str], place: Path) -> None:
    """Which one, and its line."""
    said = as_json(*command, "cli_models:broken", code=1)
    assert (said["error"], said["what"], said["where"]) == ("CaptureError", "the function raises NameError", "cli_models:broken")
    line = 1 + MODELS[: MODELS.index("return missing")].count("\n")
    assert said["why"] == f"NameError: name 'missing' is not defined\nat {place / 'cli_models.py'}:{line}  return missing"
    assert "Traceback" not in call(*command, "cli_models:broken").output


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("x = 1 / 0\n", "ZeroDivisionError: division by zero\nat {}:1  x = 1 / 0"),
        ("def x(:\n", "SyntaxError: invalid syntax (broken_models.py, line 1)\nat {}:1"),
        ("\nimport no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'\nat {}:2  import no_such_package"),
    ],
)
def test_a_module_that_cannot_be_imported(code: str, why: str, place: Path) -> None:
    (place / "broken_models.py").write_text(code)
    said = as_json("inspect", "broken_models:model", code=1)
    assert said["why"] == why.format(place / "broken_models.py")
    assert said["what"].startswith("importing 'broken_models' raises ")


def test_what_is_compiled_already_is_no_model(out: Path) -> None:
    """Its folder is recognised, and what shows it is named."""
    text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "other", "--checkpoint", "run")
    for folder, what in (("out", "an artifact: a model that is compiled"), ("run", "a checkpoint of a compilation")):
        said = as_json("inspect", folder, code=1)
        assert (said["what"], said["where"], said["why"]) == ("the folder holds no model", folder, f"it is {what}")
        assert said["do"].startswith(f"fxcompress diff {folder} shows its graphs, fxcompress explain {folder} NODE one place; or pass ")
    assert as_json("explain", "run", "fc1") == as_json("explain", "out", "fc1")


def test_passes() -> None:
    rows = as_json("passes")["passes"]
    assert [r["pass"] for r in rows] == registry.passes()
    assert all(r["what"] and r["contract"] in ("exact", "bounded", "lossy") for r in rows)
    assert "quant.weight_only" in text("passes")


def test_one_pass() -> None:
    row = as_json("passes", "quant.weight_only")
    assert row["doc"] == weight_only.__doc__.strip()  # type: ignore[union-attr]
    assert [o["option"] for o in row["options"]] == ["weights", "embeddings", "symmetric", "range", "storage"]
    assert text("passes", "quant.weight_only").startswith("Weights as integers or 8-bit floats, activations as they are.\n")
    assert as_json("passes", "quant.wieght_only", code=1)["why"] == "did you mean 'quant.weight_only'?"


def test_recipes() -> None:
    assert [r["recipe"] for r in as_json("recipes")["recipes"]] == shipped()
    assert "int4-weight-only" in text("recipes")


def test_one_recipe() -> None:
    assert as_json("recipes", "int4-weight-only")["passes"][-1]["use"] == "quant.finalize"
    assert text("recipes", "int4-weight-only").startswith("name: int4-weight-only\n")
    assert as_json("recipes", "int4", code=1)["error"] == "RecipeError"


def test_one_recipe_of_the_users_own(place: Path) -> None:
    """A path shows that file."""
    assert as_json("recipes", "mine.yaml")["name"] == "mine"
    assert text("recipes", "mine.yaml").rstrip() == RECIPE.rstrip()


# diff


def test_diff(out: Path) -> None:
    shown = text("diff", "out", "--text")
    assert shown.startswith("cli_models:with_example, mine\n")
    assert "declined fc2: fc2_weight is also read by sum_1" in shown
    assert not (out.parent / "diff.html").exists()
    assert text("diff", "out") == "diff.html: cli_models:with_example, mine\n"
    assert (out.parent / "diff.html").read_text(encoding="utf-8") == (out / "report.html").read_text(encoding="utf-8")


def test_diff_refuses_another_suffix_before_it_works(place: Path) -> None:
    """The model isn't even looked for."""
    refused = as_json("diff", "nothing", "-o", "y.dot", code=1)
    assert (refused["where"], refused["do"]) == ("y.dot", "name it y.html, or ask for --format dot")
    assert not (place / "y.dot").exists()


def test_diff_of_two(out: Path) -> None:
    found = as_json("diff", "out", WITH_EXAMPLE, "-o", "two.dot", "--format", "dot")
    assert found["file"] == "two.dot"
    assert "unpack_default" in found["steps"][0]["removed"] and "fc1_weight" in found["steps"][0]["added"]
    assert (out.parent / "two.dot").read_text().startswith("digraph {")
    assert as_json("diff", WITH_EXAMPLE, WITH_EXAMPLE)["steps"][0] == {
        "name": "comparison",
        **{s: [] for s in ("added", "removed", "changed", "moved", "rewired")},
        "written": {},
        "alike": {},
    }


def test_diff_with_a_model_alone(out: Path) -> None:
    """It takes the artifact's example inputs."""
    assert "unpack_default" in as_json("diff", "out", "cli_models:alone")["steps"][0]["removed"]


def test_diff_with_an_example_for_each(place: Path) -> None:
    """One for both, in the names of the first, or one each; not more than there are models."""
    both = ["diff", "cli_models:alone", "cli_models:other", "--example", "cli_models:example"]
    for examples in ([], ["--example", "cli_models:hidden"]):
        (step,) = as_json(*both, *examples)["steps"]
        assert (step["added"], step["removed"], step["changed"]) == ([], [], ["x"]), "what the input is called"
    assert call(*both, "--example", "cli_models:hidden", "--example", "cli_models:hidden").exit_code == 2
    assert call("diff", "cli_models:alone", "--example", "cli_models:example", "--example", "cli_models:hidden").exit_code == 2


def test_diff_of_equals_says_so(out: Path) -> None:
    same = "no node differs: the same operations, arguments, shapes and weights\n"
    assert text("diff", "out", "out", "--text").endswith(same)
    assert text("diff", "out", "out", "-o", "same.html").endswith(same)
    assert as_json("diff", "out", "out")["is_same"]
    assert same not in text("diff", "out", WITH_EXAMPLE, "--text")


def test_diff_of_a_pipeline_s_component(place: Path) -> None:
    assert as_json("diff", WITH_EXAMPLE, "--component", "unet", code=1)["what"] == "--component unet has no meaning here"


def test_diff_of_nothing(place: Path) -> None:
    assert call("diff", "out", "--format", "pdf").exit_code == 2
    assert as_json("diff", "nowhere", code=1)["error"] == "CaptureError"


def test_explain(out: Path) -> None:
    found = as_json("explain", "out", "fc1")
    assert found["node"] == "fc1"
    assert [(r["pass"], r["what"]) for r in found["found"]][:2] == [("quant.weight_only", "changed"), ("quant.weight_only", "held")]
    assert "int8 in blocks of [1, -1]" in text("explain", "out", "fc1")
    declined = as_json("explain", "out", "fc2.weight")["found"]
    assert [r["what"] for r in declined] == ["declined"]
    assert text("explain", "out", "relu") == "no pass touched relu\n"
    shown = text("explain", "out", "fc1")
    assert f"to leave it out, in place of the recipe's line ({BESIDES}):\n{found['found'][0]['exclude']}\n" in shown
    assert "quant.finalize: can't be left out alone: codes are stored for every quantised weight" in shown
    assert as_json("explain", "out", "relu")["found"] == []


@pytest.mark.parametrize(
    ("where", "module", "node", "words"),
    [
        ('exclude: [fc2, "*c1"]', "fc1", "linear", 'the recipe leaves it out: where: {exclude: ["*c1"]}'),
        ('include: [fc1, "fc[13]"]', "fc2", "linear_1", 'the recipe doesn\'t include it: where: {include: ["fc1", "fc[13]"]}'),
    ],
)
def test_explain_tells_what_the_recipe_excludes(where: str, module: str, node: str, words: str, place: Path) -> None:
    """The glob that does it, asked by module, node or constant."""
    (place / "mine.yaml").write_text(RECIPE.replace("int8/channel", f"int8/channel, where: {{{where}}}"))
    text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out")
    for name in (module, f"{module}.weight", node):
        (row,) = (r for r in as_json("explain", "out", name)["found"] if r["what"] == "excluded")
        assert (row["pass"], row["site"], row["why"]) == ("quant.weight_only", f"{module}  ({node})", words)
        assert words in text("explain", "out", name)


def test_explain_numbers_a_pass_that_runs_again(place: Path) -> None:
    steps = ["{quant.weight_only: {weights: int4/channel, where: {exclude: [fc1]}}}", "{quant.weight_only: {weights: int8/channel}}"]
    (place / "mine.yaml").write_text(RECIPE.replace("{quant.weight_only: {weights: int8/channel}}", ", ".join(steps)))
    text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out")
    found = {r["pass"]: r["what"] for r in as_json("explain", "out", "fc1")["found"] if r["what"] in ("changed", "excluded")}
    assert found == {"quant.weight_only": "excluded", "quant.weight_only (2)": "changed", "quant.finalize": "changed"}


def test_explain_an_unknown_name(out: Path) -> None:
    assert as_json("explain", "out", "fc12", code=1)["why"].startswith("did you mean 'fc2' or 'fc1'")
    assert text("explain", "out", "fc12", code=1).startswith("InputError: the artifact has no 'fc12'\n")


def test_bench(out: Path) -> None:
    facts = as_json("bench", "out", "--runs", 2, "--threads", 1)
    assert (facts["runs"], facts["threads"], facts["inputs"]) == (2, 1, {"x": [2, 8]})
    assert 0 < facts["least_ms"] <= facts["median_ms"]
    assert "median_ms" in text("bench", "out", "--runs", 1)


def test_explain_tells_the_worst_of_each_site(out: Path) -> None:
    """In three digits, with its limit and the value."""
    report = json.loads((out / "report.json").read_text())
    (check,) = report["passes"][0]["checks"]
    held = [r["why"] for r in as_json("explain", "out", "fc1")["found"] if r["what"] == "held"]
    assert held[0] == f"{check['figure']:.3g} >= {check['limit']:.3g} dB at {check['value']}"


def test_an_unknown_name_is_told_the_known_ones(out: Path) -> None:
    """The root module has no name to be listed."""
    assert ": ," not in as_json("explain", "out", "zzzzzzzz", code=1)["why"]


LONG = "a_module_whose_name_is_so_long_that_no_terminal_of_eighty_columns_can_show_it_in_a_single_line_together_with_the_rest"


def test_nothing_is_cut_in_a_pipe(place: Path) -> None:
    """Neither a name nor a sentence, whatever the columns; a terminal of 80 columns wraps them."""
    (place / "cli_models.py").write_text(MODELS.replace("self.fc1", f"self.{LONG}").replace("self.fc1, ", f"self.{LONG}, "))
    text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "long")
    for command in (["inspect", WITH_EXAMPLE], ["explain", "long", LONG]):
        shown = text(*command)
        assert LONG in shown and "…" not in shown
        narrow = in_terminal(80, *command)
        lines = [line for line in narrow.splitlines() if not line.startswith("- ")]
        assert max(map(len, lines)) <= 80 and "…" not in narrow


@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_word_is_lost_in_a_narrow_terminal(width: int, out: Path) -> None:
    """Every word that a wide one shows, but for the heads of columns, which rows one under the other have only where they are filled; and no
    line is wider than the terminal, but for a recipe's, which stays one to be copied."""
    compiling = ["compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out"]
    for command in (["inspect", WITH_EXAMPLE, "--recipes"], ["explain", "out", "fc1"], ["passes"], compiling):
        wide, narrow = (in_terminal(columns, *command) for columns in (1000, width))
        words = {w for line in wide.splitlines() if line[:1] != "┃" for w in line.split() if w.isascii()}
        squeezed = re.sub(r"\s", "", narrow)
        assert [w for w in words if w not in squeezed and not re.fullmatch(r"\d+\.\d", w)] == [], "seconds differ"
        assert max(len(line) for line in narrow.splitlines() if not line.startswith("- ")) <= width


def in_terminal(columns: int, *command: str) -> str:
    """What a terminal of that width shows."""
    console = cli.Console(highlight=False, width=columns, force_terminal=True, color_system=None)
    with pytest.MonkeyPatch.context() as patch, console.capture() as captured:
        patch.setattr(cli, "out", console)
        assert call(*command).exit_code == 0
    return captured.get()


@pytest.mark.parametrize("command", [["passes"], ["diff", WITH_EXAMPLE, "--text"]], ids=" ".join)
def test_a_full_disk_is_no_traceback(command: list[str], place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        run = [sys.executable, "-m", "fxcompress", *command]
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (1, "the output can't be written: No space left on device\n")


@pytest.mark.slow
def test_another_encoding_stops_nothing(out: Path) -> None:
    command = [sys.executable, "-c", "from fxcompress.cli import app; app()", "diff", "out", "out", "--text"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert done.stdout.startswith("the first, out: cli_models:with_example, mine \\u2192 the second, out: cli_models:with_example, mine\n")


@pytest.mark.parametrize("module", ["fxcompress", "fxcompress.cli"])
def test_python_m_is_the_command_line(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, "bench", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "ArtifactError: no artifact there")


@pytest.mark.parametrize("command", [["bench", "nowhere"], ["explain", "nowhere", "x"]])
def test_no_artifact(command: list[str], place: Path) -> None:
    assert as_json(*command, code=1)["what"] == "no artifact there"


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = as_json("doctor")
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert (facts["passes"], facts["backends"], facts["broken"]) == (registry.passes(), registry.backends(), {})
    assert "quant.finalize" in text("doctor") and facts["absent"] == {}
    kind = registry.find_backend("openvino")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(kind, "absent", lambda: "pip install 'fxcompress[openvino]'")
        assert as_json("doctor")["absent"] == {"openvino": "pip install 'fxcompress[openvino]'"}
        assert "pip install 'fxcompress[openvino]'" in text("doctor")
    monkeypatch.setattr(registry, "broken", lambda: {"quant.finalize": "ImportError: no module named x"})
    assert as_json("doctor", code=1)["broken"] == {"quant.finalize": "ImportError: no module named x"}
    assert "ImportError: no module named x" in call("doctor").stdout


# being stopped

IMPORTING = """
import sys, time
print("importing", file=sys.stderr, flush=True)
try:
    time.sleep(60)
except {caught}:
    pass
time.sleep(60)
"""
SCRIPT = "import sys; sys.argv[0] = '/usr/bin/fxcompress'; from fxcompress.cli import app; app()"
COMMANDS = {"script": ["-c", SCRIPT, "doctor"], "module": ["-m", "fxcompress", "doctor"], "cli": ["-m", "fxcompress.cli", "doctor"]}


def interrupted(command: list[str], caught: str, folder: Path) -> tuple[int, str]:
    """What a command says after "importing" when it is stopped there, in the import of a torch that catches some exceptions."""
    (folder / "torch.py").write_text(IMPORTING.format(caught=caught))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored, and so would the command
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, handler)
    assert process.stderr is not None and process.stderr.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    return process.returncode, said


@pytest.mark.parametrize("caught", ["ImportError", "BaseException"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_ctrl_c_while_torch_is_imported(command: list[str], caught: str, tmp_path: Path) -> None:
    """Neither a traceback nor a signal that some import swallows."""
    assert interrupted(command, caught, tmp_path) == (130, "stopped; nothing was written\n")


def test_ctrl_c_is_that_of_the_program_that_imports(tmp_path: Path) -> None:
    """Which may say it as it likes, and may be called with the package's name."""
    code = "try:\n import fxcompress\nexcept KeyboardInterrupt: sys.exit(7)"
    assert interrupted(["-c", f"import sys\n{code}", "-m", "fxcompress"], "ImportError", tmp_path) == (7, "")


@pytest.mark.parametrize("as_text", [True, False])
def test_ctrl_c_in_a_pass(as_text: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_only, "mse_range", stop)
    before = set(place.iterdir())
    result = call("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out", *([] if as_text else ["--json"]))
    assert result.exit_code == 130
    assert result.stderr.endswith("stopped; nothing was written\n")
    assert set(place.iterdir()) - {place / "__pycache__"} == before


def test_ctrl_c_leaves_a_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is kept; the same command goes on from there, and another recipe is refused."""
    command = ["compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out", "--checkpoint", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(finalize.Finalize, "apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = call(*command)
    assert (result.exit_code, result.stderr) == (130, "stopped; 1 finished pass is kept in run; the same call goes on from there\n")
    assert not (place / "out").exists()
    (place / "mine.yaml").write_text(RECIPE.replace("int8", "int4"))
    refused = as_json(*command, code=1)
    assert (refused["what"], refused["where"]) == ("the checkpoint is of another run", "run")
    assert refused["why"].splitlines()[1] == "pass 1, quant.weight_only.weights: int4/channel, was int8/channel"
    (place / "mine.yaml").write_text(RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr(weight_only.WeightOnly, "apply", lambda *_: pytest.fail("a finished pass ran again"))
        assert [p["fired"] for p in as_json(*command)["passes"]] == [1, 1]


def test_an_error_says_what_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise fxc.BackendRefusal("planted")

    monkeypatch.setattr(finalize.Finalize, "apply", fail)
    said = text("compile", WITH_EXAMPLE, "-r", "mine.yaml", "-o", "out", "--checkpoint", "run", code=1)
    assert said == (
        "BackendRefusal: planted\n  state program as before this pass; 1 finished passes are kept\n"
        "1 finished pass is kept in run; the same call goes on from there\n"
    )


SLOW = """
import signal, sys, time
from fxcompress import cli
from fxcompress.passes.quant import weight_only
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored


def slow(*_):
    sys.stderr.write("in the pass\\n")
    sys.stderr.flush()
    time.sleep(60)


weight_only.mse_range = slow
cli.app(["compile", "cli_models:with_example", "-r", "mine.yaml", "-o", "out"])
"""


@pytest.mark.slow
def test_a_real_ctrl_c(place: Path) -> None:
    """The signal a terminal sends, to a process of its own."""
    environment = {**os.environ, "TMPDIR": str(place / "temporary"), "OMP_NUM_THREADS": "1"}
    (place / "temporary").mkdir()
    process = subprocess.Popen([sys.executable, "-c", SLOW], cwd=place, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = ""
    while "in the pass" not in said:
        said += (line := process.stderr.readline())
        assert line, said
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "stopped; nothing was written" in said
    assert "Traceback" not in said
    assert not (place / "out").exists()
    assert not [p for p in (place / "temporary").iterdir() if "fxcompress" in p.name]
