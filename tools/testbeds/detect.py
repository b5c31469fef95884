"""Detection: a small YolosForObjectDetection of transformers, which finds handwritten digits on canvases of 40 x 40."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import YolosConfig, YolosForObjectDetection

from fxcompress.calibrate import Feed, images
from fxcompress.evaluate import Boxes, mean_average_precision
from tools.testbeds.fashion import Split
from tools.testbeds.scenes import boxes_of

SIZE, OBJECTS, FOUND, DIGITS = 40, 3, 8, 10
LEAST, MOST = 12, 20  # pixels of the square that a digit is drawn in
ORDERS = torch.tensor(list(permutations(range(FOUND), OBJECTS)))


@dataclass(frozen=True)
class Canvases:
    """images: [N, 1, 40, 40], about -1 to 1. boxes: [N, 3, 4], x1, y1, x2, y2 around the ink, in pixels. labels: [N, 3], DIGITS for none."""

    images: Tensor
    boxes: Tensor
    labels: Tensor

    def truth(self) -> list[Boxes]:
        """As `mean_average_precision` takes them."""
        return [Boxes(b[y < DIGITS], y[y < DIGITS]) for b, y in zip(self.boxes, self.labels, strict=True)]


def yolos() -> nn.Module:
    """Four blocks of width 96 over 64 patches and eight detection tokens, 0.35 M parameters.

    The tokens start apart from each other: equal ones, as transformers makes them, would stay equal.
    """
    blocks = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
    image = {"image_size": [SIZE, SIZE], "patch_size": 5, "num_channels": 1}
    config = YolosConfig(**blocks, **image, num_detection_tokens=FOUND, num_labels=DIGITS, use_mid_position_embeddings=False)
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        model.vit.embeddings.detection_tokens.normal_(std=0.5)
        model.vit.embeddings.position_embeddings.normal_(std=0.1)
    return model


def compose(data: Split, n: int) -> Canvases:
    """n canvases drawn with the global random state: up to three digits of 12 to 20 pixels anywhere, none touching an earlier one."""
    at = torch.randint(len(data), (n, OBJECTS))
    size = torch.randint(LEAST, MOST + 1, (n, OBJECTS, 1)).float()
    corner = (torch.rand(n, OBJECTS, 2) * (SIZE - size + 1)).floor()
    kept = _apart(torch.cat([corner - 1, corner + size + 1], 2))  # a digit reaches up to a pixel over the edge of its square
    layers = _placed(data.images[at] / 16, size, corner) * kept[:, :, None, None]
    gain, noise = 0.6 + 0.4 * torch.rand(n, OBJECTS, 1, 1), 0.05 * torch.randn(n, SIZE, SIZE)
    image = 2 * ((gain * layers).sum(1) + noise)[:, None] - 1
    boxes = boxes_of(layers > 0.2) + torch.tensor([0, 0, 1, 1])
    return Canvases(image, boxes, torch.where(kept, data.labels[at], DIGITS))


def _apart(squares: Tensor) -> Tensor:
    """Which squares [N, K, 4] touch no earlier one that was kept, [N, K]."""
    kept = torch.ones(squares.shape[:2], dtype=torch.bool)
    for later in range(1, squares.shape[1]):
        for earlier in range(later):
            low = torch.maximum(squares[:, later, :2], squares[:, earlier, :2])
            high = torch.minimum(squares[:, later, 2:], squares[:, earlier, 2:])
            kept[:, later] &= ~((low <= high).all(1) & kept[:, earlier])
    return kept


def _placed(digits: Tensor, size: Tensor, corner: Tensor) -> Tensor:
    """[N, K, 8, 8] to [N, K, 40, 40]: each drawn into its square, bilinear."""
    n, k = digits.shape[:2]
    scale = (SIZE / size).expand(n, k, 2)
    theta = torch.cat([torch.diag_embed(scale), (scale - (2 * corner + size) / size)[..., None]], -1).flatten(0, 1)
    grid = nn.functional.affine_grid(theta, [n * k, 1, SIZE, SIZE], align_corners=False)
    return nn.functional.grid_sample(digits.flatten(0, 1)[:, None], grid, align_corners=False).view(n, k, SIZE, SIZE)


def held_out(data: Split, n: int, seed: int) -> Canvases:
    """n canvases from a seed; the random state outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return compose(data, n)


