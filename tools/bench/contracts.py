"""What holding a pass to its contract costs, in forwards: CPU time of the check over that of one run of the old and one of the new graph.

    python -m tools.bench.contracts [--tokens N ...] [--width N]

The model is a Llama of four layers, 512 wide if not said otherwise. A check runs each changed operation once, the old way and the new, those
that do the same to every row on a part of a long probe's rows, and compares weights too: with a short probe theirs is the larger share. One
thread, the least of several runs of each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxcompress import capture, checker
from fxcompress.calibrate.feed import FlatItems, as_feed
from fxcompress.calibrate.statistics import Statistics
from fxcompress.contract import Measured
from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.manager import Manager
from fxcompress.recipe import Step, build, load_recipe
from fxcompress.registry import find_backend
from fxcompress.rewrite import Pass

VOCABULARY, RUNS = 1000, 4
RECIPES = (("rotate.residual",), ("reparam.smooth",), ("quant.insert", "quant.finalize"))


class Llama(nn.Module):
    """Token ids -> logits."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=tokens))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


class Timed(Manager):
    """Prints what each check costs."""

    old = 0.0  # seconds of one run of the graph as it was before the pass

    def _checked(self, step: Step, item: Pass, edit: Edit) -> list[Measured]:
        check = least(lambda: checker.check(self.program, edit, item.contract, self.probe))
        new = least(lambda: run(self.program, self.probe))
        print(f"  {item.name:20}{check:9.3f}{self.old:9.3f}{new:9.3f}{check / (self.old + new):9.2f}")
        self.old = new
        return super()._checked(step, item, edit)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512, 1024], help="of the probe")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 128")
    options = parser.parse_args()
    print(f"{'seconds of CPU':22}{'check':>9}{'old':>9}{'new':>9}{'ratio':>9}")
    for tokens in options.tokens:
        print(f"{tokens} tokens")
        measure(tokens, options.width)


def measure(tokens: int, width: int) -> None:
    """One row per pass."""
    torch.manual_seed(0)
    items = [(torch.randint(0, VOCABULARY, (1, tokens)),) for _ in range(4)]
    captured = capture(Llama(tokens, width).eval(), items[0])
    flat = FlatItems(as_feed(items), captured)
    old = least(lambda: run(captured, flat.probe))
    for passes in RECIPES:
        manager = Timed(captured.copy(), find_backend("onnxruntime")().target, flat.probe, "each", Statistics(flat))
        manager.old = old
        manager.run(build(load_recipe({"passes": list(passes)})))


def least(work: Callable[[], Any]) -> float:
    """CPU seconds of the quickest of several runs."""
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
