"""compile() and load(): a model and a recipe in, a checked artifact that runs out."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect as inspection
import json
import math
import platform
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from fxcompress import artifact, cached, guard, registry, store
from fxcompress.backend import Backend, Session
from fxcompress.calibrate.feed import Feed, FlatItems, as_feed
from fxcompress.calibrate.statistics import MEMORY, Statistics
from fxcompress.capture import Dynamic, capture
from fxcompress.checkpoint import Checkpoint, opened
from fxcompress.devices import CPU, beside
from fxcompress.diff import Diff, Run, between, of_run
from fxcompress.diff.journal import explained
from fxcompress.diff.read import HISTORY, PAGE, REPORT, is_run, run_at, run_in, run_of
from fxcompress.errors import ArtifactError, BackendRefusal, InputError, RecipeError, nearest
from fxcompress.generation import forward_of, generating
from fxcompress.history import History
from fxcompress.inspection import Inspection, forecast
from fxcompress.interpret import run
from fxcompress.loss import losses
from fxcompress.manager import CheckMode, Manager, Progress, lowest_sqnr, weight_bytes
from fxcompress.program import Program, Value
from fxcompress.recipe import BackendChoice, Recipe, Step, build, check_globs, load_recipe, options_error, step_options
from fxcompress.regions import regions
from fxcompress.report import BackendReport, PassReport, Report, as_tensor
from fxcompress.rewrite import Pass
from fxcompress.signature import Inputs, Signature, check_sizes, describe
from fxcompress.sources import Loaded, resolve
from fxcompress.verify import audit

PACKAGES = ("fxcompress", "torch", "onnx", "onnxruntime", "openvino")
LOCK = "recipe.lock.yaml"


def compile(  # noqa: PLR0913 - the arguments users say
    model: Any,
    recipe: Recipe | str | Path | Mapping[str, Any],
    example_inputs: Any = None,
    calibration: Any = None,
    *,
    backend: str | None = None,
    check: CheckMode = "each",
    dynamic: Dynamic = None,
    component: str | None = None,
    threads: int | None = None,
    checkpoint: str | Path | None = None,
    evaluate: Callable[[CompiledModel], float] | None = None,
    max_drop: float = 0.01,
    memory: int = MEMORY,
    progress: Progress = lambda *_: None,
) -> CompiledModel:
    """Capture the model, run the recipe's passes under their contracts, lower to the backend, check the result there.

    model: nn.Module, ExportedProgram, .pt2, .gguf, a diffusers or transformers folder (component= of a pipeline), "package.module:function",
    or a Program from `capture`, which isn't changed and can be compiled again. recipe: a Recipe, mapping, YAML file or shipped name.
    example_inputs: tuple, dict by parameter name, or Inputs; left out, the source's own. calibration: items of the same forms; the last is
    the probe of the contracts. backend: beats the recipe's. check: "each" pass under its contract, "end" only end to end, "off". threads: of
    the session. checkpoint: a folder that keeps what is finished; the same call goes on from there and gives the same model. evaluate: a metric
    of a compiled model, higher is better; the quantised sites that cost most go back to float until it has lost at most max_drop
    (`report.guard`). memory: bytes that statistics may take in one run over the calibration items; what needs more takes several runs.
    progress(name, finished, total): called before each pass and after each calibration item. Raises an FxcError; nothing is left half-done.
    """
    _check_options(check, threads, memory, max_drop)
    recipe = load_recipe(recipe)
    passes = build(recipe)
    runner = _backend(recipe, backend)
    loaded = None if isinstance(model, Program) else resolve(model, component)
    captured = _captured(loaded, example_inputs, dynamic) if loaded else model
    check_globs(recipe, captured)
    feed, steps = None if calibration is None else as_feed(calibration), len(passes) + 1
    items = None if feed is None else FlatItems(feed, captured)
    at = "", 0  # the pass that runs, and how many have finished

    def tell(name: str, finished: int) -> None:
        nonlocal at
        at = name or f"lower to {runner.name}", finished
        progress(*at, steps)

    statistics = None if items is None else Statistics(items, memory, lambda count: progress(f"{at[0]}, item {count}", at[1], steps))
    probe = captured.example if items is None else items.probe

    def one(recipe: Recipe, folder: str | Path | None = None) -> CompiledModel:
        """The captured program under one recipe, lowered; finished passes are kept in the folder."""
        manager = Manager(captured.copy(), runner.target, probe, check, statistics)
        manager.tell = lambda sentence: progress(f"{at[0]}, {sentence}", at[1], steps)
        passes = build(recipe)
        with _opened(folder, captured, recipe, passes, runner, check, feed) as kept:
            _run(manager, passes, kept, tell)
            audit(manager.program)
            return _compiled(recipe, runner, captured, manager, threads, kept)

    made = one(recipe, checkpoint) if evaluate is None else _guarded(recipe, one, evaluate, max_drop, captured, runner, probe, statistics)
    progress("", steps, steps)
    return made


def _guarded(
    recipe: Recipe,
    compiled: Callable[[Recipe], CompiledModel],
    evaluate: Callable[[CompiledModel], float],
    max_drop: float,
    captured: Program,
    runner: Backend,
    probe: Sequence[Tensor],
    statistics: Statistics | None,
) -> CompiledModel:
    """The compiled model with as few quantised sites in float as the metric needs."""
    manager = Manager(captured.copy(), runner.target, probe, "off", statistics)
    done = manager.run(list(takewhile(lambda planned: "finalised" not in planned[1].gives, build(recipe))))
    ranked = guard.named_before(guard.costs(manager.program, probe, run(captured, probe)), done)
    float_metric = guard.measured(evaluate, compiled(guard.in_float(recipe)))
    model, report = guard.give_back(recipe, ranked, compiled, evaluate, float_metric, max_drop)
    model.report = model.report.model_copy(update={"guard": report})
    _write_report(model.folder, model.report, run_in(model.folder).history)
    return model


def _check_options(check: str, threads: Any, memory: Any, max_drop: Any) -> None:
    if check not in get_args(CheckMode):
        raise RecipeError(f"check={check!r} is unknown", do=f"one of {', '.join(get_args(CheckMode))}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads={threads!r} is no number of threads", do="pass 1 or more, or None for the runtime's choice")
    if not isinstance(memory, int) or memory < 1:
        raise InputError(f"memory={memory!r} is no number of bytes", do="pass the bytes that statistics may take in one run, such as 4 << 30")
    if not isinstance(max_drop, int | float) or math.isnan(max_drop):
        raise InputError(f"max_drop={max_drop!r} is no drop", do="pass how much of the metric may be lost, such as 0.01")


def _opened(
    folder: str | Path | None,
    captured: Program,
    recipe: Recipe,
    passes: Sequence[tuple[Step, Pass]],
    runner: Backend,
    check: str,
    feed: Feed | None,
) -> contextlib.AbstractContextManager[Checkpoint | None]:
    """The checkpoint in the folder, told what this run depends on; nothing without a folder."""
    if folder is None:
        return contextlib.nullcontext()
    run = {
        "versions": versions(),
        "check": check,
        "target": runner.target.model_dump(mode="json"),
        "feed": feed and feed.digest,
        "passes": [{s.use: step_options(s, p)} for s, p in passes],
    }
    return opened(folder, run, captured, recipe.name)


def _run(manager: Manager, passes: Sequence[tuple[Step, Pass]], kept: Checkpoint | None, progress: Callable[[str, int], None]) -> None:
    """Run the passes that the checkpoint hasn't finished, and keep the program after each."""
    if kept and kept.program:
        manager.program, manager.done, manager.history = kept.program, list(kept.done), History.from_json(kept.history)
        manager.gave = {fact for _, item in passes[: len(kept.done)] for fact in item.gives}
        manager.history.resume(manager.program)
    if kept:
        manager.kept = kept.progress
    finished = len(manager.done)
    keep = (lambda: kept.save(manager.program, manager.done, manager.history.to_json())) if kept else lambda: None
    manager.run(passes[finished:], lambda name, number, _: progress(name, finished + number), keep)


