"""Block reconstruction against the loop that one writes by hand: CPU time for the same blocks, items, iterations and widths.

    python -m tools.bench.reconstruct [--layers 12] [--iterations 200] [--items 32] [--batch 4]

By hand, as the published code of BRECQ and its followers does it: linears are wrapped in modules with AdaRound roundings and LSQ scales; per
block, hooks collect its inputs and outputs from a run of the float model and one of the quantised model over all items, each stopped behind
the block; then Adam on one item at a time, values dropped with probability 0.5. fxcompress: the pass `quant.reconstruct` with attention
products left in float, so that both train the same layers; it trains biases too, and cuts a layer in two blocks.
A drawn ViT: time is measured, and nothing is said of quality. One thread.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import fxcompress as fxc

BITS, DROP, RATE, POWERS = 4, 0.5, 2e-2, (20.0, 2.0)
STRETCH = 1.1, -0.1  # of the rectified sigmoid


class Quantised(nn.Module):
    """A linear on 4-bit weights, whose roundings are trained, and 4-bit activations, whose scale is."""

    def __init__(self, linear: nn.Linear, seen: tuple[float, float]) -> None:
        super().__init__()
        self.linear, top = linear, 2**BITS - 1
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / (2 ** (BITS - 1) - 1)
        self.floor = (weight / self.scale).floor()
        rest = weight / self.scale - self.floor
        high, low = STRETCH
        self.rounding = nn.Parameter(-((high - low) / (rest - low).clamp(1e-4, high - low - 1e-4) - 1).log())
        self.step, self.zero = nn.Parameter(torch.tensor((seen[1] - seen[0]) / top)), round(-seen[0] * top / (seen[1] - seen[0]))
        self.is_trained = False

    def soft(self) -> Tensor:
        """Between 0, the code below, and 1, the code above."""
        high, low = STRETCH
        return (self.rounding.sigmoid() * (high - low) + low).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        up = self.soft() if self.is_trained else (self.soft() > 0.5).float()
        weight = (self.floor + up).clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1) * self.scale
        codes = x / self.step + self.zero
        codes = codes + (codes.round() - codes).detach()
        rounded = (codes.clamp(0, 2**BITS - 1) - self.zero) * self.step
        if self.is_trained:
            rounded = torch.where(torch.rand_like(x) < DROP, x, rounded)
        return nn.functional.linear(rounded, weight, self.linear.bias)


class Stop(Exception):  # noqa: N818 - ends a run behind the block that is looked at
    """The block has been seen."""


def by_hand(model: nn.Module, quantised: nn.Module, items: Sequence[Tensor], iterations: int) -> None:
    """Reconstruct every layer of the encoder, in order."""
    for number in range(len(model.layers)):  # type: ignore[arg-type]
        wanted = [outputs for _, outputs in seen(model, number, items)]
        given = [inputs for inputs, _ in seen(quantised, number, items)]
        train(quantised.layers[number], given, wanted, iterations)  # type: ignore[index]


def wrapped(model: nn.Module, items: Sequence[Tensor]) -> nn.Module:
    """A copy with its layers' linears quantised, on ranges from a run over the items."""
    ranges: dict[str, tuple[float, float]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(inputs[0].min())), max(high, float(inputs[0].max()))

        return hook

    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("layers.")}
    hooks = [m.register_forward_pre_hook(note(name)) for name, m in linears.items()]
    with torch.no_grad():
        for item in items:
            model(item)
    for hook in hooks:
        hook.remove()
    made = copy.deepcopy(model)
    for name, seen_range in ranges.items():
        parent, _, own = name.rpartition(".")
        setattr(made.get_submodule(parent), own, Quantised(made.get_submodule(name), seen_range))  # type: ignore[arg-type]
    return made


def seen(model: nn.Module, number: int, items: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Input and output of a layer for every item."""
    found: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        found.append((inputs[0], output if isinstance(output, Tensor) else output[0]))
        raise Stop

    handle = model.layers[number].register_forward_hook(hook)  # type: ignore[index, operator]
    with torch.no_grad():
        for item in items:
            try:
                model(item)
            except Stop:
                continue
    handle.remove()
    return found


def train(block: nn.Module, given: Sequence[Tensor], wanted: Sequence[Tensor], iterations: int) -> None:
    """Roundings and scales of a block, one item at a time."""
    layers = [m for m in block.modules() if isinstance(m, Quantised)]
    groups = [{"params": [m.rounding for m in layers], "lr": RATE}, {"params": [m.step for m in layers], "lr": RATE / 10}]
    optimizer = torch.optim.Adam(groups)
    for layer in layers:
        layer.is_trained = True
    for i in range(iterations):
        at = int(torch.randint(len(given), ()))
        found = block(given[at])
        found = found if isinstance(found, Tensor) else found[0]
        loss = (found - wanted[at]).square().sum() / wanted[at].square().sum()
        if i > 0.2 * iterations:
            power = POWERS[1] + (POWERS[0] - POWERS[1]) * (1 - i / iterations)
            loss = loss + 0.01 * torch.stack([(1 - (2 * m.soft() - 1).abs().pow(power)).mean() for m in layers]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for layer in layers:
        layer.is_trained = False


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("iterations", 200), ("items", 32), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "num_hidden_layers": asked.layers}
    model = ViTModel(ViTConfig(**sizes, image_size=112, patch_size=16), add_pooling_layer=False).eval()
    items = [torch.randn(asked.batch, 3, 112, 112) for _ in range(asked.items)]
    quantised = wrapped(model, items)
    start = time.process_time()
    by_hand(model, quantised, items, asked.iterations)
    hand = time.process_time() - start
    insert = {"quant.insert": {"weights": "int4/channel", "activations": "uint4/tensor", "products": False, "range": "minmax"}}
    recipe = {
        "passes": [insert, {"quant.reconstruct": {"iterations": asked.iterations, "where": {"exclude": ["embeddings"]}}}, "quant.finalize"]
    }
    made = fxc.compile(model, recipe, (items[0],), [(item,) for item in items], backend="reference", check="off")
    own = next(p.cpu_seconds for p in made.report.passes if p.name == "quant.reconstruct")
    print(f"CPU seconds: by hand {hand:.1f}, quant.reconstruct {own:.1f}; {hand / own:.2f} times as fast")


if __name__ == "__main__":
    main()
