"""Inspection: a captured model before anything is done to it. What its modules cost, and what each recipe would do and leave alone.

A forecast runs a recipe's passes on a copy, with ranges from the example inputs alone and no search for better ones, without contracts and
without lowering: sites, declines and bytes are those of a compilation, numbers aren't looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy
from torch import fx

from fxcompress import registry
from fxcompress.calibrate.statistics import Statistics
from fxcompress.cost import Cost, Costs
from fxcompress.diff import Diff, of_run, placed, written
from fxcompress.diff.page import page
from fxcompress.diff.read import run_of
from fxcompress.diff.text import quantity
from fxcompress.errors import FxcError
from fxcompress.history import quantised_share
from fxcompress.manager import Manager, weight_bytes
from fxcompress.program import ROOT, Program
from fxcompress.recipe import BackendChoice, Recipe, build, load_recipe
from fxcompress.regions import Region, regions
from fxcompress.report import Declined, PassReport


@dataclass(frozen=True)
class Forecast:
    """What a recipe would do. share: of all multiply-accumulates, those that read quantised values. refusal: why it can't run, else ""."""

    recipe: str
    description: str
    passes: Sequence[PassReport] = ()
    weight_bytes: int = 0
    share: float = 0.0
    refusal: str = ""

    @property
    def sites(self) -> int:
        """Sites of all passes, as the table of a compilation has them: one for each value that a pass changes at a place."""
        return sum(p.fired for p in self.passes)

    @property
    def declined(self) -> list[tuple[str, Declined]]:
        """What each pass would leave alone, with the pass's name."""
        return [(p.name, d) for p in self.passes for d in p.declined]


def forecast(program: Program, name: str) -> Forecast:
    """What the recipe of that name or file would do to the program, which isn't changed."""
    recipe = load_recipe(name)
    try:
        passes = build(_hasty(recipe))
        target = registry.find_backend((recipe.backend or BackendChoice(name="onnxruntime")).name).target
        manager = Manager(program.copy(), target, program.example, "off", Statistics([program.example]))
        done = manager.run(passes)
    except FxcError as error:
        return Forecast(name, recipe.description, refusal=error.what)
    return Forecast(name, recipe.description, done, weight_bytes(manager.program), quantised_share(manager.history.graphs[-1]))


def _hasty(recipe: Recipe) -> Recipe:
    """The recipe without the search for better ranges, which changes numbers and neither sites nor bytes."""
    steps = [s.model_copy(update={"options": {**s.options, "range": "minmax"}}) if "range" in s.options else s for s in recipe.passes]
    return recipe.model_copy(update={"passes": tuple(steps)})


@dataclass(frozen=True)
class Inspection:
    """A captured program with its costs, and the forecasts that were asked for."""

    program: Program
    forecasts: Sequence[Forecast] = ()

    @cached_property
    def diff(self) -> Diff:
        """The graph as a run without passes."""
        return of_run(run_of(self.program))

    @cached_property
    def costs(self) -> list[tuple[Region, Cost]]:
        """Every module with its cost as formulas in the dynamic sizes, in the order in which they run."""
        costs = Costs(self.program)
        places = {n: place for place, n in enumerate(self.program.graph.nodes) if n.op != "get_attr"}
        return [(r, costs.total(r.all_nodes())) for r in _in_order(regions(self.program), places)]

    def facts(self) -> dict[str, Any]:
        """All of it as plain data; sizes are those of the example inputs, formulas text."""
        bound, program = Costs(self.program, formulas=False).bound, self.program
        total = self.costs[0][1]
        return {
            "origin": program.origin,
            "inputs": {v.name: list(v.shape) for v in program.inputs},
            "outputs": {v.name: list(v.shape) for v in program.outputs},
            "symbols": {k: list(v) for k, v in program.symbols.items()},
            "sizes": self.diff.runs[0].history.sizes,
            "notes": list(program.notes),
            "cost": {
                "operations": formula(total.flops),
                "bytes of weights": formula(total.weights),
                "bytes moved": formula(total.traffic),
                **self._steps(),
            },
            "regions": [{**_row(r, program), "flops": bound(c.flops), "traffic": bound(c.traffic)} for r, c in self.costs],
            "recipes": [_forecast_row(f, program) for f in self.forecasts],
        }

    def html(self) -> str:
        """The graph in the viewer, with costs and forecasts on its first page."""
        formulas = {r.path: formula(c.flops) for r, c in self.costs}
        return page(self.diff, formulas, self._tables(), {f.recipe: f.passes for f in self.forecasts})

    def save(self, path: str | Path) -> Path:
        """Write the HTML file, whole or not at all. ArtifactError if the place can't be written, InputError if its suffix is that of another
        format."""
        return written(placed(path, "html"), self.html())

    def _steps(self) -> dict[str, str]:
        """A diffusion model is called once a step of its sampler."""
        is_diffusion = any(v.role == "timestep" for v in self.program.inputs)
        return {"operations of all steps": formula(sympy.Symbol("steps") * self.costs[0][1].flops)} if is_diffusion else {}

    def _tables(self) -> Iterator[dict[str, Any]]:
        facts = self.facts()
        yield {"title": "Cost of a call", "head": ["", "formula"], "rows": [[k, v] for k, v in facts["cost"].items()]}
        if self.forecasts:
            names = ("recipe", "sites", "declined", "weights", "quantised", "what")
            rows = [[str(r[n]) for n in names] for r in facts["recipes"]]
            yield {
                "title": "What each recipe would do; sites: of all passes; quantised: multiply-accumulates on quantised values; the example "
                "inputs are the calibration feed",
                "head": list(names),
                "rows": rows,
            }
            declined = [[f.recipe, name, d.module or d.site, d.reason] for f in self.forecasts for name, d in f.declined]
            yield {"title": "What they would leave alone", "head": ["recipe", "pass", "place", "reason"], "rows": declined}
        rows = [
            [r["path"] or ROOT, r["class"], *(quantity(r[k], "") for k in ("nodes", "parameters", "flops", "traffic"))]
            for r in facts["regions"]
        ]
        title = f"Modules, {self.diff.sizes}" if self.diff.sizes else "Modules"
        yield {"title": title, "head": ["path", "class", "nodes", "parameters", "operations", "bytes moved"], "rows": rows}


def _in_order(region: Region, places: Mapping[fx.Node, int]) -> Iterator[Region]:
    """A region and all inside it; a constant stands at the head of the graph and says nothing about where its module runs."""
    yield region
    first = {c.path: min((places[n] for n in c.all_nodes() if n in places), default=len(places)) for c in region.children}
    for child in sorted(region.children, key=lambda c: first[c.path]):
        yield from _in_order(child, places)


def formula(value: Any) -> str:
    """A cost as text, common factors in front."""
    return str(sympy.factor_terms(value)) if isinstance(value, sympy.Expr) else str(value)


def _row(region: Region, program: Program) -> dict[str, Any]:
    names = {str(n.target) for n in region.all_nodes() if n.op == "get_attr"}
    parameters = sum(program.constants[n].numel() for n in names)
    return {"path": region.path, "class": region.kind, "nodes": len(region.all_nodes()), "parameters": parameters}


def _forecast_row(found: Forecast, program: Program) -> dict[str, Any]:
    saved = f"{quantity(weight_bytes(program), 'B')} → {quantity(found.weight_bytes, 'B')}"
    return {
        "recipe": found.recipe,
        "sites": found.sites,
        "declined": len(found.declined),
        "weights": "" if found.refusal else saved,
        "quantised": "" if found.refusal else f"{found.share:.1%}",
        "what": f"can't run: {found.refusal}" if found.refusal else found.description,
    }
