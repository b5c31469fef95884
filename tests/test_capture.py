"""Capture: the program gives the model's own numbers, on inputs and sizes it never saw, for real architectures; refusals say why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxcompress import Inputs
from fxcompress.capture import capture
from fxcompress.dynamic import at_sizes
from fxcompress.errors import CaptureError, InputError, raised_at
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.regions import regions
from fxcompress.verify import verify
from tests.passes.helpers import function, seeded, zoo
from tests.zoo import ZOO


class Residual(nn.Module):
    """x + W relu(x): one linear with everything a small test needs."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, scale=None, flag=False):
        y = x + self.linear(x.relu())
        return {"y": y * 2 if flag else y}


@pytest.fixture
def model() -> Residual:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO))
def test_real_architectures(name: str) -> None:
    model, example = ZOO[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program = capture(model, example)
    verify(program)
    assert not any(n.target._schema.is_mutable for n in program.graph.nodes if hasattr(n.target, "_schema"))
    assert program.symbols, "no dynamic axis: batch at least is expected"
    assert "batch" in program.symbols
    unseen = {s: low if low > 2 else 3 for s, (low, _) in program.symbols.items()}
    tensors = [_other_values(t) for t in program.example]
    tensors = at_sizes(tensors, [v.shape for v in program.inputs], unseen)
    wanted = model(**_rebuilt(program, tensors))
    got = program.signature.unflatten(run(program, tensors))
    assert type(got) is type(wanted)
    for a, b in zip(_tensors(wanted), _tensors(got), strict=True):
        assert relative_error(a, b) < 1e-4
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "capture changed the model"
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "unet2d_condition", "sam", "swin"])
def test_regions_cover_every_node_once(name: str) -> None:
    key = next(k for k in ZOO if k.lower().replace("-", "_").startswith(name[:4]))
    model, program = ZOO[key]()[0], zoo(key)
    root = regions(program)
    nodes = root.all_nodes()
    assert len(nodes) == len(set(nodes)) == len(program.graph.nodes) - 1
    paths = {path for path, _ in model.named_modules()}
    for region in root.walk():
        assert region.path in paths
        own = set(region.all_nodes())
        assert set(region.inputs) == {a for n in own for a in n.all_input_nodes} - own
        assert set(region.outputs) == {n for n in own if set(n.users) - own}


def test_names_trees_and_classes_survive(model: Residual) -> None:
    program = capture(model, (torch.randn(2, 4),))
    assert [v.name for v in program.inputs] == ["x"]
    assert [v.name for v in program.outputs] == ["y"]
    assert set(program.constants) == {"linear.weight", "linear.bias"}
    assert program.constants["linear.weight"].data_ptr() == model.linear.weight.data_ptr(), "weights are shared, not copied"
    x = torch.randn(5, 4)
    result = program.signature.unflatten(run(program, program.signature.flatten({"x": x})))
    assert list(result) == ["y"]
    assert torch.equal(result["y"], model(x)["y"])


def test_a_batch_of_one_is_not_baked_in(model: Residual) -> None:
    program = capture(model, (torch.randn(1, 4),))
    assert program.inputs[0].shape == ("batch", 4)
    assert program.symbols["batch"][0] == 1
    x = torch.randn(3, 4)
    assert torch.equal(run(program, [x])[0], model(x)["y"])


def test_dynamic_is_overridden(model: Residual) -> None:
    x = torch.randn(2, 7, 4)
    assert capture(model, (x,)).inputs[0].shape == ("batch", "x_1", 4)
    assert capture(model, (x,), dynamic=False).inputs[0].shape == (2, 7, 4)
    assert capture(model, (x,), dynamic={"x": [1]}).inputs[0].shape == (2, "x_1", 4)


def test_an_axis_the_code_fixes_is_fixed_and_reported() -> None:
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 3, 4) @ torch.ones(4, 2) if x.shape[1] == 12 else x

    program = capture(Fixed().eval(), (torch.randn(2, 12),))
    assert program.inputs[0].shape == ("batch", 12)
    assert program.notes == ("axis 1 of x is fixed to 12: the model's code depends on its size",)


