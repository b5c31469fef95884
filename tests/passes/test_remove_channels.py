"""sparsity.remove_channels: rows and columns go together; what another layer reads stays; refusals; faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fxcompress.errors import ContractViolation
from fxcompress.passes.sparsity import remove_channels
from fxcompress.passes.sparsity.remove_channels import RemoveChannels
from fxcompress.program import Program
from tests.passes.helpers import captured, declined, error, function, planted, run, seeded, text, zoo

X, IMAGE = seeded(2, 3, 6), seeded(2, 3, 8, 8)
ALIVE = torch.tensor([True, False, True, True, False, True, True, True])
W, B, V = seeded(8, 6, seed=1), seeded(8, seed=2), seeded(5, 8, seed=3) * ALIVE
C, K, D = seeded(8, 3, 3, 3, seed=4), seeded(4, 8, 3, 3, seed=5) * ALIVE.view(1, -1, 1, 1), seeded(5, 8, seed=6)


def perceptron(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return nnf.linear(nnf.sigmoid(nnf.linear(x, w, b)), v)


def mlp() -> Program:
    return function(perceptron, X, w=W, b=B, v=V, dynamic=False)


def test_rows_and_columns_go() -> None:
    """Though sigmoid(0) isn't 0: what goes is what nobody reads."""
    after, report = run(mlp(), RemoveChannels())
    assert text(after) == text(mlp())
    assert (report.fired, declined(report)) == (1, [])
    wanted = {"w": W[ALIVE], "b": B[ALIVE], "v": V[:, ALIVE]}
    assert all(torch.equal(after.constants[n], t) for n, t in wanted.items())
    assert error(mlp(), after) < 1e-6


def test_convolution() -> None:
    before = function(lambda x, w, b, k: nnf.conv2d(nnf.relu(nnf.conv2d(x, w, b)), k, padding=1), IMAGE, w=C, b=B, k=K, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (1, [])
    assert torch.equal(after.constants["w"], C[ALIVE])
    assert torch.equal(after.constants["k"], K[:, ALIVE])
    assert error(before, after) < 1e-6


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "read elsewhere": (
        lambda x, w, b, v, d: [y := nnf.linear(x, w, b).relu(), nnf.linear(y, v), nnf.linear(y, d)][1:],
        "every channel is read by some layer",
    ),
    "an output": (lambda x, w, b, v, d: [y := nnf.linear(x, w, b).relu(), nnf.linear(y, v)], "the value is an output of the program"),
    "scores": (
        lambda x, w, b, v, d: [y := nnf.linear(x, w, b), nnf.linear(y, v), y @ y.transpose(-1, -2)][1:],
        "matmul reads the channels too, without a weight",
    ),
}


@pytest.mark.parametrize(("body", "reason"), [pytest.param(*c, id=i) for i, c in REFUSED.items()])
def test_refuses(body: Callable[..., Any], reason: str) -> None:
    before = function(body, X, w=W, b=B, v=V, d=D, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert text(after) == text(before)
    assert (report.fired, declined(report)) == (0, [("linear_1", reason)])


def test_refuses_to_leave_nothing() -> None:
    _, report = run(function(perceptron, X, w=W, b=B, v=V * 0, dynamic=False), RemoveChannels())
    assert (report.fired, declined(report)) == (0, [("linear_1", "no channel would be left")])


def test_second_run_changes_nothing() -> None:
    once, _ = run(mlp(), RemoveChannels())
    _, report = run(once, RemoveChannels())
    assert (report.fired, declined(report)) == (0, [])


@pytest.mark.parametrize("fault", [lambda k: k.roll(1), lambda k: ~k, lambda k: k & (torch.arange(len(k)) != 3)])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any]) -> None:
    planted(monkeypatch, remove_channels, "kept", fault)
    with pytest.raises(ContractViolation, match=r"sparsity\.remove_channels breaks its exact contract"):
        run(mlp(), RemoveChannels())


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_real_model(name: str) -> None:
    """Half of the hidden units of the perceptrons pruned."""
    before, _ = run(zoo(name), "tidy.fold_constants")
    wide = [n for n, t in before.constants.items() if t.shape == (64, 128)]
    for constant in wide:
        before.constants[constant] = before.constants[constant] * (torch.arange(128) % 2)
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (len(wide), [])
    assert len(wide) == 2
    assert all(after.constants[n].shape == (64, 64) for n in wide)
    assert error(before, after) < 1e-5


