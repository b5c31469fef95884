import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.errors import RecipeError
from fxcompress.numerics import affine, packing
from fxcompress.numerics.formats import FORMATS, format_of
from fxcompress.numerics.ranges import minmax_range

fxc = torch.ops.fxc


def sample(name, shape=(6, 40), block=(1, 16)):
    format = format_of(name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()
    scale, zero = minmax_range(x, format, format.kind != "int" or format.signed, block)
    return x, scale, zero, list(block)


def opcheck(op, args):
    """All of torch's checks; its schema check hashes with a multiplication that torch 2.13 lacks for float8."""
    has_float8 = any(isinstance(v, torch.Tensor) and "float8" in str(v.dtype) for v in (*args, op(*args)))
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic", *([] if has_float8 else ["test_schema"])]
    torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.parametrize("name", ["int4", "uint8", "float8_e4m3fn"])
def test_opcheck(name):
    x, scale, zero, block = sample(name)
    codes = fxc.quantize(x, scale, zero, name, block)
    opcheck(fxc.quantize.default, (x, scale, zero, name, block))
    opcheck(fxc.dequantize.default, (codes, scale, zero, name, block))
    opcheck(fxc.unpack.default, (packing.pack(codes, format_of(name)), name, 40))


def test_opcheck_of_other_memory_layouts():
    x, scale, zero, _ = sample("int8", (2, 3, 4, 5), (1, -1, -1, -1))
    args = (x.contiguous(memory_format=torch.channels_last), scale, zero, "int8", [1, -1, -1, -1])
    opcheck(fxc.quantize.default, args)
    opcheck(fxc.dequantize.default, (fxc.quantize(*args), *args[1:]))
    opcheck(fxc.unpack.default, (torch.zeros(4, 6, dtype=torch.uint8).T, "int8", 4))


@pytest.mark.parametrize("name", FORMATS)
def test_fake_and_real_agree_on_dtype_shape_and_strides(name):
    x, scale, zero, block = sample(name)
    codes = fxc.quantize(x.T.contiguous().T, scale, zero, name, block)
    values = fxc.dequantize(codes, scale, zero, name, block)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = fxc.quantize(x.T.contiguous().T, scale, zero, name, block)
        fake_values = fxc.dequantize(codes, scale, zero, name, block)
    for real, imagined in ((codes, fake), (values, fake_values)):
        assert (real.dtype, real.shape, real.stride()) == (imagined.dtype, imagined.shape, imagined.stride())


@pytest.mark.parametrize("name", ["uint4", "int8", "float8_e5m2"])
def test_the_ops_are_the_numerics(name):
    x, scale, zero, block = sample(name)
    format = format_of(name)
    codes = fxc.quantize(x, scale, zero, name, block)
    assert torch.equal(codes.view(torch.uint8), affine.quantize(x, scale, zero, format, block).view(torch.uint8))
    assert torch.equal(fxc.dequantize(codes, scale, zero, name, block), affine.dequantize(codes, scale, zero, format, block))


class Quantised(torch.nn.Module):
    """An activation per token and a weight packed in groups, as finalize leaves them."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
        scale, zero = minmax_range(weight, format_of("uint4"), False, (1, 16))
        packed = packing.pack(affine.quantize(weight, scale, zero, format_of("uint4"), (1, 16)), format_of("uint4"))
        for name, value in (("scale", scale), ("zero", zero), ("packed", packed)):
            self.register_buffer(name, value)

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127
        x = fxc.dequantize(fxc.quantize(x, step, None, "int8", [1, 1, -1]), step, None, "int8", [1, 1, -1])
        weight = fxc.dequantize(fxc.unpack(self.packed, "uint4", 40), self.scale, self.zero, "uint4", [1, 16])
        return torch.nn.functional.linear(x, weight)


def test_export_keeps_the_ops_whole_and_the_sizes_symbolic():
    model, x = Quantised(), torch.randn(2, 3, 40)
    sizes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("t")},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes).run_decompositions({})
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function" and "fxc" in str(n.target)]
    assert names == [f"fxc.{n}.default" for n in ("quantize", "dequantize", "unpack", "dequantize")]
    other = torch.randn(5, 7, 40)
    assert torch.equal(program.module()(other), model(other))


def test_fake_kernels_refuse_an_unknown_format():
    with torch.device("meta"), pytest.raises(RecipeError, match="did you mean 'int4'"):
        fxc.quantize(torch.empty(2, 2), torch.empty(2, 1), None, "int44", [1, -1])


def test_backward_through_the_pair_is_an_error_not_a_zero():
    x = torch.randn(2, 8, requires_grad=True)
    scale = torch.ones(2, 1, requires_grad=True)
    y = fxc.dequantize(fxc.quantize(x, scale, None, "int4", [1, -1]), scale, None, "int4", [1, -1])
    with pytest.raises(RuntimeError, match="fxc"):
        y.sum().backward()


def test_reloading_the_modules_registers_again_without_a_crash():
    """In a process of its own: passes that were imported before hold the ops that a reload replaces."""
    code = (
        "import importlib, torch, fxcompress.ops; importlib.reload(fxcompress.ops.quantizer); importlib.reload(fxcompress.ops); "
        "assert torch.ops.fxc.quantize(torch.tensor([1.4]), torch.ones(1), None, 'int4', [-1]).tolist() == [1]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
