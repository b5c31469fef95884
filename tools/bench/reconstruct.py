"""Block reconstruction against the loop one would write by hand: hooks on the eager model, fake quantisers in plain torch operations.

    python -m tools.bench.reconstruct [--iterations 100] [--steps 6]

Both train roundings, activation scales and biases of the trained UNet at W4A4 with dropped quantisers and mixed inputs, Adam, the same items,
as many iterations a block. The loop by hand runs the whole model twice over all items for each block, to collect what goes in and out. CPU time
of one thread, in seconds and per block and iteration; the ratio is by hand over ours.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxcompress as fxc
from fxcompress.api import program_of
from tools.testbeds import denoise, load

BLOCKS = (ResnetBlock2D, Attention, Downsample2D, Upsample2D, TimestepEmbedding)
BITS, RATE, DROP, PENALTY = 4, 2e-2, 0.5, 1.0


def main() -> None:
    """Print both times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--steps", type=int, default=6, help="of the sampler that the items come from, one item a step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load("unet").model
    feed = list(denoise.states(model, 0, n=20, steps=options.steps))
    items = [dict(item.kwargs) if hasattr(item, "kwargs") else dict(item) for item in feed]
    ours, blocks = with_passes(model, feed, options.iterations)
    print(f"{'':10}{'blocks':>8}{'seconds':>9}{'ms/iteration':>14}")
    print(f"{'ours':10}{blocks:8}{ours:9.1f}{1000 * ours / blocks / options.iterations:14.2f}")
    hand, count = by_hand(model, items, options.iterations)
    print(f"{'by hand':10}{count:8}{hand:9.1f}{1000 * hand / count / options.iterations:14.2f}")
    print(f"ratio {hand / ours:.2f}, per block and iteration {hand / count / (ours / blocks):.2f}")


def with_passes(model: nn.Module, feed: Any, iterations: int) -> tuple[float, int]:
    """Seconds that quant.reconstruct takes, and how many blocks it trained."""
    program = program_of(model, feed[0])
    insert = {"weights": "int4/channel", "activations": "uint4/tensor"}
    steps = ["tidy.fold_constants", "tidy.open_attention", {"quant.insert": insert}, {"quant.reconstruct": {"iterations": iterations}}]
    recipe = {"name": "bench", "passes": [*steps, "quant.finalize"]}
    made = fxc.compile(program, recipe, calibration=feed, backend="reference", check="off", threads=1)
    report = next(p for p in made.report.passes if p.name == "quant.reconstruct")
    return report.cpu_seconds, len({c.reason.split("whose")[1] for c in report.changes} | {d.reason for d in report.declined})


class Rounded(nn.Module):
    """A weight with a learned rounding."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1)) / (2 ** (BITS - 1) - 1)
        ratio = weight / self.scale
        self.floor = ratio.floor()
        self.v = nn.Parameter(((ratio - self.floor + 0.1) / 1.2).clamp(0.01, 0.99).logit())
        self.hard = False

    def share(self) -> Tensor:
        """The rounding."""
        return (torch.sigmoid(self.v) * 1.2 - 0.1).clamp(0, 1)

    def forward(self, _: Tensor) -> Tensor:
        up = (self.v >= 0).float() if self.hard else self.share()
        return (self.floor + up).clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1) * self.scale


class Quantised(nn.Module):
    """An activation quantiser before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.zero = torch.zeros(())
        self.on = self.drop = False

    def observe(self, x: Tensor) -> None:
        """Take the range of a value."""
        lo, hi = x.min().clamp(max=0), x.max().clamp(min=0)
        self.log_scale.data = ((hi - lo) / (2**BITS - 1)).clamp(min=1e-8).log()
        self.zero = (-lo / self.log_scale.data.exp()).round()

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return x
        scale = self.log_scale.exp()
        ratio = x / scale
        codes = ((ratio + (ratio.round() - ratio).detach()) + self.zero).clamp(0, 2**BITS - 1)
        y = (codes - self.zero) * scale
        return torch.where(torch.rand_like(x) < DROP, x, y) if self.drop else y


