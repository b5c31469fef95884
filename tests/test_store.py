"""Programs on disk: every real program comes back bit-identical, nothing in the files is code, and a file that lies is an ArtifactError."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from fxcompress import store
from fxcompress.errors import ArtifactError, BackendRefusal
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.program import Program
from fxcompress.signature import INPUT, Inputs, Signature
from fxcompress.specialise import specialise
from tests.passes.helpers import captured, function, seeded, text, zoo
from tests.zoo import ZOO


def back(program: Program, folder: Path) -> Program:
    store.save_program(program, folder)
    return store.load_program(folder)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO))
def test_real_programs(name: str, tmp_path: Path) -> None:
    before, inputs = zoo(name), ZOO[name]()[1]
    after = back(before, tmp_path)
    assert [(n.name, n.op, n.target) for n in after.graph.nodes] == [(n.name, n.op, n.target) for n in before.graph.nodes]
    assert text(after) == text(before)
    for field in ("inputs", "outputs", "symbols", "states", "notes", "classes"):
        assert getattr(after, field) == getattr(before, field)
    assert all(same_bits(before.constants[k], v) for k, v in after.constants.items())
    assert before.constants.keys() == after.constants.keys()
    results = [run(p, before.example) for p in (before, after)]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    outputs = [p.signature.unflatten(r) for p, r in zip((before, after), results, strict=True)]
    assert type(outputs[0]) is type(outputs[1])
    assert all(same_bits(a, b) for a, b in zip(before.example, store.load_example(tmp_path), strict=True))
    assert len(after.signature.flatten(inputs)) == len(before.inputs)


def test_odd_arguments(tmp_path: Path) -> None:
    """Infinities, dtypes, devices, memory formats, None and booleans in a node's arguments."""
    bodies: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.masked_fill(x > 0, -math.inf).clamp(min=-3.0),
        lambda x: torch.full_like(x, math.nan).nan_to_num(posinf=1.0) + x,
        lambda x: x.to(torch.float64).sum(dtype=torch.float32, dim=[0], keepdim=True),
        lambda x: torch.arange(3, dtype=torch.int32, device="cpu") + x[:, :3],
        lambda x: x[None, None].contiguous(memory_format=torch.channels_last).clone(),
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda x: x[:, None, ::2].flatten(1) * 1j,
    ]
    program = function(lambda x: tuple(body(x) for body in bodies), seeded(2, 4))
    after = back(program, tmp_path)
    assert text(after) == text(program)
    assert all(same_bits(a, b) for a, b in zip(run(program, program.example), run(after, program.example), strict=True))


def test_shared_and_odd_tensors(tmp_path: Path) -> None:
    """Views of one storage, transposed, empty, 0-d, complex, half, float8 and boolean constants."""
    whole = seeded(8, 4)
    odd = {
        "whole": whole,
        "upper": whole[:4],
        "turned": whole[4:].t(),
        "empty": torch.zeros(0, 4),
        "also_empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.0),
        "rotation": torch.polar(torch.ones(4), torch.arange(4.0)),
        "brain": seeded(4, dtype=torch.bfloat16),
        "small": seeded(4).to(torch.float8_e4m3fn),
        "mask": torch.tensor([True, False, True, False]),
    }
    program = function(
        lambda x, whole, upper, turned, empty, also_empty, scalar, rotation, brain, small, mask: (
            torch.cat([empty, x @ whole.t() @ whole, also_empty]) * scalar + x @ upper + x @ turned,
            rotation * x,
            brain,
            small.float(),
            mask,
        ),
        seeded(2, 4),
        **odd,
    )
    after = back(program, tmp_path)
    assert all(same_bits(t, after.constants[k]) for k, t in program.constants.items())
    pairs = zip(run(program, program.example), run(after, program.example), strict=True)
    assert all(relative_error(a, b) < 1e-6 for a, b in pairs)  # a transposed tensor comes back contiguous, and sums go in another order


