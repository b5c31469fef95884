"""Committed weights: half precision on disk, float32 when they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "weights"


def save(model: nn.Module, name: str) -> None:
    """Floating-point tensors in half precision, others as they are. ValueError for values that half precision doesn't hold."""
    tensors = {key: _half(key, value) for key, value in model.state_dict().items()}
    FOLDER.mkdir(exist_ok=True)
    save_file(tensors, FOLDER / f"{name}.safetensors")


def _half(key: str, value: Tensor) -> Tensor:
    small = value.half().contiguous() if value.is_floating_point() else value
    if value.is_floating_point() and not torch.isfinite(small).all():
        raise ValueError(f"{key} reaches {value.abs().max():.3g}, more than half precision holds")
    return small


def read(model: nn.Module, name: str) -> nn.Module:
    """The model with the committed weights, in eval mode."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in tensors.items()})
    return model.eval()


def card(name: str) -> dict[str, Any]:
    """What the weights are: data, licence, plan, CPU minutes, command, metrics."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def published() -> list[str]:
    """The names of all testbeds with committed weights."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))
