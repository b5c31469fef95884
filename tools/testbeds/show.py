"""Draws what a diffusion testbed draws: `python -m tools.testbeds.show NAME FILE.png`. A row a class: ten samples, then ten real images."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tools.testbeds import TESTBEDS, denoise, fashion, load


def grid(x: Tensor, scale: int) -> Tensor:
    """[10, n, 1, 16, 16] in [-1, 1] to one picture of bytes, rows below one another."""
    tiles = x[:, :, 0].permute(0, 2, 1, 3).reshape(10 * x.shape[-1], -1)
    return ((tiles.clamp(-1, 1) + 1) * 127.5).byte().repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=TESTBEDS)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    loaded = load(options.name)
    labels = torch.arange(10).repeat_interleave(10)
    drawn = denoise.sample(loaded.model, labels, seed=1)
    real = torch.cat([denoise.images(loaded.test)[loaded.test.labels == c][:10] for c in range(len(fashion.CLASSES))])
    shown = [grid(x.view(10, 10, 1, 16, 16), scale=3) for x in (drawn, real)]
    Image.fromarray(torch.cat([shown[0], torch.full((shown[0].shape[0], 12), 128, dtype=torch.uint8), shown[1]], 1).numpy()).save(options.file)


if __name__ == "__main__":
    main()