def test_one_tensor_given_twice_is_stored_twice(tmp_path: Path) -> None:
    program = dataclasses.replace(function(lambda x, y: x + y, seeded(2, 4), seeded(2, 4, seed=1)), example=(X := seeded(2, 4), X))
    store.save_program(program, tmp_path)
    assert all(torch.equal(t, X) for t in store.load_example(tmp_path))


@dataclasses.dataclass
class Answer:
    """A result class of a user."""

    value: Tensor
    extra: Tensor | None = None


Pair = namedtuple("Pair", "a b")


class Gives(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


RESULTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "tensor": (lambda x: x + 1, lambda x: x + 1),
    "tree": (lambda x: (x, {"a": [x * 2, None]}, 3, "s", None), lambda x: (x, {"a": [x * 2, None]}, 3, "s", None)),
    "integer keys": (lambda x: {1: x, 0: x * 2}, lambda x: {1: x, 0: x * 2}),
    "equal names": (lambda x: {"a": {"b": x}, "a_b": x * 2}, lambda x: {"a": {"b": x}, "a_b": x * 2}),
    "the user's dataclass": (lambda x: Answer(x + 1), lambda x: {"value": x + 1}),
    "the user's tuple": (lambda x: Pair(x, x * 2), lambda x: (x, x * 2)),
    "torch's tuple": (torch.sort, lambda x: tuple(torch.sort(x))),
}


@pytest.mark.parametrize(("made", "expected"), RESULTS.values(), ids=RESULTS)
def test_results(made: Callable[[Tensor], Any], expected: Callable[[Tensor], Any], tmp_path: Path) -> None:
    """Plain trees come back as they were; a class that can't be stored as a tuple or as a dict by name."""
    x = seeded(2, 4)
    after = back(captured(Gives(made), x), tmp_path)
    result, wanted = after.signature.unflatten(run(after, [x])), expected(x)
    assert type(result) is type(wanted)
    assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(wanted)
    leaves = zip(torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(wanted), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in leaves)
    assert len({v.name for v in after.outputs}) == len(after.outputs)


def test_a_bound_input_stays_bound(tmp_path: Path) -> None:
    bound = torch.tensor([0.1, -math.inf, math.nan])[:1]
    program = specialise(function(lambda x, t: x * t[:, None], seeded(2, 4), seeded(2), dynamic={"x": [0], "t": [0]}), {"t": bound})
    signature = back(program, tmp_path).signature
    assert len(signature.flatten(Inputs(torch.ones(3, 4), bound.expand(3)))) == 1
    leaf = next(leaf for leaf in signature.leaves if leaf is not INPUT)
    assert same_bits(leaf.value, bound)


def test_output_classes_of_other_libraries_are_not_imported(tmp_path: Path) -> None:
    """A module named as a result's class is imported for diffusers and transformers only."""
    program = function(lambda x: {"a": x + 1}, seeded(2, 4))
    store.save_program(program, tmp_path)
    data = json.loads((tmp_path / store.GRAPH).read_text())
    spec = json.loads(data["signature"]["out_spec"])
    spec[1]["type"] = "antigravity.Flight"
    data["signature"]["out_spec"] = json.dumps(spec)
    (tmp_path / store.GRAPH).write_text(json.dumps(data))
    assert store.load_program(tmp_path).signature.unflatten([X := seeded(2, 4)]) == {"a": X}
    assert "antigravity" not in __import__("sys").modules


