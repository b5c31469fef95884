"""Mean average precision of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.evaluate.given import require_finite, require_tensors


@dataclass(frozen=True)
class Boxes:
    """What is in one image. boxes: [n, 4], x1, y1, x2, y2. labels: [n], int64. scores: [n], of what a detector found; None for the truth."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None


def mean_average_precision(found: Sequence[Boxes], wanted: Sequence[Boxes], iou: float = 0.5) -> float:
    """The mean over the classes in `wanted` of the area under the precision-recall curve, precision made non-increasing from the right.

    By falling score, over all images at once, a box of the class is right when its IoU with the best true box of its image and class that no
    earlier one has taken is at least `iou`. Every step of recall counts (no 11 or 101 points). InputError when there is no true box, the
    lists, scores and shapes don't fit, or a number isn't finite. Source: Everingham et al., The Pascal VOC Challenge (IJCV 2010), section 4.2,
    areas as from 2010 on.
    """
    if len(found) != len(wanted) or not sum(len(w.labels) for w in wanted):
        why = f"{len(found)} images were searched, {len(wanted)} have a truth with {sum(len(w.labels) for w in wanted)} boxes in all"
        raise InputError("there is nothing to find", why=why)
    if not 0 < iou <= 1:
        raise InputError("no two boxes overlap by as much", why=f"iou is {iou}, the share of an intersection in a union", do="0 < iou <= 1")
    for image in (*found, *wanted):
        _require(image)
    if any(f.scores is None for f in found):
        raise InputError("what was found has no scores", do="Boxes(boxes, labels, scores)")
    classes = sorted(set(torch.cat([w.labels for w in wanted]).tolist()))
    return sum(_average_precision(found, wanted, c, iou) for c in classes) / len(classes)


def _average_precision(found: Sequence[Boxes], wanted: Sequence[Boxes], label: int, iou: float) -> float:
    truths = [w.boxes[w.labels == label] for w in wanted]
    free = [torch.ones(len(t), dtype=torch.bool) for t in truths]
    right = []
    for _, image, box in _by_score(found, label):
        shares = _iou(box, truths[image]).masked_fill(~free[image], -1)
        hit = bool(len(shares)) and float(shares.max()) >= iou
        if hit:
            free[image][shares.argmax()] = False
        right.append(hit)
    hits = torch.tensor(right, dtype=torch.float64)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(hits) else hits
    return float((envelope * hits).sum()) / sum(map(len, truths))


def _by_score(found: Sequence[Boxes], label: int) -> list[tuple[float, int, Tensor]]:
    """Score, image and box of everything found of a class, the surest first; equal scores in the order given."""
    rows = [
        (float(score), image, box)
        for image, f in enumerate(found)
        for score, box, of in zip(f.scores, f.boxes, f.labels.tolist(), strict=True)  # type: ignore[arg-type]
        if of == label
    ]
    return sorted(rows, key=lambda row: -row[0])


def _iou(box: Tensor, others: Tensor) -> Tensor:
    """Of one box [4] with each of [n, 4], in float64: areas overflow half precision."""
    box, others = box.double(), others.double()
    sides = torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])
    both = sides.clamp(min=0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both)


def _require(image: Boxes) -> None:
    numbers = {"boxes": image.boxes} if image.scores is None else {"boxes": image.boxes, "scores": image.scores}
    require_tensors(labels=image.labels, **numbers)
    n = len(image.labels)
    if image.boxes.shape != (n, 4) or (image.scores is not None and image.scores.shape != (n,)):
        scores = None if image.scores is None else list(image.scores.shape)
        raise InputError("the boxes of an image don't fit", why=f"boxes {list(image.boxes.shape)}, labels {n}, scores {scores}")
    require_finite("boxes and scores", *numbers.values())
