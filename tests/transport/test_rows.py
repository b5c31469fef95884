"""Every row of the op table, alone: whatever lands is exact, and exactly the kinds land that the table says.

Each row is a program of one op. Seeds go on every value and every pair of axes, inputs and outputs are free to change, and the changed op on
the changed operands must give the changed result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.program import Program
from fxcompress.transport import FLIPS, Kind, Plan, Seed, Transport
from fxcompress.transport.apply import WITH_TENSOR
from tests.passes.helpers import Builder, seeded
from tests.transport.helpers import LIMIT, vector_for

aten = torch.ops.aten
F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return seeded(*shape, seed=seed, dtype=F64)


def positive(*shape: int) -> Tensor:
    return rand(*shape).abs() + 0.5


class Row:
    """One op on operands: tensors are inputs, or constants where `constants` says so; lists of them lists. first: the only result read."""

    def __init__(self, target: Any, *args: Any, lands: str, constants: tuple[int, ...] = (), first: bool = False, **kwargs: Any) -> None:
        self.target, self.args, self.lands, self.constants, self.first, self.kwargs = target, args, lands.split(), constants, first, kwargs

    def program(self) -> Program:
        operands = {
            f"x{i}_{j}": t for i, a in enumerate(self.args) for j, t in enumerate(a if isinstance(a, list) else [a]) if isinstance(t, Tensor)
        }
        inputs = {k: t for k, t in operands.items() if int(k[1]) not in self.constants}
        built = Builder(anchor=rand(1), **inputs)
        nodes = {k: built.nodes[k] if k in inputs else built.constant(k, t) for k, t in operands.items()}
        args = [self._argument(i, a, nodes) for i, a in enumerate(self.args)]
        out = built.op(self.target, *args, kwargs=self.kwargs)
        value = out.meta["val"]
        if isinstance(value, tuple | list):
            return built.program(*(built.op(getitem, out, i) for i in range(1 if self.first else len(value))))
        return built.program(out)

    def _argument(self, number: int, value: Any, nodes: dict[str, fx.Node]) -> Any:
        if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
            return [nodes[f"x{number}_{j}"] if isinstance(v, Tensor) else v for j, v in enumerate(value)]
        return nodes[f"x{number}_0"] if isinstance(value, Tensor) else value


X, Y = rand(2, 3, 4), rand(2, 3, 4, seed=1)
IMAGE = rand(2, 4, 5, 5)
GRID = rand(2, 3, 3, 2, seed=2) / 2
EVERY = "scale sign shift permute rotate remove"
DIAGONAL = "scale sign shift"
MOVES = "permute remove"

ROWS: dict[str, Row] = {
    "view": Row(aten.view.default, rand(2, 3, 8), [2, 3, 2, 4], lands=EVERY),
    "view merges": Row(aten.view.default, rand(2, 3, 4), [6, 4], lands=EVERY),
    "flatten": Row(aten.flatten.using_ints, X, 1, lands=EVERY),
    "unflatten": Row(aten.unflatten.int, rand(2, 6), 1, [2, 3], lands=EVERY),
    "transpose": Row(aten.transpose.int, X, 1, 2, lands=EVERY),
    "permute": Row(aten.permute.default, X, [2, 0, 1], lands=EVERY),
    "t": Row(aten.t.default, rand(3, 4), lands=EVERY),
    "unsqueeze": Row(aten.unsqueeze.default, X, 1, lands=EVERY),
    "squeeze": Row(aten.squeeze.dim, rand(2, 1, 4), 1, lands=EVERY),
    "expand": Row(aten.expand.default, rand(2, 1, 4), [2, 3, 4], lands=EVERY),
    "slice": Row(aten.slice.Tensor, X, 2, 1, 3, lands=EVERY),
    "select": Row(aten.select.int, X, 1, 2, lands=EVERY),
    "cat": Row(aten.cat.default, [X, Y], 2, lands=EVERY),
    "cat other axis": Row(aten.cat.default, [X, Y], 1, lands=EVERY),
    "cat with nothing": Row(aten.cat.default, [torch.empty(0, dtype=F64), X], 2, constants=(0,), lands=EVERY),
    "stack": Row(aten.stack.default, [X, Y], 1, lands=EVERY),
    "split": Row(aten.split.Tensor, X, 2, 2, lands=EVERY),
    "chunk": Row(aten.chunk.default, X, 2, 2, lands=EVERY),
    "tensor_split at indices": Row(aten.tensor_split.indices, X, [1, 3], 2, lands=EVERY),
    "unbind": Row(aten.unbind.int, X, 1, lands=EVERY),
    "roll": Row(aten.roll.default, X, [1, 1], [1, 2], lands="scale sign shift permute rotate remove"),
    "flip": Row(aten.flip.default, X, [2], lands=EVERY),
    "repeat": Row(aten.repeat.default, X, [1, 2, 1], lands=EVERY),
    "repeat_interleave": Row(aten.repeat_interleave.self_int, X, 2, 1, lands=EVERY),
    "index_select": Row(aten.index_select.default, X, 2, torch.tensor([0, 2, 2]), constants=(2,), lands=EVERY),
    "pad": Row(aten.constant_pad_nd.default, X, [1, 2], lands="scale sign permute rotate remove"),
    "slice_scatter": Row(aten.slice_scatter.default, X, rand(2, 2, 4), 1, 0, 2, lands=EVERY),
    "select_scatter": Row(aten.select_scatter.default, X, rand(2, 4), 1, 1, lands=EVERY),
    "to": Row(aten.clone.default, X, lands=EVERY),
    "type_as": Row(aten.type_as.default, X, rand(2, 3, 4), lands=EVERY),
    "to other": Row(aten.to.other, X, rand(2, 3, 4), lands=EVERY),
    "reshape_as": Row(aten.reshape_as.default, X, rand(2, 12), lands=EVERY),
    "expand_as": Row(aten.expand_as.default, rand(2, 1, 4), Y, lands=EVERY),
    "neg": Row(aten.neg.default, X, lands=EVERY),
    "relu": Row(aten.relu.default, X, lands="scale permute remove"),
    "abs": Row(aten.abs.default, X, lands="scale sign permute remove"),
    "tanh": Row(aten.tanh.default, X, lands="sign permute remove"),
    "cos": Row(aten.cos.default, X, lands="sign permute remove"),
    "silu": Row(aten.silu.default, X, lands=MOVES),
    "sqrt": Row(aten.sqrt.default, positive(2, 3, 4), lands="scale permute remove"),
    "rsqrt": Row(aten.rsqrt.default, positive(2, 3, 4), lands="scale permute remove"),
    "reciprocal": Row(aten.reciprocal.default, positive(2, 3, 4), lands="scale sign permute remove"),
    "pow 3": Row(aten.pow.Tensor_Scalar, X, 3, lands="scale sign permute remove"),
    "pow 2": Row(aten.pow.Tensor_Scalar, X, 2, lands="scale sign permute remove"),
    "square": Row(aten.square.default, X, lands="scale sign permute remove"),
    "mul number": Row(aten.mul.Tensor, X, 3.0, lands=EVERY),
    "div number": Row(aten.div.Tensor, X, 3.0, lands=EVERY),
    "mul": Row(aten.mul.Tensor, X, Y, lands="scale sign permute remove"),
    "mul constant": Row(aten.mul.Tensor, X, rand(4), constants=(1,), lands="scale sign permute rotate remove"),
    "mul uniform": Row(aten.mul.Tensor, X, torch.full((4,), 3.0, dtype=F64), constants=(1,), lands="scale sign permute rotate remove"),
    "mul narrow": Row(aten.mul.Tensor, X, rand(2, 3, 1), lands="scale sign permute rotate remove"),
    "div": Row(aten.div.Tensor, X, positive(2, 3, 4), lands="scale sign permute remove"),
    "add": Row(aten.add.Tensor, X, Y, lands=EVERY),
    "add narrow": Row(aten.add.Tensor, X, rand(4), constants=(1,), lands=EVERY),
    "add number": Row(aten.add.Tensor, X, 2.0, lands="scale sign shift permute rotate remove"),
    "sub": Row(aten.sub.Tensor, X, Y, lands=EVERY),
    "rsub alpha": Row(aten.rsub.Scalar, X, 1.0, 2.0, lands="scale sign shift permute rotate remove"),
    "rsub": Row(aten.rsub.Scalar, X, 1.0, lands="scale sign shift permute rotate remove"),
    "where": Row(aten.where.self, rand(2, 3, 1) > 0, X, Y, lands="scale sign shift permute rotate remove"),
    "where by channel": Row(aten.where.self, rand(2, 3, 4) > 0, X, Y, lands="scale sign shift permute remove"),
    "where zero": Row(aten.where.ScalarOther, rand(2, 3, 1) > 0, X, 0.0, lands="scale sign permute rotate remove"),
    "masked_fill": Row(aten.masked_fill.Scalar, X, rand(2, 3, 1) > 0, -torch.inf, lands="scale shift permute remove"),
    "maximum": Row(aten.maximum.default, X, Y, lands="scale shift permute remove"),
    "clamp": Row(aten.clamp.default, X, -1.0, 1.0, lands=MOVES),
    "clamp_min 0": Row(aten.clamp_min.default, X, 0, lands="scale permute remove"),
    "prelu": Row(aten.prelu.default, rand(2, 3, 4), rand(3).abs(), constants=(1,), lands="scale permute remove"),
    "lt": Row(aten.lt.Scalar, X, 0.5, lands=MOVES),
    "linear": Row(aten.linear.default, X, rand(5, 4), rand(5), constants=(1, 2), lands=EVERY),
    "linear no bias": Row(aten.linear.default, X, rand(5, 4), constants=(1,), lands=EVERY),
    "addmm": Row(aten.addmm.default, rand(5), rand(3, 4), rand(4, 5), constants=(0, 2), lands=EVERY),
    "mm": Row(aten.mm.default, rand(3, 4), rand(4, 5), constants=(1,), lands=EVERY),
    "matmul": Row(aten.matmul.default, rand(2, 2, 3, 4), rand(2, 2, 4, 5), lands="scale sign permute rotate remove"),
    "bmm": Row(aten.bmm.default, rand(2, 3, 4), rand(2, 4, 5), lands="scale sign permute rotate remove"),
    "outer": Row(aten.outer.default, rand(3), rand(4), lands="scale sign permute rotate remove"),
    "einsum": Row(aten.einsum.default, "bhqc,rkc->bhqrk", [rand(2, 2, 3, 4), rand(3, 5, 4)], lands="scale sign permute rotate remove"),
    "einsum ellipsis": Row(
        aten.einsum.default, "...qc,...kc->...qk", [rand(2, 2, 3, 4), rand(2, 5, 4)], lands="scale sign permute rotate remove"
    ),
    "einsum without a result": Row(aten.einsum.default, "...ac,bc", [rand(2, 3, 4), rand(5, 4)], lands="scale sign permute rotate remove"),
    "einsum of three": Row(
        aten.einsum.default, "ac,bc,dc->abd", [rand(3, 4), rand(2, 4), rand(5, 4)], lands="scale sign permute rotate remove"
    ),
    "einsum in a row": Row(
        aten.einsum.default, "bqk,bkd,dh->bqh", [rand(2, 3, 3), rand(2, 3, 4), rand(4, 5)], lands="scale sign permute rotate remove"
    ),
    "einsum of a letter twice": Row(aten.einsum.default, "aa,ab->ab", [rand(3, 3), rand(3, 4)], lands=""),
    "einsum of one": Row(aten.einsum.default, "nhwc->nchw", [rand(2, 3, 3, 4)], lands=EVERY),
    "conv2d": Row(aten.conv2d.default, IMAGE, rand(6, 4, 3, 3), rand(6), constants=(1, 2), lands=EVERY),
    "conv2d padded": Row(aten.conv2d.default, IMAGE, rand(6, 4, 3, 3), rand(6), [1, 1], [1, 1], constants=(1, 2), lands=EVERY),
    "conv2d grouped": Row(aten.conv2d.default, IMAGE, rand(6, 2, 3, 3), rand(6), [1, 1], [0, 0], [1, 1], 2, constants=(1, 2), lands=EVERY),
    "conv2d depthwise": Row(
        aten.conv2d.default,
        IMAGE,
        rand(4, 1, 3, 3),
        rand(4),
        [1, 1],
        [0, 0],
        [1, 1],
        4,
        constants=(1, 2),
        lands="scale sign shift permute remove",
    ),
    "conv1d": Row(aten.conv1d.default, rand(2, 4, 7), rand(6, 4, 3), constants=(1,), lands=EVERY),
    "conv3d": Row(aten.conv3d.default, rand(1, 2, 3, 3, 3), rand(3, 2, 2, 2, 2), constants=(1,), lands=EVERY),
    "conv_transpose2d": Row(aten.conv_transpose2d.input, IMAGE, rand(4, 6, 2, 2), rand(6), [2, 2], constants=(1, 2), lands=EVERY),
    "conv_transpose2d grouped": Row(
        aten.conv_transpose2d.input, IMAGE, rand(4, 3, 2, 2), rand(6), [2, 2], [0, 0], [0, 0], 2, constants=(1, 2), lands=EVERY
    ),
    "sdpa": Row(aten.scaled_dot_product_attention.default, rand(2, 2, 3, 4), rand(2, 2, 5, 4), rand(2, 2, 5, 4, seed=1), lands=EVERY),
    "sdpa gqa": Row(
        aten.scaled_dot_product_attention.default,
        rand(2, 4, 3, 4),
        rand(2, 2, 5, 4),
        rand(2, 2, 5, 4, seed=1),
        None,
        0.0,
        False,
        scale=0.3,
        enable_gqa=True,
        lands=EVERY,
    ),
    "topk": Row(aten.topk.default, X, 2, -1, lands="scale shift permute remove"),
    "sort": Row(aten.sort.default, X, 1, lands="scale shift permute remove"),
    "max of axis": Row(aten.max.dim, X, 1, lands="scale shift permute remove"),
    "amax": Row(aten.amax.default, X, [-1], True, lands="scale shift permute remove"),
    "gather": Row(aten.gather.default, X, 1, torch.tensor([[2, 0]] * 2)[..., None].repeat(1, 1, 4), lands="scale sign shift permute remove"),
    "index_add": Row(aten.index_add.default, rand(5, 4), 0, torch.tensor([0, 2]), rand(2, 4, seed=1), lands="scale sign permute rotate remove"),
    "softmax": Row(aten.softmax.int, X, -1, lands="shift permute remove"),
    "mean": Row(aten.mean.dim, X, [-1], True, lands="scale sign shift permute rotate remove"),
    "sum": Row(aten.sum.dim_IntList, X, [1], lands="scale sign shift permute rotate remove"),
    "vector_norm": Row(aten.linalg_vector_norm.default, X, 2, [-1], True, lands="scale sign permute rotate remove"),
    "cumsum": Row(aten.cumsum.default, X, 1, lands="scale sign permute rotate remove"),
    "avg_pool2d": Row(aten.avg_pool2d.default, IMAGE, [2, 2], lands=EVERY),
    "max_pool2d": Row(aten.max_pool2d.default, IMAGE, [2, 2], lands="scale shift permute remove"),
    "adaptive_avg_pool2d": Row(aten.adaptive_avg_pool2d.default, IMAGE, [1, 1], lands=EVERY),
    "upsample": Row(aten.upsample_nearest2d.vec, IMAGE, None, [2.0, 2.0], lands=EVERY),
    "upsample exactly": Row(aten._upsample_nearest_exact2d.vec, IMAGE, None, [2.0, 2.0], lands=EVERY),
    "upsample to a size": Row(aten.upsample_nearest2d.default, IMAGE, [7, 7], lands=EVERY),
    "upsample without aliases": Row(aten._upsample_bicubic2d_aa.vec, IMAGE, [3, 3], False, None, lands=EVERY),
    "upsample a volume": Row(aten.upsample_trilinear3d.vec, rand(1, 4, 2, 2, 2), None, False, [2.0] * 3, lands=EVERY),
    "adaptive_max_pool2d": Row(aten.adaptive_max_pool2d.default, IMAGE, [2, 2], lands="scale shift permute remove", first=True),
    "grid_sampler": Row(aten.grid_sampler.default, IMAGE, GRID, 0, 0, False, lands="scale sign permute rotate remove"),
    "grid_sampler to the border": Row(aten.grid_sampler.default, IMAGE, GRID, 2, 1, False, lands=EVERY),
    "layer_norm": Row(aten.layer_norm.default, X, [4], positive(4), rand(4), constants=(2, 3), lands=f"{DIAGONAL} {MOVES}"),
    "layer_norm even": Row(aten.layer_norm.default, X, [4], torch.full((4,), 2.0, dtype=F64), rand(4), constants=(2, 3), lands=EVERY),
    "layer_norm plain": Row(aten.layer_norm.default, X, [4], lands=EVERY),
    "native_layer_norm": Row(
        aten.native_layer_norm.default, X, [4], positive(4), rand(4), 1e-5, constants=(2, 3), first=True, lands=f"{DIAGONAL} {MOVES}"
    ),
    "native_layer_norm plain": Row(aten.native_layer_norm.default, X, [4], None, None, 1e-5, first=True, lands=f"{MOVES} rotate"),
    "native_group_norm": Row(
        aten.native_group_norm.default,
        IMAGE,
        positive(4),
        rand(4),
        2,
        4,
        25,
        2,
        1e-5,
        constants=(1, 2),
        first=True,
        lands="scale sign shift permute",
    ),
    "native_group_norm plain": Row(aten.native_group_norm.default, IMAGE, None, None, 2, 4, 25, 2, 1e-5, first=True, lands="permute"),
    "var": Row(aten.var.correction, X, [-1], correction=0, keepdim=True, lands=EVERY),
    "var all": Row(aten.var.correction, X, None, correction=0, lands="permute rotate"),
    "std": Row(aten.std.correction, X, [1], correction=1, lands=EVERY),
    "var_mean": Row(aten.var_mean.correction, X, [-1], correction=0, keepdim=True, lands=EVERY),
    "rms_norm": Row(aten.rms_norm.default, X, [4], positive(4), 1e-6, constants=(2,), lands=f"scale sign {MOVES}"),
    "rms_norm plain": Row(aten.rms_norm.default, X, [4], None, 1e-6, lands=f"scale sign {MOVES} rotate"),
    "group_norm": Row(aten.group_norm.default, IMAGE, 2, positive(4), rand(4), constants=(2, 3), lands="scale sign shift permute"),
    "batch_norm": Row(
        aten.batch_norm.default,
        IMAGE,
        positive(4),
        rand(4),
        rand(4),
        positive(4),
        False,
        0.1,
        1e-5,
        False,
        constants=(1, 2, 3, 4),
        lands="scale sign shift permute remove",
    ),
    "batch_norm plain": Row(
        aten.batch_norm.default,
        IMAGE,
        None,
        None,
        rand(4),
        positive(4),
        False,
        0.1,
        1e-5,
        False,
        constants=(3, 4),
        lands="scale sign shift permute remove",
    ),
    "embedding": Row(aten.embedding.default, rand(7, 4), torch.tensor([[1, 2], [0, 6]]), constants=(0,), lands=EVERY),
    "index": Row(aten.index.Tensor, X, [None, torch.tensor([0, 2])], lands=EVERY),
    "index constant": Row(aten.index.Tensor, X, [None, None, torch.tensor([2, 0, -3])], constants=(1,), lands=EVERY),
    "index one": Row(aten.index.Tensor, X, [None, torch.tensor(-1)], constants=(1,), lands=EVERY),
    "baddbmm": Row(aten.baddbmm.default, rand(2, 3, 5), rand(2, 3, 4), rand(2, 4, 5), lands=EVERY, beta=0.5, alpha=3.0),
    "baddbmm narrow": Row(aten.baddbmm.default, rand(2, 1, 5), rand(2, 3, 4), rand(2, 4, 5), lands=EVERY),
    "index_put": Row(aten.index_put.default, rand(5, 4), [torch.tensor([0, 2])], rand(2, 4), lands=EVERY),
    "pixel_shuffle": Row(aten.pixel_shuffle.default, rand(2, 8, 3, 2), 2, lands=EVERY),
    "pixel_unshuffle": Row(aten.pixel_unshuffle.default, rand(2, 2, 4, 6), 2, lands=EVERY),
    "zeros_like": Row(aten.zeros_like.default, X, lands=EVERY),
    "ones_like": Row(aten.ones_like.default, X, lands=EVERY),
    "new_zeros": Row(aten.new_zeros.default, X, [2, 3, 4], lands=EVERY),
    "new_full": Row(aten.new_full.default, X, [2, 3, 4], 2.5, lands=EVERY),
    "full_like": Row(aten.full_like.default, X, 2.5, lands=EVERY),
    "repeat in front": Row(aten.repeat.default, X, [2, 1, 1, 2], lands=EVERY),
    "bitwise": Row(aten.bitwise_not.default, torch.tensor([[1, 2], [3, 4]]), lands=""),
    "sin": Row(aten.sin.default, X, lands="sign permute remove"),
    "exp": Row(aten.exp.default, X, lands=MOVES),
    "maximum of number": Row(aten.fmod.Scalar, X, 2.0, lands=MOVES),
    "copy": Row(aten.copy.default, X, Y, lands=EVERY),
    "view_as_complex": Row(aten.view_as_complex.default, rand(2, 3, 2), lands="scale sign permute remove"),
}


def seeds(program: Program) -> Iterator[Seed]:
    """Every float value, every axis and every pair of axes that has more than one position."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node.name == "anchor" or not (value.is_floating_point() or value.is_complex()):
            continue
        axes = [a for a, n in enumerate(value.shape) if n > 1]
        for chosen in (*itertools.combinations(axes, 1), *itertools.combinations(axes, 2)):
            yield Seed(node, chosen)