def _compiled(
    recipe: Recipe, runner: Backend, captured: Program, manager: Manager, threads: int | None, kept: Checkpoint | None
) -> CompiledModel:
    """The program lowered and measured, or the checkpoint's artifact where it has finished just that."""
    chosen = {"recipe": recipe.model_dump(mode="json"), "backend": _chosen(runner)}
    made = kept.finished(chosen) if kept else None
    folder, report, session = _copied(made) if made else _lowered(recipe, runner, captured, manager, threads)
    configs = captured.config, captured.generation_config
    compiled = CompiledModel(folder, runner, report, threads, manager.program, *configs, session)
    weakref.finalize(compiled, shutil.rmtree, folder, ignore_errors=True)
    if kept and not made:
        kept.finish(chosen, compiled.save)
    return compiled


def _lowered(recipe: Recipe, runner: Backend, captured: Program, manager: Manager, threads: int | None) -> tuple[Path, Report, Session | None]:
    """A temporary folder with the artifact's files, its report, and the session that was measured, if one was."""
    program, session = manager.program, None
    with _new_folder() as folder:
        runner.write(program, folder)
        try:
            lowered = runner.report(program, folder, manager.probe)
            session = None if manager.check == "off" else runner.open(folder, threads)
        except ArtifactError as error:  # the files are there: the runtime refuses the program itself
            do = 'backend="reference" runs it; or change what it names in the model'
            raise BackendRefusal(f"{runner.name} can't run the program", why=error.why, do=do) from error
        shipped = None if session is None else lowest_sqnr(manager.reference, session.run(manager.probe))
        report = _report(recipe, captured, manager, manager.done, lowered, shipped)
        store.save_graph(program, folder)
        _write_report(folder, report, _measured(manager, captured))
        (folder / LOCK).write_text(_lock(recipe, runner), encoding="utf-8")
    return folder, report, session


