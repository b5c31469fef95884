"""Programs as ONNX graphs: numbers at every size, one translation for many recipes, refusals with their text."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from fxcompress import dynamic
from fxcompress.backends.onnx import torchlib
from fxcompress.backends.onnx import translate as module
from fxcompress.backends.onnx.outline import fingerprint, outline
from fxcompress.backends.onnx.translate import translate
from fxcompress.edit import Edit
from fxcompress.errors import BackendRefusal
from tests.backends.onnx_helpers import EXACT, LIMIT, error, ops, program_of, quantised
from tests.passes.helpers import function, zoo
from tests.zoo import ZOO

QUICK = ("llama", "gpt2", "mixtral", "vit", "dit", "bert")
SINES = {"flux": 5e-5}  # sines of angles up to 1e3, where float32 leaves 1e-5


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_real_models_give_the_interpreters_numbers_at_other_sizes(name):
    program = zoo(name)
    sizes = {symbol: min(greatest, least + 2) for symbol, (least, greatest) in program.symbols.items()}
    other = dynamic.at_sizes(program.example, [v.shape for v in program.inputs], sizes) if name not in ("flux",) else program.example
    limit = SINES.get(name, LIMIT)
    assert error(program, program.example) < limit
    assert error(program, other) < limit


class Attention(nn.Module):
    """Attention as it stands in torch, with the options under test."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


def _heads(heads: int, keys: int, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, heads, length, 8), torch.randn(2, keys, 7, 8), torch.randn(2, keys, 7, 6)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}], ids=str)
def test_attention_without_mask(options):
    inputs = _heads(4, 4)
    assert error(program_of(Attention(**options), *inputs), inputs) < LIMIT


@pytest.mark.parametrize("mask", [None, (2, 1, 5, 7), (2, 6, 5, 7), (5, 7), (2, 1, 1, 7), (1, 6, 1, 7), (6, 1, 7), (1, 7)], ids=str)
@pytest.mark.parametrize("is_bool", [True, False])
def test_attention_with_fewer_key_heads(mask, is_bool):
    inputs = list(_heads(6, 2))
    if mask is not None:
        numbers = torch.randn(*mask, generator=torch.Generator().manual_seed(1))
        inputs.append(numbers > -0.7 if is_bool else numbers)
    assert error(program_of(Attention(enable_gqa=True), *inputs), inputs) < LIMIT


def test_causal_attention_with_fewer_key_heads():
    inputs = _heads(6, 2)
    assert error(program_of(Attention(enable_gqa=True, is_causal=True), *inputs), inputs) < LIMIT


class Repeated(nn.Module):
    """Rows repeated as often as another input has rows, along one axis or of all numbers in a row."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.repeat_interleave(y.shape[1], dim=self.dim)


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_repeats_as_many_as_another_input_has_rows(dim):
    torch.manual_seed(0)
    program = program_of(Repeated(dim), torch.randn(2, 3, 5), torch.randn(2, 4))
    for batch, rows in ((2, 4), (3, 3), (1, 7), (5, 1)):
        inputs = [torch.randn(batch, 3, 5), torch.randn(batch, rows)]
        assert error(program, inputs) == 0


def test_attention_of_three_axes():
    q, k, v = (t[:, 0] for t in _heads(1, 1))
    assert error(program_of(Attention(), q, k, v), [q, k, v]) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["bool", "float", "infinite"])
def test_a_row_that_sees_no_key_is_zero(kind, dtype):
    """torch gives zeros there; finite float masks hide nothing entirely, so that row is the mean of the values."""
    seen = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    seen[0, :, 2, 3:], seen[1, :, 1] = False, False
    mask = {"bool": seen, "float": torch.where(seen, 0.0, torch.finfo(dtype).min), "infinite": torch.where(seen, 0.0, -math.inf)}[kind]
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in (*_heads(4, 4), mask)]
    program = program_of(Attention(), *inputs)
    assert error(program, inputs) < max(LIMIT, 4 * torch.finfo(dtype).eps)
    (result,) = torch.unbind(Attention()(*inputs)[1:2, :, 1])
    assert (result == 0).all() == (kind != "float")


class Pieces(nn.Module):
    """The ops with several results."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        even, odd = torch.unbind(x.reshape(-1, 2, 7), 1)
        return (*torch.split(x, 3, dim=1), *torch.split(x, [2, 5], -1), *x.chunk(2, 1), even * odd)


def test_pieces_are_slices_not_sequences():
    x = torch.randn(4, 7)
    program = program_of(Pieces(), x)
    assert error(program, [x]) == 0
    assert not [op for op in ops(program) if "Sequence" in op]


def test_inputs_and_outputs_keep_names_and_symbols():
    program = program_of(nn.Linear(8, 4), torch.randn(3, 8))
    graph = translate(program).model.graph
    assert [(v.name, [getattr(d, "value", d) for d in v.shape]) for v in graph.inputs] == [("input", ["batch", 8])]
    assert [v.name for v in graph.outputs] == [program.outputs[0].name]


