"""How far a changed sampler's network is from its reference: step by step on given states, and in the images that equal noise leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.calibrate.trajectory import Sampler, first_tensor
from fxcompress.errors import InputError
from fxcompress.evaluate.given import require_finite, require_tensors
from fxcompress.numerics.noise import decibel, sqnr
from fxcompress.signature import Inputs


@dataclass(frozen=True)
class Ratios:
    """Signal-to-noise ratios in dB by what they belong to: timesteps, or numbers of images."""

    each: dict[float, float]

    @property
    def mean(self) -> float:
        """The mean of the figures in dB."""
        return sum(self.each.values()) / len(self.each)

    @property
    def worst(self) -> float:
        """The least figure in dB."""
        return min(self.each.values())


def step_sqnr(reference: Callable[..., Any], changed: Callable[..., Any], feed: Iterable[Any]) -> Ratios:
    """Per timestep 10 log10(Σ reference² / Σ (reference - changed)²) of the first output, both models called on the same items, in float64.

    feed: items with one timestep each, its argument given by name with role "timestep", as `calibrate.trajectory` makes them. On those of
    the reference from other seeds than calibration had, it says what is lost on held-out states; on trajectories of `changed`, what is lost on
    the states that its own errors lead to. InputError for an item without the role or with several timesteps, for
    no item, and for outputs of two shapes or not finite.
    """
    sums: dict[float, list[float]] = {}
    with torch.no_grad():
        for item in map(Inputs.of, feed):
            a, b = (first_tensor(model(*item.args, **item.kwargs)).double() for model in (reference, changed))
            if a.shape != b.shape:
                raise InputError("the outputs can't be compared", why=f"they are {list(a.shape)} and {list(b.shape)}")
            require_finite("the outputs", a, b)
            entry = sums.setdefault(timestep(item), [0.0, 0.0])
            entry[0] += float(a.square().sum())
            entry[1] += float((a - b).square().sum())
    if not sums:
        raise InputError("there is no state to compare on", why="the feed gave no item")
    return Ratios({t: decibel(signal, noise) for t, (signal, noise) in sorted(sums.items())})


def image_snr(reference: Tensor, changed: Tensor) -> Ratios:
    """Per image the SQNR in dB of `changed` against `reference`, [N, ...] both, drawn from the same noise, conditions and sampler.

    InputError when shapes differ, there is no image or a value isn't finite.
    """
    require_tensors(reference=reference, changed=changed)
    if reference.shape != changed.shape or not reference.numel():
        raise InputError("the images can't be compared", why=f"they are {list(reference.shape)} and {list(changed.shape)}")
    require_finite("the images", reference, changed)
    return Ratios({float(i): sqnr(a, b) for i, (a, b) in enumerate(zip(reference, changed, strict=True))})


@dataclass(frozen=True)
class Rollout:
    """Both models' samples from equal noise, [n, ...], and the noise of `changed` by timestep: `given` on states that the reference came
    through, `own` on those that `changed` came through, where its earlier errors have led it."""

    reference: Tensor
    changed: Tensor
    given: Ratios
    own: Ratios


def rollout(
    reference: Callable[..., Any],
    changed: Callable[..., Any],
    sampler: Sampler,
    n: int,
    *,
    shape: Sequence[int],
    conditions: Mapping[str, Any] | None = None,
    batch: int = 25,
    seed: int = 1,
) -> Rollout:
    """Sample n items with each model from the same noise, conditions and seed; compare the two networks on the states of both.

    Arguments as `calibrate.trajectory`; batch: items a run; guided calls
    have twice as many rows, and diffusers' UNets take fewer than 64. States are held out where `seed` isn't calibration's. Costs each network
    twice its sampling. InputError as `step_sqnr`, and for n or batch < 1.
    """
    if n < 1 or batch < 1:
        raise InputError("there is nothing to sample", why=f"n is {n}, batch is {batch}", do="1 or more of both")
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    samples, ratios = [], []
    for model in (reference, changed):
        seen: list[Inputs] = []
        parts = []
        for start in range(0, n, batch):
            rows = slice(start, start + batch)
            given = {name: value[rows] if isinstance(value, Tensor) else value for name, value in (conditions or {}).items()}
            parts.append(sampler.run(model, noise[rows], given, seed * 1_000_003 + start, seen.append))
        samples.append(torch.cat(parts))
        ratios.append(step_sqnr(reference, changed, seen))
    return Rollout(samples[0], samples[1], ratios[0], ratios[1])


def timestep(item: Inputs) -> float:
    """The one timestep of an item, from the argument that has the role. InputError when there is none or several."""
    names = [name for name, role in item.roles.items() if role == "timestep" and name in item.kwargs]
    values = set(torch.as_tensor(item.kwargs[names[0]]).flatten().tolist()) if len(names) == 1 else set()
    if len(values) != 1:
        raise InputError(
            "an item doesn't say at which timestep it is",
            why=f"arguments by name with role 'timestep': {names}, different values: {len(values)}",
            do='Inputs(..., timestep=t, roles={"timestep": "timestep"}) with one t an item',
        )
    return float(values.pop())