def test_a_fixed_size_is_a_number_in_every_op() -> None:
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 3, 4).sum(1).sum() + torch.arange(x.shape[1]).float() + x

    program = capture(Fixed().eval(), (torch.randn(2, 12),))
    assert program.inputs[0].shape == ("batch", 12)
    assert [n.args for n in program.graph.nodes if n.target is torch.ops.aten.arange.default] == [(12,)]
    assert [n.args[1] for n in program.graph.nodes if n.target is torch.ops.aten.sym_size.int] == [0]


def test_asking_for_an_axis_the_code_fixes_is_an_error() -> None:
    class Fixed(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[1] == 12 else x

    with pytest.raises(CaptureError, match="can't be dynamic"):
        capture(Fixed().eval(), (torch.randn(2, 12),), dynamic={"x": [1]})


def test_views_are_captured_as_reshapes() -> None:
    """A view refuses operands that lie otherwise in memory, as after a rewrite they may."""

    class Views(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2).contiguous().view(x.shape[0], -1)

    program = capture(Views().eval(), (torch.randn(2, 3, 4),))
    names = [str(n.target) for n in program.graph.nodes]
    assert "aten.reshape.default" in names
    assert "aten.view.default" not in names


def test_tied_weights_are_one_constant() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    program = capture(Tied().eval(), (torch.randn(2, 3),))
    assert list(program.constants) == ["a.weight"]


@pytest.mark.parametrize("late_read", [False, True])
def test_in_place_ops_become_functional(late_read: bool) -> None:
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 2
            view = y.view(-1)
            y.add_(1).mul_(3)
            return (y + view.view_as(y) if late_read else y), x

    model = InPlace().eval()
    x = torch.randn(2, 3)
    program = capture(model, (x,))
    assert torch.equal(run(program, [x])[0], model(x)[0])


def _copied(x):
    y = x * 2
    y[:, 0] = x[:, 1]
    return y


def _added_to_a_slice(x):
    y = x * 2
    part = y[:, 1:]
    part[..., :2] += 1
    return y, part


def _twice_in_one_place(x):
    y = x.clone()
    whole = y[:, :2]
    y[:, 0] = 1.0
    first = whole.sum()
    y[0, 0] *= 3
    return first, whole, y


def _integers(x):
    n = x.long()
    n += (x > 0) * 2
    n[:, :1] = x[:, :1]
    return n


def _one_of_two_results(x):
    values, places = x.topk(2)
    values /= values.sum(-1, keepdim=True)
    return values, places


def _filled(x):
    y = torch.zeros_like(x)
    y[:, 1:3].fill_(2.5)
    y[1].copy_(x.sum())
    return y.relu_()


def _column_of_a_row(x):
    y = x + 0
    row = y[1:]
    column = row[:, 2]
    column.mul_(4)
    return row - y[:-1], column


def _twice_through_one_view(x):
    y = x * 2
    part = y[:, 1:]
    part += 1
    part.masked_fill_(x[:, 1:] > 3, 0.0)
    half = y[..., :2]
    half *= 2
    y[:, 0].add_(1).mul_(2)
    half += 1
    return y, part


def _written_after_it_was_copied(x):
    s = x * 2
    y = torch.zeros_like(x)
    y.copy_(s)
    y.masked_fill_(x > 3, 0.0)
    y += 1
    column = y[:, 0]
    column.copy_(y[:, 1])
    column += 1
    return y + s, s


def _given_back_by_dropout(x):
    y = x * 2
    z = nn.functional.dropout(y, 0.1, False)
    z.masked_fill_(x > 3, 0.0)
    return y + z


WRITES = (_copied, _added_to_a_slice, _twice_in_one_place, _integers, _one_of_two_results, _filled, _column_of_a_row)
WRITES += (_twice_through_one_view, _written_after_it_was_copied, _given_back_by_dropout)


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__.strip("_"))
def test_writes_to_slices_need_no_second_trace(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value that shares the memory is as in eager mode, whether it was taken before or after."""
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *_: pytest.fail("a second trace"))
    x = seeded(2, 4)
    program = function(forward, x)
    for given in (x, 9 * x):  # of the second some are so large that a write does something which did nothing before
        found, wanted = run(program, [given]), pytree.tree_leaves(forward(given.clone()))
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert not any(n.target._schema.is_mutable for n in program.graph.nodes if hasattr(n.target, "_schema"))


def _read_turned(x):
    y = x * 2
    turned = y.t()
    y[0] = 1.0
    return turned


def _squeezed(x):
    y = (x * 2).unsqueeze(1)
    y.squeeze_(1)
    return y.t_()


def _several_at_once(x):
    y, z = x * 2, x * 3
    torch._foreach_add_([y, z], 1.0)
    return y + z


@pytest.mark.parametrize("forward", [_read_turned, _squeezed, _several_at_once], ids=lambda f: f.__name__.strip("_"))
def test_memory_that_is_read_otherwise_takes_a_second_trace(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, real = list[int](), ExportedProgram.run_decompositions
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *given: (traced.append(1), real(*given))[1])
    x = seeded(2, 4)
    program = function(forward, x)
    assert all(torch.equal(run(program, [v])[0], forward(v.clone())) for v in (x, 9 * x)) and traced


def test_an_integer_written_in_place_keeps_its_dtype() -> None:
    class Ints(nn.Module):
        def forward(self, x):
            n = x.long() + 1
            n.div_(torch.tensor(2), rounding_mode="floor")
            return n

    model = Ints().eval()
    x = torch.randn(2, 3) * 5
    out = run(capture(model, (x,)), [x])[0]
    assert out.dtype == torch.int64
    assert torch.equal(out, model(x))


def test_call_with_another_constant_is_refused(model: Residual) -> None:
    signature = capture(model, (torch.randn(2, 4),)).signature
    with pytest.raises(InputError) as caught:
        signature.flatten(Inputs(torch.randn(2, 4), flag=True))
    assert str(caught.value) == (
        "argument 'flag' was not among the example inputs\n"
        "  why   the program was captured with flag=False; this call passes True\n"
        "  do    compile again with flag in example_inputs, or leave it out of the call"
    )
    assert len(signature.flatten(Inputs(torch.randn(2, 4), flag=False, scale=None))) == 1


def test_a_tensor_where_none_was_is_refused(model: Residual) -> None:
    signature = capture(model, {"x": torch.randn(2, 4), "scale": None}).signature
    with pytest.raises(InputError) as caught:
        signature.flatten({"x": torch.randn(2, 4), "scale": torch.ones(1)})
    assert str(caught.value) == (
        "argument 'scale' doesn't have the form it had at capture\n"
        "  why   captured with None, called with a float32 tensor of shape [1]\n"
        "  do    call it in the captured form (None stays None, constants keep their value), or compile again with these inputs"
    )


def test_train_mode_is_refused(model: Residual) -> None:
    model.linear.train()
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(2, 4),))
    assert str(caught.value) == "the model is in train mode\n  where linear\n  why   1 modules have training=True\n  do    model.eval()"


@pytest.mark.parametrize(("bad", "count"), [(math.nan, 1), (math.inf, 2)])
def test_weights_that_are_not_finite_are_refused(model: Residual, bad: float, count: int) -> None:
    with torch.no_grad():
        model.linear.weight[0, :count] = bad
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(2, 4),))
    assert str(caught.value) == (
        "a parameter holds NaN or infinity\n"
        "  where linear.weight\n"
        f"  why   {count} of 16 values are not finite\n"
        "  do    repair or reload the weights: every number after it would be wrong"
    )


def test_control_flow_on_data_is_refused_with_the_line() -> None:
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureError) as caught:
        capture(Branch().eval(), (torch.randn(2, 4),))
    assert caught.value.what == "torch.export can't follow the model"
    assert caught.value.where.startswith(f"{__file__}:")
    assert caught.value.why.startswith("what the code does there depends on numbers that only a call has: ")


def test_what_is_raised_in_an_installed_model_is_told_with_its_file() -> None:
    """Nor "<string>", code that torch makes while it traces."""
    file = f"{Path('site-packages') / 'zoo' / 'model.py'}"
    made: dict[str, Any] = {"nn": nn}
    exec(compile("class Listed(nn.Module):\n    def forward(self, x):\n        return x * len({x.sum().long().item(), 1})", file, "exec"), made)
    with pytest.raises(CaptureError) as caught:
        capture(made["Listed"]().eval(), (torch.randn(2, 4),))
    assert caught.value.where == f"{file}:3"
    assert caught.value.do.startswith("rewrite what it names so that it also runs on tensors without numbers")


class Padded(nn.Module):
    """A convolution that pads by what it computes from its stride and kernel size, kept as buffers, as audio codecs do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 5, stride=2)
        self.register_buffer("kernel_size", torch.tensor(5), persistent=False)
        self.register_buffer("stride", torch.tensor(2), persistent=False)

    def forward(self, x):
        left = self.kernel_size - self.stride
        extra = (torch.ceil((x.shape[-1] - self.kernel_size + left) / self.stride) * self.stride).to(torch.int64) - x.shape[-1] + left
        return self.conv(nn.functional.pad(x, (int(left), int(extra) if extra > 0 else 0), mode="reflect"))


