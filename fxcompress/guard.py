"""Quality guard: the quantised sites that cost most go back to float until the user's own metric has lost no more than allowed.

A site is a node that reads quantised values. What it costs is measured, not guessed: the noise at the outputs on the probe with all sites
quantised, less the noise with this one reading the float values. Sites are given back in that order; how many is found by doubling and
halving, every step a whole compilation judged by the metric.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxcompress.dataflow import before_pair, is_move, pads_with_zeros, pair_of
from fxcompress.errors import ContractViolation, FxcError, InputError, raised_at
from fxcompress.interpret import run
from fxcompress.program import Program
from fxcompress.recipe import Recipe, Step, Where
from fxcompress.registry import find_pass
from fxcompress.report import GuardReport, PassReport
from fxcompress.signature import describe

QUANTIZE = torch.ops.fxc.quantize.default
Model = TypeVar("Model")


def quantised_sites(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that compute with dequantised values, each with the nodes that read these for it: itself, or what moves the numbers there."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is not QUANTIZE and any(pair_of(a) for a in node.all_input_nodes):
            found.setdefault(_computing(node), []).append(node)
    return found


def _computing(node: fx.Node) -> fx.Node:
    """The first op behind a node that does more than move numbers, or put zeros around them."""
    while (is_move(node) or pads_with_zeros(node)) and len(node.users) == 1:
        node = next(iter(node.users))
    return node


def costs(program: Program, probe: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, float]:
    """Per quantised site, by node name, the share of the outputs' noise that goes when it reads float values. The program isn't changed.

    program: with its quantisers, before they are folded into codes.
    """
    total = _noise(reference, run(program, probe))
    found = {}
    for site, readers in quantised_sites(program).items():
        before = [(reader, reader.args, reader.kwargs) for reader in readers]
        try:
            for reader, args, kwargs in before:
                reader.args, reader.kwargs = fx.node.map_arg((args, kwargs), before_pair)
            found[site.name] = total - _noise(reference, run(program, probe))
        finally:
            for reader, args, kwargs in before:
                reader.args, reader.kwargs = args, kwargs
    return found


def named_before(ranked: Mapping[str, float], reports: Sequence[PassReport]) -> dict[str, float]:
    """The costs under names that every quantising pass can leave out: what a pass made that opens and quantises at once goes by the op that it
    opened, and back to float with all of it."""
    opening = [r for r in reports if {"opened", "quantised"} <= find_pass(r.name).gives]
    origins = {new: old for r in opening for change in r.changes for old in change.replaced for new in change.inserted}
    found: dict[str, float] = {}
    for name, cost in ranked.items():
        origin = origins.get(name, name)
        found[origin] = found.get(origin, 0.0) + cost
    return found


def measured(evaluate: Callable[[Model], Any], model: Model) -> float:
    """The user's metric of a model. InputError where it fails, or isn't one number."""
    try:
        value = evaluate(model)
    except FxcError:
        raise
    except Exception as error:
        do = "evaluate takes a compiled model, which is called as yours is and gives what yours gives, and returns one number"
        raise InputError("the metric fails", where=raised_at(error), why=f"{type(error).__name__}: {error}", do=do) from error
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        if not isinstance(value, str):
            return float(value)
    why = f"evaluate returned {describe(value)}"
    raise InputError("the metric is no number", why=why, do="return one number, higher is better")


def give_back(
    recipe: Recipe,
    ranked: Mapping[str, float],
    build: Callable[[Recipe], Model],
    evaluate: Callable[[Model], float],
    float_metric: float,
    max_drop: float,
) -> tuple[Model, GuardReport]:
    """The model with the fewest sites given back whose metric is at most max_drop below that of the float model, and what that cost.

    ranked: sites with their costs. Raises ContractViolation if the drop is larger even with every site given back, and InputError if the float
    model's metric isn't finite.
    """
    if not math.isfinite(float_metric):
        raise InputError("the metric says nothing", why=f"evaluate returned {float_metric} for the float model", do="return a finite number")
    names = sorted(ranked, key=lambda n: -ranked[n])
    metrics: dict[int, float] = {}
    met: dict[int, Model] = {}  # the model of the least count that is met, no other: models are large

    def is_met(count: int) -> bool:
        """Whether the metric drops by at most max_drop with the first `count` sites given back."""
        if count not in metrics:
            model = build(without(recipe, names[:count]))
            metrics[count] = measured(evaluate, model)
            if float_metric - metrics[count] <= max_drop:
                met.clear()
                met[count] = model
        return float_metric - metrics[count] <= max_drop

    most = _least_met(is_met, len(names))
    if most is None:
        raise _unreachable(float_metric, metrics[len(names)], max_drop, len(names))
    given_back = tuple(names[:most])
    report = GuardReport(
        float_metric=float_metric,
        quantised_metric=metrics[0],
        metric=metrics[most],
        max_drop=max_drop,
        given_back=given_back,
        recipe_line="where: {exclude: [" + ", ".join(f'"{n}"' for n in given_back) + "]}" if given_back else "",
    )
    return met[most], report


def _least_met(is_met: Callable[[int], bool], count: int) -> int | None:
    """The least number from 0 to count that is met, by doubling and halving; None if count isn't."""
    if is_met(0):
        return 0
    least, most = 0, 1
    while not is_met(most):
        if most >= count:
            return None
        least, most = most, min(2 * most, count)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if is_met(middle) else (middle, most)
    return most


def in_float(recipe: Recipe) -> Recipe:
    """The recipe up to its first pass that quantises; its float model is what the metric is compared with."""
    steps = list(takewhile(lambda step: "quantised" not in find_pass(step.use).gives, recipe.passes))
    return recipe.model_copy(update={"passes": tuple(steps) or (Step(use="tidy.dead_code"),)})


def without(recipe: Recipe, sites: Sequence[str]) -> Recipe:
    """The recipe with these nodes excluded from every pass that quantises."""
    if not sites:
        return recipe
    steps = [
        step.model_copy(update={"where": Where(include=step.where.include, exclude=(*step.where.exclude, *sites))})
        if "quantised" in find_pass(step.use).gives
        else step
        for step in recipe.passes
    ]
    return recipe.model_copy(update={"passes": tuple(steps)})


def _noise(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Σ over the floating-point outputs of noise over signal."""
    pairs = [(a.double(), b.double()) for a, b in zip(reference, outputs, strict=True) if a.is_floating_point()]
    return sum(float((a - b).square().sum() / a.square().sum().clamp(min=1e-30)) for a, b in pairs)


def _unreachable(float_metric: float, metric: float, max_drop: float, count: int) -> ContractViolation:
    return ContractViolation(
        "the quality asked for can't be reached by giving sites back",
        why=f"the metric is {float_metric:.6g} in float and {metric:.6g} with all {count} sites given back; allowed drop {max_drop:g}",
        do="allow a larger max_drop, or take the other lossy passes out of the recipe",
    )
