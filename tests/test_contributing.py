"""The code in README.md and CONTRIBUTING.md runs and does what the text says."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress import registry
from fxcompress.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)


class Signs(nn.Module):
    def forward(self, x):
        return x.neg().neg().relu() * 3


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two classes of CONTRIBUTING.md, found by name like those of an installed package."""
    space: dict[str, object] = {"__name__": __name__}
    for source in blocks("CONTRIBUTING.md", "python"):
        exec(compile(source, "CONTRIBUTING.md", "exec"), space)

    class Found(EntryPoint):
        def load(self) -> object:
            return space[self.value]

    def found(group: str) -> dict[str, EntryPoint]:
        name, value = {
            "fxcompress.passes": ("mine.double_negation", "DoubleNegation"),
            "fxcompress.backends": ("mine.generated", "GeneratedBackend"),
        }[group]
        return {name: Found(name, value, group)}

    monkeypatch.setattr(registry, "_found", found)


def test_the_smallest_pass_and_backend_work(registered: None) -> None:
    x = torch.randn(3, 4)
    model = Signs().eval()
    compiled = fxc.compile(model, {"passes": ["mine.double_negation"]}, (x,), backend="mine.generated")
    report = compiled.report.passes[0]
    assert (report.fired, report.nodes_before - report.nodes_after) == (1, 2)
    assert report.worst is not None
    assert (report.worst.verdict, report.worst.figure) == ("held", 0.0)
    assert compiled.report.backend is not None
    assert compiled.report.backend.parity == 0.0
    assert torch.equal(compiled(x), model(x))


def test_the_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for source in blocks("README.md", "python"):
        exec(compile(source, "README.md", "exec"), space)
    assert space["y"].shape == (5, 64)
    assert space["fast"].report.backend.integer_share == 1.0


def test_the_readme_recipes_are_valid(tmp_path: Path) -> None:
    file, names = tmp_path / "mine.yaml", []
    for source in blocks("README.md", "yaml"):
        file.write_text(source, encoding="utf-8")
        names.append(load_recipe(file).name)
    assert names == ["trained", "mine"]


def test_every_pass_backend_and_recipe_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (*registry.passes(), *registry.backends(), *fxc.recipe.shipped()):
        assert f"`{name}`" in text
