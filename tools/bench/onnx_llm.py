"""A language model of SmolLM2-135M's shape through the onnxruntime backend: time to lower, bytes, speed against float32, one thread.

    python tools/bench/onnx_llm.py [int4/group:32 int8/channel ...]

Weights are random: only speed and size mean anything. Sessions are timed interleaved, the best of several rounds each.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from fxcompress.backend import Session
from fxcompress.backends.onnx.onnxruntime import OnnxRuntimeBackend
from fxcompress.capture import capture
from fxcompress.manager import Manager
from fxcompress.program import Program
from fxcompress.recipe import build, load_recipe

VOCABULARY = 49152
LENGTHS = (1, 16, 64)
BACKEND = OnnxRuntimeBackend()


def model() -> torch.nn.Module:
    """Randomly drawn, eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, tie_word_embeddings=True, use_cache=False)).eval()


def tokens(length: int) -> list[Tensor]:
    """One sequence and its mask."""
    return [torch.randint(0, VOCABULARY, (1, length)), torch.ones(1, length, dtype=torch.long)]


def quantised(program: Program, weights: str) -> Program:
    """A copy with weight-only quantised weights."""
    recipe = load_recipe({"name": "bench", "passes": [{"quant.weight_only": {"weights": weights, "range": "minmax"}}, "quant.finalize"]})
    manager = Manager(program.copy(), BACKEND.target, program.example, "off")
    manager.run(build(recipe))
    return manager.program


def lowered(name: str, program: Program, folder: Path) -> Session:
    """Write the model files and say what that cost."""
    folder.mkdir()
    start = time.process_time()
    BACKEND.write(program, folder)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:16} lowered in {time.process_time() - start:5.1f} CPU s, {size / 1e6:7.1f} MB", flush=True)
    return BACKEND.open(folder, threads=1)


def best_times(sessions: list[Session], inputs: list[Tensor], rounds: int) -> list[float]:
    """Best seconds of each, interleaved."""
    best = [float("inf")] * len(sessions)
    for _ in range(rounds):
        for i, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(inputs)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main(formats: list[str]) -> None:
    """The table."""
    ids = torch.randint(0, VOCABULARY, (2, 8))
    program = capture(model(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    programs = {"float32": program, **{f: quantised(program, f) for f in formats}}
    with tempfile.TemporaryDirectory() as scratch:
        sessions = [lowered(name, p, Path(scratch, str(i))) for i, (name, p) in enumerate(programs.items())]
        for length in LENGTHS:
            times = best_times(sessions, tokens(length), rounds=8)
            print(
                f"{length:3} tokens: " + ", ".join(f"{n} {1e3 * t:.1f} ms ({times[0] / t:.2f}x)" for n, t in zip(programs, times, strict=True))
            )


if __name__ == "__main__":
    main(sys.argv[1:] or ["int4/group:32", "int4/group:128", "int8/channel", "int2/group:64"])
