"""Feeds of what a sampler's network sees on its way from noise to image, each item with its timestep."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxcompress.calibrate.feed import Feed, Items, Spool
from fxcompress.errors import CalibrationError
from fxcompress.signature import Inputs, bind, forward_signature

IN_MEMORY = 1 << 28  # bytes of items; more go to disk


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: out = without + scale (with - without). without: per condition what says "no condition", one row of it."""

    scale: float
    without: Mapping[str, Tensor]


@dataclass(frozen=True)
class Sampler:
    """How a network turns noise into images. scheduler: any of diffusers'; each run builds it anew from its config, so it stays untouched.

    The network is called by name, once a call of the sampler; guided, that one call has both halves, those without the condition first.
    per_row: t is [rows], else it has no axis, as UNet pipelines pass it. sample, timestep: the network's parameters for x_t (its first if
    left out) and t.
    """

    scheduler: Any
    steps: int
    guidance: Guidance | None = None
    per_row: bool = True
    sample: str = ""
    timestep: str = "timestep"

    def run(
        self,
        model: Callable[..., Any],
        noise: Tensor,
        conditions: Mapping[str, Any],
        seed: int = 0,
        visit: Callable[[Inputs], None] = lambda item: None,
    ) -> Tensor:
        """Images [B, ...] from standard normal noise [B, ...]. visit: sees the inputs of each call. seed: of the noise of random steps.

        CalibrationError for no step, a scheduler that isn't one of diffusers', and guidance without any of these conditions.
        """
        self._require(conditions)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps)
        takes_draw = "generator" in inspect.signature(scheduler.step).parameters
        random = {"generator": torch.Generator().manual_seed(seed)} if takes_draw else {}
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        with torch.no_grad():
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                item = self.item(model, scaled, t, conditions)
                visit(item)
                out = self._guided(first_tensor(model(**item.kwargs)))
                x = scheduler.step(_without_variance(out, x, scheduler), t, x, **random).prev_sample
        return x

    def _require(self, conditions: Mapping[str, Any]) -> None:
        if self.steps < 1:
            raise CalibrationError("there is nothing to sample", why=f"the sampler takes {self.steps} steps", do="steps=1 or more")
        if isinstance(self.scheduler, type) or not all(hasattr(self.scheduler, name) for name in ("config", "step", "set_timesteps")):
            why = f"it is {self.scheduler!r}, which has no config, step and set_timesteps"[:200]
            raise CalibrationError("this is no scheduler to sample with", why=why, do="pass an instance, as DDIMScheduler()")
        without = None if self.guidance is None else self.guidance.without
        if without is not None and not (without and without.keys() <= conditions.keys()):
            why = f"`without` is for {sorted(without)}, the conditions are {sorted(conditions)}"
            raise CalibrationError("the guidance has nothing to guide by", why=why, do="Guidance(scale, {condition's name: its row for none})")

    def item(self, model: Callable[..., Any], x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> Inputs:
        """The inputs of one call at x [B, ...] and t, by name, role "timestep" set."""
        if self.guidance is not None:
            x = torch.cat([x, x])
            conditions = {name: _halves(value, self.guidance.without.get(name)) for name, value in conditions.items()}
        first = self.sample or _first_parameter(model)
        times = t.expand(len(x)) if self.per_row else t
        return Inputs(**{first: x, self.timestep: times, **conditions}, roles={self.timestep: "timestep"})

    def _guided(self, out: Tensor) -> Tensor:
        if self.guidance is None:
            return out
        free, bound = out.chunk(2)
        return free + self.guidance.scale * (bound - free)


def trajectory(
    model: Callable[..., Any],
    sampler: Sampler,
    n: int,
    *,
    shape: Sequence[int],
    conditions: Mapping[str, Any] | None = None,
    batch: int = 4,
    seed: int = 0,
) -> Feed:
    """A feed of the network's inputs while `n` images are sampled: one item a call of the network, by parameter name, role "timestep" set.

    model: the full-precision network, or another whose own states are wanted. shape: of one image, without the batch. conditions: tensors of n
    rows, and constants. batch: images a run. Equal seeds start from equal noise. The timesteps are stratified: the calls of a run stand
    together, shuffled, so every run's stretch of the feed holds each timestep as often as the sampler calls it. Above 256 MiB the items go to
    disk. CalibrationError when n < 1 or batch < 1, a condition hasn't n rows, and as `Sampler.run`.
    """
    known = dict(conditions or {})
    wrong = [name for name, value in known.items() if isinstance(value, Tensor) and (not value.dim() or len(value) != n)]
    if n < 1 or batch < 1 or wrong:
        why = f"n is {n}, batch {batch}" if n < 1 or batch < 1 else f"{wrong[0]} is {list(known[wrong[0]].shape)}, the images are {n}"
        raise CalibrationError("the images can't be sampled", why=why, do="pass n >= 1, batch >= 1 and one row of each condition an image")
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    runs = (_run(model, sampler, noise, known, slice(start, start + batch), seed) for start in range(0, n, batch))
    first = next(runs)
    items = chain(first, chain.from_iterable(runs))
    return Spool(items) if _bytes(first) * n / min(batch, n) > IN_MEMORY else Items(list(items))


def _run(model: Callable[..., Any], sampler: Sampler, noise: Tensor, conditions: Mapping[str, Any], rows: slice, seed: int) -> list[Inputs]:
    items: list[Inputs] = []
    given = {name: value[rows] if isinstance(value, Tensor) else value for name, value in conditions.items()}
    own_seed = seed * 1_000_003 + rows.start
    sampler.run(model, noise[rows], given, own_seed, items.append)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(own_seed))
    return [items[i] for i in order.tolist()]