def loss(model: nn.Module, data: Split, batch: int) -> Tensor:
    """3 x cross entropy of all tokens, "nothing" counting 0.4, and for those matched with a digit 5 |Δbox| + 2 (1 - GIoU), boxes as shares."""
    asked = compose(data, batch)
    out = model(pixel_values=asked.images)
    boxes, wanted = _corners(out.pred_boxes), asked.boxes / SIZE
    rows = torch.arange(batch)[:, None]
    real = asked.labels < DIGITS
    chosen = _matched(out.logits.detach(), boxes.detach(), asked.labels, wanted)
    labels = torch.full((batch, FOUND), DIGITS)
    labels[rows, chosen] = asked.labels
    weight = torch.ones(DIGITS + 1).index_fill(0, torch.tensor([DIGITS]), 0.4)
    entropy = nn.functional.cross_entropy(out.logits.transpose(1, 2), labels, weight)
    return 3 * entropy + _apartness(boxes[rows, chosen], wanted)[real].mean()


def _matched(logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """The tokens of the K objects [N, K] with the least sum of costs over all orders of K of the Q tokens; absent objects cost nothing."""
    likely = nn.functional.pad(logits.softmax(2)[..., :DIGITS], (0, 1))
    cost = _apartness(boxes[:, :, None], wanted[:, None]) - 2 * likely.gather(2, labels[:, None].expand(-1, FOUND, -1))
    cost = cost.masked_fill(labels[:, None] == DIGITS, 0.0)
    orders = ORDERS.to(cost.device)
    total = sum(cost[:, orders[:, k], k] for k in range(OBJECTS))
    return orders[total.argmin(1)]


def _apartness(a: Tensor, b: Tensor) -> Tensor:
    """5 Σ |a - b| + 2 (1 - GIoU) of boxes [..., 4] given by their corners. Source: Carion et al. (ECCV 2020), section 3.1."""
    area_a, area_b = ((v[..., 2] - v[..., 0]) * (v[..., 3] - v[..., 1]) for v in (a, b))
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = area_a + area_b - inner
    overlap = inner / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)
    return 5 * (a - b).abs().sum(-1) + 2 * (1 - overlap)


def _corners(boxes: Tensor) -> Tensor:
    """Centre and size to corners, [..., 4]."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def detections(model: Callable[..., Any], x: Tensor) -> list[Boxes]:
    """What the model finds: of every token its surest digit, with its probability as score. x: [N, 1, 40, 40]; boxes in pixels."""
    found = []
    with torch.no_grad():
        for rows in x.split(50):
            out = model(pixel_values=rows)
            scores, labels = out.logits.softmax(2)[..., :DIGITS].max(2)
            found += [Boxes(b, y, s) for b, y, s in zip(SIZE * _corners(out.pred_boxes), labels, scores, strict=True)]
    return found


def metrics(model: nn.Module, train: Split, test: Split) -> dict[str, float]:
    """Over 1000 canvases of test digits: mean average precision at an IoU of 0.5 and 0.75."""
    asked = held_out(test, 1000, seed=1)
    found, truth = detections(model, asked.images), asked.truth()
    return {"map50": mean_average_precision(found, truth, 0.5), "map75": mean_average_precision(found, truth, 0.75)}


def feed(data: Split, seed: int, n: int = 64, batch: int = 8) -> Feed:
    """Canvases as the model is called."""
    return images(held_out(data, n, seed + 100).images, batch=batch, limit=n)