def by_hand(model: nn.Module, items: list[dict[str, Any]], iterations: int) -> tuple[float, int]:
    """Seconds of the loop by hand, and its blocks."""
    twin = denoise.unet()
    twin.load_state_dict(model.state_dict())
    twin.eval()
    quantisers: dict[nn.Module, Quantised] = {}
    for layer in [m for m in twin.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        quantisers[layer] = q = Quantised()
        layer.register_forward_pre_hook(lambda _, args, q=q: (q(args[0]), *args[1:]))
    start = time.process_time()
    _ranges(twin, quantisers, items)
    blocks = list(_blocks(twin))
    originals = dict(model.named_modules())
    for name, block in blocks:
        _train(twin, name, block, quantisers, items, iterations, originals[name], model)
    return time.process_time() - start, len(blocks)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: list[str] = []
    for name, module in model.named_modules():
        is_block = isinstance(module, BLOCKS) or (isinstance(module, nn.Conv2d) and "." not in name)
        if is_block and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
            yield name, module


def _ranges(model: nn.Module, quantisers: dict[nn.Module, Quantised], items: list[dict[str, Any]]) -> None:
    hooks = [layer.register_forward_pre_hook(lambda _, args, q=q: q.observe(args[0])) for layer, q in quantisers.items()]
    with torch.no_grad():
        model(**items[0])
    for hook in hooks:
        hook.remove()


def _train(
    model: nn.Module,
    name: str,
    block: nn.Module,
    quantisers: dict[nn.Module, Quantised],
    items: list[dict[str, Any]],
    iterations: int,
    source: nn.Module,
    original: nn.Module,
) -> None:
    floats, outputs = _collected(original, source, items)
    rounded, _ = _collected(model, block, items)
    layers = [m for m in block.modules() if m in quantisers]
    roundings = [Rounded(layer.weight.detach()) for layer in layers]
    for layer, rounding in zip(layers, roundings, strict=True):
        parametrize.register_parametrization(layer, "weight", rounding, unsafe=True)
        quantisers[layer].on = quantisers[layer].drop = True
    biases = [layer.bias for layer in layers if layer.bias is not None]
    scales = [quantisers[layer].log_scale for layer in layers]
    optimizer = torch.optim.Adam([{"params": [r.v for r in roundings], "lr": RATE}, {"params": [*scales, *biases], "lr": RATE / 10}])
    for i in range(iterations):
        at_item = int(torch.randint(len(items), ()))
        (args, kwargs), (float_args, float_kwargs) = rounded[at_item], floats[at_item]
        args = tuple(_mixed(a, b) for a, b in zip(args, float_args, strict=True))
        kwargs = {k: _mixed(v, float_kwargs[k]) for k, v in kwargs.items()}
        loss = (block(*args, **kwargs) - outputs[at_item]).square().sum() / outputs[at_item].square().sum()
        if i > 0.2 * iterations:
            power = 20 - 18 * i / iterations
            loss = loss + PENALTY * torch.stack([1 - (2 * r.share() - 1).abs().pow(power).mean() for r in roundings]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for layer, rounding in zip(layers, roundings, strict=True):
        rounding.hard, quantisers[layer].drop = True, False


def _mixed(a: Any, b: Any) -> Any:
    return torch.where(torch.rand_like(a) < 0.5, b, a) if isinstance(a, Tensor) and a.is_floating_point() else a


def _collected(model: nn.Module, block: nn.Module, items: list[dict[str, Any]]) -> tuple[list[Any], list[Tensor]]:
    """What goes into a block and comes out of it, by running the model."""
    inputs: list[Any] = []
    outputs: list[Tensor] = []
    before = block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    after = block.register_forward_hook(lambda _, args, result: outputs.append(result))
    with torch.no_grad():
        for item in items:
            model(**item)
    before.remove()
    after.remove()
    return inputs, outputs


if __name__ == "__main__":
    main()
