"""Compress a real language model, SmolLM2-135M-Instruct, to 8 and 4 bits, and compare the artifacts with fp32 on ONNX Runtime.

    python tools/demo.py [--out out/demo] [--windows 16]

Needs the model (make model). Writes an artifact with its report for each recipe to --out and prints one table: bytes on disk, perplexity on
Moby-Dick (chapters 41 to 48; the probe of the contracts is another book), milliseconds of one forward on one thread, lowest output SQNR, a
sentence by each.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import fxcompress as fxc
from fxcompress.calibrate.text import token_ids
from fxcompress.evaluate import perplexity
from fxcompress.recipe import BackendChoice, load_recipe
from fxcompress.sources import resolve

ROOT = Path(__file__).parent
MODEL = ROOT.parent / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROBE_TEXT, TEST_TEXT = ROOT / "texts/persuasion.txt", ROOT / "texts/moby_dick.txt"
RECIPES: dict[str, Any] = {
    "fp32": {"name": "fp32", "description": "nothing but tidying", "passes": ["tidy.fold_constants"]},
    "int8": "int8-weight-only",
    "int4": "int4-weight-only",
    "int4 exact": "int4-weight-only",
}
QUESTION = "In one sentence: why is the sky blue?"
WINDOW, PROBE_TOKENS = 256, 64


def main() -> None:
    """Load, capture once, compile every recipe, measure, print."""
    options = _options()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    console = Console(width=max(110, Console().width))
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("load SmolLM2 from its GGUF file", total=4 + 3 * len(RECIPES))

        def step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        loaded = resolve(MODEL)
        assert loaded.tokenizer is not None
        tokenizer = loaded.tokenizer()
        step("capture")
        program = fxc.capture(loaded.model, {"input_ids": token_ids(tokenizer, PROBE_TEXT)[:PROBE_TOKENS].view(1, -1)})
        del loaded
        models = {name: _compiled(program, name, options.out, step) for name in RECIPES}
        step("time")
        latency = {length: _latency(models, length) for length in (1, 64)}
        rows = {name: _measured(model, tokenizer, options.windows, name, step) for name, model in models.items()}
    console.print(_table(models, rows, latency, options.out))
    for name, row in rows.items():
        console.print(f"{name}: {row['sentence']}", markup=False, highlight=False)
    console.print(
        f"Perplexity: {rows['fp32']['tokens']} tokens of Moby-Dick in windows of {WINDOW}. The weights come from a 4-bit file (Q4_1): fp32 is "
        "what it holds. int4 rounds activations to int8 inside the kernel; int4 exact doesn't."
    )
    console.print(f"artifacts and reports: {options.out}    CPU time of this program: {time.process_time() / 60:.1f} minutes")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--windows", type=int, default=16)
    return parser.parse_args()


def _compiled(program: fxc.Program, name: str, out: Path, step: Callable[[str], None]) -> fxc.CompiledModel:
    step(f"compile {name}")
    recipe = load_recipe(RECIPES[name])
    if name.endswith("exact"):
        exact = BackendChoice(name="onnxruntime", options={"activation_rounding": "off"})
        recipe = recipe.model_copy(update={"backend": exact})
    model = fxc.compile(program, recipe, threads=1)
    model.save(out / name.replace(" ", "-"))
    return model


def _measured(model: fxc.CompiledModel, tokenizer: Any, windows: int, name: str, step: Callable[[str], None]) -> dict[str, Any]:
    step(f"perplexity of {name}")
    text = token_ids(tokenizer, TEST_TEXT)[: windows * WINDOW]
    score = perplexity(lambda rows: model(rows).logits, text, WINDOW)
    step(f"a sentence by {name}")
    return {"perplexity": score.value, "tokens": score.tokens, "sentence": _sentence(model, tokenizer)}


def _sentence(model: fxc.CompiledModel, tokenizer: Any, most: int = 40) -> str:
    """Greedy answer to QUESTION, up to its first full stop."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt")
    ids = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    start = ids.shape[1]
    for _ in range(most):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        if ids[0, -1] == tokenizer.eos_token_id or text.rstrip().endswith((".", "!", "?")):
            break
    return str(text.strip())


def _latency(models: dict[str, fxc.CompiledModel], length: int, runs: int = 15) -> dict[str, float]:
    """Median CPU milliseconds of one forward on `length` tokens, the models in turn so that a busy machine is busy for all."""
    ids = torch.arange(length).view(1, -1) + 100
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(runs + 2):
        for name, model in models.items():
            start = time.process_time()
            model(ids)
            if turn >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def _table(models: dict[str, fxc.CompiledModel], rows: dict[str, Any], latency: dict[int, dict[str, float]], out: Path) -> Table:
    grid = Table(title="SmolLM2-135M-Instruct on ONNX Runtime, one thread")
    grid.add_column("model")
    for name in ("MB on disk", "of fp32", "perplexity", "ms, 1 token", "of fp32", "ms, 64 tokens", "of fp32", "lowest output SQNR"):
        grid.add_column(name, justify="right")
    size = {name: sum(f.stat().st_size for f in (out / name.replace(" ", "-")).glob("*") if f.suffix in (".onnx", ".bin")) for name in models}
    for name, model in models.items():
        times = [f for by_name in latency.values() for f in (f"{by_name[name]:.1f}", f"{by_name[name] / by_name['fp32']:.2f}")]
        sqnr = model.report.output_sqnr
        quality = "inf" if sqnr is None else f"{sqnr:.1f} dB"
        grid.add_row(name, f"{size[name] / 1e6:.1f}", f"{size[name] / size['fp32']:.3f}", f"{rows[name]['perplexity']:.2f}", *times, quality)
    return grid


if __name__ == "__main__":
    main()
