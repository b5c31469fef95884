"""Programs as files: the graph as JSON, constants as safetensors. Nothing in them is code: ops are looked up by name among pure torch ops and
size arithmetic. `operator` as a whole would be code (`attrgetter` and `call` reach everything), and some torch ops name files.

Fake values are not stored, so a loaded program can be run, read and compared, and is not lowered again.
"""

from __future__ import annotations

import inspect
import json
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from fxcompress.errors import ArtifactError, BackendRefusal, VerifierError
from fxcompress.program import Program, State, Value
from fxcompress.signature import INPUT, Bound, Signature
from fxcompress.verify import verify

GRAPH, CONSTANTS, EXAMPLE = "program.json", "constants.safetensors", "example.safetensors"
NAMESPACES = ("aten", "fxc")
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow, operator.neg)
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_, operator.not_)
MATHS = tuple(value for name, value in vars(math).items() if callable(value) and not name.startswith("_"))
SYMBOLIC = tuple(value for name, value in vars(torch).items() if name.startswith("sym_"))
FUNCTIONS = {f"{f.__module__}.{f.__name__}": f for f in (*ARITHMETIC, *COMPARISONS, operator.getitem, *MATHS, *SYMBOLIC)}
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
OUTPUT_LIBRARIES = ("transformers.", "diffusers.")


def save_graph(program: Program, folder: Path) -> None:
    """Write the program without its constants' values. OSError if that fails."""
    (folder / GRAPH).write_text(json.dumps(program_to_json(program), indent=0), encoding="utf-8")
    _save_tensors({str(i): t for i, t in enumerate(program.example)}, folder / EXAMPLE)


def program_to_json(program: Program) -> dict[str, Any]:
    """The program without its example and its constants' values as plain data."""
    return {
        "nodes": [_node(n) for n in program.graph.nodes],
        "inputs": [_value(v) for v in program.inputs],
        "outputs": [_value(v) for v in program.outputs],
        "states": [vars(s) for s in program.states],
        "symbols": {k: list(v) for k, v in program.symbols.items()},
        "classes": dict(program.classes),
        "notes": list(program.notes),
        "constants": {k: [str(t.dtype).removeprefix("torch."), list(t.shape)] for k, t in program.constants.items()},
        "signature": signature_to_json(program.signature),
    }


def save_program(program: Program, folder: Path) -> None:
    """Write the program whole."""
    save_graph(program, folder)
    _save_tensors(program.constants, folder / CONSTANTS)


def load_program(folder: Path) -> Program:
    """The program written by `save_program`. ArtifactError if a file is missing, damaged or no legal program, or names an unknown op."""
    try:
        data = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
        constants = load_file(folder / CONSTANTS)
        program = program_from_json(data, constants)
        verify(program)
        return program
    except (*UNREADABLE, VerifierError) as error:
        raise ArtifactError(
            "the stored program can't be read", where=str(folder), why=f"{type(error).__name__}: {error}", do="compile and save it again"
        ) from error


def load_example(folder: Path) -> list[Tensor]:
    """The flat example inputs of a stored program."""
    try:
        tensors = load_file(folder / EXAMPLE)
        return [tensors[str(i)] for i in range(len(tensors))]
    except UNREADABLE as error:
        raise ArtifactError("the stored example inputs can't be read", where=str(folder / EXAMPLE), why=str(error)) from error


def load_signature(folder: Path) -> tuple[Signature, tuple[Value, ...], dict[str, tuple[int, int]]]:
    """Signature, inputs and symbols of a stored program, without its graph."""
    try:
        data = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
        inputs = tuple(_read_value(v) for v in data["inputs"])
        return signature_from_json(data["signature"]), inputs, {k: (int(a), int(b)) for k, (a, b) in data["symbols"].items()}
    except UNREADABLE as error:
        raise ArtifactError("the stored signature can't be read", where=str(folder), why=f"{type(error).__name__}: {error}") from error


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """safetensors refuses shared memory: a tensor that is a view of another's storage is written as a copy. OSError if the file can't be."""
    seen: set[int] = set()
    alone = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        alone[name] = (tensor.clone() if pointer in seen else tensor).contiguous()
        seen.add(pointer)
    try:
        save_file(alone, path)
    except SafetensorError as error:  # its way to say that a disk is full
        raise OSError(str(error)) from error


