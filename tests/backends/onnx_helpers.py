"""What the ONNX tests share: quantised leaves put into captured programs, and the one comparison all of them use."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fxcompress.backends.onnx.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeOptions
from fxcompress.capture import capture
from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.numerics.blocks import scale_shape
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.packing import pack
from fxcompress.program import Program

LIMIT = 1e-5  # of the largest error over the rms of the reference; the faults of these tests give 1e-2 and more
EXACT = OnnxRuntimeBackend(OnnxRuntimeOptions(activation_rounding="off"))


def program_of(model: nn.Module, *inputs: Tensor) -> Program:
    """The captured model, weights as they are."""
    return capture(model.eval(), inputs)


def quantised(program: Program, name: str, format: str, block: Sequence[int], *, symmetric: bool = True, seed: int = 0) -> Program:
    """A copy in which the constant is replaced by random codes of the whole format, with random scales (and zero points), packed."""
    result, rng = program.copy(), torch.Generator().manual_seed(seed)
    kind, shape = format_of(format), result.constants[name].shape
    per_block = scale_shape(shape, block)
    codes = _random_codes(format, shape, rng)
    scale = (0.5 + torch.rand(per_block, generator=rng)) / codes.float().square().mean().sqrt() / shape[-1] ** 0.5
    zero = None if symmetric else torch.randint(kind.qmin, kind.qmax + 1, per_block, generator=rng).to(kind.container)
    edit = Edit(result)
    leaf = next(n for n in result.graph.nodes if n.op == "get_attr" and n.target == name)
    at = {"like": leaf, "before": leaf.next}
    with edit.site(leaf, "quantised"):
        packed = edit.constant(f"{name}.packed", pack(codes, kind), **at)
        grid = [edit.constant(f"{name}.scale", scale, **at)]
        grid.append(None if zero is None else edit.constant(f"{name}.zero_point", zero, **at))
        unpacked = edit.insert(torch.ops.fxc.unpack.default, packed, format, shape[-1], **at)
        edit.replace(leaf, edit.insert(torch.ops.fxc.dequantize.default, unpacked, *grid, format, list(block), **at))
    edit.commit()
    return result


def _random_codes(format: str, shape: Sequence[int], rng: torch.Generator) -> Tensor:
    kind = format_of(format)
    if kind.kind == "float":
        return torch.randn(shape, generator=rng).to(kind.container)
    return torch.randint(kind.qmin, kind.qmax + 1, tuple(shape), generator=rng).to(kind.container)


def error(program: Program, inputs: Sequence[Tensor], lowered: Program | None = None) -> float:
    """Largest relative error over the outputs: ONNX Runtime on `lowered` (the program itself if not given) against the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        EXACT.write(lowered or program, Path(folder))
        given = EXACT.open(Path(folder), threads=1).run(inputs)
    return max(relative_error(a, b) for a, b in zip(run(program, inputs), given, strict=True))


def ops(program: Program) -> list[str]:
    """Op types of the lowered graph, in order."""
    return [node.op_type for node in EXACT.lower(program).model.graph]


def changed(program: Program, name: str, tensor: Tensor) -> Program:
    """A copy with another tensor under the constant's name."""
    result = program.copy()
    assert result.constants[name].shape == tensor.shape
    result.constants[name] = tensor
    return result
