"""The recipe `ptq4sam`, as it is, on testbeds it wasn't made for: what fires, what is declined and why, and what it gains.

    python -m tools.ptq4sam_elsewhere [vit yolos dit smollm2] [--iterations 300] [--samples 60] [--windows 4]

First as shipped, on ONNX Runtime, beside the recipe `int8`. Then the recipe at 4 bits (`tools.ptq4sam`), run by the interpreter, beside
rounding to nearest on min-max ranges and itself without sign folds and without trained roundings. Figures and intervals are those of
`tools.testbeds.baselines`. --iterations: of every block; as shipped it is 500.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

import fxcompress as fxc
from fxcompress.diff.text import grouped
from fxcompress.recipe import load_recipe
from tools.ptq4sam import VARIANTS, recipe
from tools.testbeds.baselines import compiled, line, subject


def main() -> None:
    """Print a row for each as it is measured."""
    options = _options()
    torch.set_num_threads(1)
    for name in options.names:
        on = subject(name, options.samples, options.windows)
        print(line({"model": name, "width": "float", "runs": "float", "figures": on.judge(dict.fromkeys(on.feeds, on.model))}), flush=True)
        for title, chosen, backend in _recipes(options.iterations):
            start = time.process_time()
            made = compiled(on.model, on.feeds[""], chosen, backend)
            took = time.process_time() - start
            print(line({"model": name, "width": title, "runs": backend, "figures": on.judge({"": made})}), f"{took:.0f} CPU-s", flush=True)
            if title == "ptq4sam":
                print(*_told(made), sep="\n", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["vit", "yolos", "dit", "smollm2"], metavar="NAME")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--samples", type=int, default=60, help="drawn by each diffusion model")
    parser.add_argument("--windows", type=int, default=4, help="of 256 tokens of each domain")
    return parser.parse_args()


def _recipes(iterations: int) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Titles, recipes and their backends."""
    yield "int8", load_recipe("int8").model_dump(exclude_unset=True), "onnxruntime"
    yield "ptq4sam", trained(iterations), "onnxruntime"
    for variant in ("min-max", "full", "without keys", "without training"):
        yield f"W4A4 {variant}", recipe("W4A4", VARIANTS[variant], iterations), "reference"


def trained(iterations: int) -> dict[str, Any]:
    """The shipped recipe with so many iterations of every block."""
    steps = load_recipe("ptq4sam").passes
    passes = [{s.use: {**s.options, **({"iterations": iterations} if s.use == "quant.reconstruct" else {})}} for s in steps]
    return {"name": "ptq4sam", "passes": passes}


def _told(made: fxc.CompiledModel) -> Iterator[str]:
    """What every pass did, and why not elsewhere."""
    for run in made.report.passes:
        yield f"  {run.name}: {run.fired} fired, {len(run.declined)} declined"
        for text in (*run.notes, *grouped(f"{d.module or d.site}: {d.reason}" for d in run.declined)):
            yield f"    {text}"


if __name__ == "__main__":
    main()
