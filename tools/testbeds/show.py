"""Draws what a testbed draws or finds: `python -m tools.testbeds.show NAME FILE.png`.

Denoisers: a row a class, ten samples, then ten real images. vae: images, below each the decoded one. video: a row a digit, two drawn clips,
then two real ones. yolos: canvases with what was found at a score of 0.5 or more, and above each box its digit. sam: three scenes a row, beside
each the object meant, what its box finds and what its points find, both drawn in.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tools.testbeds import TESTBEDS, Loaded, denoise, detect, fashion, latent, load, scenes, segment, video


def grid(x: Tensor, scale: int) -> Tensor:
    """[rows, n, 1, H, W] in [-1, 1] to one picture of bytes, rows below one another."""
    tiles = x[:, :, 0].permute(0, 2, 1, 3).reshape(len(x) * x.shape[-2], -1)
    return ((tiles.clamp(-1, 1) + 1) * 127.5).byte().repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[name for name, bed in TESTBEDS.items() if bed.metrics in PICTURES])
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    PICTURES[TESTBEDS[options.name].metrics](load(options.name)).save(options.file)


def _samples(loaded: Loaded, space: Any) -> Image.Image:
    labels = torch.arange(10).repeat_interleave(10)
    drawn = space.drawn(space.sample(loaded.model, labels, seed=1))
    real = torch.cat([denoise.images(loaded.test)[loaded.test.labels == c][:10] for c in range(len(fashion.CLASSES))])
    return _beside(drawn.view(10, 10, 1, 16, 16), real.view(10, 10, 1, 16, 16))


def _decoded(loaded: Loaded) -> Image.Image:
    x = fashion.pixels(loaded.test.images[:50])
    y = latent.decode(loaded.model, latent.encode(loaded.model, loaded.test.images[:50]))
    return Image.fromarray(grid(torch.stack([x.view(5, 10, 1, 32, 32), y.view(5, 10, 1, 32, 32)], 1).flatten(0, 1), scale=2).numpy())


def _clips(loaded: Loaded) -> Image.Image:
    kinds = torch.arange(10).repeat_interleave(2) * 4 + torch.arange(20) % 4
    drawn, seen = video.sample(loaded.model, kinds, seed=1), video.held_out(loaded.test, 2000, seed=1)
    real = torch.stack([seen.videos[seen.kinds == kind][0] for kind in kinds.tolist()])
    return _beside(*(x.transpose(1, 2).reshape(10, 16, 1, 16, 16) for x in (drawn, real)))


def _beside(left: Tensor, right: Tensor) -> Image.Image:
    shown = [grid(x, scale=3) for x in (left, right)]
    return Image.fromarray(torch.cat([shown[0], torch.full((shown[0].shape[0], 12), 128, dtype=torch.uint8), shown[1]], 1).numpy())


def _canvases(loaded: Loaded, scale: int = 4) -> Image.Image:
    asked = detect.held_out(loaded.test, 24, seed=1)
    side = detect.SIZE * scale
    picture = Image.new("L", (8 * side, 3 * side))
    for i, found in enumerate(detect.detections(loaded.model, asked.images)):
        tile = Image.fromarray(grid(asked.images[None, i : i + 1], scale).numpy())
        pen = ImageDraw.Draw(tile)
        for box, label, score in zip((scale * found.boxes).tolist(), found.labels.tolist(), found.scores.tolist(), strict=True):
            if score >= 0.5:
                pen.rectangle(box, outline=255)
                pen.text((box[0] + 2, box[1] - 11), str(label), fill=255)
        picture.paste(tile, (i % 8 * side, i // 8 * side))
    return picture


def _scenes(loaded: Loaded, scale: int = 2) -> Image.Image:
    asked = scenes.held_out(loaded.test, 24, seed=1)
    side = scenes.SIZE * scale
    picture = Image.new("L", (12 * side, 8 * side))
    masks = [asked.masks, *(segment.masks(loaded.model, asked, kind) for kind in segment.PROMPTS)]
    for i in range(len(asked)):
        shown = [asked.images[i, 0], *(torch.where(mask[i, 0], asked.images[i, 0], -1.0) for mask in masks)]
        tile = Image.fromarray(grid(torch.stack(shown)[None, :, None], scale).numpy())
        pen = ImageDraw.Draw(tile)
        x1, y1, x2, y2 = (scale * asked.boxes[i, 0]).tolist()
        pen.rectangle((2 * side + x1, y1, 2 * side + x2 + scale - 1, y2 + scale - 1), outline=255)
        for x, y in (scale * asked.points[i, 0]).tolist():
            pen.rectangle((3 * side + x - 1, y - 1, 3 * side + x + scale, y + scale), fill=255, outline=0)
        picture.paste(tile, (i % 3 * 4 * side, i // 3 * side))
    return picture


PICTURES: dict[Any, Callable[[Loaded], Image.Image]] = {
    denoise.metrics: lambda loaded: _samples(loaded, denoise),
    latent.metrics: lambda loaded: _samples(loaded, latent),
    latent.coding_metrics: _decoded,
    video.metrics: _clips,
    detect.metrics: _canvases,
    segment.metrics: _scenes,
}


if __name__ == "__main__":
    main()