def test_sizes_kept_as_tensors_decide_shapes() -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 2, 15)
    program = capture(model, (x,))
    assert relative_error(model(x), run(program, [x])[0]) == 0
    assert list(model.__dict__["_buffers"]) == ["kernel_size", "stride"] and "stride" not in model.__dict__


def test_random_numbers_are_refused() -> None:
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    with pytest.raises(CaptureError, match="other numbers each time"):
        capture(Noise().eval(), (torch.randn(2, 4),))


def test_buffers_written_by_forward_are_refused() -> None:
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return x + self.count

    with pytest.raises(CaptureError):
        capture(Counter().eval(), (torch.randn(2, 4),))


@pytest.mark.parametrize("thing", [3, {"a": 1}, torch.randn(2), lambda x: x])
def test_what_is_no_model_is_refused(thing: object) -> None:
    with pytest.raises(CaptureError, match="not a model"):
        capture(thing, (torch.randn(2),))


def test_inputs_that_do_not_bind_are_refused(model: Residual) -> None:
    with pytest.raises(InputError) as caught:
        capture(model, {"x": torch.randn(2, 4), "scael": None})
    assert str(caught.value) == (
        "the inputs don't fit the model's forward\n"
        "  why   got an unexpected keyword argument 'scael'; did you mean 'scale'?\n"
        "  do    forward takes (x, scale, flag)"
    )


