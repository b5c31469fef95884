"""Snapshots: a program between two passes as plain data, exact enough that the passes after it can't tell the difference.

Beyond what `store` holds, later passes see the order of a node's readers, the names a graph has given out, which constants share memory and
how they lie in it, and fake values. Memory of the captured program is named, not stored, and so are its fake values and dynamic sizes.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxcompress import store
from fxcompress.program import Program
from fxcompress.verify import verify

Put = Callable[[memoryview], str]
Get = Callable[[str], Tensor]
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
}
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}


def take(program: Program, captured: Program, put: Put) -> dict[str, Any]:
    """The program as plain data. put(bytes) stores memory that isn't the captured program's, and returns the name to find it by."""
    origins = {_memory(t): name for name, t in reversed(captured.constants.items())}
    numbers: dict[tuple[int, int], int] = {}
    storages: list[dict[str, str]] = []
    places = {}
    for name, constant in program.constants.items():
        tensor = constant.resolve_conj().resolve_neg()
        memory = _memory(tensor)
        if memory not in numbers or tensor is not constant:
            numbers[memory] = len(storages)
            storages.append({"captured": origins[memory]} if memory in origins else {"stored": put(bytes_of(_whole(tensor)))})
        places[name] = {"storage": numbers[memory], "offset": tensor.storage_offset(), "stride": list(tensor.stride())}
    namespace = program.graph._graph_namespace
    return {
        "program": store.program_to_json(program),
        "values": {n.name: _form(n.meta["val"]) for n in program.graph.nodes if "val" in n.meta},
        "readers": {n.name: [u.name for u in n.users] for n in program.graph.nodes if len(n.users) > 1},
        "names": sorted(namespace._used_names),
        "counts": namespace._base_count,
        "storages": storages,
        "places": places,
    }


@torch.no_grad()
def restore(data: Mapping[str, Any], captured: Program, get: Get) -> Program:
    """The program of a snapshot. get(name) gives stored memory as a tensor of bytes. Raises one of store.UNREADABLE, or VerifierError."""
    storages = [captured.constants[s["captured"]] if "captured" in s else get(s["stored"]) for s in data["storages"]]
    constants = {}
    for name, (dtype, shape) in data["program"]["constants"].items():
        place = data["places"][name]
        tensor = _placed(storages[place["storage"]], getattr(torch, dtype), shape, place["stride"], place["offset"])
        shared = captured.constants.get(name)
        constants[name] = shared if shared is not None and _same_place(shared, tensor) else tensor
    stored = store.program_from_json(data["program"], constants)
    program = replace(
        captured,
        graph=stored.graph,
        constants=constants,
        inputs=stored.inputs,
        outputs=stored.outputs,
        states=stored.states,
        symbols=stored.symbols,
    )
    _restore_graph(program.graph, data)
    _restore_values(program, captured, data["values"])
    verify(program)
    return program


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _restore_graph(graph: fx.Graph, data: Mapping[str, Any]) -> None:
    nodes = {n.name: n for n in graph.nodes}
    for name, readers in data["readers"].items():
        for reader in readers:
            nodes[name].users[nodes[reader]] = nodes[name].users.pop(nodes[reader])  # moves it to the end
    for node in graph.nodes:
        if not node.meta["module"]:
            del node.meta["module"]
    graph._graph_namespace._used_names = set(data["names"])
    graph._graph_namespace._base_count = dict(data["counts"])


def _restore_values(program: Program, captured: Program, forms: Mapping[str, Any]) -> None:
    known = {n.name: n.meta["val"] for n in captured.graph.nodes if "val" in n.meta}
    sizes = {str(s): s for value in known.values() for s in _sizes(value)}
    mode = next((v.fake_mode for v in known.values() if hasattr(v, "fake_mode")), contextlib.nullcontext())
    for node in program.graph.nodes:
        constant = program.constants.get(str(node.target)) if node.op == "get_attr" else None
        if node.name not in forms:
            continue
        for value in (known.get(node.name), constant):
            if value is not None and _form(value) == forms[node.name]:
                node.meta["val"] = value
                break
        else:
            with mode:
                node.meta["val"] = _value(forms[node.name], sizes)


def _form(value: Any) -> Any:
    """A fake value as plain data. Dynamic sizes are text: comparing them themselves would make torch assume that they are equal."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": _plain(value.shape), "stride": _plain(value.stride())}
    if isinstance(value, tuple | list):
        return [_form(v) for v in value]
    return _plain([value])[0]


def _plain(sizes: Sequence[Any]) -> list[Any]:
    return [s if s is None or isinstance(s, bool | int | float) else str(s) for s in sizes]


def _value(form: Any, sizes: Mapping[str, Any]) -> Any:
    if isinstance(form, dict):
        shape, stride = ([_size(s, sizes) for s in form[k]] for k in ("shape", "stride"))
        return torch.empty_strided(shape, stride, dtype=getattr(torch, form["dtype"]))
    if isinstance(form, list):
        return tuple(_value(f, sizes) for f in form)
    return _size(form, sizes)


def _size(form: Any, sizes: Mapping[str, Any]) -> Any:
    if not isinstance(form, str):
        return form
    return sizes[form] if form in sizes else _computed(ast.parse(form, mode="eval").body, sizes)


def _computed(term: ast.expr, sizes: Mapping[str, Any]) -> Any:
    """A size from the text torch writes for it: arithmetic over symbols, and nothing else."""
    if isinstance(term, ast.Constant) and isinstance(term.value, int | float):
        return term.value
    if isinstance(term, ast.Name):
        return sizes[term.id]
    if isinstance(term, ast.UnaryOp) and isinstance(term.op, ast.USub):
        return -_computed(term.operand, sizes)
    if isinstance(term, ast.BinOp):
        return ARITHMETIC[type(term.op)](_computed(term.left, sizes), _computed(term.right, sizes))
    if isinstance(term, ast.Call) and isinstance(term.func, ast.Name):
        return functools.reduce(FUNCTIONS[term.func.id], (_computed(a, sizes) for a in term.args))
    raise ValueError(f"{ast.unparse(term)} is no size")


def _sizes(value: Any) -> Iterator[Any]:
    """The dynamic sizes in a fake value."""
    for leaf in pytree.tree_leaves(value):
        candidates = (*leaf.shape, *leaf.stride()) if isinstance(leaf, Tensor) else (leaf,)
        yield from (s for s in candidates if isinstance(s, torch.SymInt | torch.SymFloat | torch.SymBool))


def _memory(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _whole(tensor: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """All memory behind a tensor."""
    return torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())


def _placed(memory: Tensor, dtype: torch.dtype, shape: list[int], stride: list[int], offset: int) -> Tensor:
    return _whole(memory, dtype).as_strided(shape, stride, offset)  # refuses what lies outside; set_ would grow the memory


def _same_place(a: Tensor, b: Tensor) -> bool:
    places = [(t.dtype, t.shape, t.stride(), t.storage_offset(), _memory(t)) for t in (a, b)]
    return places[0] == places[1]
