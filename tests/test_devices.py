"""A model on another device is captured from a copy on the CPU. Fake tensors stand for those of a GPU, which this machine may not have."""

from __future__ import annotations

import importlib
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxcompress as fxc
from fxcompress import devices
from fxcompress.errors import CaptureError
from fxcompress.interpret import run
from tests.passes.helpers import seeded

GPU = torch.device("cuda", 0)


class Tied(nn.Module):
    """Tensors in every place where models keep some."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), 0.5, device=device))
        self.inner = nn.ParameterList([self.weight])
        self.register_buffer("places", torch.ones(4, device=device), persistent=False)
        self.tables = [torch.ones(4, device=device)]
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x @ self.weight @ self.inner[0] + self.places + self.tables[0] + torch.arange(4, device=x.device)
        return y.split(2, -1)


def test_a_copy_has_all_its_tensors_on_the_cpu() -> None:
    with FakeTensorMode():
        model = Tied(GPU)
    assert devices.elsewhere(model) == ["cuda:0"]
    moved = devices.on_cpu(model)
    assert devices.elsewhere(moved) == [] and moved.tables[0].device == devices.CPU
    assert moved.inner[0] is moved.weight and isinstance(moved.weight, nn.Parameter)
    assert devices.elsewhere(model) == ["cuda:0"] and model.tables[0].device == GPU


def test_what_is_on_the_cpu_is_shared() -> None:
    model = Tied()
    moved = devices.on_cpu(model)
    assert moved is not model and moved.weight.data_ptr() == model.weight.data_ptr()
    assert moved.tables[0].data_ptr() == model.tables[0].data_ptr()


def test_inputs_move_with_all_that_holds_them() -> None:
    with FakeTensorMode():
        item = fxc.Inputs(torch.ones(2, device=GPU), roles={"x": "timestep"}, more=[torch.ones(2, device=GPU)], n=3)
    moved = devices.on_cpu(item)
    assert (moved.args[0].device, moved.kwargs["more"][0].device, moved.kwargs["n"]) == (devices.CPU, devices.CPU, 3)
    assert moved.roles == item.roles


def test_what_can_not_be_copied_is_refused() -> None:
    model = Tied()
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match="can't be brought to the CPU"):
        devices.on_cpu(model)


def test_it_is_captured_from_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fxcompress.capture"), "elsewhere", lambda model: ["cuda:0"])
    model, x = Tied(), seeded(3, 4)
    program = fxc.capture(model, (x,))
    assert all(map(torch.equal, run(program, (x,)), model(x)))
    assert "the model is on cuda:0, its program on the CPU" in program.notes


@pytest.mark.parametrize(("shift", "said"), [(0.0, []), (9.0, ["on the CPU and on cpu 50.0% of the numbers of result 0 differ by"])])
def test_what_differs_in_a_few_places_is_told(shift: float, said: list[str]) -> None:
    model, moved = Tied(), Tied()
    moved.tables[0] = moved.tables[0] + torch.tensor([shift, 0, 0, 0])
    item = fxc.Inputs(seeded(3, 4))
    assert [note[: len(s)] for note, s in zip(devices.compared(model, item, moved, item), said, strict=True)] == said


def test_a_model_that_is_another_there_is_refused() -> None:
    item, moved = fxc.Inputs(seeded(3, 4)), Tied()
    moved.places = 3 * moved.places
    with pytest.raises(CaptureError, match="other numbers on the CPU than on cpu"):
        list(devices.compared(Tied(), item, moved, item))


def test_what_comes_back_is_where_the_inputs_were() -> None:
    with FakeTensorMode():
        given: dict[str, Any] = {"ids": [torch.ones(2, device=GPU)]}
        assert [t.device for t in devices.beside([torch.ones(3)], given)] == [GPU]
    assert devices.beside([torch.ones(3)], {"n": 3})[0].device == devices.CPU