def _measured(manager: Manager, captured: Program) -> History:
    """The run's history with the loss at every value."""
    history, replaced = manager.history, [{k: v for c in p.changes for k, v in c.replaced.items()} for p in manager.done]
    if manager.check != "off":
        history.sqnr = losses(captured, manager.program, manager.probe, replaced, history.recast)
    return history


def _write_report(folder: Path, report: Report, history: History) -> None:
    (folder / REPORT).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    (folder / HISTORY).write_text(json.dumps(history.to_json(), separators=(",", ":")), encoding="utf-8")
    (folder / PAGE).write_text(of_run(run_in(folder)).html(), encoding="utf-8")


def _copied(artifact_folder: Path) -> tuple[Path, Report, None]:
    """A temporary folder with the files of an artifact, and its report."""
    report, _, _ = _read(artifact_folder)
    with _new_folder() as folder:
        _copy_files(artifact_folder, folder)
    return folder, report, None


@contextlib.contextmanager
def _new_folder() -> Iterator[Path]:
    """A temporary folder, gone if the block fails. ArtifactError if it can't be written."""
    place = Path(tempfile.gettempdir(), "fxcompress")
    folder = None
    try:
        folder = artifact.working_folder(place)
        yield folder
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            do = "free space, or set TMPDIR to a folder that has it"
            raise ArtifactError("the lowered program can't be written", where=str(folder or place.parent), why=str(error), do=do) from error
        raise


