"""The onnxruntime backend as a whole: what runs in which kernel, what is on disk, what a session refuses."""

from __future__ import annotations

import shutil

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fxcompress.backends.onnx.onnxruntime import OnnxRuntimeBackend
from fxcompress.backends.onnx.translate import _SKELETONS
from fxcompress.cost import macs
from fxcompress.dataflow import weight_uses
from fxcompress.errors import ArtifactError, BackendRefusal, InputError
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.numerics.formats import format_of
from fxcompress.program import Program
from tests.backends.onnx_helpers import EXACT, LIMIT, changed, ops, program_of, quantised
from tests.passes.helpers import zoo

ROUNDED = OnnxRuntimeBackend()


def _int4(name: str) -> Program:
    """A real model with every matrix that is multiplied or gathered in int4, in groups of 32 along the axis that is summed over."""
    program = zoo(name)
    for node in [n for n in program.graph.nodes if n.op == "get_attr" and program.constants[n.target].dim() == 2]:
        uses, _ = weight_uses(node, program.constants[node.target])
        if uses:
            program = quantised(program, str(node.target), "int4", (1, 32) if uses[0].contraction == 1 else (32, 1), symmetric=False)
    return program


@pytest.mark.parametrize(("name", "gathers", "products"), [("llama", 1, 9), ("gpt2", 2, 9)])
def test_every_quantised_matrix_of_a_language_model_runs_in_the_nbit_kernel(name, gathers, products, tmp_path):
    program = _int4(name)
    EXACT.write(program, tmp_path)
    report = EXACT.report(program, tmp_path, program.example)
    lowered = ops(program)
    assert (lowered.count("GatherBlockQuantized"), lowered.count("MatMulNBits")) == (gathers, products)
    assert report.parity < LIMIT
    assert report.site_parity is not None and report.site_parity < LIMIT  # found by name: a kernel's value is called as its fx node
    assert report.quantised_share == 1
    assert report.in_float == ()
    assert 0.9 < report.integer_share < 1  # attention's own products stay in float


def test_shares_count_multiply_accumulates_on_the_probe(tmp_path):
    """Two linears of 6 x 64 x 32 and 6 x 32 x 64, one quantised; the other, a convolution's worth, in float."""
    x = torch.randn(6, 64)
    program = quantised(program_of(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 128)), x), "0.weight", "int4", (1, 32))
    ROUNDED.write(program, tmp_path)
    report = ROUNDED.report(program, tmp_path, [x])
    assert report.integer_share == pytest.approx(64 * 32 / (64 * 32 + 32 * 128), rel=1e-12)
    assert report.quantised_share == 1
    assert report.opset == 18
    assert report.file_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_sites_in_float_are_reported_with_place_work_and_reason(tmp_path):
    x = torch.randn(2, 8, 9, 9)
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(2), nn.Linear(49, 64))
    program = program_of(model, x)
    program = quantised(quantised(program, "0.weight", "int8", (1, -1, -1, -1)), "2.weight", "int4", (1, 16))
    ROUNDED.write(program, tmp_path)
    report = ROUNDED.report(program, tmp_path, [x])
    conv, dense = 2 * 6 * 49 * 8 * 9, 2 * 6 * 64 * 49
    assert [(s.site, s.module, s.macs, s.reason) for s in report.in_float] == [("conv2d", "0", conv, "Conv has no n-bit kernel")]
    assert report.quantised_share == report.integer_share == pytest.approx(dense / (conv + dense), rel=1e-12)


