"""The command line: each command parses, calls one public function and prints what it returned, as text or with --json as JSON."""

from __future__ import annotations

import contextlib
import inspect as inspection
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file

from fxcompress.errors import FxcError, InputError
from fxcompress.sources import call_function
from fxcompress.starting import started

app = typer.Typer(help="Makes generative and vision models small and fast, and proves every rewrite on your own model.", no_args_is_help=True)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

UNCUT = 100_000  # columns, where nobody looks: what reads a pipe or a file wants whole lines
MOST = 20  # declined sites that are printed
LEAST = 24  # columns that the widest cell of a table is given before it is wrapped
SPELLINGS = (
    (r"example_inputs=\(tensor, \.\.\.\) or \{name: tensor\}", "--example FILE.safetensors, or --example package.module:function"),
    (r"\bin example_inputs\b", "in --example"),
    (r"pass calibration=\[item, \.\.\.\]", "from Python, pass calibration=[item, ...]"),
    (r"\bcomponent=['\"]?([\w.-]+)['\"]?", r"--component \1"),
    (r"\bleave component out\b", "leave --component out"),
    (r"\bbackend=['\"](\w+)['\"]", r"--backend \1"),
    (r"\bthe format '([\w-]+)'", r"--format \1"),
)
ENDINGS = {"html": "html", "text": "txt", "dot": "dot", "model-explorer": "json"}
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=".pt2, .gguf, diffusers or transformers folder, or package.module:function")]
Example = Annotated[str | None, typer.Option(help="example inputs: a .safetensors by parameter name, or package.module:function")]
Examples = Annotated[list[str] | None, typer.Option("--example", help="example inputs, as for compile; given twice: the second for B")]
Component = Annotated[str | None, typer.Option(help="which model of a diffusers pipeline")]


