"""Compress a small real diffusion model, trained in tools/testbeds, to 8 bits and draw with it inside a diffusers pipeline on ONNX Runtime.

    python -m tools.demo_diffusion [--out out/demo-diffusion] [--samples 100]

Downloads nothing. Both artifacts draw from the same noise, guided, 20 steps of DDIM, one thread. Writes the artifacts with their reports and
samples.png to --out: a row a class, ten samples of fp32 on the left, of int8 on the right. Prints one table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.evaluate import Estimate, accuracy, frechet, noise_floor, paired_distance
from tools.testbeds import classify, denoise, fashion, load, weights
from tools.testbeds.show import grid

RECIPES: dict[str, Any] = {"fp32": {"name": "fp32", "passes": ["tidy.fold_constants"]}, "int8": "w8a8-diffusion"}
STEPS, SEED, ROWS = 20, 2, 25


class ClassPipeline(DiffusionPipeline):
    """Draws images of given classes with classifier-free guidance: the pipeline that the UNet was trained for, on 16 x 16 pixels."""

    def __init__(self, unet: nn.Module, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, labels: Tensor, seed: int, guidance: float = denoise.GUIDANCE) -> Tensor:
        """[N, 1, 16, 16], one image a label."""
        x = torch.randn(len(labels), *denoise.SHAPE, generator=torch.Generator().manual_seed(seed))
        both = torch.cat([torch.full_like(labels, denoise.NO_CLASS), labels])
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            free, bound = self.unet(torch.cat([x, x]), t.expand(len(both)), both).sample.chunk(2)
            x = self.scheduler.step(free + guidance * (bound - free), t, x).prev_sample
        return x


def main() -> None:
    """Load, compile both, draw, measure, print."""
    options = _options()
    torch.set_num_threads(1)
    console = Console(width=max(110, Console().width))
    loaded = load("unet")
    models = {name: _compiled(loaded, recipe, options.out / name) for name, recipe in RECIPES.items()}
    labels = torch.arange(options.samples) % len(fashion.CLASSES)
    drawn = {name: _drawn(loaded.model, model, labels) for name, model in models.items()}
    latency = _latency(models, labels[:ROWS])
    console.print(_table(models, drawn, latency, labels, denoise.images(loaded.test), options.out))
    _show(drawn, options.out / "samples.png")
    console.print(
        f"Recognised and distances: {len(labels)} samples, seen by the ResNet of tools/testbeds. Fréchet is a multiple of what as many "
        "real images score. Off fp32: how far samples from the same noise are apart, as a share of two fp32 samples from other noise."
    )
    console.print(f"samples: {options.out / 'samples.png'}    CPU time of this program: {time.process_time() / 60:.1f} minutes")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo-diffusion"))
    parser.add_argument("--samples", type=int, default=100)
    return parser.parse_args()


def _compiled(loaded: Any, recipe: Any, folder: Path) -> fxc.CompiledModel:
    model = fxc.compile(loaded.model, recipe, next(iter(loaded.calibration)), calibration=loaded.calibration, check="end", threads=1)
    model.save(folder)
    return model


def _drawn(unet: nn.Module, model: fxc.CompiledModel, labels: Tensor) -> Tensor:
    """The pipeline is that of the torch model, with the artifact in the place of its network."""
    pipe = ClassPipeline(unet, denoise.scheduler())
    pipe.unet = model.as_module()
    return torch.cat([pipe(rows, SEED + i) for i, rows in enumerate(labels.split(ROWS))])


def _latency(models: dict[str, fxc.CompiledModel], labels: Tensor, runs: int = 8) -> dict[str, float]:
    """Median CPU milliseconds of one guided call, the models in turn so that a busy machine is busy for all."""
    rows = torch.cat([torch.full_like(labels, denoise.NO_CLASS), labels])
    inputs = (torch.randn(len(rows), *denoise.SHAPE), torch.full((len(rows),), 500), rows)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(runs + 1):
        for name, model in models.items():
            start = time.process_time()
            model(*inputs)
            if turn:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def _table(
    models: dict[str, fxc.CompiledModel], drawn: dict[str, Tensor], latency: dict[str, float], labels: Tensor, real: Tensor, out: Path
) -> Table:
    judge = weights.read(classify.resnet(), "resnet")
    features = {name: classify.features(judge, fashion.doubled(x)) for name, x in {**drawn, "real": real}.items()}
    floor = statistics.mean(noise_floor(frechet, features["real"], len(labels), 2000))
    table = Table(title=f"UNet2DModel, {sum(p.numel() for p in load('unet').model.parameters()) / 1e6:.1f} M, on ONNX Runtime, one thread")
    table.add_column("model")
    for name in ("recognised, %", "Fréchet", "off fp32, %", "MB", "of fp32", f"ms, {ROWS} images", "of fp32", "int MACs"):
        table.add_column(name, justify="right")
    size = {name: sum(f.stat().st_size for f in (out / name).glob("*") if f.suffix in (".onnx", ".bin")) for name in models}
    for name, model in models.items():
        right = accuracy(classify.logits(judge), fashion.doubled(drawn[name]), labels)
        distance = frechet(features[name], features["real"][:2000]) / floor
        off = "" if name == "fp32" else _percent(paired_distance(drawn["fp32"], drawn[name]))
        on_disk = f"{size[name] / 1e6:.2f}", f"{size[name] / size['fp32']:.3f}"
        times = f"{latency[name]:.1f}", f"{latency[name] / latency['fp32']:.2f}"
        backend = model.report.backend
        share = f"{backend.integer_share:.0%}" if backend and backend.integer_share is not None else ""
        table.add_row(name, _percent(right), f"{distance:.2f}", off, *on_disk, *times, share)
    return table


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f} ± {50 * (share.high - share.low):.1f}"


def _show(drawn: dict[str, Tensor], file: Path) -> None:
    """Both grids side by side: rows are classes, columns the first ten samples of each."""
    grids = [grid(x[:100].view(10, 10, *denoise.SHAPE).transpose(0, 1), scale=3) for x in drawn.values()]
    gap = torch.full((grids[0].shape[0], 12), 128, dtype=torch.uint8)
    Image.fromarray(torch.cat([grids[0], gap, grids[1]], 1).numpy()).save(file)


if __name__ == "__main__":
    main()
