"""Model -> Program: export, flatten, verify against the model's own numbers at several sizes.

`torch.export` sees the model through an adapter that takes the tensors of the call and returns the tensors of the result, so trees of
arguments and output classes never reach the graph; `Signature` keeps them. Which axes are dynamic is tried from wide to narrow: what
export can't follow, or follows with other numbers than the model gives, is fixed and reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fxcompress import cached
from fxcompress import dynamic as axes_of
from fxcompress.devices import compared, elsewhere, on_cpu
from fxcompress.errors import CaptureError, InputError, raised_at
from fxcompress.functional import flat_graph
from fxcompress.inplace import NotFunctional
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.program import ROOT, Program, State, Value
from fxcompress.signature import INPUT, Inputs, Signature, bind, describe, forward_signature, leaf_names
from fxcompress.verify import verify

LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # max |d| / rms, same kernels: mostly 0
DYNAMIC_GREATEST = 2**31 - 1
Dynamic = bool | Mapping[str, Sequence[int]] | None


@torch.no_grad()
def capture(model: nn.Module | ExportedProgram, example_inputs: Any, *, dynamic: Dynamic = None) -> Program:
    """Capture the model as a Program whose numbers are the model's own on the example and on other sizes of every dynamic axis.

    example_inputs: a tuple, a dict by parameter name, or Inputs with roles. dynamic: None for batch and sequence where the model allows it,
    False for none, or {input name: axes}. The model is read, never changed; one on another device is copied to the CPU. Raises CaptureError,
    InputError.
    """
    item = Inputs.of(example_inputs)
    if not isinstance(model, ExportedProgram):
        check_model(model)
    if not (devices := elsewhere(model)):
        return _captured(model, item, dynamic)
    moved, moved_item = on_cpu(model), on_cpu(item)
    program = _captured(moved, moved_item, dynamic)
    notes = (f"the model is on {', '.join(devices)}, its program on the CPU", *compared(model, item, moved, moved_item))
    return dataclasses.replace(program, notes=(*program.notes, *notes))


def _captured(model: nn.Module | ExportedProgram, item: Inputs, dynamic: Dynamic) -> Program:
    """With its key/value cache, if the model keeps one."""
    notes: list[str] = []
    if dynamic is None and isinstance(model, nn.Module) and cached.is_kept(model, item):
        try:
            return _capture_wide(Call.of(model, cached.second_call(model, item), keeps=True), dynamic, [])
        except CaptureError as error:
            if item.kwargs.get(cached.SWITCH):
                raise
            notes.append(f"captured without its key/value cache: {_first_line(error.why or error.what)}")
    call = Call.of(model, item)
    return _capture_wide(call, dynamic, notes or [*call.notes])


def _capture_wide(call: Call, dynamic: Dynamic, notes: list[str]) -> Program:
    """The program of the widest attempt that holds."""
    for last, (what, axes) in _with_last(_attempts(call, dynamic)):
        try:
            program = _capture(call, axes, notes, tied=not isinstance(dynamic, Mapping))
        except CaptureError as error:
            if last:
                raise
            notes.append(f"{what} can't be dynamic: {_first_line(error.why or error.what)}")
        else:
            if dynamic:
                _refuse_fixed(program, call, axes)
            return program
    raise AssertionError("no attempt")


@dataclass
class Call:
    """The model with one example call taken apart: everything capture needs to know about how it is called."""

    eager: Adapter
    exported: ExportedProgram | None  # already captured by the user
    tensors: list[Tensor]
    signature: Signature
    roles: dict[str, str]
    notes: tuple[str, ...] = ()
    states: tuple[State, ...] = ()

    def configs(self) -> dict[str, Any]:
        """What the model says about itself."""
        return {name: getattr(self.eager.model, name, None) for name in ("config", "generation_config")}

    @classmethod
    def of(cls, model: Any, item: Inputs, keeps: bool = False) -> Call:
        """Bind the example to forward, run the model once. keeps: the call holds a key/value cache as tensors, and the result one.

        CaptureError for a model that can't be captured as it stands.
        """
        exported = model if isinstance(model, ExportedProgram) else None
        module: nn.Module = exported.module() if exported else model
        parameters = forward_signature(module)
        given = bind(parameters, item)
        leaves, spec = pytree.tree_flatten(given)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]  # export takes one object given twice for one input
        names = [n for n, v in zip(leaf_names(given, "input"), leaves, strict=True) if isinstance(v, Tensor)]
        _check_example(dict(zip(names, tensors, strict=True)))
        adapter = Adapter(module, parameters, spec, tuple(INPUT if isinstance(v, Tensor) else v for v in leaves))
        adapter.positional = len(item.args)  # as the user calls it: hooks see the difference
        adapter.keeps = keeps
        if exported:
            adapter.positional = exported.call_spec.in_spec.children()[0].num_children
        notes = adapter.settle(tensors)
        result, out_spec, out_leaves = adapter.result(tensors)
        outputs = [n for n, v in zip(leaf_names(result, "output"), out_leaves, strict=True) if v is INPUT]
        outputs = [f"output_{n}" if n.isdigit() else n for n in outputs]
        states = _states(names, outputs) if keeps else ()
        outputs = [next((s.output for s in states if s.input == n), n) for n in outputs]
        signature = Signature(parameters, spec, adapter.leaves, tuple(names), out_spec, out_leaves, tuple(outputs), dict(adapter.fixed))
        roles = {**item.roles, **{s.input: "state" for s in states}}
        return cls(adapter, exported, tensors, signature, roles, notes, states)


def _states(inputs: Sequence[str], outputs: Sequence[str]) -> tuple[State, ...]:
    """A part of the cache that goes in under a name comes out under the same, which is told apart as "present"."""
    names = cached.state_names(inputs)
    if cached.state_names(outputs) != names:
        raise CaptureError("the model gives back another cache than it takes", why=f"{outputs} for {names}")
    return tuple(State(name, name.replace("past", "present", 1)) for name in names)


class Adapter(nn.Module):
    """The model as a function from flat tensors to flat tensors. `fixed`: arguments capture adds so that the result is tensors only."""

    def __init__(self, model: nn.Module, parameters: inspect.Signature, spec: pytree.TreeSpec, leaves: tuple[Any, ...]) -> None:
        super().__init__()
        self.model, self.takes, self.spec, self.leaves = model, parameters, spec, leaves
        self.fixed: dict[str, Any] = {}
        self.tied: tuple[int, ...] = ()  # inputs whose axis 0 is the batch: export is told that they agree, which few models' code says
        self.keeps = False  # whether a key/value cache goes in and out, which the graph sees as tensors
        self.positional = 0  # how many arguments go by position
        self.training = False  # only of the adapter: the model stays as it is
        self.numbers = [(m, n, b.item()) for m in model.modules() for n, b in m.named_buffers(recurse=False) if _is_size(b)]

    def call(self, tensors: Sequence[Tensor]) -> Any:
        """The model's own result."""
        given = self._tree(tensors)
        if self.keeps:
            given[cached.CACHE] = cached.cache_of(given[cached.CACHE])
        result = self.model(*self._positional(given), **given, **self.fixed)
        return cached.opened(result) if self.keeps else result

    def _tree(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        values = iter(tensors)
        given: dict[str, Any] = pytree.tree_unflatten([next(values) if leaf is INPUT else leaf for leaf in self.leaves], self.spec)
        return given

    def _positional(self, given: dict[str, Any]) -> list[Any]:
        """The arguments that can't go by name, taken out of `given`."""
        kinds = {name: p.kind for name, p in self.takes.parameters.items()}
        named = [n for n, k in kinds.items() if k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        rest = next((n for n, k in kinds.items() if k is inspect.Parameter.VAR_POSITIONAL), None)
        if rest is None:
            named = named[: self.positional] or [n for n in named if kinds[n] is inspect.Parameter.POSITIONAL_ONLY]
        return [given.pop(n) for n in named if n in given] + (list(given.pop(rest, ())) if rest else [])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the result, in order."""
        if torch.compiler.is_exporting():
            for index in self.tied[1:]:
                torch._check(tensors[index].shape[0] == tensors[self.tied[0]].shape[0])  # type: ignore[no-untyped-call]
            if self.keeps:
                cached.agree(self._tree(tensors))
            with _known(self.numbers):
                return self._results(tensors)
        return self._results(tensors)

    def _results(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in pytree.tree_leaves(self.call(tensors)) if isinstance(leaf, Tensor))

    def settle(self, tensors: Sequence[Tensor]) -> tuple[str, ...]:
        """Run once and see that the result is made of tensors; a cache in it is switched off. Returns notes for the report."""
        if self.keeps:
            self.fixed[cached.SWITCH] = True
        result = self._first_run(tensors)
        if not (bad := _strangers(result)):
            return ()
        accepts = {p.name for p in self.takes.parameters.values()} | {p.kind for p in self.takes.parameters.values()}
        if "Cache" in type(bad[0]).__name__ and accepts & {"use_cache", inspect.Parameter.VAR_KEYWORD}:
            self.fixed["use_cache"] = False
            result = self._first_run(tensors)
            if not _strangers(result):
                return ("captured with use_cache=False: this program returns no key/value cache",)
        for stranger in {type(s) for s in bad}:
            if dataclasses.is_dataclass(stranger):
                torch.export.register_dataclass(stranger)
        if bad := _strangers(self._first_run(tensors)):
            raise CaptureError(
                f"the model returns a {type(bad[0]).__name__}",
                why="results must be tensors in tuples, lists, dicts or dataclasses",
                do="wrap the model in a module that returns the tensors you need",
            )
        return ()

    def _first_run(self, tensors: Sequence[Tensor]) -> Any:
        try:
            return self.call(tensors)
        except Exception as error:
            raise CaptureError(
                "the model fails on the example inputs",
                where=raised_at(error),
                why=f"{type(error).__name__}: {error}",
                do="pass inputs on which model(...) works",
            ) from error

    def result(self, tensors: Sequence[Tensor]) -> tuple[Any, pytree.TreeSpec, tuple[Any, ...]]:
        """The result, its tree, and per leaf INPUT for a tensor or the constant."""
        result = self.call(tensors)
        leaves, spec = pytree.tree_flatten(result)
        if not any(isinstance(v, Tensor) for v in leaves):
            raise CaptureError("the model returns no tensor", why=f"it returns {describe(result)}")
        return result, spec, tuple(INPUT if isinstance(v, Tensor) else v for v in leaves)


def _is_size(buffer: Tensor) -> bool:
    return not buffer.dim() and buffer.dtype in (torch.int32, torch.int64) and not buffer.is_meta


@contextlib.contextmanager
def _known(numbers: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Buffers of one integer as numbers that the tracer sees: strides and kernel sizes kept as tensors decide shapes, as only numbers may."""
    for module, name, value in numbers:
        module.__dict__[name] = torch.tensor(value, dtype=module.get_buffer(name).dtype)
    try:
        yield
    finally:
        for module, name, _ in numbers:
            del module.__dict__[name]


def _check_example(tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise InputError("the example inputs hold no tensor", why="a program's inputs are tensors", do="pass numbers as torch.tensor(...)")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise InputError(f"example input {name!r} can't be used", why=f"its layout is {tensor.layout}", do="pass a dense tensor")
        if tensor.is_meta:
            raise InputError(f"example input {name!r} can't be used", why="it is on the meta device, without numbers", do="pass real inputs")
        if tensor.is_floating_point() and tensor.isnan().any():
            raise InputError(f"example input {name!r} holds NaN", why="no check can bite on it", do="pass real inputs")
        if not tensor.numel():
            raise InputError(
                f"example input {name!r} is empty", why=f"its shape is {list(tensor.shape)}", do="pass at least one entry on each axis"
            )


def check_model(model: Any) -> None:
    """CaptureError unless this is a module in eval mode with finite parameters that exist."""
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"not a model: {describe(model)}",
            why=f"a {type(model).__name__} can't be captured",
            do="pass an nn.Module, an ExportedProgram, a .pt2 or .gguf file, a diffusers or transformers folder, or 'package.module:function'",
        )
    if training := [name for name, m in model.named_modules() if m.training]:
        raise CaptureError(
            "the model is in train mode",
            where=training[0] or ROOT,
            why=f"{len(training)} modules have training=True",
            do="model.eval()",
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CaptureError("a parameter has no values", where=name, why="it is lazy and was never set", do="run the model once")
        if parameter.is_meta:
            raise CaptureError("a parameter has no values", where=name, why="it is on the meta device", do="load the weights first")
        if parameter.is_floating_point() and not (finite := torch.isfinite(parameter)).all():
            raise CaptureError(
                "a parameter holds NaN or infinity",
                where=name,
                why=f"{int((~finite).sum())} of {parameter.numel()} values are not finite",
                do="repair or reload the weights: every number after it would be wrong",
            )


def _attempts(call: Call, dynamic: Dynamic) -> list[tuple[str, axes_of.Axes]]:
    names, tensors = call.signature.input_names, call.tensors
    fixed = tuple(frozenset[int]() for _ in tensors)
    if isinstance(dynamic, Mapping):
        return [("the asked axes", axes_of.asked_axes(dynamic, names, tensors))]
    if dynamic is False:
        return [("nothing", fixed)]
    wide = axes_of.default_axes(tensors)
    if call.states:
        return [("the cache", tuple(a | {2} if call.roles.get(n) == "state" else a for n, a in zip(names, wide, strict=True)))]
    batch = tuple(a & {0} for a in wide)
    ladder = [("batch and sequence", wide), ("batch", batch), ("nothing", fixed)]
    return [step for i, step in enumerate(ladder) if i == 0 or step[1] != ladder[i - 1][1]]


def _capture(call: Call, axes: axes_of.Axes, notes: list[str], tied: bool) -> Program:
    tensors = axes_of.widened(call.tensors, axes)
    exported = call.exported or _export(call, tensors, axes, tied)
    strip = "" if call.exported else "model."
    try:
        graph, constants, results = flat_graph(exported, strip)
    except NotFunctional:
        graph, constants, results = flat_graph(exported.run_decompositions({}), strip)
    if any(not isinstance(r, torch.fx.Node) for r in results) and len(results) != len(call.signature.output_names):
        raise CaptureError("the captured results don't match the model's", why=f"{len(results)} against {len(call.signature.output_names)}")
    program = _program(call, graph, constants, exported)
    program = dataclasses.replace(program, notes=(*notes, *_fixed_notes(program, axes)), example=tuple(call.tensors), **call.configs())
    verify(program)
    return _checked(program, call)


def _export(call: Call, tensors: list[Tensor], axes: axes_of.Axes, tied: bool) -> ExportedProgram:
    call.eager.tied = axes_of.batched(tensors) if tied else ()
    shapes = tuple(dict.fromkeys(sorted(dims), Dim.AUTO) or None for dims in axes)
    try:
        with quiet():
            return torch.export.export(call.eager, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        why, do = "", "rewrite what it names so that it also runs on tensors without numbers, as torch.export has them, or capture a part"
        if isinstance(error, GuardOnDataDependentSymNode):
            why = "what the code does there depends on numbers that only a call has: "
            do = "rewrite it with tensor ops (data-dependent branches: torch.where; .item(): keep a tensor), or capture a part"
        told = f"{why}{type(error).__name__}: {_first_line(str(error))}"
        raise CaptureError("torch.export can't follow the model", where=raised_at(error), why=told, do=do) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, and none of the graphs that torch logs and prints when it gives up: what matters of them is in our error."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def _program(call: Call, graph: torch.fx.Graph, constants: dict[str, Tensor], exported: ExportedProgram) -> Program:
    places = [n for n in graph.nodes if n.op == "placeholder"]
    names = _symbol_names(places, call, axes_of.batched(call.tensors))
    for node, name in zip(places, call.signature.input_names, strict=True):
        node.name, node.target = _free_name(graph, node, name), name
    inputs = tuple(
        Value(name, _shape(node.meta["val"], names), node.meta["val"].dtype, call.roles.get(name, "input"), _rows_indexed(node))
        for node, name in zip(places, call.signature.input_names, strict=True)
    )
    results, kept = next(iter(reversed(graph.nodes))).args[0], {s.output for s in call.states}
    outputs = tuple(
        Value(name, _shape(node.meta["val"], names), node.meta["val"].dtype, "state" if name in kept else "output")
        for node, name in zip(results, call.signature.output_names, strict=True)
    )
    classes = {path: cls for n in graph.nodes for path, cls in zip(n.meta.get("module", ()), n.meta.pop("classes", ()), strict=False)}
    return Program(graph, constants, inputs, outputs, call.signature, _ranges(exported, names), classes, call.states)


def _rows_indexed(node: torch.fx.Node) -> int | None:
    """The rows of the smallest table an input indexes directly: runtimes return something for an index beyond it, models raise."""
    tables: list[Any] = [u.args[0] for u in node.users if u.target is torch.ops.aten.embedding.default and u.args[1] is node]
    return min((int(t.meta["val"].shape[0]) for t in tables), default=None)


def _free_name(graph: torch.fx.Graph, node: torch.fx.Node, name: str) -> str:
    """The input's name, or with a suffix where a node has it; reserved, so that no later node gets it."""
    if node.name == name:
        return name
    return graph._graph_namespace.create_name(name, None)


def _symbol_names(places: Sequence[torch.fx.Node], call: Call, batched: Sequence[int]) -> dict[str, str]:
    """ "batch", "past" for what a state has grown to, else the first input and axis that is this size, or contains it."""
    names: dict[str, str] = {}
    found = [
        (index, axis, size.node.expr)
        for index, node in enumerate(places)
        for axis, size in enumerate(getattr(node.meta["val"], "shape", ()))
        if isinstance(size, torch.SymInt)
    ]
    for index, axis, expression in sorted(found, key=lambda f: not f[2].is_symbol):
        name = call.signature.input_names[index]
        default = "past" if call.roles.get(name) == "state" and call.states else f"{name}_{axis}"
        is_batch = axis == 0 and index in batched and "batch" not in names.values()
        for symbol in sorted(expression.free_symbols, key=str):
            names.setdefault(str(symbol), "batch" if is_batch else default)
    return names


def _shape(value: Any, names: Mapping[str, str]) -> tuple[int | str, ...]:
    return tuple(_dim(s, names) for s in getattr(value, "shape", ()))


def _dim(size: Any, names: Mapping[str, str]) -> int | str:
    if not isinstance(size, torch.SymInt):
        return int(size)
    renamed = size.node.expr.subs({s: sympy.Symbol(names.get(str(s), str(s))) for s in size.node.expr.free_symbols})
    return int(renamed) if renamed.is_number else str(renamed)


def _ranges(exported: ExportedProgram, names: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    ranges = {names[str(s)]: r for s, r in exported.range_constraints.items() if str(s) in names}
    return {n: (max(1, int(r.lower)), _greatest(r.upper)) for n, r in ranges.items()}


def _greatest(bound: Any) -> int:
    return int(bound) if bound.is_finite and bound < DYNAMIC_GREATEST else DYNAMIC_GREATEST


def _fixed_notes(program: Program, axes: axes_of.Axes) -> Iterator[str]:
    for value, wanted in zip(program.inputs, axes, strict=True):
        for axis in sorted(wanted):
            if isinstance(value.shape[axis], int):
                yield f"axis {axis} of {value.name} is fixed to {value.shape[axis]}: the model's code depends on its size"


def _refuse_fixed(program: Program, call: Call, axes: axes_of.Axes) -> None:
    if fixed := list(_fixed_notes(program, axes)):
        raise CaptureError("an axis asked for in dynamic= can't be dynamic", why="; ".join(fixed), do="leave it out of dynamic=")


def _checked(program: Program, call: Call) -> Program:
    """The program with the sizes it was found right at as its ranges. CaptureError where its numbers differ from the model's."""
    _compare(program, call, call.tensors, "the example inputs")
    if not program.symbols:
        return program
    shapes = [v.shape for v in program.inputs]
    example = {s: _example_size(s, program, call.tensors) for s in program.symbols}
    other = {s: axes_of.other_size(example[s], *program.symbols[s]) for s in program.symbols}
    _compare(program, call, axes_of.at_sizes(call.tensors, shapes, other), f"sizes {other}")
    symbols = dict(program.symbols)
    for symbol, (low, high) in program.symbols.items():
        if low == 2 and (example[symbol] == 1 or _holds_at_one(program, call, shapes, {**example, symbol: 1})):
            symbols[symbol] = (1, high)
    if call.states:
        symbols["past"] = _checked_empty(program, call, example)
    return dataclasses.replace(program, symbols=symbols)


def _checked_empty(program: Program, call: Call, example: Mapping[str, int]) -> tuple[int, int]:
    """The range of "past": the program is right on prompts and on single tokens, with and without a past, and where the first is hidden."""
    names, shapes = call.signature.input_names, [v.shape for v in program.inputs]
    new = str(shapes[names.index(cached.IDS)][1])
    extremes: tuple[dict[str, int], ...] = ({"past": 0}, {new: 1}, {"past": 0, new: 1})
    for sizes in extremes:
        _compare(program, call, axes_of.at_sizes(call.tensors, shapes, {**example, **sizes}), f"sizes {sizes}")
    if cached.MASK in names:
        padded, place = list(call.tensors), names.index(cached.MASK)
        padded[place] = padded[place].clone()
        padded[place][:, 0] = 0
        _compare(program, call, padded, "rows whose first token is hidden")
    return 0, program.symbols["past"][1]


def _example_size(symbol: str, program: Program, tensors: Sequence[Tensor]) -> int:
    for value, tensor in zip(program.inputs, tensors, strict=True):
        if symbol in value.shape:
            return int(tensor.shape[value.shape.index(symbol)])
    return max(2, program.symbols[symbol][0])


def _holds_at_one(program: Program, call: Call, shapes: Sequence[Sequence[Any]], sizes: Mapping[str, int]) -> bool:
    try:
        _compare(program, call, axes_of.at_sizes(call.tensors, shapes, sizes), "size 1")
    except Exception:
        return False
    return True


def _compare(program: Program, call: Call, tensors: list[Tensor], what: str) -> None:
    try:
        result, _, leaves = call.eager.result(tensors)
    except Exception as fault:
        why = f"{type(fault).__name__}: {_first_line(str(fault))}"
        raise CaptureError(f"the model itself fails on {what}", where=raised_at(fault), why=why) from fault
    if (have := [v for v in leaves if v is not INPUT]) != (want := [v for v in call.signature.out_leaves if v is not INPUT]):
        raise CaptureError(
            "a result that is no tensor depends on the sizes",
            why=f"{have} against {want} on {what}: it would be a constant of the program",
            do="return it as a tensor, or leave it out",
        )
    wanted = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
    again = call.eager(*tensors)
    try:
        got = run(program, tensors)
    except Exception as fault:
        raise CaptureError(f"the captured graph fails on {what}", why=f"{type(fault).__name__}: {_first_line(str(fault))}") from fault
    for value, a, b, c in zip(program.outputs, wanted, got, again, strict=True):
        if relative_error(a, c) > 0:
            raise CaptureError(
                "the model gives other numbers each time",
                where=f"output {value.name}",
                why="two runs on one input differ: forward draws random numbers",
                do="pass the noise as an input",
            )
        error = relative_error(a, b)
        if a.shape != b.shape or a.dtype != b.dtype or not error <= LIMIT.get(a.dtype, 0.0):
            raise CaptureError(
                "the captured graph gives other numbers than the model",
                where=f"output {value.name}",
                why=f"{describe(b)} against {describe(a)}, relative error {error:.1e}, limit {LIMIT.get(a.dtype, 0.0):.0e}, on {what}",
                do="report this model: torch.export traced one path of code that takes another here",
            )


def _strangers(result: Any) -> list[Any]:
    plain = (Tensor, type(None), bool, int, float, str)
    return [leaf for leaf in pytree.tree_leaves(result) if not isinstance(leaf, plain)]


def _with_last(items: Sequence[Any]) -> Iterator[tuple[bool, Any]]:
    for i, item in enumerate(items):
        yield i == len(items) - 1, item


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]