def program_from_json(data: dict[str, Any], constants: dict[str, Tensor]) -> Program:
    """The inverse, without fake values. Raises one of UNREADABLE for what isn't of that form."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        args, kwargs = _decode(item["args"], nodes), _decode(item["kwargs"], nodes)
        target = find_op(item["target"]) if item["op"] == "call_function" else item["target"]
        node = graph.create_node(item["op"], target, args, kwargs, name=item["name"])
        node.meta = {"module": tuple(item["module"])}
        nodes[item["name"]] = node
    return Program(
        graph,
        constants,
        tuple(_read_value(v) for v in data["inputs"]),
        tuple(_read_value(v) for v in data["outputs"]),
        signature_from_json(data["signature"]),
        {k: (int(a), int(b)) for k, (a, b) in data["symbols"].items()},
        data["classes"],
        tuple(State(**s) for s in data["states"]),
        tuple(data["notes"]),
    )


def _node(node: fx.Node) -> dict[str, Any]:
    target = op_name(node.target) if node.op == "call_function" else str(node.target)
    value = node.meta.get("val")
    shape = [str(s) for s in value.shape] if isinstance(value, Tensor) else None
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": _encode(node.args),
        "kwargs": _encode(dict(node.kwargs)),
        "module": list(node.meta.get("module", ())),
        "shape": shape,
    }


def op_name(target: Any) -> str:
    """The name an op is stored under: "aten.linear.default", "_operator.add"."""
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in NAMESPACES:
            do = "replace it in the model with torch's own ops"
            raise BackendRefusal(f"the custom op {target} can't be stored", why="an artifact holds aten and fxc ops only", do=do)
        return str(target)
    name = f"{target.__module__}.{target.__name__}"
    if name not in FUNCTIONS:
        raise BackendRefusal(f"the function {name} can't be stored", why="an artifact holds torch ops and size arithmetic only")
    return name


def find_op(name: str) -> Any:
    """The op of a stored name; ValueError for one outside torch.ops.aten, torch.ops.fxc and size arithmetic, and for one that names a file."""
    import fxcompress.ops  # noqa: F401 - registers fxc::

    head, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = FUNCTIONS.get(name)
    if head in NAMESPACES and name.count(".") == 2:
        found = getattr(getattr(getattr(torch.ops, head), packet, None), overload, None)
        if not isinstance(found, torch._ops.OpOverload) or any(a.name == "filename" for a in found._schema.arguments):
            found = None
    if found is None:
        raise ValueError(f"unknown op {name!r}")
    return found


_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_NAMED = {
    **_DTYPES,
    **{str(v): v for v in vars(torch).values() if isinstance(v, torch.memory_format | torch.layout)},
}


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {str(k): _encode(v) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if str(value) in _NAMED:
        return {"torch": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a node argument of type {type(value).__name__} can't be stored")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, inner), *rest = value.items()
    if rest:
        raise ValueError(f"a stored argument has the keys {sorted(value)}")
    readers: dict[str, Callable[[], Any]] = {
        "node": lambda: nodes[inner],
        "tuple": lambda: tuple(_decode(v, nodes) for v in inner),
        "list": lambda: [_decode(v, nodes) for v in inner],
        "dict": lambda: {k: _decode(v, nodes) for k, v in inner.items()},
        "device": lambda: torch.device(inner),
        "torch": lambda: _NAMED[inner],
        "float": lambda: float(inner),
        "complex": lambda: complex(inner),
        "slice": lambda: slice(*(_decode(v, nodes) for v in inner)),
    }
    return readers[kind]()


def _value(value: Value) -> dict[str, Any]:
    return {"name": value.name, "shape": list(value.shape), "dtype": str(value.dtype), "role": value.role, "below": value.below}


def _read_value(data: dict[str, Any]) -> Value:
    return Value(data["name"], tuple(data["shape"]), _DTYPES[data["dtype"]], data["role"], data["below"])


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """The signature as plain data. A tuple class that can't be stored comes back as a tuple, any other result class as a dict by name."""
    parameters = [[p.name, p.kind.name, _constant(p.default)] for p in signature.parameters.parameters.values()]
    out_spec, out_leaves = _plain_result(signature)
    return {
        "parameters": parameters,
        "spec": pytree.treespec_dumps(signature.spec),
        "leaves": [_constant(v) for v in signature.leaves],
        "input_names": list(signature.input_names),
        "out_spec": pytree.treespec_dumps(out_spec),
        "out_leaves": [_constant(v) for v in out_leaves],
        "output_names": list(signature.output_names),
        "fixed": {k: _constant(v) for k, v in signature.fixed.items()},
    }


