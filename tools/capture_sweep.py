"""Capture every model of the zoo and of the held-out table, each in a process of its own, and print what came of it.

    python -m tools.capture_sweep [--table zoo|held-out|all] [--only NAME ...] [--limit SECONDS] [--json FILE]

A row: nodes, CPU seconds of capture, the worst relative error against the model on inputs that capture never saw (other values, and other
values at other sizes), dynamic sizes with their ranges, and sizes in range at which neither model nor program runs. Or the refusal. The
exit code is 0 if at least 95 % of the models were captured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import fxcompress as fxc
from fxcompress import cached
from fxcompress.cached import continued
from fxcompress.dynamic import at_sizes
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.signature import INPUT
from tests.held_out import HELD_OUT
from tests.test_zoo import all_moved
from tests.zoo import ZOO
from tools.forked import Row, forked

ENOUGH = 0.95
LIMIT = 1e-4  # max |d| / rms in float32, the limit capture holds itself to


def main() -> int:
    """Run the sweep."""
    options = _options()
    torch.set_num_threads(1)
    rows = []
    for name in options.only or names(options.table):
        rows.append(_in_process(name, options.limit))
        print(_line(rows[-1]), flush=True)
    captured = sum("nodes" in r for r in rows)
    print(f"captured {captured} of {len(rows)}, {captured / len(rows):.1%}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if captured >= ENOUGH * len(rows) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("zoo", "held-out", "all"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--limit", type=float, default=300, help="seconds a model may take")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def names(table: str) -> list[str]:
    """The names of the models in a table."""
    return list({"zoo": ZOO, "held-out": HELD_OUT, "all": {**ZOO, **HELD_OUT}}[table])


def row(name: str) -> dict[str, Any]:
    """Build, capture and check one model in this process."""
    model, inputs = {**ZOO, **HELD_OUT}[name]()
    start = time.process_time()
    try:
        program = fxc.capture(model, inputs)
    except fxc.FxcError as error:
        return {"name": name, "refused": error.what, "why": error.why, "where": error.where, "seconds": time.process_time() - start}
    seconds = time.process_time() - start
    checks = dict(_checks(program, model, all_moved(name, inputs)))
    found = {"name": name, "seconds": seconds, "symbols": dict(program.symbols), "notes": list(program.notes)}
    found["wide"] = [what for what, result in checks.items() if result is None]
    if wrong := {what: r for what, r in checks.items() if isinstance(r, str) or (r is not None and not r <= LIMIT)}:
        return {**found, "refused": "captured, but", "why": "; ".join(f"at {k}: {v}" for k, v in wrong.items()), "where": ""}
    return {**found, "error": max(r for r in checks.values() if isinstance(r, float)), "nodes": len(program.graph.nodes)}


def _checks(program: Any, model: Any, inputs: dict[str, Any]) -> Iterator[tuple[str, float | str | None]]:
    """`_check` on moved inputs at the example's sizes, then with each dynamic size at its least, a little and much more, and all at once."""
    tensors = continued(program.signature, program.inputs, inputs, lambda flat: program.signature.unflatten(run(program, flat)))
    shapes = [v.shape for v in program.inputs]
    yield "other values", _check(program, model, tensors)
    for sizes in _sizes(program, tensors):
        yield ", ".join(f"{s}={n}" for s, n in sizes.items()), _check(program, model, at_sizes(tensors, shapes, sizes))


def _sizes(program: Any, tensors: list[Any]) -> Iterator[dict[str, int]]:
    example = {s: t.shape[v.shape.index(s)] for v, t in zip(program.inputs, tensors, strict=True) for s in program.symbols if s in v.shape}
    ranges = {s: program.symbols[s] for s in example}
    for symbol, (low, high) in ranges.items():
        for size in sorted({low, min(example[symbol] + 2, high), min(3 * example[symbol] + 1, high)} - {example[symbol]}):
            yield {**example, symbol: size}
    if len(example) > 1:
        yield {s: min(n + 2, ranges[s][1]) for s, n in example.items()}


def _check(program: Any, model: Any, tensors: list[Any]) -> float | str | None:
    """The worst relative error of an output; words where only one of the two can run; None where neither can: the range is too wide."""
    signature, values = program.signature, iter(tensors)
    given = pytree.tree_unflatten([next(values) if leaf is INPUT else leaf for leaf in signature.leaves], signature.spec)
    with torch.no_grad():
        if cached.keeps(program.inputs):
            given[cached.CACHE] = cached.cache_of(given[cached.CACHE])
        wanted = _tried(lambda: pytree.tree_leaves(cached.opened(model(**given, **signature.fixed))))
        got = _tried(lambda: run(program, tensors))
    if isinstance(wanted, str):
        return None if isinstance(got, str) else f"only the program runs, the model fails with {wanted}"
    if isinstance(got, str):
        return f"only the model runs, the program fails with {got}"
    return max(relative_error(a, b) for a, b in zip((w for w in wanted if isinstance(w, torch.Tensor)), got, strict=True))


def _tried(call: Callable[[], list[Any]]) -> list[Any] | str:
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}" if str(error).strip() else type(error).__name__


def _in_process(name: str, limit: float) -> Row:
    found = forked(lambda model: [row(model)], name, limit)[0]
    return {"refused": found["verdict"], "where": "", **found} if "verdict" in found else found


def _line(found: dict[str, Any]) -> str:
    seconds = f"{found.get('seconds', 0):6.1f} s"
    if "nodes" not in found:
        where = f"  ({found['where']})" if found["where"] else ""
        return f"{found['name']:22}      - {seconds}  REFUSED {found['refused']}: {found['why']}{where}"
    sizes = " ".join(f"{name}={low}..{high if high < 2**31 - 1 else ''}" for name, (low, high) in found["symbols"].items())
    wide = f"  TOO WIDE: neither runs at {'; '.join(found['wide'])}" if found["wide"] else ""
    return f"{found['name']:22} {found['nodes']:6} {seconds}  {found['error']:.0e}  {sizes or 'fixed'}{wide}"


if __name__ == "__main__":
    sys.exit(main())