def _copy_files(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.name != artifact.MANIFEST:
            shutil.copy2(file, target / file.name)


def _report(
    recipe: Recipe, captured: Program, manager: Manager, done: list[PassReport], lowered: BackendReport, output_sqnr: float | None
) -> Report:
    program = manager.program
    return Report(
        versions=versions(),
        origin=captured.origin,
        parameters=sum(t.numel() for t in captured.constants.values()),
        float_bytes=weight_bytes(captured),
        inputs=tuple(as_tensor(v) for v in program.inputs),
        outputs=tuple(as_tensor(v) for v in program.outputs),
        states={s.input: s.output for s in program.states},
        symbols=dict(program.symbols),
        notes=captured.notes,
        recipe=recipe.model_dump(mode="json"),
        check=manager.check,
        nodes=len(program.graph.nodes),
        regions=sum(1 for _ in regions(program).walk()),
        weight_bytes=weight_bytes(program),
        bytes_by_width=bytes_by_width(program),
        output_sqnr=output_sqnr,
        passes=tuple(done),
        backend=lowered,
    )


def load(folder: str | Path, threads: int | None = None) -> CompiledModel:
    """A saved artifact, ready to run. ArtifactError if it is missing, incomplete, altered or from a newer version."""
    path = _folder(folder)
    report, choice, manifest = _read(path)
    config, generation = (Config(c) if isinstance(c := manifest.get(name), dict) else None for name in ("config", "generation_config"))
    compiled = CompiledModel(path, _open_backend(choice), report, threads, None, config, generation)
    _ = compiled.session  # opened now: the files that were checked are the files that run
    return compiled


def _folder(given: Any) -> Path:
    try:
        return Path(given)
    except TypeError:
        raise ArtifactError("an artifact lies in a folder", why=f"{describe(given)} names none", do="pass a path") from None


def _read(path: Path) -> tuple[Report, BackendChoice, Any]:
    """Report, backend and manifest of a checked artifact."""
    manifest = artifact.read_manifest(path)
    try:
        report = Report.model_validate_json((path / REPORT).read_bytes())
        choice = BackendChoice.model_validate(manifest["backend"])
    except (OSError, KeyError, ValidationError) as error:
        raise ArtifactError("the artifact's report can't be read", where=str(path), why=str(error), do="compile and save it again") from error
    return report, choice, manifest


def program_of(model: Any, example_inputs: Any = None, component: str | None = None, dynamic: Dynamic = None) -> Program:
    """The captured program of anything `compile` takes. InputError where neither the user nor the source gives example inputs."""
    return model if isinstance(model, Program) else _captured(resolve(model, component), example_inputs, dynamic)


def _captured(loaded: Loaded, example_inputs: Any, dynamic: Dynamic) -> Program:
    example = example_inputs if example_inputs is not None else loaded.example
    if example is None:
        raise InputError(
            "no example inputs",
            where=loaded.origin,
            why="capture runs the model once on them",
            do="example_inputs=(tensor, ...) or {name: tensor}",
        )
    given = Inputs.of(example)
    item = Inputs(*given.args, roles={**loaded.roles, **given.roles}, **given.kwargs)
    program = replace(capture(loaded.model, item, dynamic=dynamic), origin=loaded.origin)
    names = [v.name for v in program.inputs]
    if unknown := [name for name in given.roles if name not in names]:
        raise InputError(f"a role is given to an unknown input {unknown[0]!r}", why=nearest(unknown[0], names))
    return program


class CompiledModel:
    """A compiled model: call it as the model was called. `report` says what was done; `program` is there after compile, not after load."""

    def __init__(
        self,
        folder: Path,
        backend: Backend,
        report: Report,
        threads: int | None = None,
        program: Program | None = None,
        config: Any = None,
        generation_config: Any = None,
        session: Session | None = None,
    ) -> None:
        self.folder, self.backend, self.report, self.threads, self.program = folder, backend, report, threads, program
        self.config, self.generation_config = config, generation_config
        self._session = session
        self.signature: Signature
        self.inputs: tuple[Value, ...]
        self.signature, self.inputs, self.symbols = store.load_signature(folder) if program is None else _facts(program)

    @property
    def session(self) -> Session:
        """The backend's session, opened at the first use."""
        if self._session is None:
            self._session = self.backend.open(self.folder, self.threads)
        return self._session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the backend: takes what the model took at capture, returns its output class, on the device of what it was given. InputError
        for what doesn't fit."""
        as_tuple = kwargs.get("return_dict") is False and "return_dict" not in self.signature.captured()
        if as_tuple:
            del kwargs["return_dict"]
        item = Inputs(*args, **kwargs)
        tensors = cached.flat_inputs(self.signature, self.inputs, item)
        check_sizes(self.inputs, self.symbols, tensors)
        result = self.signature.unflatten(beside(self.session.run(tensors), (item.args, item.kwargs)))
        result = cached.closed(result, self.signature, item) if cached.keeps(self.inputs) else result
        return result.to_tuple() if as_tuple and hasattr(result, "to_tuple") else result

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """Itself: calls don't change it, and sessions can't be copied."""
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the artifact, whole or not at all. ArtifactError if the place can't be written or holds something else."""
        path = _folder(folder)
        with artifact.writing(path) as new:
            _copy_files(self.folder, new)
            artifact.write_manifest(new, backend=_chosen(self.backend), versions=self.report.versions, **self._plain_configs())
        return path

    def _plain_configs(self) -> dict[str, Any]:
        return {"config": plain_config(self.config), "generation_config": plain_config(self.generation_config)}

    def diff(self, against: Any = None) -> Diff:
        """What each pass did to the graph: `.save("diff.html")`, `.text()`. against: a compiled model, a folder or a model; then how this one
        differs from it."""
        return diff(self) if against is None else diff(against, self)

    def as_module(self) -> CompiledModule:
        """A drop-in nn.Module for diffusers and transformers: config, dtype, device and output classes of the model.

        That of a language model which keeps a key/value cache has `generate`, as in transformers.
        """
        module: CompiledModule = (generating(CompiledModule) if cached.keeps(self.inputs) else CompiledModule)(self)
        return module


class Config(dict[str, Any]):
    """A model's config read from an artifact: its entries are attributes too, as diffusers and transformers have it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}") from None


def plain_config(config: Any) -> dict[str, Any] | None:
    """The entries of a diffusers or transformers config as JSON holds them; None for anything else."""
    entries = config.to_dict() if hasattr(config, "to_dict") else config
    plain: dict[str, Any] | None = json.loads(json.dumps(entries, default=str)) if isinstance(entries, Mapping) else None
    return plain


class CompiledModule(nn.Module):
    """A compiled model as a module. It has no parameters: weights live in the backend's session."""

    def __init__(self, compiled: CompiledModel) -> None:
        super().__init__()
        self.compiled = compiled
        self.config = compiled.config
        self.forward = forward_of(compiled)
        self.training = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point input, else output."""
        values = [*self.compiled.report.inputs, *self.compiled.report.outputs]
        names = (v.dtype for v in values)
        return next((getattr(torch, n) for n in names if getattr(torch, n).is_floating_point), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where it computes. What is given elsewhere comes back there."""
        return CPU


def explain(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """Rows about a node, module path or constant of an artifact or checkpoint: which pass changed, removed or declined it, why, what was
    measured, and the recipe's line that leaves the place out.

    None where no pass did. InputError with the nearest names for a name that neither the model nor a pass ever had.
    """
    return explained(run_at(Path(folder)), name)


def diff(first: Any, second: Any = None, example_inputs: Any = None, component: str | None = None, second_inputs: Any = None) -> Diff:
    """What each pass of a run did; of two, how what the second made differs from what the first made.

    A side is the folder of an artifact or checkpoint, a CompiledModel, or anything `compile` takes as a model (component= of a pipeline).
    example_inputs: of models that bring none, of both unless the second has second_inputs; left out, those of the other side. What is taken
    from the other side goes by names, and where the second's forward has other names, by order. Raises an FxcError.
    """
    one = _run_of(first, second, example_inputs, component)
    if second is None:
        return of_run(one)
    given = example_inputs if second_inputs is None else second_inputs
    return between(one, _run_of(second, first, given, component, is_own=second_inputs is not None))


def inspect(
    model: Any, example_inputs: Any = None, component: str | None = None, recipes: Sequence[str] = (), dynamic: Dynamic = None
) -> Inspection:
    """A model's modules with what they cost, and what each of the recipes would do to it: `.facts()`, `.save("inspect.html")`.

    model, example_inputs, component, dynamic: as for `compile`. recipes: names or files. Raises what capture and recipes raise.
    """
    program = program_of(model, example_inputs, component, dynamic)
    return Inspection(program, [forecast(program, name) for name in recipes])


def _run_of(side: Any, other: Any, example_inputs: Any, component: str | None, is_own: bool = True) -> Run:
    """is_own: the example inputs were made for this side."""
    if isinstance(side, CompiledModel):
        return run_in(side.folder)
    if isinstance(side, str | Path) and is_run(Path(side)):
        return run_at(Path(side))
    if isinstance(side, Program):
        return run_of(side)
    loaded = resolve(side, component)
    called = _called(other) if example_inputs is None and loaded.example is None else None
    example, dynamic = called or (example_inputs, None)
    example = example if called is None and is_own else _in_names_of(loaded.model, example)
    return run_of(_captured(loaded, example, dynamic))


def _in_names_of(model: Any, example: Any) -> Any:
    """The arguments of another model's call; those that this one has no name for under its free ones, in order."""
    if example is None or not isinstance(model, nn.Module):
        return example
    call, own = Inputs.of(example), inspection.signature(model.forward).parameters
    is_open = any(p.kind is inspection.Parameter.VAR_KEYWORD for p in own.values())
    free = (n for n in [*own][len(call.args) :] if n not in call.kwargs)
    names = {n: n if is_open or n in own else next(free, n) for n in call.kwargs}
    roles = {names.get(n, n): role for n, role in call.roles.items()}
    return Inputs(*call.args, roles=roles, **{names[n]: value for n, value in call.kwargs.items()})


def _called(side: Any) -> tuple[Inputs, Dynamic] | None:
    """Example inputs of a run or program, and whether any size of them is dynamic; None of anything else."""
    if isinstance(side, str | Path) and (Path(side) / artifact.MANIFEST).is_file():
        artifact.read_manifest(Path(side))
        (signature, inputs, symbols), example = store.load_signature(Path(side)), store.load_example(Path(side))
    elif isinstance(side, CompiledModel):
        signature, inputs, symbols, example = side.signature, side.inputs, side.symbols, store.load_example(side.folder)
    elif isinstance(side, Program):
        signature, inputs, symbols, example = side.signature, side.inputs, dict(side.symbols), list(side.example)
    else:
        return None
    return cached.whole_call(signature, inputs, example), None if symbols else False


def bench(folder: str | Path, runs: int = 10, threads: int = 1) -> dict[str, Any]:
    """Median and least wall milliseconds of a call on inputs of the compiled sizes, after two warm-up runs."""
    compiled = load(folder, threads)
    inputs = store.load_example(Path(folder))
    times = []
    for number in range(runs + 2):
        start = time.perf_counter()
        compiled.session.run(inputs)
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    shapes = {v.name: list(t.shape) for v, t in zip(compiled.inputs, inputs, strict=True)}
    return {
        "median_ms": round(statistics.median(times), 3),
        "least_ms": round(min(times), 3),
        "runs": runs,
        "threads": threads,
        "inputs": shapes,
    }


def bytes_by_width(program: Program) -> dict[str, int]:
    """Bytes of the stored constants by what they hold: packed codes by format, everything else by dtype."""
    packed = {str(n.args[0].target): str(n.args[1]) for n in program.graph.nodes if n.target is torch.ops.fxc.unpack.default}
    found: dict[str, int] = {}
    for name, tensor in program.constants.items():
        width = packed.get(name, str(tensor.dtype).removeprefix("torch."))
        found[width] = found.get(width, 0) + tensor.numel() * tensor.element_size()
    return dict(sorted(found.items()))


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _facts(program: Program) -> tuple[Signature, tuple[Value, ...], dict[str, tuple[int, int]]]:
    return program.signature, program.inputs, dict(program.symbols)


def _backend(recipe: Recipe, name: str | None) -> Backend:
    chosen = recipe.backend or BackendChoice(name="onnxruntime")
    return _open_backend(chosen if name in (None, chosen.name) else BackendChoice(name=str(name)))


def _open_backend(chosen: BackendChoice) -> Backend:
    kind: Callable[..., Backend] = registry.find_backend(chosen.name)
    try:
        options = kind.Options.model_validate(chosen.options)  # type: ignore[attr-defined]
    except ValidationError as error:
        raise options_error(error, f"the options of backend {chosen.name}", kind.Options) from None  # type: ignore[attr-defined]
    return kind(options)


def _chosen(runner: Backend) -> dict[str, Any]:
    return {"name": runner.name, "options": runner.options.model_dump(mode="json")}


def _lock(recipe: Recipe, runner: Backend) -> str:
    steps = [{s.use: step_options(s, p)} for s, p in build(recipe)]
    chosen = {runner.name: runner.options.model_dump(mode="json")}
    data = {"name": recipe.name, "description": recipe.description, "passes": steps, "backend": chosen}
    return "# versions: " + ", ".join(f"{k} {v}" for k, v in versions().items()) + "\n" + yaml.safe_dump(data, sort_keys=False)