def recorded(model: nn.Module, run: Callable[[], Any], timestep: str = "timestep") -> Feed:
    """A feed of the inputs that `model` gets while run() runs, in order: for any pipeline, `recorded(pipe.unet, lambda: pipe(prompt))`.

    Items are by parameter name; `return_dict`, which no number depends on, is left out. CalibrationError when run() doesn't call the model.
    """

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = bind(parameters, Inputs(*args, **kwargs))
        given.pop("return_dict", None)
        roles = {timestep: "timestep"} if isinstance(given.get(timestep), Tensor) else {}
        items.append(Inputs(**pytree.tree_map_only(Tensor, torch.clone, given), roles=roles))

    items: list[Inputs] = []
    parameters = forward_signature(model)
    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    return Items(items)


def first_tensor(output: Any) -> Tensor:
    """The output itself, or the first tensor of a tuple or of an output class. CalibrationError where there is none."""
    found = next(_tensors(output), None)
    if found is None:
        raise CalibrationError("the model gave no tensor", why=f"its output is {type(output).__name__}")
    return found


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(items: Sequence[Inputs]) -> int:
    return sum(t.nbytes for item in items for t in _tensors(item.kwargs))


def _halves(value: Any, without: Tensor | None) -> Any:
    """A condition's rows behind as many that say "none"; rows that guidance leaves alone stand twice."""
    if not isinstance(value, Tensor):
        return value
    return torch.cat([value if without is None else without.expand_as(value), value])


def _without_variance(out: Tensor, x: Tensor, scheduler: Any) -> Tensor:
    """The first C channels, where the network predicts a variance that the scheduler doesn't use."""
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    return out if learned else out[:, : x.shape[1]]


def _first_parameter(model: Callable[..., Any]) -> str:
    signature = getattr(model, "signature", None)  # a compiled model has the captured one
    parameters: inspect.Signature = signature.parameters if signature is not None else forward_signature(model)
    found = next(iter(parameters.parameters.values()), None)
    if found is None or found.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise CalibrationError("the name of the network's input isn't known", why=f"it takes ({found})", do='Sampler(..., sample="its name")')
    return str(found.name)
