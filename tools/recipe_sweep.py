"""Compile every model of the zoo and of the held-out table with recipes, each in a process of its own, and judge the numbers.

    python -m tools.recipe_sweep int8 int8:openvino int8-dynamic [--table zoo|held-out|all] [--only NAME ...] [--json FILE]

A job is a recipe and its backend, ONNX Runtime if none is named; a model is captured once for all of them. Calibrated on four items of the
example with noise, judged on five others by the median of the lowest output SQNR: where a model picks by top-k or a threshold, rounding that
flips one pick makes another figure of one item. "right": the artifact's is above 20 dB, or at most 6 dB below that of plain fake quantisation
in eager mode (int8 weights per channel, uint8 min-max activations of linear layers and convolutions). Anything else is a refusal, a crash, a
wrong number or a model that came out unchanged. The exit code is 0 if of every job at least 95 % are right and the rest refusals.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import fxcompress as fxc
from fxcompress import cached
from fxcompress.interpret import run
from fxcompress.manager import lowest_sqnr
from fxcompress.program import Program
from tests.held_out import HELD_OUT
from tests.zoo import ZOO
from tools.capture_sweep import names
from tools.forked import Row, forked

ENOUGH, FLOOR, SLACK = 0.95, 20.0, 6.0
CALIBRATED, JUDGED = 4, 5  # items
LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")


def main() -> int:
    """Run the sweep."""
    options = _options()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in options.only or names(options.table):
        found = forked(partial(rows_of, jobs=options.jobs), name, options.limit)
        rows += [{**r, "job": job} for r in found for job in ([r["job"]] if "job" in r else options.jobs)]
        for row in rows[-len(options.jobs) :]:
            print(_line(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    return max([_summed(job, [r for r in rows if r["job"] == job]) for job in options.jobs])


def _summed(job: str, rows: list[Row]) -> int:
    verdicts = Counter(r["verdict"] for r in rows)
    print(f"{job}: " + ", ".join(f"{v} {n}" for v, n in verdicts.most_common()), f"of {len(rows)}; right {verdicts['right'] / len(rows):.1%}")
    good = verdicts["right"] >= ENOUGH * len(rows) and verdicts["right"] + verdicts["refused"] == len(rows)
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="RECIPE[:BACKEND]")
    parser.add_argument("--table", choices=("zoo", "held-out", "all"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--limit", type=float, default=900, help="seconds a model may take")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def rows_of(name: str, jobs: list[str]) -> list[Row]:
    """Compile and judge one model with every job."""
    torch.manual_seed(0)
    model, inputs = {**ZOO, **HELD_OUT}[name]()
    items = [noisy(inputs, seed) for seed in range(CALIBRATED + JUDGED)]
    try:
        program = fxc.capture(model, inputs)
    except fxc.FxcError as error:
        return [{"name": name, "verdict": "refused", "why": _told(error)}]
    wanted = [(flat, run(program, flat)) for flat in (_flat(program, item) for item in items[CALIBRATED:])]
    made = [_made(program, items, wanted, *job.partition(":")[::2]) for job in jobs]
    eager = _eager(model, items)
    return [{"name": name, "job": job, "eager": eager, **_judged(row, eager)} for job, row in zip(jobs, made, strict=True)]


def _flat(program: Program, item: Any) -> list[torch.Tensor]:
    return cached.flat_inputs(program.signature, program.inputs, fxc.Inputs(**item))


def _made(program: Program, items: list[Any], wanted: list[tuple[list[torch.Tensor], list[Any]]], recipe: str, backend: str) -> Row:
    start = time.process_time()
    try:
        compiled = fxc.compile(program, recipe, calibration=items[: CALIBRATED + 1], backend=backend or "onnxruntime", threads=1)
    except fxc.FxcError as error:
        return {"verdict": "refused", "why": _told(error)}
    except Exception as error:  # the row of this job; the model's other jobs go on
        return {"verdict": "crashed", "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc().splitlines()[-30:]}
    report = compiled.report
    figures = [lowest_sqnr(outputs, compiled.session.run(flat)) for flat, outputs in wanted]
    quantised = [p for p in report.passes if p.name in ("quant.insert", "quant.weight_only")]
    return {
        "why": "",
        "sqnr": _median(figures),
        "figures": figures,
        "fired": sum(p.fired for p in quantised),
        "declined": [d.reason for p in quantised for d in p.declined],
        "integer_share": report.backend and report.backend.integer_share,
        "quantised_share": report.backend and report.backend.quantised_share,
        "bytes": report.weight_bytes / report.float_bytes,
        "in_float": [f"{s.site}: {s.reason}" for s in report.backend.in_float] if report.backend else [],
        "seconds": time.process_time() - start,
    }


def _median(figures: list[float]) -> float:
    """NaN if one is."""
    return float(torch.tensor(figures, dtype=torch.float64).median())


def _judged(row: Row, eager: float) -> Row:
    if "verdict" in row:
        return row
    right = row["sqnr"] > FLOOR or row["sqnr"] >= eager - SLACK
    return {**row, "verdict": "unchanged" if not row["fired"] else "right" if right else "wrong"}


def _told(error: fxc.FxcError) -> str:
    return f"{type(error).__name__}: {error.what}; {error.why} at {error.where}"


def noisy(inputs: Any, seed: int) -> Any:
    """The inputs with noise on every floating-point tensor."""
    generator = torch.Generator().manual_seed(seed)

    def moved(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        return value + 0.1 * value.std(correction=0).clamp(min=0.1) * torch.randn(value.shape, generator=generator)

    return pytree.tree_map_only(torch.Tensor, moved, inputs)


def _eager(model: Any, items: list[Any]) -> float:
    """Median of the lowest output SQNR of plain fake quantisation with hooks."""

    def outputs(inputs: Any) -> list[Any]:
        with torch.no_grad():
            return [t for t in pytree.tree_leaves(model(**inputs)) if isinstance(t, torch.Tensor)]

    layers = [m for m in model.modules() if any(base.__name__ in LAYERS for base in type(m).__mro__)]
    references = [outputs(item) for item in items[CALIBRATED:]]
    ranges = _ranges(layers, items[:CALIBRATED], outputs)
    for layer in layers:
        layer.weight.data = _per_channel(layer.weight.data, type(layer).__name__ == "Conv1D")
    handles = [m.register_forward_pre_hook(lambda m, args: (_on_grid(args[0], *ranges[m]), *args[1:])) for m in layers if m in ranges]
    figures = [lowest_sqnr(reference, outputs(item)) for reference, item in zip(references, items[CALIBRATED:], strict=True)]
    for handle in handles:
        handle.remove()
    return _median(figures)


def _ranges(layers: list[Any], items: list[Any], outputs: Any) -> dict[Any, tuple[float, float]]:
    found: dict[Any, tuple[float, float]] = {}

    def seen(module: Any, args: Any) -> None:
        if args and args[0].numel():
            lo, hi = found.get(module, (0.0, 0.0))
            found[module] = min(lo, float(args[0].min())), max(hi, float(args[0].max()))

    handles = [m.register_forward_pre_hook(seen) for m in layers]
    for item in items:
        outputs(item)
    for handle in handles:
        handle.remove()
    return found


def _per_channel(weight: Any, is_transposed: bool) -> Any:
    rows = (weight.T if is_transposed else weight).flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    rounded = ((rows / scale).round().clamp(-127, 127) * scale).to(weight.dtype)
    return rounded.T.contiguous() if is_transposed else rounded.view_as(weight)


def _on_grid(x: Any, lo: float, hi: float) -> Any:
    scale = max((hi - lo) / 255, 1e-12)
    zero = round(-lo / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def _line(found: dict[str, Any]) -> str:
    if "sqnr" not in found:
        return f"{found['job']:18} {found['name']:24} {found['verdict'].upper():10} {found['why'][:300]}"
    share = found["integer_share"]
    kernels = "" if share is None else f"  {share:.0%} of MACs in integers, {found['quantised_share'] or 0:.0%} of quantised"
    return (
        f"{found['job']:18} {found['name']:24} {found['verdict']:10} {found['sqnr']:6.1f} dB (eager {found['eager']:5.1f})  "
        f"{found['fired']} fired, "
        f"{len(found['declined'])} declined{kernels}  {found['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