def test_an_output_named_like_an_input_is_told_apart():
    class Same(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x + 1}

    graph = translate(program_of(Same(), torch.randn(2, 3))).model.graph
    assert [v.name for v in (*graph.inputs, *graph.outputs)] == ["x", "out_x"]


def test_a_constant_named_like_an_input_is_told_apart():
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.x

    x = torch.randn(2, 3)
    assert error(program_of(Same(), x), [x]) == 0


def test_an_input_returned_and_a_result_returned_twice():
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = x + 1
            return x, y, y

    x = torch.randn(2, 3)
    assert error(program_of(Plain(), x), [x]) == 0


def test_recipes_of_one_model_share_one_translation(monkeypatch):
    calls = []
    exported = module._exported
    monkeypatch.setattr(module, "_exported", lambda *a: calls.append(a) or exported(*a))
    x = torch.randn(5, 48)
    program = program_of(nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16)), x)
    variants = [program, quantised(program, "0.weight", "int4", (1, 16)), quantised(program, "2.weight", "int8", (1, -1), symmetric=False)]
    assert all(error(p, [x]) < LIMIT for p in variants)
    assert len(calls) == 1


def test_the_fingerprint_sees_wiring_arguments_and_shapes_but_no_values():
    class Two(nn.Module):
        def __init__(self, swap: bool, scale: float = 2.0) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
            self.swap, self.scale = swap, scale

        def forward(self, x: Tensor) -> Tensor:
            y = x - self.a
            return (self.b - y if self.swap else y - self.b) * self.scale

    def print_of(model: nn.Module, x: Tensor) -> str:
        return fingerprint(outline(program_of(model, x)))

    x = torch.randn(3, 4)
    base = print_of(Two(False), x)
    assert base == print_of(Two(False), x)
    assert len({base, print_of(Two(True), x), print_of(Two(False, 3.0), x), print_of(Two(False), torch.randn(3, 2, 4))}) == 4


def test_dead_ops_and_their_constants_are_not_translated():
    x = torch.randn(3, 8)
    program = program_of(nn.Linear(8, 8), x)
    weight = next(n for n in program.graph.nodes if n.op == "get_attr")
    with program.graph.inserting_after(weight):
        program.graph.call_function(torch.ops.aten.neg.default, (weight,)).meta["val"] = weight.meta["val"]
    assert "Neg" not in ops(program)


def test_an_unknown_op_is_refused_with_its_place():
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.cholesky(x @ x.mT + 9 * torch.eye(4))

    with pytest.raises(BackendRefusal) as refused:
        translate(program_of(nn.Sequential(Inner()), torch.randn(2, 4, 4)))
    assert str(refused.value) == (
        "aten.linalg_cholesky.default has no ONNX form\n"
        "  where 0  (linalg_cholesky)\n"
        "  why   it decomposes into aten.linalg_cholesky_ex.default, which has no translation in torch.onnx\n"
        '  do    backend="reference" runs it; or replace the op in the model'
    )


def test_bfloat16_is_refused_with_the_remedy():
    with pytest.raises(BackendRefusal) as refused:
        translate(program_of(nn.Linear(4, 4).bfloat16(), torch.randn(2, 4).bfloat16()))
    assert str(refused.value) == (
        "ONNX runtimes have no bfloat16 kernels on CPU\n"
        "  where <root>  (input_1)\n"
        "  why   input_1 computes in bfloat16\n"
        "  do    model.float() before compile"
    )


class Slopes(nn.Module):
    """A bias of positions in bfloat16 inside a float32 model, with integers that bfloat16 rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([[0.3], [0.07]]))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + (self.slopes.bfloat16() * positions[:, None]).reshape(2, 2, -1).float()


def test_a_step_in_bfloat16_is_rounded_as_in_torch():
    x, positions = torch.randn(2, 2, 5), torch.tensor([[0, 1, 300, 777, 1001]] * 2)
    program = program_of(Slopes(), x, positions)
    assert any(n.meta["val"].dtype == torch.bfloat16 for n in program.graph.nodes if n.op == "call_function")
    assert error(program, [x, positions]) < 1e-6


class Turned(nn.Module):
    """Pairs of channels turned by constant angles, as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(5, 4), torch.rand(5, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.turns).flatten(-2)


def test_complex_constants_are_written_as_pairs():
    x = torch.randn(2, 5, 8)
    assert error(program_of(Turned(), x), [x]) < 1e-6


class Filled(nn.Module):
    """A mask with True or False put in where x is large, and numbers with -1 there."""

    def forward(self, x: Tensor) -> Tensor:
        small, large = x > 0, x > 1
        return small.masked_fill(large, False) * 2 + (x < 0).masked_fill(large, True) + x.masked_fill(large, -1)


def test_booleans_are_filled_under_a_mask():
    x = torch.randn(40)
    assert error(program_of(Filled(), x), [x]) == 0