@app.callback()
def setup() -> None:
    """Modules of the working directory can be named, as with `python -m`."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding shows "\\u2192" for an arrow
    if not out.is_terminal:
        out.width = UNCUT


@app.command()
def compile(
    model: Model,
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="a shipped recipe's name or a .yaml file")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the artifact")],
    backend: Annotated[str | None, typer.Option(help="instead of the recipe's")] = None,
    component: Component = None,
    check: Annotated[str, typer.Option(help="each, end or off")] = "each",
    example: Example = None,
    checkpoint: Annotated[Path | None, typer.Option(help="folder that keeps what is finished; the same command goes on from there")] = None,
    as_json: Json = False,
) -> None:
    """Compile a model with a recipe and save the artifact."""
    from fxcompress import api

    if check not in ("each", "end", "off"):
        raise typer.BadParameter(f"{check!r} is none of each, end, off", param_hint="--check")
    with failing(as_json), bar() as progress:
        inputs = example_inputs(example) if example else None
        options = {"backend": backend, "component": component, "check": check, "checkpoint": checkpoint, "progress": progress}
        compiled = api.compile(model, recipe, inputs, **options)  # type: ignore[arg-type]
        compiled.save(output)
    report = compiled.report
    show(report.model_dump(mode="json"), as_json, lambda: [*summary(report, str(output)), *declines(report)])


@app.command()
def inspect(
    model: Model,
    component: Component = None,
    example: Example = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="also try every shipped recipe on a copy: sites, declines, bytes")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="an HTML file with the graph, too")] = None,
    as_json: Json = False,
) -> None:
    """Capture a model and list its modules with nodes, parameters and costs, and what each recipe would do to it."""
    from fxcompress import api
    from fxcompress.diff.text import grouped
    from fxcompress.program import ROOT
    from fxcompress.recipe import shipped

    with failing(as_json):
        found = api.inspect(model, example_inputs(example) if example else None, component, shipped() if recipes else ())
        facts = found.facts()
        saved = found.save(output) if output else None
    regions = [{**r, "path": r["path"] or ROOT} for r in facts["regions"]]
    parts = [table("path", regions), *([table("recipe", facts["recipes"])] if recipes else [])]
    declined = grouped(f"{f.recipe}: {name} would decline {d.module or d.site}: {d.reason}" for f in found.forecasts for name, d in f.declined)
    show(facts, as_json, lambda: [*_facts(facts), *parts, *declined, *([f"{saved}"] if saved else [])])


@app.command("passes")
def list_passes(name: Annotated[str | None, typer.Argument(help="one pass, with its options")] = None, as_json: Json = False) -> None:
    """List passes, or show one with its options."""
    from fxcompress import registry

    with failing(as_json):
        broken = {} if name else registry.broken()
        found = [_pass_row(n, registry.find_pass(n)) for n in ([name] if name else registry.passes()) if n not in broken]
    if name:
        show(found[0], as_json, lambda: [found[0]["doc"], table("option", found[0]["options"])])
    else:
        show({"passes": found}, as_json, lambda: [table("pass", [{k: r[k] for k in ("pass", "contract", "needs", "what")} for r in found])])


@app.command("recipes")
def list_recipes(name: Annotated[str | None, typer.Argument(help="one recipe or .yaml file, whole")] = None, as_json: Json = False) -> None:
    """List shipped recipes, or print one."""
    from fxcompress.recipe import load_recipe, shipped

    with failing(as_json):
        found = {n: load_recipe(n) for n in ([name] if name else shipped())}
    if name:
        file = resources.files("fxcompress.recipes") / f"{name}.yaml" if name in shipped() else Path(name)
        text = file.read_text(encoding="utf-8")
        show(found[name].model_dump(mode="json"), as_json, lambda: [text])
    else:
        rows = [{"recipe": n, "what": r.description} for n, r in found.items()]
        show({"recipes": rows}, as_json, lambda: [table("recipe", rows)])


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="an artifact, a checkpoint, or a model as for compile")],
    second: Annotated[str | None, typer.Argument(metavar="B", help="compared with A; left out: what each pass of A did")] = None,
    as_text: Annotated[bool, typer.Option("--text", help="print text that is the same for the same runs")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the file to write")] = None,
    format: Annotated[str, typer.Option(help="html, text, dot or model-explorer")] = "html",
    component: Component = None,
    example: Examples = None,
    as_json: Json = False,
) -> None:
    """Show what each pass did to the graph, or how two results differ, in one HTML file or as text."""
    from fxcompress import api
    from fxcompress.diff import placed
    from fxcompress.diff.text import SAME, unfinished

    if format not in ENDINGS:
        raise typer.BadParameter(f"{format!r} is none of {', '.join(ENDINGS)}", param_hint="--format")
    if as_text and (output or format != "html"):
        raise typer.BadParameter("it prints; leave out -o and --format, or ask for --format text", param_hint="--text")
    if as_text and as_json:
        raise typer.BadParameter("the two print one thing each; leave out one of them", param_hint="--text and --json")
    if len(example or ()) > 1 + (second is not None):
        raise typer.BadParameter("more than there are models", param_hint="--example")
    with failing(as_json):
        if output:
            placed(output, format)  # type: ignore[arg-type]  # before the work
        inputs = [*map(example_inputs, example or ()), None, None]
        found = api.diff(first, second, inputs[0], component, inputs[1])
        wanted = None if as_text or (as_json and output is None) else output or Path(f"diff.{ENDINGS[format]}")
        saved = found.save(wanted, format) if wanted else None  # type: ignore[arg-type]
    if as_text:
        with writing():
            sys.stdout.write(found.text())
    else:
        show(
            {**found.summary(), "file": saved and str(saved)},
            as_json,
            lambda: [f"{saved}: {found.title}", *unfinished(found), *[SAME] * found.is_same],
        )


@app.command()
def explain(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="folder of an artifact or checkpoint")],
    node: Annotated[str, typer.Argument(help="a node, a module path or a constant")],
    as_json: Json = False,
) -> None:
    """Tell which passes touched or declined a node or module, what was measured there, and the recipe's lines that leave it out."""
    from fxcompress import api

    with failing(as_json):
        rows = api.explain(artifact, node)
    told = [{k: row[k] for k in ("pass", "site", "what", "why")} for row in rows]
    show({"node": node, "found": rows}, as_json, lambda: [table("pass", told), *_exclusions(rows)] if rows else [f"no pass touched {node}"])


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="folder of an artifact")],
    runs: Annotated[int, typer.Option(min=1)] = 10,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Time an artifact on inputs of the sizes it was compiled with: median and least of several runs."""
    from fxcompress import api

    with failing(as_json):
        facts = api.bench(artifact, runs, threads)
    show(facts, as_json, lambda: [table("figure", [{"figure": k, "value": v} for k, v in facts.items()])])


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, passes and backends, what can't be loaded and why, and how to install what a backend lacks."""
    from fxcompress import api, registry

    with failing(as_json):
        broken, absent = registry.broken(), registry.absent()
        facts = {"versions": api.versions(), "passes": registry.passes(), "backends": registry.backends(), "broken": broken, "absent": absent}
    rows = [{"name": k, "value": v} for k, v in api.versions().items()]
    rows += [{"name": n, "value": broken.get(n) or absent.get(n, "ok")} for n in (*registry.passes(), *registry.backends())]
    show(facts, as_json, lambda: [table("name", rows)])
    if broken:
        raise typer.Exit(1)


