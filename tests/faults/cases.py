"""The passes under trial: with which options, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fxcompress.calibrate.statistics import Statistics
from fxcompress.edit import Edit
from fxcompress.manager import Manager, apply_rewrite
from fxcompress.program import Program
from fxcompress.recipe import Step
from fxcompress.rewrite import Context, Pass, Rewrite
from fxcompress.target import Target
from tests.passes.helpers import named


@dataclass(frozen=True)
class Case:
    """A pass with options, after others."""

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The pass, and its options if there are any."""
        return f"{self.use} {dict(self.options)}" if self.options else self.use

    def item(self) -> Pass:
        """The pass."""
        return named(self.use, **self.options)

    def opened(self, program: Program) -> Edit:
        """The pass's edit, open, on a copy of the program that the passes before have run over."""
        for name in self.after:
            manager = Manager(program.copy(), Target(name="test"), program.example, "off", Statistics([program.example]))
            manager.run([(Step(use=name), named(name))])
            program = manager.program
        return opened(pruned(program.copy()) if self.use == "sparsity.remove_channels" else program.copy(), self.item())


def opened(program: Program, item: Pass) -> Edit:
    """The open edit of one pass on the program itself."""
    edit, seen = Edit(program), Statistics([program.example])
    context = Context(program, Target(name="test"), program.example, observe=partial(seen, program), items=lambda: [program.example])
    if isinstance(item, Rewrite):
        apply_rewrite(item, context, edit)
    else:
        item.run(context, edit)  # type: ignore[attr-defined]
    return edit


def pruned(program: Program) -> Program:
    """Every other input channel of the layers that halve the width set to 0, in place."""
    for name, weight in program.constants.items():
        if weight.dim() == 2 and weight.shape[1] == 2 * weight.shape[0]:
            program.constants[name] = weight * (torch.arange(weight.shape[1]) % 2)
    return program


FOLDED = ("tidy.fold_constants",)
OPENED = (*FOLDED, "tidy.open_attention")
CASES = (
    *(
        Case(n)
        for n in ("tidy.fold_constants", "tidy.dead_code", "tidy.no_ops", "tidy.fold_batch_norm", "tidy.open_attention", "tidy.open_einsum")
    ),
    Case("tidy.fold_norm_gain", {}, FOLDED),
    Case("tidy.fold_norm_gain", {"beta": True}, FOLDED),
    Case("rotate.residual", {}, (*FOLDED, "tidy.fold_norm_gain")),
    Case("sparsity.remove_channels", {}, FOLDED),
    Case("quant.weight_only", {}, FOLDED),
    Case("quant.weight_only", {"weights": "int4/group:32"}, FOLDED),
    Case("quant.weight_only", {"weights": "uint4/group:16", "symmetric": False}, FOLDED),
    Case("quant.weight_only", {"weights": "float8_e4m3fn/channel"}, FOLDED),
    Case("quant.finalize", {}, (*FOLDED, "quant.weight_only")),
    Case("reparam.smooth", {}, FOLDED),
    Case("quant.insert", {}, OPENED),
    Case("quant.insert", {"activations": "int8/token", "products": False}, FOLDED),
    Case("quant.ranges", {}, (*OPENED, "quant.insert")),
    Case("quant.bias_correction", {}, (*OPENED, "quant.insert")),
    Case("quant.reconstruct", {"iterations": 3}, (*OPENED, "quant.insert")),
    Case("signs.bimodal", {}, FOLDED),
    Case("signs.centre_keys", {}, FOLDED),
    Case("softmax.adaptive", {"bits": 4}, FOLDED),
)