class Less(nn.Module):
    """number - x."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return self.number - x


@pytest.mark.parametrize("number", [1.0, 2])
def test_a_number_less_integers_has_torchs_type(number):
    x = torch.tensor([[1, 0, 1], [0, 3, 1]])
    assert error(program_of(Less(number), x), [x]) == 0


def test_a_weight_that_is_not_finalised_is_refused_with_the_remedy():
    x = torch.randn(2, 4)
    program = program_of(nn.Linear(4, 4), x)
    edit, linear = Edit(program), next(n for n in program.graph.nodes if n.name == "linear")
    weight = linear.args[1]
    with edit.site(linear):
        grid = (edit.constant("s", torch.ones(4, 1), like=linear), None, "int8", [1, -1])
        codes = edit.insert(torch.ops.fxc.quantize.default, weight, *grid, like=linear)
        edit.replace(weight, edit.insert(torch.ops.fxc.dequantize.default, codes, *grid, like=linear))
    with pytest.raises(BackendRefusal) as refused:
        translate(program)
    assert str(refused.value) == (
        "weight is quantised but not finalised\n"
        "  where <root>  (quantize_default)\n"
        "  why   its codes would be computed at every call, from the float weight\n"
        "  do    - quant.finalize"
    )


def _not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(*_: object) -> None:
        raise AssertionError("run_decompositions was called")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", traced)
    module._SKELETONS.clear()


def test_a_familiar_graph_is_not_traced_again(monkeypatch):
    """The one trick that makes lowering fast."""
    program = zoo("llama")
    _not_traced(monkeypatch)
    translate(program)


def test_constants_are_shared_with_the_model():
    x = torch.randn(3, 64)
    program = program_of(nn.Linear(64, 64), x)
    weight = EXACT.lower(program).model.graph.initializers["weight"].const_value
    assert isinstance(weight, ir.tensor_adapters.TorchTensor)
    assert weight.raw.data_ptr() == program.constants["weight"].data_ptr()


FORMS = {
    "mean of all": lambda x: nn.functional.adaptive_avg_pool2d(x, 1),
    "means of windows": lambda x: nn.functional.adaptive_avg_pool2d(x, (3, 2)),
    "means along a line": lambda x: nn.functional.adaptive_avg_pool1d(x[0], 2),
    "windows that overlap": lambda x: nn.functional.adaptive_avg_pool2d(x, (4, 3)),
    "windows of one number": lambda x: nn.functional.adaptive_avg_pool2d(x, (12, 5)),
    "means of a volume": lambda x: nn.functional.adaptive_avg_pool3d(x, (2, 2, 1)),
    "one mean of a volume": lambda x: nn.functional.adaptive_avg_pool3d(x[None], 1),
    "windows of a volume": lambda x: nn.functional.adaptive_avg_pool3d(x, (3, 4, 1)),
    "differences": lambda x: x.diff(dim=2),
    "differences from the start": lambda x: x.diff(dim=1, prepend=x[:, :1] * 0),
    "differences twice": lambda x: x.diff(n=2),
    "outer product": lambda x: torch.outer(x[0, 0, 0], x[0, 1, :, 0]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    x = torch.randn(2, 3, 6, 4)
    assert error(program_of(Calls(FORMS[form]), x), (x,)) < LIMIT


@pytest.mark.parametrize("sizes", [(32, 32), (5, 3)], ids=str)
def test_adaptive_pools_are_not_decomposed(sizes, monkeypatch):
    """torch's decomposition of windows of different lengths takes minutes in a video model."""
    program = program_of(Calls(lambda x: nn.functional.adaptive_avg_pool2d(x, sizes)), torch.randn(2, 3, 8, 8))
    _not_traced(monkeypatch)
    translate(program)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_by_running_statistics(affine):
    norm = nn.BatchNorm2d(3, affine=affine, eps=1e-3)
    for value in norm.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5) if value.is_floating_point() else None
    x = torch.randn(2, 3, 4, 5)
    program = program_of(norm.eval(), x)
    assert error(program, (x,)) < LIMIT
    assert not affine or ops(program) == ["BatchNormalization"]


def test_torchs_own_table_is_built_once_and_never_changed(monkeypatch):
    """Each export adds its forms to a copy; what torch exports itself sees none of them."""
    built: list[int] = []
    own = ONNXRegistry.__dict__["from_torchlib"]
    counted = classmethod(lambda kind, *args, **options: built.append(1) or own.__func__(kind, *args, **options))
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", counted)
    program = function(lambda x: x.sin() * 2, torch.ones(2, 3))
    for _ in range(3):
        translate(program)
    assert len(built) == 1
    assert ONNXRegistry.__dict__["from_torchlib"] is counted
    for table in (ONNXRegistry.from_torchlib(), torchlib._built(counted, opset_version=18)):
        assert not any(form.is_custom for forms in table.functions.values() for form in forms)
