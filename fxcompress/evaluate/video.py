"""Videos [N, C, T, H, W], as diffusers' video networks make them: distances between sets of them, and how far motion is off."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.evaluate.distributions import frechet
from fxcompress.evaluate.given import require_finite, require_tensors
from fxcompress.evaluate.intervals import Estimate, bootstrap


def video_features(network: Callable[[Tensor], Tensor], videos: Tensor, batch: int = 50) -> Tensor:
    """[mean_t f_t, mean_t |f_{t+1} - f_t|] of each video, [N, 2 D]: what the frames show and how much it changes from one to the next.

    network: images [n, C, H, W] to features [n, D]. A still video has zeros in its second half; one played backwards has the features of
    itself. InputError for videos that aren't [N, C, T >= 2, H, W], and batch < 1.
    """
    _require(videos)
    if batch < 1:
        raise InputError("there is no frame a call", why=f"batch is {batch}", do="1 or more")
    frames = videos.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        seen = torch.cat([network(rows) for rows in torch.split(frames, batch)]).view(len(videos), videos.shape[2], -1)
    return torch.cat([seen.mean(1), seen.diff(dim=1).abs().mean(1)], 1)


def video_distance(network: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of `video_features` of two sets of videos. Read it beside `noise_floor` of the same sizes, as `frechet`."""
    return frechet(video_features(network, a), video_features(network, b))


def frame_difference_error(reference: Tensor, changed: Tensor) -> Estimate:
    """(Σ |Δc - Δr|² / Σ |Δr|²)^½, Δ the difference of neighbouring frames: 0 where all moves alike, 1 for a changed video that stands still.

    reference, changed: videos from the same noise. An error that stays the same over time doesn't count: flicker does. With a bootstrap
    interval over videos. InputError for other shapes and where nothing moves in the reference.
    """
    _require(reference)
    require_tensors(changed=changed)
    if reference.shape != changed.shape:
        raise InputError("the videos can't be paired", why=f"they are {list(reference.shape)} and {list(changed.shape)}")
    require_finite("the videos", reference, changed)
    a, b = reference.double().diff(dim=2), changed.double().diff(dim=2)
    sums = torch.stack([(b - a).square().flatten(1).sum(1), a.square().flatten(1).sum(1)], 1)
    if not float(sums[:, 1].sum()) > 0:
        raise InputError("nothing moves in the reference", why="all its frames are equal")
    return bootstrap(lambda rows: float((rows[:, 0].sum() / rows[:, 1].sum()).sqrt()), sums)


def _require(videos: Tensor) -> None:
    require_tensors(videos=videos)
    if videos.dim() != 5 or videos.shape[2] < 2 or not len(videos):
        raise InputError("these are no videos", why=f"they are {list(videos.shape)}, not [N, C, T >= 2, H, W]")
