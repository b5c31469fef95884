"""Scenes for promptable segmentation: garments of Fashion-MNIST and drawn shapes, three on a canvas of 64 x 64, turned and overlapping."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tools.testbeds.fashion import Split

SIZE, OBJECTS, ASKED, POINTS = 64, 3, 2, 3
LEAST = 120  # visible pixels of an object that is asked for


@dataclass(frozen=True)
class Scenes:
    """images: [N, 1, 64, 64] in [-1, 1]. masks: [N, 2, 64, 64], bool, what is visible of two objects of each. foreground: [N, 64, 64], of all.

    points: [N, 2, 3, 2], x and y of three pixels inside each mask. boxes: [N, 2, 4], the corners x1, y1, x2, y2 of the pixels around it.
    """

    images: Tensor
    masks: Tensor
    foreground: Tensor
    points: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.images)


def held_out(data: Split, n: int, seed: int) -> Scenes:
    """n scenes from a seed; the random state outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [compose(data, min(100, n - start)) for start in range(0, n, 100)]
    return Scenes(*(torch.cat([getattr(p, name) for p in parts]) for name in Scenes.__annotations__))


def compose(data: Split, n: int) -> Scenes:
    """n scenes drawn with the global random state: later objects lie on earlier ones."""
    kind = torch.rand(n, OBJECTS) < 0.5
    garments = _garments(data.images[torch.randint(len(data), (n, OBJECTS))])
    placed = _placed(torch.where(kind[..., None, None, None], garments, _shapes(n)), kind)
    alpha, texture = placed[:, :, 0] > 0.5, placed[:, :, 1]
    top = torch.where(alpha, torch.arange(1, OBJECTS + 1).view(1, -1, 1, 1), 0).amax(1)  # 0: background
    gain = 0.5 + 0.5 * torch.rand(n, OBJECTS, 1, 1)
    layers = torch.cat([_background(n), gain * (0.3 + 0.7 * texture)], 1)
    image = layers.gather(1, top[:, None]) + 0.02 * torch.randn(n, 1, SIZE, SIZE)
    visible = top[:, None] == torch.arange(1, OBJECTS + 1).view(1, -1, 1, 1)
    weight = (visible.sum((2, 3)) >= LEAST) + 1e-6
    masks = visible[torch.arange(n)[:, None], torch.multinomial(weight, ASKED)]
    return Scenes(2 * image - 1, masks, top > 0, points_in(masks), boxes_of(masks))


def _garments(images: Tensor) -> Tensor:
    """[..., 28, 28] bytes to mask and texture, [..., 2, 28, 28]; gaps of one pixel in a mask are closed."""
    seen = (images > 25).float().flatten(0, 1)[:, None]
    grown = nn.functional.max_pool2d(nn.functional.pad(seen, (1,) * 4), 3, 1)
    closed = -nn.functional.max_pool2d(nn.functional.pad(-grown, (1,) * 4, value=-1.0), 3, 1)
    return torch.stack([closed.view(images.shape), images / 255], -3)


def _shapes(n: int) -> Tensor:
    """Mask and texture of n * OBJECTS shapes, one of six kinds each, [n, OBJECTS, 2, 28, 28]."""
    at = torch.linspace(-1, 1, 28)
    y, x = at[:, None].expand(28, 28), at.expand(28, 28)
    radius = (x.square() + y.square()).sqrt()
    cross = (x.abs().minimum(y.abs()) < 0.27) & (x.abs().maximum(y.abs()) < 0.95)
    corner = (x.abs().maximum(y.abs()) < 0.9) & ((x < -0.3) | (y > 0.3))
    triangle = (y < 0.85) & (y > 2 * x.abs() - 0.95)
    kinds = torch.stack([radius < 0.8, (radius < 0.95) & (radius > 0.5), triangle, cross, (y.abs() < 0.25) & (x.abs() < 1), corner])
    tilt = torch.rand(n, OBJECTS, 1, 1) * math.tau
    shade = 0.75 + 0.25 * (x * tilt.cos() + y * tilt.sin())
    return torch.stack([kinds[torch.randint(len(kinds), (n, OBJECTS))].float(), shade], 2)