def test_a_kernel_that_the_runtime_does_not_run_is_not_counted(tmp_path):
    """What counts is ONNX Runtime's graph, not ours: with the kernel's name replaced in the file the share falls to 0."""
    x = torch.randn(6, 64)
    program = quantised(program_of(nn.Linear(64, 32), x), "weight", "int4", (1, 32))
    EXACT.write(program, tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    next(n for n in model.graph.node if n.op_type == "MatMulNBits").name = "something else"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    report = EXACT.report(program, tmp_path, [x])
    assert report.integer_share == 0
    assert [(s.site, s.reason) for s in report.in_float] == [("linear", "its kernel is not in the graph that ONNX Runtime runs")]


def test_a_float_site_is_folded_when_the_model_is_loaded(tmp_path):
    x = torch.randn(2, 8, 9, 9)
    program = quantised(program_of(nn.Conv2d(8, 6, 3), x), "weight", "int4", (1, 4, -1, -1), symmetric=False)
    EXACT.write(program, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    left = {n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert left <= {"Conv", "ReorderInput", "ReorderOutput"}
    assert (tmp_path / "weights.bin").stat().st_size < program.constants["weight.packed"].nbytes + 1024


def test_int8_activations_cost_what_the_report_says(tmp_path):
    x = torch.randn(6, 256)
    program = quantised(program_of(nn.Linear(256, 32), x), "weight", "int4", (1, 32))
    reports = {}
    for backend in (ROUNDED, EXACT):
        folder = tmp_path / str(backend.options.activation_rounding)
        folder.mkdir()
        backend.write(program, folder)
        reports[backend.options.activation_rounding] = backend.report(program, folder, [x])
    assert reports["int8"].parity < LIMIT
    assert 30 < reports["int8"].rounding_sqnr < 60  # 8 bits with a scale for each block of 32: about 45 dB
    assert reports["off"].rounding_sqnr is None  # infinite


def test_parity_refuses_other_numbers(tmp_path):
    x = torch.randn(6, 64)
    program = quantised(program_of(nn.Linear(64, 32), x), "weight", "int4", (1, 32), symmetric=False)
    EXACT.write(changed(program, "weight.scale", program.constants["weight.scale"] * 1.001), tmp_path)
    with pytest.raises(BackendRefusal) as refused:
        EXACT.report(program, tmp_path, [x])
    assert refused.value.what == "the backend gives other numbers than the program"
    assert refused.value.where == f"output {program.outputs[0].name}"


def test_bytes_on_disk_are_those_of_the_codes(tmp_path):
    """int4 in groups of 64: half a byte a weight, 4 bytes of scale a group."""
    x = torch.randn(2, 512)
    program = quantised(program_of(nn.Linear(512, 256, bias=False), x), "weight", "int4", (1, 64))
    EXACT.write(program, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size == 512 * 256 // 2 + 512 * 256 // 64 * 4


def test_the_file_runs_without_this_package(tmp_path):
    x = torch.randn(6, 64)
    program = quantised(program_of(nn.Linear(64, 32), x), "weight", "int4", (1, 32))
    EXACT.write(program, tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    (given,) = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})
    assert relative_error(run(program, [x])[0], torch.from_numpy(given)) < LIMIT


def test_equal_programs_give_equal_files_whatever_was_lowered_before(tmp_path):
    """Translations are shared between recipes; the names in a file are not."""
    x = torch.randn(6, 64)
    program = quantised(program_of(nn.Linear(64, 32), x), "weight", "int4", (1, 32))
    other = program.copy()
    for node in other.graph.nodes:
        node.name = f"other_{node.name}"
    files = []
    for order in ((program, other), (other, program)):
        _SKELETONS.clear()
        for lowered in order:
            EXACT.write(lowered, tmp_path)
            if lowered is program:
                files.append([(tmp_path / f).read_bytes() for f in ("model.onnx", "weights.bin")])
    assert files[0] == files[1]


def _deleted(folder):
    (folder / "weights.bin").unlink()


def _truncated(folder):
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(data[:-1])


def _no_model(folder):
    (folder / "model.onnx").unlink()


def _not_onnx(folder):
    (folder / "model.onnx").write_bytes(b"\xff" * 100)


def _elsewhere(folder):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights.bin" if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (_deleted, "the model's weights are missing or truncated"),
        (_truncated, "the model's weights are missing or truncated"),
        (_elsewhere, "the model's weights are missing or truncated"),
        (_no_model, "no ONNX model there"),
        (_not_onnx, "not an ONNX model"),
    ],
)
def test_damaged_files_are_refused(damage, what, tmp_path):
    program = program_of(nn.Linear(64, 32), torch.randn(6, 64))
    (tmp_path / "good").mkdir()
    EXACT.write(program, tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    damage(tmp_path / "bad")
    EXACT.open(tmp_path / "good", threads=1)
    with pytest.raises(ArtifactError, match=what):
        EXACT.open(tmp_path / "bad", threads=1)


@pytest.mark.parametrize("inputs", [[torch.randn(6, 63)], [torch.randn(6, 64).double()], []], ids=["shape", "dtype", "count"])
def test_inputs_that_do_not_fit_are_refused(inputs, tmp_path):
    EXACT.write(program_of(nn.Linear(64, 32), torch.randn(6, 64)), tmp_path)
    with pytest.raises(InputError, match="the inputs don't fit the model"):
        EXACT.open(tmp_path, threads=1).run(inputs)


class Contractions(nn.Module):
    """One op of each family."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.ConvTranspose2d(6, 4, 3, stride=2)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        conv = self.conv(x)
        attended = nn.functional.scaled_dot_product_attention(a, b, b)
        return conv, self.up(conv), self.linear(a), a @ b.mT, torch.addmm(a[0, 0, 0, 0], a[0, 0], b[0, 0].T), attended


def test_macs_are_those_of_the_loops_written_out():
    x, a, b = torch.randn(2, 4, 9, 9), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 8, 4)
    program = program_of(Contractions(), x, a, b)
    shapes: dict = {}
    run(program, [x, a, b], lambda n, v: shapes.update({n: v.shape}))
    counted = {n.name: macs(n, shapes) for n in program.graph.nodes if n.op == "call_function"}
    assert {k: v for k, v in counted.items() if v} == {
        "conv2d": 2 * 6 * 16 * 2 * 9,
        "conv_transpose2d": 2 * 6 * 16 * 4 * 9,
        "linear": 2 * 3 * 7 * 4 * 5,
        "matmul": 2 * 3 * 7 * 8 * 4,
        "addmm": 7 * 8 * 4,
        "scaled_dot_product_attention": 2 * 3 * 7 * 8 * (4 + 4),
    }


def test_the_target_admits_what_has_a_kernel_and_nothing_else():
    def refusal(family: str, name: str, group: int | None) -> str | None:
        return OnnxRuntimeBackend.target.refusal(family, format_of(name), group, 64, True)

    assert all(refusal("linear", f, g) is None for f in ("int4", "uint4", "int8") for g in (None, 16, 32, 128))
    assert all(refusal("embedding", f, 32) is None for f in ("int2", "int4", "int8"))
    assert refusal("linear", "int2", 16) == "onnxruntime: groups of 16 are below the least of 32"
    assert refusal("linear", "int4", 48) == "onnxruntime: groups of 48 are not a power of two"
    assert refusal("conv", "int4", None) == "onnxruntime has no n-bit kernel for conv weights"
    assert (
        refusal("linear", "float8_e4m3fn", None)
        == "onnxruntime has no float8_e4m3fn kernel for linear weights, only int2, int4, int8, uint2, uint4, uint8"
    )