def example_inputs(name: str) -> Any:
    """Example inputs as `--example` names them: tensors of a .safetensors file, or what a function returns. InputError if unreadable."""
    if not name.endswith(".safetensors"):
        return call_function(name)
    try:
        return load_file(name)
    except (OSError, SafetensorError) as error:
        raise InputError(
            "the example inputs can't be read", where=name, why=str(error), do="write them with safetensors.torch.save_file"
        ) from None


def summary(report: Any, place: str) -> list[Any]:
    """Passes of a report in order, with sites, measured figures, bytes and time."""
    from fxcompress.diff.text import measured

    rows = []
    for p in report.passes:
        figure = measured(p.worst.model_copy(update={"limit": None}), p.unit) if p.worst else ""
        limit = number(p.worst.limit) if p.worst else ""
        rows.append(
            {
                "pass": p.name,
                "sites": f"{p.fired}/{p.legal + len(p.declined)}",
                "declined": len(p.declined),
                "worst figure": figure,
                "limit": limit,
                "output SQNR": f"{p.output_sqnr:.1f} dB" if p.output_sqnr is not None else "",
                "MB": f"{p.bytes_before / 1e6:.1f} -> {p.bytes_after / 1e6:.1f}",
                "CPU s": f"{p.cpu_seconds:.1f}",
            }
        )
    return [f"{report.origin} -> {place}", table("pass", rows), _headline(report)]


def declines(report: Any) -> list[str]:
    """One line a declined site, the first twenty of each pass, and the notes of capture."""
    lines = [f"note: {n}" for n in report.notes]
    for p in report.passes:
        lines += [f"{p.name} declined {d.module or d.site}: {d.reason}" for d in p.declined[:MOST]]
        lines += [f"{p.name} declined {len(p.declined) - MOST} more; all are in report.json"] if len(p.declined) > MOST else []
    return lines


def _headline(report: Any) -> str:
    widths = ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in report.bytes_by_width.items())
    backend = report.backend
    parts = [f"weights: {widths}"]
    if backend and backend.integer_share is not None:
        parts.append(f"MACs in integer or n-bit kernels: {backend.integer_share:.1%} of all")
    if backend and backend.parity is not None:
        parts.append(f"parity with the interpreter: {backend.parity:.1e}")
    if backend and backend.rounding_sqnr is not None:
        parts.append(f"kernel-internal rounding of activations: {backend.rounding_sqnr:.1f} dB")
    if report.check != "each":
        parts.append(f"contracts were not checked pass by pass (check={report.check})")
    return "\n".join(parts)


def number(value: float | None) -> str:
    """A figure in three digits; a dash where there is none."""
    from fxcompress.diff import text

    return text.NONE if value is None else text.number(value)