def deviation(program: Program, plan: Plan, vector: Any) -> float:
    """How far the changed op on changed operands is from the changed result."""
    if plan.kind == Kind.REMOVE:
        return without(program, plan, vector)
    return changed(program, plan, vector, program.example)


def without(program: Program, plan: Plan, keep: Any) -> float:
    """The same where the channels that go are null on every input and constant."""
    stays = plan.numbers(keep)

    def nulled(node: fx.Node, x: Tensor) -> Tensor:
        for label in plan.values.get(node, ()):
            x = x * torch.from_numpy(stays[label.index])
        return x

    saved = dict(program.constants)
    for node in program.graph.find_nodes(op="get_attr"):
        program.constants[node.target] = nulled(node, program.constants[node.target])
    try:
        return changed(program, plan, keep, [nulled(n, x) for n, x in zip(program.placeholders(), program.example, strict=True)])
    finally:
        program.constants.clear()
        program.constants.update(saved)


def changed(program: Program, plan: Plan, vector: Any, example: Sequence[Tensor]) -> float:
    before = run(program, example)
    changes = plan.changes(vector)
    inputs = [changes.get(n, same)(x).contiguous() for n, x in zip(program.placeholders(), example, strict=True)]
    wanted = [changes.get(n, same)(x) for n, x in zip(program.results(), before, strict=True)]
    edit = Edit(program)
    plan.apply(edit, vector)
    after = run(program, inputs)
    edit.rollback()
    return max(relative_error(a, b) for a, b in zip(wanted, after, strict=True))


