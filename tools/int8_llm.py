"""Perplexity of SmolLM2-135M-Instruct with 8-bit weights and activations, by how the activations are prepared.

    python -m tools.int8_llm [--backend onnxruntime] [--windows 8] [--only NAME ...]

Needs the model (make model). Calibrates on Persuasion, scores Moby-Dick, in windows of 256 tokens; one line a recipe.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fxcompress as fxc
from fxcompress import calibrate
from fxcompress.calibrate.text import token_ids
from fxcompress.evaluate import perplexity
from fxcompress.sources import resolve
from tools.demo import MODEL, PROBE_TEXT, TEST_TEXT, WINDOW

STATIC: list[Any] = ["tidy.open_attention", {"quant.insert": {"activations": "uint8/tensor", "range": "mse"}}, "quant.finalize"]
DYNAMIC: list[Any] = [{"quant.insert": {"activations": "int8/token", "products": False}}, "quant.finalize"]
TOKENS: dict[str, Any] = {  # inputs whose tokens differ most in size: products of two branches, and what the head reads
    "quant.insert": {"activations": "int8/token", "products": False, "where": {"include": ["*.down_proj", "lm_head"]}}
}
PREPARED: dict[str, list[Any]] = {
    "fp32": ["tidy.fold_constants"],
    "static": ["tidy.fold_constants", *STATIC],
    "static, smoothed": ["tidy.fold_constants", "tidy.open_attention", "reparam.smooth", *STATIC[1:]],
    "static, smoothed, two by token": ["tidy.fold_constants", "tidy.open_attention", "reparam.smooth", TOKENS, *STATIC[1:]],
    "static, rotated": ["tidy.fold_constants", "tidy.fold_norm_gain", "rotate.residual", *STATIC],
    "dynamic": ["tidy.fold_constants", *DYNAMIC],
    "dynamic, smoothed": ["tidy.fold_constants", {"reparam.smooth": {"products": False}}, *DYNAMIC],
    "dynamic, rotated": ["tidy.fold_constants", "tidy.fold_norm_gain", "rotate.residual", *DYNAMIC],
}


def main() -> None:
    """Capture once, compile and score every recipe, print the table."""
    options = _options()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    loaded = resolve(MODEL)
    assert loaded.tokenizer is not None
    tokenizer = loaded.tokenizer()
    feed = calibrate.text(tokenizer, PROBE_TEXT, length=WINDOW, items=options.items + 1)
    program = fxc.capture(loaded.model, {"input_ids": token_ids(tokenizer, PROBE_TEXT)[:64].view(1, -1)})
    text = token_ids(tokenizer, TEST_TEXT)[: options.windows * WINDOW]
    table = Table("activations", "perplexity", "output SQNR", "compile, CPU s", title=f"SmolLM2, int8 weights per channel, {options.backend}")
    console = Console()
    for name in options.only or PREPARED:
        start = time.process_time()
        model = fxc.compile(program, {"name": name, "passes": PREPARED[name]}, calibration=feed, backend=options.backend, threads=1)
        took = time.process_time() - start
        scored = perplexity(lambda ids, model=model: model(ids).logits, text, WINDOW)
        table.add_row(name, f"{scored.value:.2f}", f"{model.report.output_sqnr:.1f} dB", f"{took:.0f}")
        console.print(f"{name}: {scored.value:.2f}")
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=[*PREPARED])
    return parser.parse_args()


if __name__ == "__main__":
    main()