def _placed(objects: Tensor, upright: Tensor) -> Tensor:
    """[N, K, 2, 28, 28] to [N, K, 2, 64, 64]: 26 to 46 pixels wide, anywhere, turned by any angle; garments by at most 30 degrees."""
    n, k = objects.shape[:2]
    scale = SIZE / (26 + 20 * torch.rand(n, k))
    angle = (2 * torch.rand(n, k) - 1) * torch.where(upright, math.pi / 6, math.pi)
    centre = 1.4 * torch.rand(n, k, 2) - 0.7
    turn = scale[..., None, None] * torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, k, 2, 2)
    theta = torch.cat([turn, -turn @ centre[..., None]], -1).flatten(0, 1)
    grid = nn.functional.affine_grid(theta, [n * k, 2, SIZE, SIZE], align_corners=False)
    return nn.functional.grid_sample(objects.flatten(0, 1), grid, align_corners=False).view(n, k, 2, SIZE, SIZE)


def _background(n: int) -> Tensor:
    slope, at = 0.1 * torch.randn(n, 2, 1, 1), torch.linspace(-1, 1, SIZE)
    return (0.15 * torch.rand(n, 1, 1) + 0.05 + slope[:, 0] * at + slope[:, 1] * at[:, None]).clamp(0, 0.3)[:, None]


def points_in(masks: Tensor) -> Tensor:
    """x and y of random pixels of each mask, hardly ever of its edge where it has an inside. masks: [..., H, W]; returns [..., POINTS, 2]."""
    flat = masks.float().flatten(0, -3)[:, None]
    inner = -nn.functional.max_pool2d(-flat, 3, 1, 1)
    weight = inner.flatten(1) + 1e-4 * flat.flatten(1) + 1e-12
    at = torch.multinomial(weight, POINTS, replacement=True).view(*masks.shape[:-2], POINTS)
    return torch.stack([at % masks.shape[-1], at // masks.shape[-1]], -1).float()


def boxes_of(masks: Tensor) -> Tensor:
    """First and last column and row of each mask, as x1, y1, x2, y2. masks: [..., H, W]; returns [..., 4]."""
    columns, rows = masks.any(-2).float(), masks.any(-1).float()
    last = [masks.shape[-1] - 1 - v.flip(-1).argmax(-1) for v in (columns, rows)]
    return torch.stack([columns.argmax(-1), rows.argmax(-1), *last], -1).float()


def filled(boxes: Tensor) -> Tensor:
    """The pixels of each box: the answer of a segmenter that sees no image. boxes: [..., 4]; returns [..., 64, 64], bool."""
    at = torch.arange(SIZE)
    x1, y1, x2, y2 = boxes[..., None, None].unbind(-3)
    return (at >= x1) & (at <= x2) & (at[:, None] >= y1) & (at[:, None] <= y2)


def nearest_object(foreground: Tensor, points: Tensor) -> Tensor:
    """The connected part of the true foreground that lies nearest to the first point: it knows what is an object, not where one ends.

    foreground: [N, 64, 64]. points: [N, P, POINTS, 2]. Returns [N, P, 64, 64], bool.
    """
    at = torch.arange(SIZE)
    distance = (at - points[..., 0, 0, None, None]).square() + (at[:, None] - points[..., 0, 1, None, None]).square()
    allowed = foreground[:, None].expand_as(distance)
    distance = distance.masked_fill(~allowed, math.inf)
    found = (distance == distance.amin((2, 3), keepdim=True)) & allowed
    while True:
        grown = (nn.functional.max_pool2d(found.float(), 3, 1, 1) > 0) & allowed
        if torch.equal(grown, found):
            return found
        found = grown