def test_a_model_that_fails_on_its_example_is_refused(model: Residual) -> None:
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        capture(model, (torch.randn(2, 5),))


class Fails(nn.Module):
    """In what it calls."""

    def forward(self, x):
        return x + len(json.loads("{no json}"))


def test_an_exception_of_the_model_is_told_with_its_line() -> None:
    """Not that of the library in which it was raised, nor of what called the model."""
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    number, code = next((i, line.strip()) for i, line in enumerate(source, 1) if line.strip().startswith("return x + len(json"))
    with pytest.raises(CaptureError, match="the model fails on the example inputs") as caught:
        capture(Fails().eval(), (torch.randn(2, 4),))
    assert caught.value.where == f"{__file__}:{number}  {code}"
    assert caught.value.why.startswith("JSONDecodeError: ")
    assert raised_at(ValueError("never raised")) == ""


def test_an_exported_program_is_captured(model: Residual) -> None:
    exported = torch.export.export(model, (torch.randn(2, 4),), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    program = capture(exported, (torch.randn(2, 4),))
    x = torch.randn(5, 4)
    assert program.inputs[0].shape == ("batch", 4)
    assert torch.equal(run(program, [x])[0], model(x)["y"])


def _other_values(tensor: torch.Tensor) -> torch.Tensor:
    """Other legal values: floats move, integers and booleans are permuted along the last axis."""
    return tensor * 0.9 + 0.05 if tensor.is_floating_point() else tensor.roll(1, -1) if tensor.dim() else tensor


def _rebuilt(program, tensors):
    import torch.utils._pytree as pytree

    from fxcompress.signature import INPUT

    values = iter(tensors)
    given = pytree.tree_unflatten([next(values) if leaf is INPUT else leaf for leaf in program.signature.leaves], program.signature.spec)
    return {**given, **program.signature.fixed}


def _tensors(value):
    import torch.utils._pytree as pytree

    return [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Minus(nn.Module):
        def forward(self, x, y):
            return x * 2 - y

    x = torch.randn(2, 3)
    program = capture(Minus().eval(), (x, x))
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(run(program, [a, b])[0], a * 2 - b)


def test_a_size_given_back_as_a_number_fixes_that_size() -> None:
    class Counts(nn.Module):
        def forward(self, x):
            return x * 2, x.shape[0], "rows"

    program = capture(Counts().eval(), (torch.randn(2, 3),))
    assert program.inputs[0].shape == (2, 3)
    assert (
        "batch can't be dynamic: [3, 'rows'] against [2, 'rows'] on sizes {'batch': 3}: it would be a constant of the program" in program.notes
    )


def test_hooks_see_the_call_as_the_user_makes_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(2, 4)
    assert torch.equal(run(capture(model, (x,)), [x])[0], model(x))


class Sparse(nn.Module):
    """A sparse weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.eye(4).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.w, x.t())


REFUSED = {
    "sparse weight": (
        Sparse(),
        (torch.randn(2, 4),),
        CaptureError,
        "the model has a sparse weight\n  where w\n  why   its layout is torch.sparse_coo\n  do    weight.to_dense()",
    ),
    "lazy weight": (
        nn.LazyLinear(4),
        (torch.randn(2, 4),),
        CaptureError,
        "a parameter has no values\n  where weight\n  why   it is lazy and was never set\n  do    run the model once",
    ),
    "sparse input": (
        nn.Identity(),
        (torch.eye(4).to_sparse(),),
        InputError,
        "example input 'input' can't be used\n  why   its layout is torch.sparse_coo\n  do    pass a dense tensor",
    ),
    "no entries": (
        nn.Linear(4, 4),
        (torch.randn(0, 4),),
        InputError,
        "example input 'input' is empty\n  why   its shape is [0, 4]\n  do    pass at least one entry on each axis",
    ),
}


@pytest.mark.parametrize(("model", "example", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_program_is_refused(model: nn.Module, example: object, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        capture(model.eval(), example)
    assert str(caught.value) == text


class Widths(nn.Module):
    """What a table has for the widths of boxes: their corners have to stay in order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, boxes: Any) -> Any:
        return self.table(boxes[:, :, 2] - boxes[:, :, 0]) + self.table(boxes[:, :, 3] - boxes[:, :, 1])


@pytest.mark.parametrize("batch", [1, 2])
def test_examples_of_other_sizes_keep_boxes_whole(batch: int) -> None:
    start = torch.arange(batch * 7).reshape(batch, 7) % 5
    program = capture(Widths().eval(), (torch.stack([start, start, start + 2, start + 2 + start % 3], -1),))
    assert program.inputs[0].shape[:2] == ("batch", "boxes_1")


class Halved(nn.Module):
    """Takes its halves from two tuples, and writes them into memory that nobody has written yet."""

    def forward(self, x):
        whole = x.new_empty(x.shape)
        whole[..., :2], whole[..., 2:] = x.chunk(2, -1)[1], torch.concatenate([x.chunk(2, -1)[0]], -1)
        return whole + torch.empty_like(x).copy_(x)


def test_a_value_is_split_once_and_all_memory_has_numbers():
    x = torch.randn(3, 4)
    program = capture(Halved().eval(), (x,))
    targets = [str(n.target) for n in program.graph.nodes]
    assert sum("chunk" in t or "split" in t for t in targets) == 1
    assert not any("empty" in t or "concatenate" in t for t in targets)
    assert torch.equal(run(program, (x,))[0], torch.cat([x[:, 2:], x[:, :2]], -1) + x)
