"""How often a classifier or a segmenter is right: of real data its own quality, of samples the quality of the model that drew them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.evaluate.given import require_finite, require_tensors
from fxcompress.evaluate.intervals import Estimate, bootstrap

Logits = Callable[[Tensor], Tensor]


def accuracy(logits: Logits, x: Tensor, labels: Tensor, batch: int = 250) -> Estimate:
    """The share of rows whose greatest logit is the label's, with a bootstrap interval. Ties go to the lower class, as argmax has it.

    logits: x [n, ...] -> [n, C], any callable: the model, a Program's run, a compiled artifact. labels: [N], int64. Of samples drawn for given
    labels it is the recognition rate. batch: rows a call; the last call may have fewer. InputError as `predicted`.
    """
    return bootstrap(lambda hits: float(hits.mean()), (predicted(logits, x, labels, batch) == labels).double())


def recall(logits: Logits, x: Tensor, labels: Tensor, batch: int = 250) -> dict[int, float]:
    """Per class that has a row: the share of its rows that are recognised. Arguments as `accuracy`."""
    hits = (predicted(logits, x, labels, batch) == labels).double()
    return {c: float(hits[labels == c].mean()) for c in sorted(set(labels.tolist()))}


def predicted(logits: Logits, x: Tensor, labels: Tensor, batch: int) -> Tensor:
    """The class of each row, [N]. InputError when there is no row, labels aren't one a row, or logits have another shape or aren't finite."""
    require_tensors(x=x, labels=labels)
    if labels.dim() != 1 or len(x) != len(labels) or not len(x) or batch < 1:
        raise InputError("there isn't one label a row", why=f"x is {list(x.shape)}, labels are {list(labels.shape)}, batch is {batch}")
    with torch.no_grad():
        scores = torch.cat([logits(rows) for rows in torch.split(x, batch)])
    if scores.dim() != 2 or len(scores) != len(x):
        raise InputError("the logits don't fit the rows", why=f"{len(x)} rows gave logits {list(scores.shape)}, not [rows, classes]")
    require_finite("the logits", scores)
    return scores.argmax(1)


def mask_iou(found: Tensor, wanted: Tensor) -> Estimate:
    """The mean over masks of |found ∩ wanted| / |found ∪ wanted|, with a bootstrap interval over images.

    found, wanted: [N, H, W] or [N, P, H, W], bool, P masks an image. A mask that is empty in both counts as 1. InputError for other shapes or
    dtypes and where there is no mask.
    """
    require_tensors(found=found, wanted=wanted)
    if found.shape != wanted.shape or found.dtype != torch.bool or wanted.dtype != torch.bool or found.dim() < 3 or not found.numel():
        why = f"they are {list(found.shape)} {found.dtype} and {list(wanted.shape)} {wanted.dtype}, not two [N, ..., H, W] of bool"
        raise InputError("the masks can't be compared", why=why)
    both, either = ((f(found, wanted)).sum((-2, -1)).double() for f in (torch.logical_and, torch.logical_or))
    each = torch.where(either > 0, both / either, 1.0).flatten(1).mean(1)
    return bootstrap(lambda rows: float(rows.mean()), each)


def mean_iou(found: Tensor, wanted: Tensor, classes: int, ignore: int | None = None) -> float:
    """The mean over classes of |found ∩ wanted| / |found ∪ wanted|, counted over all pixels of all images; classes in neither are left out.

    found, wanted: equal shapes, int64 in [0, classes); pixels where wanted == ignore count nowhere. InputError otherwise and if none counts.
    """
    require_tensors(found=found, wanted=wanted)
    if found.is_floating_point() or wanted.is_floating_point():
        raise InputError("the maps can't be compared", why=f"they are of {found.dtype} and {wanted.dtype}", do="classes as integers")
    kept = torch.ones_like(wanted, dtype=torch.bool) if ignore is None else wanted != ignore
    if found.shape != wanted.shape or not kept.any():
        why = f"they are {list(found.shape)} and {list(wanted.shape)}, {int(kept.sum())} pixels count"
        raise InputError("the maps can't be compared", why=why)
    a, b = found[kept], wanted[kept]
    both = torch.cat([a, b])
    if int(both.min()) < 0 or int(both.max()) >= classes:
        raise InputError("a map holds an unknown class", why=f"classes {int(both.min())}..{int(both.max())}, known are 0..{classes - 1}")
    pairs = torch.bincount(b * classes + a, minlength=classes * classes).view(classes, classes).double()
    union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    return float((pairs.diagonal() / union)[union > 0].mean())