def signature_from_json(data: dict[str, Any]) -> Signature:
    """The inverse. Result classes are imported from diffusers and transformers only; without them, results are dicts by name."""
    parameters = [
        inspect.Parameter(n, inspect._ParameterKind[kind], default=inspect.Parameter.empty if d == {"empty": 1} else _read_constant(d))
        for n, kind, d in data["parameters"]
    ]
    out_leaves, out_spec = tuple(_read_constant(v) for v in data["out_leaves"]), data["out_spec"]
    try:
        _import_output_classes(out_spec)
        spec = pytree.treespec_loads(out_spec)
    except (ImportError, NotImplementedError):
        plain = dict.fromkeys(data["output_names"], INPUT)
        out_leaves, spec = tuple(plain.values()), pytree.tree_structure(plain)
    return Signature(
        inspect.Signature(parameters),
        pytree.treespec_loads(data["spec"]),
        tuple(_read_constant(v) for v in data["leaves"]),
        tuple(data["input_names"]),
        spec,
        out_leaves,
        tuple(data["output_names"]),
        {k: _read_constant(v) for k, v in data["fixed"].items()},
    )


def _plain_result(signature: Signature) -> tuple[pytree.TreeSpec, tuple[Any, ...]]:
    if _storable(signature.out_spec):
        return signature.out_spec, signature.out_leaves
    result = pytree.tree_unflatten(signature.out_leaves, signature.out_spec)
    if isinstance(result, tuple) and _storable(spec := pytree.tree_structure(tuple(result))):
        return spec, signature.out_leaves
    by_name = dict.fromkeys(signature.output_names, INPUT)
    return pytree.tree_structure(by_name), tuple(by_name.values())


def _storable(spec: pytree.TreeSpec) -> bool:
    try:
        pytree.treespec_dumps(spec)
    except NotImplementedError:
        return False
    return True


def _import_output_classes(spec: str) -> None:
    import importlib

    for name in _types(json.loads(spec)):
        if name.startswith(OUTPUT_LIBRARIES):
            importlib.import_module(name.rpartition(".")[0])


def _types(data: Any) -> list[str]:
    if isinstance(data, dict):
        own = [data["type"]] if isinstance(data.get("type"), str) else []
        return own + [t for v in data.values() for t in _types(v)]
    return [t for v in data for t in _types(v)] if isinstance(data, list) else []


def _constant(value: Any) -> Any:
    if value is INPUT:
        return {"input": 1}
    if value is inspect.Parameter.empty:
        return {"empty": 1}
    if isinstance(value, Bound):
        return {"bound": [value.value.tolist(), str(value.value.dtype)]}
    try:
        return _encode(value)
    except TypeError:
        return {"other": f"{type(value).__module__}.{type(value).__name__}"}


def _read_constant(value: Any) -> Any:
    if value == {"input": 1}:
        return INPUT
    if isinstance(value, dict) and "bound" in value:
        numbers, dtype = value["bound"]
        return Bound(torch.tensor(numbers, dtype=_DTYPES[dtype]))
    if isinstance(value, dict) and "other" in value:
        return value["other"]
    return _decode(value, {})
