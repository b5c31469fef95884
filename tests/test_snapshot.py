"""Snapshots: after any pass the program comes back so that no later pass can tell, and neither can anything that is lowered from it."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxcompress import snapshot, store
from fxcompress.backends.onnx.onnxruntime import OnnxRuntimeBackend
from fxcompress.edit import Edit
from fxcompress.errors import VerifierError
from fxcompress.manager import Manager
from fxcompress.program import Program
from fxcompress.recipe import build, load_recipe
from tests.passes.helpers import function, node, seeded, zoo
from tests.zoo import ZOO

aten = torch.ops.aten
PASSES: list[Any] = [
    "tidy.fold_constants",
    "tidy.no_ops",
    "tidy.fold_batch_norm",
    "tidy.fold_norm_gain",
    "tidy.open_attention",
    "rotate.residual",
    "sparsity.remove_channels",
    "tidy.dead_code",
    {"quant.weight_only": {"weights": "int8/channel"}},
    "quant.finalize",
]


def back(program: Program, captured: Program, change: Callable[[dict[str, Any]], Any] = lambda data: None) -> Program:
    """The program through JSON and bytes."""
    stored: dict[str, bytes] = {}

    def put(content: memoryview) -> str:
        name = hashlib.sha256(content).hexdigest()
        stored[name] = bytes(content)
        return name

    data = json.loads(json.dumps(snapshot.take(program, captured, put)))
    change(data)
    return snapshot.restore(data, captured, lambda name: torch.tensor(list(stored[name]), dtype=torch.uint8))


def facts(program: Program) -> dict[str, Any]:
    """All that a pass or a backend may look at."""
    nodes, memory, constants = list(program.graph.nodes), dict[Any, int](), program.constants
    return {
        "stored": store.program_to_json(program),
        "readers": [[u.name for u in n.users] for n in nodes],
        "arguments": [[u.name for u in n.all_input_nodes] for n in nodes],
        "values": [(n.name, snapshot._form(n.meta.get("val")), n.meta.get("module")) for n in nodes],
        "places": [
            (n, t.stride(), t.storage_offset(), memory.setdefault(snapshot._memory(t), len(memory))) for n, t in program.constants.items()
        ],
        "bits": [bytes(snapshot.bytes_of(t.resolve_conj().contiguous())) for t in constants.values()],
        "next names": [program.graph._graph_namespace.create_name(n.name, None) for n in nodes],
    }


def after(program: Program, passes: int) -> Program:
    manager = Manager(program.copy(), OnnxRuntimeBackend.target, program.example, "off")
    manager.run(build(load_recipe({"passes": PASSES}))[:passes])
    return manager.program


def chained(program: Program) -> Iterator[tuple[Program, Program]]:
    """After each pass the program of an undisturbed run, and that of a run that is stored and read between any two passes."""
    plain, stored = (Manager(program.copy(), OnnxRuntimeBackend.target, program.example, "end") for _ in range(2))
    for step in build(load_recipe({"passes": PASSES})):
        for manager in (plain, stored):
            manager.run([step])
        assert [r.model_dump(exclude={"cpu_seconds"}) for r in stored.done] == [r.model_dump(exclude={"cpu_seconds"}) for r in plain.done]
        stored.program = back(stored.program, program)
        yield plain.program, stored.program


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO))
def test_real_programs_between_any_two_passes(name: str) -> None:
    changed = 0
    for plain, stored in chained(zoo(name)):
        wanted, found = facts(plain), facts(stored)
        assert found == wanted
        changed += wanted["stored"]["nodes"] != store.program_to_json(zoo(name))["nodes"]
    assert changed


def attention(q: Tensor, w: Tensor, dead: Tensor) -> Tensor:
    """A little of everything that passes change: a bias that is a computed constant, attention, a channel nobody reads."""
    x = torch.nn.functional.linear(q, w[:, 4:], dead * 2)
    y = torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
    return torch.nn.functional.linear(y.reshape(y.shape[0], -1, 4).to(torch.float32), w[:, :4].clone()) + q.shape[1]


@pytest.fixture(scope="module")
def small() -> Program:
    return function(attention, seeded(2, 3, 4), w=seeded(4, 8), dead=seeded(4), dynamic={"q": [0, 1]})


def test_a_small_program_between_any_two_passes(small: Program) -> None:
    for plain, stored in chained(small):
        assert facts(stored) == facts(plain)


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "readers": lambda data: data["readers"].update({k: v[::-1] for k, v in data["readers"].items()}),
    "values": lambda data: data["values"].popitem(),
    "next names": lambda data: data["names"].clear(),
    "places": lambda data: next(iter(data["places"].values()))["stride"].reverse(),
    "bits": lambda data: data["storages"].reverse(),
}


@pytest.mark.parametrize(("part", "fault"), FAULTS.items(), ids=FAULTS)
def test_each_part_is_needed(part: str, fault: Callable[[dict[str, Any]], Any], small: Program) -> None:
    """Without it the comparison above fails, so it would see the loss."""
    program = after(small, 6)
    assert facts(back(program, small))[part] == facts(program)[part]
    assert facts(back(program, small, fault))[part] != facts(program)[part]


# memory


def edited(program: Program, **values: Tensor) -> Program:
    """A copy with further constants, each read by a node of its own."""
    copy = program.copy()
    edit = Edit(copy)
    last = copy.results()[0]
    with edit.site(last):
        for name, value in values.items():
            edit.insert(aten.clone.default, edit.constant(name, value, like=last), like=last)
    return copy


def plain() -> Program:
    return function(lambda x, w: x @ w, seeded(2, 4), w=seeded(4, 4))


def test_memory_is_shared_as_it_was() -> None:
    """Views of one another and of the model's weights stay views, equal contents stay apart, nothing of the model's own is stored."""
    captured = plain()
    model, new = captured.constants["w"], seeded(3, 4, seed=1)
    program = edited(
        captured, turned=model.t(), row=model[1], new=new, twin=new.clone(), part=new[1:, ::2], whole=new, bits=new.view(torch.int32)
    )
    stored: list[int] = []
    data = snapshot.take(program, captured, lambda content: str(stored.append(len(content))))
    assert stored == [3 * 4 * 4] * 2
    assert [next(iter(s)) for s in data["storages"]] == ["captured", "stored", "stored"]
    found = back(program, captured)
    assert facts(found) == facts(program)
    assert found.constants["w"] is model
    assert found.constants["turned"].data_ptr() == model.data_ptr()
    assert found.constants["new"].data_ptr() == found.constants["whole"].data_ptr() != found.constants["twin"].data_ptr()


def test_odd_constants() -> None:
    complex_ = torch.polar(seeded(4).abs(), seeded(4, seed=1))
    captured = plain()
    program = edited(
        captured,
        conjugate=complex_.conj(),
        again=complex_.conj(),
        negative=complex_.conj().imag,
        complex=complex_,
        empty=torch.zeros(0, 4),
        nothing=torch.zeros(3, 0),
        number=torch.tensor(2.0),
        small=seeded(4).to(torch.float8_e4m3fn),
        brain=seeded(4).bfloat16(),
        mask=torch.tensor([True, False]),
        wide=seeded(1, 4).expand(3, 4),
        parameter=torch.nn.Parameter(seeded(2)),
    )
    found = back(program, captured)
    for name, tensor in program.constants.items():
        assert torch.equal(
            found.constants[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).resolve_conj().resolve_neg().view(torch.uint8)
        )
        assert (found.constants[name].dtype, found.constants[name].shape) == (tensor.dtype, tensor.shape)
    assert not found.constants["parameter"].requires_grad


def test_memory_beyond_its_end_is_refused_and_not_grown() -> None:
    captured = plain()
    size = captured.constants["w"].untyped_storage().nbytes()
    for place in ({"offset": 1}, {"stride": [5, 1]}):
        with pytest.raises(RuntimeError, match="out of bounds"):
            back(captured, captured, lambda data, place=place: data["places"]["w"].update(place))  # type: ignore[misc]
    assert captured.constants["w"].untyped_storage().nbytes() == size


def test_a_program_that_is_not_legal_is_refused() -> None:
    def lie(data: dict[str, Any]) -> None:
        next(n for n in data["program"]["nodes"] if n["op"] == "call_function")["target"] = "aten.add_.Tensor"

    with pytest.raises(VerifierError):
        back(plain(), plain(), lie)


def test_the_captured_program_is_not_changed(small: Program) -> None:
    before = facts(small.copy()), [id(t) for t in small.constants.values()], [id(n.meta.get("val")) for n in small.graph.nodes]
    back(after(small, 9), small)
    assert (facts(small.copy()), [id(t) for t in small.constants.values()], [id(n.meta.get("val")) for n in small.graph.nodes]) == before


# sizes


def symbols() -> dict[str, Any]:
    """Two dynamic sizes by the names torch gives them."""
    program = function(lambda x: x.flatten() + 1, seeded(6, 5, 2), dynamic={"x": [0, 1]})
    shape = program.placeholders()[0].meta["val"].shape
    return {str(s): s for s in shape if not isinstance(s, int)}


SIZES: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a * b,
    lambda a, b: 2 * a**2 * b + 3,
    lambda a, b: a - 7 * b,
    lambda a, b: (a * b + 1) // 4,
    lambda a, b: (3 * a) % 5 - b,
    lambda a, b: torch.sym_max(a, b + 2) * 4,
    lambda a, b: torch.sym_min(torch.sym_max(a, b), 9),
    lambda a, b: -(a // 2),
]


@pytest.mark.parametrize("make", SIZES)
def test_a_size_comes_back_from_its_text(make: Callable[[Any, Any], Any]) -> None:
    known = symbols()
    size = make(*known.values())
    again = snapshot._size(str(size), known)
    assert isinstance(again, torch.SymInt)
    assert str(again) == str(size)


CODE = [
    "__import__('os').system('true')",
    "(1).__class__",
    "[1]",
    "s0 if 1 else 2",
    "lambda: 1",
    "sum(x for x in y)",
    "open('f')",
    "1 < 2",
    "'a' * 9",
]


@pytest.mark.parametrize("text", CODE)
def test_a_size_is_arithmetic_and_nothing_else(text: str) -> None:
    ast.parse(text, mode="eval")
    with pytest.raises((ValueError, LookupError)):
        snapshot._size(text, {"s0": 3})


def test_values_that_are_no_tensors() -> None:
    known = symbols()
    first = next(iter(known.values()))
    for value in (3, True, None, 2.5, first, (first, 4), (torch.empty(2), torch.empty(3, 4, dtype=torch.int8).t())):
        form = json.loads(json.dumps(snapshot._form(value)))
        again = snapshot._value(form, known)
        assert snapshot._form(again) == form
        assert type(again) is type(value)


def test_a_value_that_was_resized(small: Program) -> None:
    """What no op would compute from its arguments comes back as it was, not as it should be."""
    program = small.copy()
    edited_node: fx.Node = node(program, next(n.name for n in program.graph.nodes if n.target is aten.linear.default))
    edited_node.meta["val"] = edited_node.meta["val"].new_empty((2, 1, 5))
    assert snapshot._form(node(back(program, small), edited_node.name).meta["val"])["shape"] == [2, 1, 5]
