"""What each part of the recipe `ptq4sam` is worth on the trained segmenter: widths by parts, keys as they are and with planted lumps.

    python -m tools.ptq4sam [--widths W6A6 W4A4] [--iterations 300] [--scenes 1000] [--keys natural planted] [--json FILE]

"min-max": rounding to nearest on min-max ranges, nothing else. "full": the recipe at that width. "without ...": the recipe less that part, of
which keys are the two passes over signs, softmax the adaptive codes (probabilities then have even steps), training the reconstruction.
Planted: ±8 standard deviations are added to the bias of every key projection of the mask decoder, with random signs, which softmax doesn't
see, so that the float model stays and its keys lie in two lumps. Each row is the finished program (`quant.finalize`) run by the interpreter:
IoU of held-out scenes asked for by boxes, with its 95 % interval; IoU with the float model's own masks; and, mean over the decoder's
attentions on 16 scenes, SQNR in dB of the scores (each row less its mean), of probabilities times values, and the divergence of the attention.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.api import program_of
from fxcompress.cached import flat_inputs
from fxcompress.calibrate import Feed
from fxcompress.evaluate import mask_iou, sqnr
from fxcompress.interpret import run
from fxcompress.program import Program, module_path
from fxcompress.recipe import load_recipe
from tools.testbeds import EVALUATION, fashion, load, scenes, segment
from tools.testbeds.widths import macs_by_width

WIDTHS = {"W8A8": ("int8", "uint8", 8), "W6A6": ("int6", "uint6", 6), "W4A4": ("int4", "uint4", 4)}
PARTS = {"keys": ("signs.bimodal", "signs.centre_keys"), "softmax": ("softmax.adaptive",), "training": ("quant.reconstruct",)}
VARIANTS = {"min-max": (), "full": tuple(PARTS), **{f"without {out}": tuple(p for p in PARTS if p != out) for out in PARTS}}
DEVIATIONS = 8.0


def main() -> None:
    """Print a row for each as it is measured."""
    options = _options()
    torch.set_num_threads(1)
    rows = []
    for keys in options.keys:
        judge = Judge(keys == "planted", options.scenes)
        for width in options.widths:
            for variant in options.variants:
                start = time.process_time()
                made = judge.compiled(recipe(width, VARIANTS[variant], options.iterations))
                row = {"keys": keys, "width": width, "variant": variant, **judge(made), "cpu_seconds": round(time.process_time() - start)}
                rows.append(row)
                print(" | ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=["W6A6", "W4A4"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--keys", nargs="+", choices=("natural", "planted"), default=["natural"])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def recipe(width: str, parts: Sequence[str], iterations: int) -> dict[str, Any]:
    """The shipped recipe at a width with these parts of it; without any, on min-max ranges."""
    weight, activation, bits = WIDTHS[width]
    insert = {"weights": f"{weight}/channel", "activations": f"{activation}/tensor", "range": "mse" if parts else "minmax"}
    told = {"quant.insert": insert, "softmax.adaptive": {"bits": bits}, "quant.reconstruct": {"iterations": iterations}}
    out = {use for part, uses in PARTS.items() if part not in parts for use in uses}
    steps = [step.use for step in load_recipe("ptq4sam").passes if step.use not in out]
    return {"name": f"{width}-{'-'.join(parts) or 'minmax'}", "passes": [{use: told[use]} if use in told else use for use in steps]}


class Judge:
    """The segmenter, its calibration feed, and what it is judged by."""

    def __init__(self, planted: bool, count: int) -> None:
        loaded = load("sam")
        self.model = plant(loaded.model) if planted else loaded.model
        self.feed: Feed = segment.feed(fashion.read("train"), 0)
        self.program = program_of(self.model, next(iter(self.feed)))
        self.scenes = scenes.held_out(loaded.test, count, seed=EVALUATION + 2)
        self.float_masks = segment.masks(self.model, self.scenes, "boxes")
        few = scenes.held_out(loaded.test, 16, seed=EVALUATION + 3)
        self.item = {"pixel_values": 2 * few.images, **segment.prompt(few, "boxes")}
        self.reference = self._seen(self.compiled({"name": "float", "passes": ["tidy.fold_constants", "tidy.open_attention"]}))

    def compiled(self, chosen: dict[str, Any]) -> fxc.CompiledModel:
        """The segmenter under a recipe, on the reference backend."""
        return fxc.compile(self.program, chosen, calibration=self.feed, backend="reference", check="off", threads=1)

    def __call__(self, made: fxc.CompiledModel) -> dict[str, str]:
        """What a compiled segmenter is worth."""
        masks = segment.masks(made, self.scenes, "boxes")
        truth, floats = mask_iou(masks, self.scenes.masks), mask_iou(masks, self.float_masks)
        before = mask_iou(self.float_masks, self.scenes.masks)
        sites = [_compared(a, b) for a, b in zip(self.reference, self._seen(made), strict=True)]
        scores, products, divergence = (sum(column) / len(sites) for column in zip(*sites, strict=True))
        assert made.program is not None
        return {
            "IoU": f"{100 * truth.value:.1f} ± {50 * (truth.high - truth.low):.1f} (float {100 * before.value:.1f})",
            "IoU with float's": f"{100 * floats.value:.1f}",
            "scores": f"{scores:.1f} dB",
            "A V": f"{products:.1f} dB",
            "divergence": f"{divergence:.4f}",
            "multiplications": ", ".join(f"{k} {v:.1%}" for k, v in macs_by_width(made.program).items()),
        }

    def _seen(self, made: fxc.CompiledModel) -> list[tuple[Tensor, ...]]:
        """Scores, probabilities and products of the decoder's attentions."""
        assert made.program is not None
        seen: dict[fx.Node, Tensor] = {}
        sites = list(_attentions(made.program))
        wanted = {n for site in sites for n in site}
        inputs = flat_inputs(made.program.signature, made.program.inputs, self.item)
        run(made.program, inputs, lambda n, v: seen.update({n: v}) if n in wanted else None)
        return [tuple(seen[n] for n in site) for site in sites]


def plant(model: nn.Module) -> nn.Module:
    """A copy whose decoder's keys lie in two lumps, and which gives what the model gives."""
    twin, rng = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for name, module in twin.named_modules():
        if "mask_decoder" in name and name.endswith("k_proj"):
            size = DEVIATIONS * float(module.weight.detach().norm(dim=1).mean())
            signs = torch.randint(2, module.bias.shape, generator=rng) * 2.0 - 1
            module.bias.data += size * signs
    return twin


def _attentions(program: Program) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Scores, softmax and product with the values of the decoder's attentions, in order."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.softmax.int and "mask_decoder" in module_path(node):
            product = node
            while product.target is not torch.ops.aten.matmul.default:
                product = next(iter(product.users))
            yield node.args[0], node, product


def _compared(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[float, float, float]:
    """dB of the scores, dB of the products, and the divergence of the attention, mean over its rows."""
    scores = [v[0] - v[0].mean(-1, keepdim=True) for v in (old, new)]
    p, q = (v[1].double().clamp(min=1e-12) for v in (old, new))
    return sqnr(*scores), sqnr(old[2], new[2]), float((p * (p / q).log()).sum(-1).mean())


if __name__ == "__main__":
    main()
