"""Compress a real language model, SmolLM2-135M-Instruct, to 8 and 4 bits, and compare the artifacts with fp32 on ONNX Runtime.

    python tools/demo.py [--out out/demo] [--windows 16]

Needs the model (make model). Writes an artifact with its report.html for each recipe to --out and prints one table: tokens a second of
`generate` after a prompt, on one thread; bytes on disk, perplexity on Moby-Dick (chapters 41 to 48; the probe of the contracts is another
book), milliseconds of one forward, lowest output SQNR, a sentence by each.
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
WINDOW, PROBE_TOKENS = 256, 128
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 64, 3


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
        latency = _latency(models, 64)
        rates = _decode_rates(models, token_ids(tokenizer, TEST_TEXT)[:PROMPT_TOKENS].view(1, -1))
        rows = {name: _measured(model, tokenizer, options.windows, name, step) for name, model in models.items()}
    console.print(_table(models, rows, rates, latency, options.out))
    for name, row in rows.items():
        console.print(f"{name}: {row['sentence']}", markup=False, highlight=False)
    console.print(
        f"Tokens a second: greedy generate, {NEW_TOKENS} tokens after a prompt of {PROMPT_TOKENS}, without the prompt's own time. "
        f"Perplexity: {rows['fp32']['tokens']} tokens of Moby-Dick in windows of {WINDOW}. The weights come from a 4-bit file (Q4_1): fp32 is "
        "what it holds. int4 rounds activations to int8 inside the kernel; int4 exact doesn't."
    )
    console.print(f"artifacts, each with its report.html: {options.out}    CPU time of this program: {time.process_time() / 60:.1f} minutes")


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
    ends = {"stop_strings": [".", "!", "?"], "tokenizer": tokenizer}
    made = model.as_module().generate(ids, max_new_tokens=most, do_sample=False, **ends)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())


class _Clock:
    """A streamer that reads the CPU clock at the first new token and at the end: a reading can cost a tenth of a token."""

    def __init__(self) -> None:
        self.count, self.start, self.stop = -1, 0.0, 0.0  # the first put is the prompt

    def put(self, tokens: torch.Tensor) -> None:
        self.count += 1
        if self.count == 1:
            self.start = time.process_time()

    def end(self) -> None:
        self.stop = time.process_time()

    @property
    def rate(self) -> float:
        """Tokens a CPU second after the first new one."""
        return (self.count - 1) / (self.stop - self.start)


def _decode_rates(models: dict[str, fxc.CompiledModel], prompt: torch.Tensor) -> dict[str, float]:
    """Tokens a CPU second after the first new token, the median round, the models in turn so that a busy machine is busy for all."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            clock = _Clock()
            model.as_module().generate(prompt, do_sample=False, streamer=clock, max_new_tokens=NEW_TOKENS + 1)
            rates[name].append(clock.rate)
    return {name: statistics.median(r) for name, r in rates.items()}


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


def _table(models: dict[str, fxc.CompiledModel], rows: dict[str, Any], rates: dict[str, float], latency: dict[str, float], out: Path) -> Table:
    grid = Table(title="SmolLM2-135M-Instruct on ONNX Runtime, one thread")
    grid.add_column("model")
    for name in ("tokens/s", "x fp32", "MB on disk", "of fp32", "perplexity", "ms, 64 tokens", "of fp32", "lowest output SQNR"):
        grid.add_column(name, justify="right")
    size = {name: sum(f.stat().st_size for f in (out / name.replace(" ", "-")).glob("*") if f.suffix in (".onnx", ".bin")) for name in models}
    for name, model in models.items():
        rate = [f"{rates[name]:.1f}", f"{rates[name] / rates['fp32']:.2f}"]
        weight = [f"{size[name] / 1e6:.1f}", f"{size[name] / size['fp32']:.3f}", f"{rows[name]['perplexity']:.2f}"]
        times = [f"{latency[name]:.1f}", f"{latency[name] / latency['fp32']:.2f}"]
        sqnr = model.report.output_sqnr
        quality = "inf" if sqnr is None else f"{sqnr:.1f} dB"
        grid.add_row(name, *rate, *weight, *times, quality)
    return grid


if __name__ == "__main__":
    main()