def same(x: Tensor) -> Tensor:
    return x


ITSELF = {
    aten.mul.Tensor: "scale sign permute remove",
    aten.add.Tensor: EVERY,
    aten.sub.Tensor: EVERY,
    aten.div.Tensor: "scale sign permute remove",
}


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("op", list(ITSELF), ids=str)
def test_an_op_on_one_value_twice(op: Any, kind: Kind) -> None:
    built = Builder(anchor=rand(1), x=rand(3, 4))
    program = built.program(built.op(op, built.x, built.x))
    assert bool(landings(program, kind)) == (kind in ITSELF[op].split())


@pytest.mark.parametrize("kind", [Kind.SCALE, Kind.SHIFT])
def test_two_plans_meet_in_one_filled_value(kind: Kind) -> None:
    """The number becomes a vector with the first and another one with the second."""
    built = Builder(anchor=rand(1), x=rand(2, 3, 4))
    node = built.op(aten.full_like.default, built.x, 2.5)
    program = built.program(node)
    plans = [Transport(program).solve(kind, Seed(node, (axis,)), is_open=True) for axis in (1, 2)]
    vectors, edit = [vector_for(plan, seed) for seed, plan in enumerate(plans)], Edit(program)
    for plan, vector in zip(plans, vectors, strict=True):
        plan.apply(edit, vector)
    (after,) = run(program, program.example)
    down, along = vectors[0].view(-1, 1), vectors[1]
    assert torch.allclose(after, (2.5 * down * along if kind == Kind.SCALE else 2.5 + down + along).expand(2, 3, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("row", [pytest.param(r, id=i) for i, r in ROWS.items()])
def test_row(row: Row, kind: Kind) -> None:
    assert bool(landings(row.program(), kind)) == (kind in row.lands)


NUMBERS = (*((op, (2.0,)) for op in WITH_TENSOR), *((op, (1.5, 2.0)) for op in (aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)))


@pytest.mark.parametrize("route", list(FLIPS))
@pytest.mark.parametrize(("op", "operands"), [*NUMBERS, *((WITH_TENSOR[op], operands) for op, operands in NUMBERS[:2])], ids=str)
def test_a_number_may_carry_the_change(op: Any, operands: tuple[float, ...], route: str) -> None:
    """Whatever the route, what lands is exact: a number that is to change becomes a vector."""
    built = Builder(anchor=rand(1), x=rand(3, 4))
    node = built.op(op, built.x, *operands)
    program = built.program(node)
    plans = [
        Transport(program).solve(kind, Seed(at), choices={node: route}, is_open=True)
        for kind, at in itertools.product((Kind.SCALE, Kind.SHIFT), (built.x, node))
    ]
    assert any(plan.count for plan in plans)
    for plan in plans:
        assert deviation(program, plan, vector_for(plan)) < LIMIT if plan.count else plan.reason()


def landings(program: Program, kind: Kind) -> int:
    """How many seeds give a change, each of them exact."""
    engine, count = Transport(program), 0
    for number, seed in enumerate(seeds(program)):
        plan = engine.solve(kind, seed, is_open=True)
        if not plan.count or (kind.is_mixing and plan.count == len(set(plan.blocks.tolist()))):
            continue
        try:
            assert deviation(program, plan, vector_for(plan, number)) < LIMIT, f"{seed.node.name} axes {seed.axes}"
        except ValueError as refusal:
            assert kind == Kind.REMOVE, refusal
            continue
        count += 1
    return count


@pytest.mark.parametrize("op", [aten.type_as.default, aten.to.other, aten.expand_as.default, aten.reshape_as.default], ids=str)
def test_what_lends_its_form_only_carries_nothing(op: Any) -> None:
    """A program's input may lend: it doesn't change."""
    built = Builder(x=rand(3, 4), lender=rand(3, 4))
    inner = built.op(aten.linear.default, built.x, built.constant("w", rand(4, 4)))
    cast = built.op(op, inner, built.lender)
    program = built.program(built.op(aten.linear.default, cast, built.constant("v", rand(2, 4))))
    for kind in (Kind.SCALE, Kind.SIGN, Kind.SHIFT, Kind.PERMUTE, Kind.ROTATE):
        assert Transport(program).solve(kind, Seed(cast)).is_whole


@pytest.mark.parametrize("kind", list(Kind))
def test_a_norm_that_hands_out_its_statistics_stops(kind: Kind) -> None:
    built = Builder(anchor=rand(1), x=rand(3, 4))
    norm = built.op(aten.native_layer_norm.default, built.x, [4], None, None, 1e-5)
    program = built.program(built.op(getitem, norm, 0), built.op(getitem, norm, 1))
    plan = Transport(program).solve(kind, Seed(built.x), is_open=True)
    assert (plan.count, plan.reason()) == (0, "native_layer_norm_default hands out its statistics")
