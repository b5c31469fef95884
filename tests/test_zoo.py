"""What the zoo promises, per entry: nothing is degenerate, so that a wrong rewrite cannot hide behind a zero or a constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tests.held_out import HELD_OUT
from tests.zoo import ZOO, Inputs, redraw

ALL = {**ZOO, **HELD_OUT}
STILL = {("hunyuan_dit", "['style']"): "indexes an embedding of one row: 0 is the only legal value"}


def outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """All floating-point outputs in one vector."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**inputs))
    return torch.cat([leaf.flatten() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()])


def moved(value: Tensor) -> Tensor:
    """The input changed: noise on floats, one position flipped in a mask, a neighbouring id elsewhere."""
    if value.is_floating_point() or value.is_complex():
        return value + 0.3 * value.std().clamp(min=0.1) * torch.randn(value.shape, generator=torch.Generator().manual_seed(7))
    if set(value.unique().tolist()) <= {0, 1}:
        flipped = value.clone().flatten()
        where = (flipped == 0).nonzero()[0]
        flipped[where] = 1
        return flipped.view_as(value)
    return torch.where(value < value.max(), value + 1, value - 1)


def perturbed(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The inputs with each tensor leaf moved in turn."""
    leaves, spec = pytree.tree_flatten_with_path(inputs)
    for index, (path, value) in enumerate(leaves):
        if isinstance(value, Tensor):
            changed = [moved(leaf) if i == index else leaf for i, (_, leaf) in enumerate(leaves)]
            yield pytree.keystr(path), pytree.tree_unflatten(changed, spec)


def all_moved(name: str, inputs: Inputs) -> Inputs:
    """The inputs with every tensor leaf moved that may be."""
    leaves, spec = pytree.tree_flatten_with_path(inputs)
    free = [isinstance(value, Tensor) and (name, pytree.keystr(path)) not in STILL for path, value in leaves]
    return pytree.tree_unflatten([moved(v) if f else v for f, (_, v) in zip(free, leaves, strict=True)], spec)


def unused(model: nn.Module, inputs: Inputs) -> set[str]:
    """Parameters the outputs do not depend on: those that get no gradient."""
    model.zero_grad()
    leaves = [leaf for leaf in pytree.tree_leaves(model(**inputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum((leaf.float() * torch.randn_like(leaf.float())).sum() for leaf in leaves).backward()
    return {name for name, value in model.named_parameters() if value.requires_grad and value.grad is None}


class Peaks(TorchFunctionMode):
    """Collects the median of each softmax's greatest probability while active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            # with one-hot values the attention output is the probabilities themselves
            call["value"] = torch.eye(call["key"].shape[-2]).expand(*call["key"].shape[:-1], -1)
            self.note(func(**call))
        result = func(*args, **kwargs)
        if "softmax" in getattr(func, "__name__", "") and "log" not in func.__name__:
            self.note(result)
        return result

    def note(self, probabilities: Tensor) -> None:
        if probabilities.shape[-1] > 1:
            self.found.append(float(probabilities.amax(-1).median()))


def shares(name: str, model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """By input: how far moving it moves the outputs, in the 2-norm, relative to the outputs."""
    base = outputs(model, inputs)
    moves = {path: other for path, other in perturbed(inputs) if (name, path) not in STILL}
    return {path: float((outputs(model, other) - base).norm() / base.norm()) for path, other in moves.items()}


def degenerate(model: nn.Module, inputs: Inputs) -> list[str]:
    """Parameters that are zero, and those that are used and constant."""
    zero = [n for n, v in model.named_parameters() if not v.any()]
    constant = {n for n, v in model.named_parameters() if v.numel() > 1 and v.detach().std() < 1e-3}
    return zero + sorted(constant - unused(model, inputs) if constant else [])


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in HELD_OUT)) for n in ALL])
def entry(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Inputs]:
    return (request.param, *ALL[request.param]())


def test_outputs_are_finite_and_the_model_is_small(entry: tuple[str, nn.Module, Inputs]) -> None:
    _, model, inputs = entry
    result = outputs(model, inputs)
    assert result.isfinite().all()
    assert 0.02 < result.square().mean().sqrt() < 50
    assert sum(value.numel() for value in model.parameters()) < 2_000_000


def test_every_input_moves_the_output(entry: tuple[str, nn.Module, Inputs]) -> None:
    assert {path: share for path, share in shares(*entry).items() if not share > 1e-3} == {}


def test_no_attention_saturates(entry: tuple[str, nn.Module, Inputs]) -> None:
    with Peaks() as peaks:
        outputs(*entry[1:])
    assert max(peaks.found, default=0) < 0.9


def test_no_parameter_is_degenerate(entry: tuple[str, nn.Module, Inputs]) -> None:
    assert degenerate(*entry[1:]) == []


def test_two_builds_are_the_same_model_on_the_same_inputs() -> None:
    first, second = ZOO["unet2d_cond"](), ZOO["unet2d_cond"]()
    assert torch.equal(outputs(*first), outputs(*second))


def test_redraw_is_what_opens_a_model_and_the_checks_see_it() -> None:
    model, inputs = ZOO["dit"]()
    fresh = type(model).from_config(model.config).eval()
    nn.init.zeros_(fresh.transformer_blocks[0].norm1.linear.weight)  # as DiT starts its training: every gate shut
    assert "transformer_blocks.0.norm1.linear.weight" in degenerate(fresh, inputs)
    assert degenerate(redraw(fresh, seed=3), inputs) == []


def test_an_input_that_is_ignored_is_seen() -> None:
    model, inputs = ZOO["dit"]()
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.emb.class_embedder.embedding_table.weight)
    assert shares("dit", model, inputs)["['class_labels']"] <= 1e-3


def test_a_saturated_attention_is_seen() -> None:
    model, inputs = ZOO["vit"]()
    with torch.no_grad(), Peaks() as peaks:
        for name, value in model.named_parameters():
            value.mul_(50 if "query.weight" in name or "q_proj.weight" in name else 1)
        outputs(model, inputs)
    assert max(peaks.found) >= 0.9