def table(key: str, rows: list[dict[str, Any]]) -> Any:
    """Rows of one form as a table; where the terminal is too narrow for one, row by row. `key` heads a row. Nothing is cut."""
    cells = [{name: f"{v:,}" if isinstance(v, int) else str(v) for name, v in row.items()} for row in rows]
    widths = [max(cell_len(text) for text in (name, *(row[name] for row in cells))) for name in (cells[0] if cells else [key])]
    if sum(widths) - max(widths) + min(max(widths), LEAST) + 3 * len(widths) + 1 > out.width:
        return "\n".join(line for row in cells for line in (row[key], *(f"  {name}: {row[name]}" for name in row if name != key and row[name])))
    grid = Table()
    for name, width in zip(cells[0] if cells else [key], widths, strict=True):
        is_figure = name != key and all(re.match(r"-?\d|[-–]?$", row[name]) for row in cells)
        side: Any = "right" if is_figure else "left"
        grid.add_column(name, min_width=min(width, LEAST), no_wrap=width < max(widths), overflow="fold", justify=side)
    for row in cells:
        grid.add_row(*map(escape, row.values()))
    return grid


def show(data: Any, as_json: bool, text: Callable[[], list[Any]]) -> None:
    """Print one JSON object, or the text."""
    from fxcompress.diff.text import printable

    with writing():
        if as_json:
            sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")
            return
        for part in text():
            is_recipe = isinstance(part, str) and part.startswith("- ")  # stays one line, to be copied
            said = "\n".join(map(printable, part.split("\n"))) if isinstance(part, str) else part
            out.print(said, markup=not isinstance(part, str), soft_wrap=is_recipe)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Exit 1 with the reason where standard output takes no more; that its reader has gone is typer's to end in silence."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still kept for it would fail once more at the end
        err.print(f"the output can't be written: {error.strerror}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def failing(as_json: bool) -> Iterator[None]:
    """Exit 1 with the message of an FxcError, exit 130 at Ctrl-C."""
    try:
        started()
        yield
    except FxcError as error:
        if as_json:
            fields = {name: spoken(getattr(error, name)) for name in ("what", "where", "why", "state", "do")}
            with writing():
                sys.stdout.write(json.dumps({"error": type(error).__name__, **fields}, indent=1) + "\n")
        else:
            said = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            err.print(spoken(said), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        err.print(f"stopped; {'; '.join(getattr(error, '__notes__', ['nothing was written']))}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


def spoken(message: str) -> str:
    """A message with the options of the command line in place of the arguments of Python."""
    for argument, option in SPELLINGS:
        message = re.sub(argument, option, message)
    return message


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback that draws a bar with an estimate on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as drawn:
        task = drawn.add_task("capture", total=None)
        yield lambda name, done, total: drawn.update(task, description=name or "done", completed=done, total=total)


def _exclusions(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The recipe's lines that leave out what was changed, and why single places of a pass can't be."""
    from fxcompress.diff.journal import BESIDES

    lines = dict.fromkeys(row["exclude"] for row in rows if row.get("exclude"))
    yield from [f"to leave it out, in place of the recipe's line ({BESIDES}):"] * bool(lines)
    yield from lines
    yield from dict.fromkeys(f"{row['pass']}: can't be left out alone: {row['alone']}" for row in rows if row.get("alone"))


def _facts(facts: dict[str, Any]) -> list[str]:
    from fxcompress.diff.sizes import at

    lines = [f"{facts['origin']}"]
    for kind in ("inputs", "outputs"):
        lines += [f"{kind[:-1]} {name} [{', '.join(map(str, shape))}]" for name, shape in facts[kind].items()]
    lines += [f"{name}: {formula}" for name, formula in facts["cost"].items()]
    lines += [f"operations and bytes by module {told}"] if (told := at(facts["sizes"])) else []
    return lines + [f"note: {n}" for n in facts["notes"]]


def _pass_row(name: str, kind: Any) -> dict[str, Any]:
    doc = inspection.cleandoc(sys.modules[kind.__module__].__doc__ or kind.__doc__ or "")
    options = [{"option": n, "default": repr(f.default), "type": str(f.annotation)} for n, f in kind.Options.model_fields.items()]
    needs = ", ".join(sorted(kind.needs)) or "-"
    return {
        "pass": name,
        "contract": kind.contract.kind,
        "needs": needs,
        "what": doc.splitlines()[0] if doc else "",
        "doc": doc,
        "options": options,
    }


if __name__ == "__main__":
    app()