HEADS = 3
ATTENTION = {n: seeded(6, 6, seed=i) for i, n in enumerate(("wq", "wk", "wv", "wo"))} | {"bv": seeded(6, seed=7)}
FIRST = torch.tensor([0.0, 0, 1, 1, 1, 1])  # without the first of three heads


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(*x.shape[:1], -1, x.shape[1] * x.shape[3])


def attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, bv: Tensor) -> Tensor:
    q, k, v = split(nnf.linear(x, wq)), split(nnf.linear(x, wk)), split(nnf.linear(x, wv, bv))
    return nnf.linear(merged(nnf.scaled_dot_product_attention(q, k, v)), wo)


def opened(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, bv: Tensor) -> Tensor:
    q, k, v = split(nnf.linear(x, wq)), split(nnf.linear(x, wk)), split(nnf.linear(x, wv, bv))
    return nnf.linear(merged((q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v), wo)


def fused(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, bv: Tensor) -> Tensor:
    q, k, v = nnf.linear(x, torch.cat([wq, wk, wv]), torch.cat([bv, bv, bv])).chunk(3, -1)
    return nnf.linear(merged(nnf.scaled_dot_product_attention(split(q), split(k), split(v))), wo)


def pruned(where: str) -> dict[str, Tensor]:
    rows = {"out": ("wo", FIRST), "values": ("wv", FIRST[:, None])}[where]
    changed = ATTENTION | {rows[0]: ATTENTION[rows[0]] * rows[1]}
    return changed | {"bv": ATTENTION["bv"] * FIRST} if where == "values" else changed


@pytest.mark.parametrize(("body", "where"), [(attention, "out"), (attention, "values"), (opened, "out"), (opened, "values"), (fused, "out")])
def test_a_head_goes_from_all_four(body: Callable[..., Tensor], where: str) -> None:
    before, _ = run(function(body, X, **pruned(where)), "tidy.fold_constants")
    after, report = run(before, RemoveChannels())
    assert report.fired == 1
    assert {tuple(t.shape) for t in after.constants.values() if t.dim() == 2} <= {(4, 6), (6, 4), (12, 6)}
    assert error(before, after) < 1e-6
    assert error(before, after, [seeded(2, 5, 6, seed=8)]) < 1e-6


def test_a_head_goes_from_a_mask_made_in_the_graph() -> None:
    """Zeros of a literal number of heads, as tables of positions are made where there are none."""

    def masked(x: Tensor, **weights: Tensor) -> Tensor:
        q, k, v = (split(nnf.linear(x, weights[n])) for n in ("wq", "wk", "wv"))
        mask = torch.where(x[:, None, :, :1] > 0, torch.zeros(1, HEADS, x.shape[1], 1), -1e4)
        return nnf.linear(merged(nnf.scaled_dot_product_attention(q, k, v, mask.expand(-1, -1, -1, x.shape[1]))), weights["wo"])

    before = function(masked, X, **pruned("out"))
    after, report = run(before, RemoveChannels())
    assert report.fired == 1
    assert after.constants["wo"].shape == (6, 4)
    assert error(before, after, [seeded(2, 5, 6, seed=8)]) < 1e-6


def test_a_head_goes_from_a_key_of_zeros() -> None:
    """One more key and value of zeros for every head, in a literal size, as attention that may look at nothing has them."""

    def padded(x: Tensor, **weights: Tensor) -> Tensor:
        q, k, v = (split(nnf.linear(x, weights[n])) for n in ("wq", "wk", "wv"))
        nothing = x.new_zeros(x.shape[0], HEADS, 1, 2)
        k, v = (torch.cat([t, nothing], 2) for t in (k, v))
        return nnf.linear(merged(nnf.scaled_dot_product_attention(q, k, v)), weights["wo"])

    before = function(padded, X, **pruned("out"))
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (1, [])
    assert after.constants["wo"].shape == (6, 4)
    assert error(before, after, [seeded(2, 5, 6, seed=8)]) < 1e-6


def test_the_same_channels_go_from_heads_that_must_all_stay() -> None:
    """Heads and examples in one axis: the number of heads can't change."""

    def folded(x: Tensor, **weights: Tensor) -> Tensor:
        q, k, v = (split(nnf.linear(x, weights[n])).flatten(0, 1) for n in ("wq", "wk", "wv"))
        y = nnf.scaled_dot_product_attention(q, k, v).view(x.shape[0], HEADS, x.shape[1], -1)
        return nnf.linear(merged(y), weights["wo"])

    before = function(folded, X, **ATTENTION | {"wo": ATTENTION["wo"] * (torch.arange(6) % 2)})
    after, report = run(before, RemoveChannels())
    assert report.fired == 1
    assert {n: tuple(t.shape) for n, t in after.constants.items()} == {"wq": (6, 6), "wk": (6, 6), "wv": (3, 6), "wo": (6, 3)}
    assert error(before, after) < 1e-6


PIECES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {  # both halves, taken from two ways of splitting
    "chunk and split": lambda y: (y.chunk(2, -1)[0], y.split(4, -1)[1]),
    "chunk and tensor_split": lambda y: (y.chunk(2, -1)[0], y.tensor_split((4,), -1)[1]),
    "tensor_split and a slice": lambda y: (y.tensor_split(2, -1)[0], y[..., 4:]),
    "sizes that differ": lambda y: (y.split([4, 4], -1)[0], y.split([2, 2, 4], -1)[2]),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_value_split_two_ways(name: str) -> None:
    """What nobody takes of a tuple loses channels like the rest of it."""

    def body(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        first, second = PIECES[name](nnf.linear(x, w))
        return nnf.linear(first.sigmoid() * second, v)

    before = function(body, X, w=W, v=seeded(5, 4, seed=3) * torch.tensor([1.0, 0, 1, 1]), dynamic=False)
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (1, [])
    assert (after.constants["w"].shape[0], after.constants["v"].shape[1]) == (6, 3)
    assert error(before, after) < 1e-6


def also_by_einsum(x: Tensor, w: Tensor, v: Tensor, t: Tensor) -> Any:
    y = nnf.linear(x, w)
    return nnf.linear(y, v), torch.einsum("bsc,kc->bsk", y, t)


@pytest.mark.parametrize(("table", "left"), [(ALIVE, 6), (torch.ones(8), 8)])
def test_an_einsum_reads_what_it_sums_over(table: Tensor, left: int) -> None:
    before = function(also_by_einsum, X, w=W, v=V, t=seeded(5, 8) * table, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert after.constants["w"].shape[0] == left
    assert declined(report) == ([] if left < 8 else [("linear_1", "every channel is read by some layer")])
    assert error(before, after) < 1e-6


def test_shared_keys_and_values_go_with_all_that_read_them() -> None:
    """Two key/value heads for four queries each read by two: one of a pair pruned isn't enough, both are."""

    def grouped(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        q, k, v = split(nnf.linear(x, wq), 4), split(nnf.linear(x, wk), 2), split(nnf.linear(x, wv), 2)
        k, v = (t[:, :, None].expand(2, 2, 2, -1, 2).reshape(2, 4, -1, 2) for t in (k, v))
        return nnf.linear(merged(nnf.scaled_dot_product_attention(q, k, v)), wo)

    shapes = {"wq": (8, 6), "wk": (4, 6), "wv": (4, 6), "wo": (5, 8)}
    weights = {n: seeded(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    for zeros, wanted in ((2, (0, 8)), (4, (1, 4))):
        keep = (torch.arange(8) >= zeros).float()
        before = function(grouped, X, **weights | {"wo": weights["wo"] * keep}, dynamic=False)
        after, report = run(before, RemoveChannels())
        assert (report.fired, after.constants["wo"].shape[1]) == wanted
        assert error(before, after) < 1e-6
    assert [tuple(after.constants[n].shape) for n in shapes] == [(4, 6), (2, 6), (2, 6), (5, 4)]


def fused_with(zeros: tuple[str, ...], bias: Tensor) -> Program:
    """One weight for queries, keys and values; the rows of the first head are 0 in those named, and the bias of all three is one."""
    weights = ATTENTION | {n: ATTENTION[n] * FIRST[:, None] for n in zeros} | {"bv": bias}
    return run(function(fused, X, **weights), "tidy.fold_constants")[0]


def test_a_head_of_null_values_in_a_fused_weight_goes() -> None:
    """Its queries and keys, in the same weight, aren't 0, but only weigh its values."""
    before = fused_with(("wv",), ATTENTION["bv"] * FIRST)
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (1, [])
    assert sorted(tuple(t.shape) for t in after.constants.values() if t.dim() == 2) == [(6, 4), (12, 6)]
    assert error(before, after, [seeded(2, 5, 6, seed=8)]) < 1e-6


@pytest.mark.parametrize(("zeros", "bias"), [(("wq", "wk"), ATTENTION["bv"] * FIRST), (("wv",), ATTENTION["bv"])])
def test_a_head_whose_values_are_not_null_stays(zeros: tuple[str, ...], bias: Tensor) -> None:
    """Null queries and keys weigh all values alike; rows of zeros with a bias are the bias."""
    _, report = run(fused_with(zeros, bias), RemoveChannels())
    why = "the channels that linear has zeros for go only together with others"
    assert (report.fired, {reason for _, reason in declined(report)}) == (0, {why})


@pytest.mark.parametrize(("second", "left"), [(1, 6), (0, 8)])
def test_a_channel_that_stands_twice(second: int, left: int) -> None:
    """Once it is 0, once nobody reads it; or in the second place too it is read."""

    def twice(x: Tensor, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        first, other = nnf.linear(x, w), nnf.linear(x, u)
        return nnf.linear(torch.cat([first + first.relu(), other * first.sigmoid()], -1), v)

    read = torch.cat([torch.ones(8), ALIVE if second else torch.ones(8)])
    before = function(twice, X, w=W * ALIVE[:, None], u=seeded(8, 6, seed=9), v=seeded(5, 16, seed=3) * read, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert (after.constants["w"].shape[0], bool(report.fired)) == (left, left < 8)
    assert error(before, after) < 1e-6


def test_half_a_head_stays() -> None:
    half = ATTENTION | {"wo": ATTENTION["wo"] * torch.tensor([0.0, 1, 1, 1, 1, 1])}
    _, report = run(function(attention, X, **half, dynamic=False), RemoveChannels())
    assert (report.fired, declined(report)) == (0, [("linear_3", "the channels that linear_3 has zeros for go only together with others")])


def test_a_shifted_head_stays() -> None:
    """Rows of zeros, but the values are their bias."""
    shifted = ATTENTION | {"wv": ATTENTION["wv"] * FIRST[:, None]}
    _, report = run(function(attention, X, **shifted, dynamic=False), RemoveChannels())
    assert (report.fired, declined(report)) == (0, [("linear_2", "every channel is read by some layer")])


NULL: dict[str, tuple[Callable[..., Tensor], bool]] = {  # what becomes of a row of zeros with no shift
    "gelu": (lambda y, v: nnf.linear(nnf.gelu(y), v), True),
    "sigmoid": (lambda y, v: nnf.linear(y.sigmoid(), v), False),
    "a gate": (lambda y, v: nnf.linear(y * y.sigmoid(), v), True),
    "one added": (lambda y, v: nnf.linear(y + 1, v), False),
    "a token's number added": (lambda y, v: nnf.linear(y + torch.arange(3.0)[:, None], v), False),
    "itself added": (lambda y, v: nnf.linear(y + y.relu(), v), True),
    "squared": (lambda y, v: nnf.linear((y @ y.transpose(-1, -2)) @ y, v), True),
}


@pytest.mark.parametrize(("tail", "goes"), [pytest.param(*c, id=i) for i, c in NULL.items()])
def test_null_rows(tail: Callable[..., Tensor], goes: bool) -> None:
    full = seeded(5, 8, seed=3)
    before = function(lambda x, w, v: tail(nnf.linear(x, w), v), X, w=W * ALIVE[:, None], v=full, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert (report.fired, after.constants["w"].shape[0]) == ((1, 6) if goes else (0, 8))
    assert error(before, after) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_heads_of_a_real_model(name: str) -> None:
    """The first key/value head's share of every output projection pruned."""
    before, _ = run(zoo(name), "tidy.fold_constants")
    program = before.copy()
    for site in program.graph.nodes:
        if site.target is torch.ops.aten.scaled_dot_product_attention.default:
            leaf = _projection(site)
            tensor, heads = program.constants[leaf], site.meta["val"].shape[1]
            axis = 0 if name == "gpt2" else 1
            shared = 2 if name == "llama" else 1
            keep = (torch.arange(64) >= 64 // heads * shared).float()
            program.constants[leaf] = tensor * (keep[:, None] if axis == 0 else keep)
    after, report = run(program, RemoveChannels())
    assert (report.fired, declined(report)) == (2, [])
    assert report.bytes_after < report.bytes_before
    assert error(program, after) < 1e-5


def _projection(node: Any) -> str:
    while not (leaves := [n for n in node.all_input_nodes if n.op == "get_attr" and n.meta["val"].dim() == 2]):
        node = next(iter(node.users))
    return str(leaves[0].target)


class Attention(nn.Module):
    """torch's own, with a dead first head of three."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(6, HEADS, batch_first=True)
        for bias in (self.attention.in_proj_bias, self.attention.out_proj.bias):
            bias.data.normal_()
        if where == "out":
            self.attention.out_proj.weight.data[:, :2] = 0
        else:
            self.attention.in_proj_weight.data[12:14] = 0
            self.attention.in_proj_bias.data[12:14] = 0

    def forward(self, x: Tensor) -> Any:
        """Attention of x to itself."""
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("dynamic", [None, False])
@pytest.mark.parametrize("where", ["out", "values"])
def test_a_head_of_packed_projections_goes(where: str, dynamic: bool | None) -> None:
    before, _ = run(captured(Attention(where), X, dynamic=dynamic), "tidy.fold_constants")
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (1, [])
    assert after.constants["attention.in_proj_weight"].shape == (12, 6)
    assert error(before, after, [X] if dynamic is False else [seeded(3, 5, 6, seed=8)]) < 1e-6


def test_a_head_whose_weights_are_averaged_stays() -> None:
    """The weights that attention gives back are a mean over all heads, dead ones too."""

    class WithWeights(Attention):
        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x)

    _, report = run(captured(WithWeights("out"), X, dynamic=False), RemoveChannels())
    assert (report.fired, declined(report)) == (0, [("linear_1", "mean sums over the channels that a remove would change")])


NORMED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # of all queries and keys, and the heads that are left of four
    "rms_norm of each head": (lambda x: split(nnf.rms_norm(x.unflatten(-1, (4, 2)), (2,), torch.tensor([0.5, 2.0])).flatten(-2), 4), 3),
    "layer_norm of each head": (lambda x: nnf.layer_norm(split(x, 4), (2,), torch.tensor([0.5, 2.0])), 3),
    "a norm spelled out": (lambda x: split(x, 4) * torch.rsqrt(split(x, 4).square().mean(-1, keepdim=True) + 1e-6), 3),
    "rms_norm of all heads": (lambda x: split(nnf.rms_norm(x, (8,)), 4), 4),
}


@pytest.mark.parametrize("name", NORMED)
def test_heads_behind_norms_of_queries_and_keys(name: str) -> None:
    norm, left = NORMED[name]

    def body(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        q, k, v = (nnf.linear(x, w) for w in (wq, wk, wv))
        return nnf.linear(merged(nnf.scaled_dot_product_attention(norm(q), norm(k), split(v, 4))), wo)

    weights = {n: seeded(8, 6, seed=i) for i, n in enumerate(("wq", "wk", "wv"))}
    before = function(body, X, **weights, wo=seeded(5, 8, seed=4) * (torch.arange(8) > 1))
    after, report = run(before, RemoveChannels())
    assert after.constants["wo"].shape == (5, 2 * left)
    assert declined(report) == ([] if left < 4 else [("linear_3", "rms_norm norms over the channels that a remove would change")])
    assert error(before, after, [seeded(2, 5, 6, seed=8)]) < 1e-5


def repeated(t: Tensor) -> Tensor:
    return t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


def beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries that share keys along an axis of their own."""
    q, k, v = q.unflatten(1, (2, 2)), k[:, :, None], v[:, :, None]
    return ((q @ k.mT * 0.5).softmax(-1) @ v).flatten(1, 2)


SHARED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "expand": lambda q, k, v: nnf.scaled_dot_product_attention(q, repeated(k), repeated(v)),
    "repeat_interleave": lambda q, k, v: nnf.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
    "in the op": lambda q, k, v: nnf.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "by broadcasting": beside,
}


@pytest.mark.parametrize(("dead", "left"), [((0, 2), (4, 4)), ((1, 3), (4, 4)), ((0, 1), (4, 2)), ((0,), (8, 4)), ((0, 3), (8, 4))])
@pytest.mark.parametrize("name", SHARED)
def test_queries_that_share_keys(name: str, dead: tuple[int, ...], left: tuple[int, int]) -> None:
    """Of four heads that share two: the same one of both pairs goes alone, both of a pair with what they share."""

    def body(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        q, k, v = split(nnf.linear(x, wq), 4), split(nnf.linear(x, wk), 2), split(nnf.linear(x, wv), 2)
        return nnf.linear(merged(SHARED[name](q, k, v)), wo)

    shapes = {"wq": (8, 6), "wk": (4, 6), "wv": (4, 6)}
    weights = {n: seeded(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    read = torch.tensor([float(head not in dead) for head in range(4)]).repeat_interleave(2)
    before = function(body, X, **weights, wo=seeded(5, 8, seed=4) * read, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert (after.constants["wq"].shape[0], after.constants["wk"].shape[0]) == left
    assert declined(report) == ([] if left[0] < 8 else [("linear_3", "the channels that linear_3 has zeros for go only together with others")])
    assert error(before, after) < 1e-5


@pytest.mark.parametrize(("rows", "heads"), [("the same of each head", [0, 2, 4]), ("another of each head", [0, 3, 4])])
def test_channels_of_heads_go(rows: str, heads: list[int]) -> None:
    """As many of each head, though no head is dead."""
    alive = torch.ones(6).index_fill(0, torch.tensor(heads), 0)
    before = function(attention, X, **ATTENTION | {"wo": ATTENTION["wo"] * alive}, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (1, [])
    assert {n: t.shape[0] for n, t in after.constants.items()} == {"wq": 6, "wk": 6, "wv": 3, "wo": 6, "bv": 3}
    assert error(before, after) < 1e-5


class Normed(nn.Module):
    """A batch norm whose gain is 0 for two channels, between convolutions."""

    def __init__(self, bias: float, between: nn.Module, is_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data, norm.bias.data = torch.rand(8) * ALIVE, torch.randn(8) * ALIVE + bias * ~ALIVE
        middle = (between, norm) if is_first else (norm, between)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), *middle, nn.Conv2d(8, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Convolutions, with the norm in between."""
        return self.body(x)


GAINLESS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu after": (lambda: Normed(0.0, nn.ReLU()), ""),
    "relu before": (lambda: Normed(0.0, nn.ReLU(), is_first=True), ""),
    "a bias": (lambda: Normed(0.3, nn.ReLU()), "batch_norm makes channels whose gain is 0 its bias, body_1_bias, which is read"),
    "sigmoid after": (lambda: Normed(0.0, nn.Sigmoid()), "batch_norm makes channels whose gain is 0 its bias, body_1_bias, which is read"),
}


@pytest.mark.parametrize("name", GAINLESS)
def test_channels_without_a_gain(name: str) -> None:
    make, why = GAINLESS[name]
    before = captured(make(), IMAGE)
    after, report = run(before, RemoveChannels())
    assert declined(report) == ([("batch_norm", why)] if why else [])
    assert after.constants["body.0.weight"].shape[0] == (8 if why else 6)
    assert error(before, after) < 1e-5


def stacked(t: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(t.expand(3, -1, -1), up).relu(), down)


EXPERTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], bool]] = {  # and whether each may lose channels of its own
    "stacked": (stacked, True),
    "by einsum": (lambda t, u, d: torch.einsum("teh,ehd->etd", torch.einsum("td,edh->teh", t, u).relu(), d), True),
    "one after the other": (lambda t, u, d: torch.stack([(t @ u[e]).relu() @ d[e] for e in range(3)]), True),
    "picked": (lambda t, u, d: torch.bmm(torch.bmm(t[:, None], u[t[:, 0].gt(0).long()]).relu(), d[t[:, 0].gt(0).long()]), False),
}


@pytest.mark.parametrize("dead", ["columns", "rows"])
@pytest.mark.parametrize("where", ["in all alike", "in each another"])
@pytest.mark.parametrize("name", EXPERTS)
def test_channels_of_experts(name: str, where: str, dead: str) -> None:
    body, is_apart = EXPERTS[name]
    read = torch.ones(3, 8)
    for expert in range(3):
        read[expert, [2, 5] if where == "in all alike" else [expert, expert + 2]] = 0
    up, down = seeded(3, 6, 8, seed=1), seeded(3, 8, 6, seed=2)
    weights = {"u": up * read[:, None], "d": down} if dead == "rows" else {"u": up, "d": down * read[..., None]}
    program = function(lambda x, u, d: body(x.flatten(0, 1), u, d), X, **weights)
    before, _ = run(program, "tidy.fold_constants")
    after, report = run(before, RemoveChannels())
    goes = is_apart or where == "in all alike"
    assert bool(report.fired) == goes
    assert not goes or all(8 not in t.shape for t in after.constants.values())
    assert error(before, after) < 1e-5


def test_what_one_route_leaves_another_takes() -> None:
    """A dead head goes whole, then a dead channel of each of the others."""
    alive = torch.tensor([0.0, 0, 0, 1, 1, 0])
    before = function(attention, X, **ATTENTION | {"wo": ATTENTION["wo"] * alive}, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (2, [])
    assert {n: t.shape[0] for n, t in after.constants.items()} == {"wq": 4, "wk": 4, "wv": 2, "wo": 6, "bv": 2}
    assert error(before, after) < 1e-5