OUTSIDE = [
    "os.system",
    "torch.load",
    "torch.ops.aten.add.Tensor",
    "builtins.eval",
    "aten.add",
    "aten.add.Tensor.default",
    "aten.no_such_op.default",
    "aten.add.NoSuchOverload",
    "aten.__class__.mro",
    "aten.from_file.default",  # maps any file, and makes one
    "aten.save.default",
    "fxc.no_such_op.default",
    "prims.add.default",
    "_operator.attrgetter",  # with `call` it reaches every function there is
    "_operator.call",
    "_operator.methodcaller",
    "_operator.setitem",
    "operator.add",
    "math.__loader__",
    "torch.sym_.x",
    "torch.hub",
    "",
    ".",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_op_outside_the_allowed_places(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown op"):
        store.find_op(name)
    store.save_program(function(lambda x: x.exp(), seeded(2, 4)), tmp_path)
    edit(tmp_path, lambda data: data["nodes"][1].update(target=name))
    with pytest.raises(ArtifactError) as caught:
        store.load_program(tmp_path)
    assert str(caught.value) == (
        f"the stored program can't be read\n  where {tmp_path}\n  why   ValueError: unknown op {name!r}\n  do    compile and save it again"
    )


def test_no_way_to_run_a_command(tmp_path: Path) -> None:
    """The chain that Python's operator module would allow: attributes by name, then a call."""
    store.save_program(function(lambda x: x.exp(), seeded(2, 4)), tmp_path)
    path = "__class__.__torch_function__.__func__.__globals__"
    getter = {"name": "g", "op": "call_function", "target": "_operator.attrgetter", "args": {"tuple": [path]}, "kwargs": {"dict": {}}}
    edit(tmp_path, lambda data: data["nodes"].insert(1, {**getter, "module": [], "shape": None}))
    with pytest.raises(ArtifactError, match=r"unknown op '_operator\.attrgetter'"):
        store.load_program(tmp_path)


def test_what_is_written_can_be_read() -> None:
    """`op_name` refuses what `find_op` would not give back."""
    for target in (torch.ops.aten.add.Tensor, torch.ops.fxc.unpack.default, *store.FUNCTIONS.values()):
        assert store.find_op(store.op_name(target)) is target
    with pytest.raises(BackendRefusal) as caught:
        store.op_name(os.system)
    assert str(caught.value) == "the function posix.system can't be stored\n  why   an artifact holds torch ops and size arithmetic only"


@torch.library.custom_op("storetest::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """2 x."""
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_custom_op_is_refused_with_its_name(tmp_path: Path) -> None:
    program = function(twice, seeded(2, 4))
    with pytest.raises(BackendRefusal) as caught:
        store.save_program(program, tmp_path)
    assert str(caught.value) == (
        "the custom op storetest.twice.default can't be stored\n"
        "  why   an artifact holds aten and fxc ops only\n"
        "  do    replace it in the model with torch's own ops"
    )


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / store.GRAPH).read_text())
    change(data)
    (folder / store.GRAPH).write_text(json.dumps(data))


def mutates(data: dict[str, Any]) -> None:
    data["nodes"][1].update(target="aten.exp_.default")


def reads_later(data: dict[str, Any]) -> None:
    data["nodes"][1]["args"] = {"tuple": [{"node": "nobody"}]}


def two_keys(data: dict[str, Any]) -> None:
    data["nodes"][1]["args"] = {"tuple": [], "list": []}


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an op that writes its argument": (
        mutates,
        "VerifierError: exp (call_function aten.exp_.default) is not legal in a program\n          why   no op may write its arguments",
    ),
    "a node that isn't there": (reads_later, "KeyError: 'nobody'"),
    "an argument of two kinds": (two_keys, "ValueError: a stored argument has the keys ['list', 'tuple']"),
    "a method call": (
        lambda d: d["nodes"][1].update(op="call_method", target="exp"),
        "VerifierError: exp (call_method exp) is not legal in a program\n          why   nodes are inputs, constants, functions and one output",
    ),
    "a constant that isn't there": (
        lambda d: d["nodes"].insert(0, {**d["nodes"][0], "name": "w", "op": "get_attr", "target": "w"}),
        "VerifierError: w (get_attr w) is not legal in a program\n          why   a constant node names an entry of constants",
    ),
    "no nodes": (lambda d: d.pop("nodes"), "KeyError: 'nodes'"),
    "another dtype": (lambda d: d["inputs"][0].update(dtype="torch.nope"), "KeyError: 'torch.nope'"),
    "nodes as text": (lambda d: d.update(nodes="exp"), "TypeError: string indices must be integers, not 'str'"),
}


@pytest.mark.parametrize(("lie", "why"), LIES.values(), ids=LIES)
def test_a_graph_that_lies(lie: Callable[[dict[str, Any]], Any], why: str, tmp_path: Path) -> None:
    store.save_program(function(lambda x: x.exp(), seeded(2, 4)), tmp_path)
    edit(tmp_path, lie)
    with pytest.raises(ArtifactError) as caught:
        store.load_program(tmp_path)
    assert str(caught.value) == f"the stored program can't be read\n  where {tmp_path}\n  why   {why}\n  do    compile and save it again"


@pytest.mark.parametrize("name", [store.GRAPH, store.CONSTANTS, store.EXAMPLE])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "noise", "a deep nest"])
def test_damaged_files(name: str, damage: str, tmp_path: Path) -> None:
    store.save_program(function(lambda x, w: x @ w, seeded(2, 4), w=seeded(4, 4)), tmp_path)
    path = tmp_path / name
    content = {"empty": b"", "truncated": path.read_bytes()[:-7], "noise": bytes(range(256)) * 9, "a deep nest": b"[" * 100_000}
    path.unlink() if damage == "missing" else path.write_bytes(content[damage])
    reader = store.load_example if name == store.EXAMPLE else store.load_program
    with pytest.raises(ArtifactError, match="can't be read"):
        reader(tmp_path)
    if name == store.GRAPH:
        with pytest.raises(ArtifactError, match="the stored signature can't be read"):
            store.load_signature(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    program = captured(Gives(torch.sort), seeded(2, 4))
    store.save_program(program, tmp_path)
    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail("a pickle was opened"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    after = store.load_program(tmp_path)
    store.load_example(tmp_path)
    assert run(after, program.example)
    for file in tmp_path.iterdir():
        assert b"\x80\x04" not in file.read_bytes()[:64], "a pickle's header"


def test_constants_stay_as_they_are_in_memory(tmp_path: Path) -> None:
    program = function(lambda x, w: x @ w, seeded(2, 4), w=seeded(4, 4).t())
    strides = program.constants["w"].stride()
    store.save_program(program, tmp_path)
    assert program.constants["w"].stride() == strides


def test_signature_survives_alone(tmp_path: Path) -> None:
    def forward(x, scale=1.5, mode="a", flags=(True, None), *, dtype=torch.float32, start=-math.inf):
        return x * scale

    program = function(forward, seeded(2, 4))
    store.save_program(program, tmp_path)
    (tmp_path / store.CONSTANTS).unlink()
    signature, inputs, symbols = store.load_signature(tmp_path)
    assert isinstance(signature, Signature)
    assert str(signature.parameters) == str(program.signature.parameters)
    assert (inputs, symbols) == (program.inputs, dict(program.symbols))


def test_a_node_argument_without_a_form_is_a_bug_with_its_type() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.exp.default, (object(),))
    with pytest.raises(TypeError, match="a node argument of type object can't be stored"):
        store._node(node)


def test_safetensors_hold_plain_tensors(tmp_path: Path) -> None:
    """What other tools read from the file is what the program computes with."""
    program = function(lambda x, w: x @ w, seeded(2, 4), w=seeded(4, 4))
    store.save_program(program, tmp_path)
    other = {k: v * 2 for k, v in load_file(tmp_path / store.CONSTANTS).items()}
    save_file(other, tmp_path / store.CONSTANTS)
    assert torch.equal(run(store.load_program(tmp_path), program.example)[0], 2 * run(program, program.example)[0])
