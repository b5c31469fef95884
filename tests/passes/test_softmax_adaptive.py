"""softmax.adaptive: graphs, planted optima, what is declined, masks and shared heads, faults, other passes behind it, real models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from torch import Tensor

from fxcompress.calibrate.statistics import Statistics
from fxcompress.errors import RecipeError
from fxcompress.interpret import run as interpret
from fxcompress.manager import Manager
from fxcompress.numerics import affine
from fxcompress.program import Program
from fxcompress.recipe import Step, Where, build, load_recipe
from fxcompress.report import PassReport
from fxcompress.target import ActivationKernel, Target
from tests.passes.helpers import Builder, declined, function, lines, named, node, ops, seeded, text

NAME = "softmax.adaptive"
KINDS = {"self": (7, 7), "token to image": (7, 64), "image to token": (64, 7)}  # queries and keys
TAUS = (1, 2, 4, 8)
HEADS, SIZE = 2, 6


def run(
    program: Program, feed: Sequence[Sequence[Tensor]] = (), *, where: Where | None = None, target: Target | None = None, **options: Any
) -> tuple[Program, PassReport]:
    """(a copy after the pass, its report), calibrated on the feed, else on the example."""
    statistics = Statistics(feed or [program.example])
    manager = Manager(program.copy(), target or Target(name="test"), program.example, "each", statistics)
    return manager.program, manager.run([(Step(use=NAME, where=where or Where()), named(NAME, **options))])[-1]


def second(program: Program, feed: Sequence[Sequence[Tensor]] = (), **options: Any) -> PassReport:
    """The report of another run, which changes nothing."""
    again, report = run(program, feed, **options)
    assert report.fired == 0
    assert text(again) == text(program)
    assert again.constants.keys() == program.constants.keys()
    return report


def eager(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def whole(scores: Tensor, v: Tensor) -> Tensor:
    """The same as one op: the keys are the identity."""
    k = torch.eye(scores.shape[-1]).expand(*v.shape[:-1], v.shape[-2])
    return F.scaled_dot_product_attention(scores, k, v, scale=1.0)


def attention(scores: Tensor, body: Callable[..., Any] = eager) -> Program:
    """body(scores, v) with drawn values."""
    return function(body, scores, seeded(*scores.shape[:-2], scores.shape[-1], SIZE, seed=1), dynamic=False)


def drawn(queries: int = 7, keys: int = 7, spread: float = 2.0, seed: int = 0) -> Tensor:
    return spread * seeded(1, HEADS, queries, keys, seed=seed)


def reason(report: PassReport) -> str:
    (change,) = report.changes
    return change.reason


def kept(program: Program) -> tuple[str, Tensor, Tensor]:
    """Format, probabilities and what is multiplied in their place at the only quantiser."""
    values: dict[str, Tensor] = {}
    interpret(program, program.example, lambda n, value: values.__setitem__(n.name, value) if isinstance(value, Tensor) else None)
    pair = next(n for n in program.graph.nodes if n.target is torch.ops.fxc.dequantize.default)
    codes: Any = pair.args[0]
    return str(pair.args[3]), values[codes.args[0].name], values[pair.name]


# before and after


def test_the_pair_stands_between_softmax_and_product() -> None:
    after, report = run(attention(drawn()), candidates=(2,), bits=4)
    assert text(after) == lines("""
        softmax = softmax.int(scores, -1)
        quantize_default = fxc.quantize(softmax, %softmax.scale, None, log4:2, [-1, -1, -1, -1])
        dequantize_default = fxc.dequantize(quantize_default, %softmax.scale, None, log4:2, [-1, -1, -1, -1])
        matmul = matmul(dequantize_default, v)
        return matmul""")
    assert (report.fired, declined(report)) == (1, [])
    assert second(after).declined[0].reason == "matmul reads probabilities that are log4:2 already"


def test_an_attention_that_is_one_op_is_opened() -> None:
    q, k, v = (seeded(1, HEADS, 7, SIZE, seed=i) for i in range(3))
    before = function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), q, k, v, dynamic=False)
    after, report = run(before, bits=4, candidates=("uniform",))
    assert ops(after) == ["transpose.int", "matmul", "mul.Tensor", "softmax.int", "fxc.quantize", "fxc.dequantize", "matmul"]
    assert list(report.changes[0].replaced) == ["scaled_dot_product_attention"]
    assert second(after).declined


def test_moves_and_casts_in_between() -> None:
    """The quantiser stands before moves, behind masks and casts."""

    def body(scores: Tensor, v: Tensor) -> Tensor:
        a = F.dropout(scores.double().softmax(-1), 0.1, training=False).to(scores.dtype).masked_fill(scores > 3, 0.0)
        return torch.bmm(a.reshape(HEADS, 7, 7), v.reshape(HEADS, 7, SIZE))

    after, report = run(attention(drawn(), body), bits=4)
    assert report.fired == 1
    assert node(after, "quantize_default").args[0] is node(after, "masked_fill")
    second(after, bits=4)


def test_other_readers_keep_the_float_probabilities() -> None:
    def body(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a = scores.softmax(-1)
        return a @ v, a

    before = attention(drawn(), body)
    after, report = run(before, bits=2)
    assert report.fired == 1
    products, probabilities = interpret(after, after.example)
    assert torch.equal(probabilities, interpret(before, before.example)[1])
    assert not torch.equal(products, interpret(before, before.example)[0])


def test_a_recipe_leaves_one_out() -> None:
    def body(scores: Tensor, v: Tensor) -> Tensor:
        return eager(scores, v) + whole(scores, v)

    before = attention(drawn(), body)
    for glob, other in (("matmul", "scaled_dot_product_attention"), ("scaled_dot_product_attention", "matmul")):
        after, report = run(before, where=Where(exclude=(glob,)))
        assert (report.fired, declined(report)) == (1, [])
        assert report.changes[0].exclude == (other,)
        assert ("scaled_dot_product_attention" in ops(after)) == (glob == "scaled_dot_product_attention")


# the choice


def planted(candidate: str | int, queries: int, keys: int) -> Tensor:
    """Scores whose probabilities are levels of 4 bits of this candidate and no other: all rows have the same ones, in another order."""
    top = 2 ** (-torch.arange(15) / candidate) if isinstance(candidate, int) else torch.arange(15, 0, -1) / 15
    levels = top.double()[torch.linspace(0, 14, keys).round().long()]
    draw = torch.Generator().manual_seed(0)
    rows = [levels[torch.randperm(keys, generator=draw)] for _ in range(HEADS * queries)]
    return torch.stack(rows).log().float().reshape(1, HEADS, queries, keys)


@pytest.mark.parametrize("body", [eager, whole], ids=["opened", "whole"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidate", ["uniform", *TAUS])
def test_the_planted_optimum_is_found(candidate: str | int, kind: str, body: Callable[..., Any]) -> None:
    after, report = run(attention(planted(candidate, *KINDS[kind]), body), bits=4)
    name, a, quantised = kept(after)
    assert name == ("uint4" if candidate == "uniform" else f"log4:{candidate}")
    assert reason(report).startswith("uniform, s" if candidate == "uniform" else f"log, τ = {candidate}, s = {float(a.max()):.4g}: ")
    torch.testing.assert_close(quantised, a, rtol=2e-5, atol=0)


@pytest.mark.parametrize("candidate", TAUS)
def test_a_table_off_by_one_is_seen(candidate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = affine.on_line

    def shifted(codes: Tensor, format: Any, work: torch.dtype) -> Tensor:
        return right((codes + 1).clamp(max=format.qmax), format, work)

    monkeypatch.setattr(affine, "on_line", shifted)
    with pytest.raises(AssertionError):
        test_the_planted_optimum_is_found(candidate, "token to image", eager)


def law(a: Tensor, candidate: str | int, bits: int, s: float) -> Tensor:
    """The quantised probabilities, written from the paper; s: of the reason, a grid's step or the greatest level."""
    if candidate == "uniform":
        return (a / s).round().clamp(0, 2**bits - 1) * s
    code = (-int(candidate) * torch.log2(a / s)).round().clamp(min=0)
    return torch.where(code < 2**bits - 1, s * 2 ** (-code / int(candidate)), 0.0)


def figures(report: PassReport) -> tuple[str | int, float, dict[str | int, float]]:
    """What a reason says: the candidate, its s, and the dB of every candidate."""
    first = re.match(r"(?:log, τ = (\d)|uniform), s = (\S+): (\S+) dB of A V", reason(report))
    assert first is not None
    chosen: str | int = int(first[1]) if first[1] else "uniform"
    rest = re.findall(r"(?:τ = (\d)|uniform) (-?[\d.]+)(?:,|$)", reason(report).partition("; ")[2])
    return chosen, float(first[2]), {chosen: float(first[3])} | {int(tau) if tau else "uniform": float(db) for tau, db in rest}


def sqnr(scores: Tensor, v: Tensor, approx: Callable[[Tensor], Tensor]) -> float:
    a = scores.double().softmax(-1)
    exact, error = a @ v.double(), (approx(a) - a) @ v.double()
    return 10 * math.log10(exact.square().sum() / error.square().sum())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_one_loses_least_and_the_reason_says_what(kind: str, bits: int) -> None:
    program = attention(drawn(*KINDS[kind], spread=4))
    _, report = run(program, bits=bits)
    chosen, s, gains = figures(report)
    assert gains.keys() == {"uniform", *TAUS}
    assert gains[chosen] >= max(gains.values()) - 0.15, "0.1 dB for even steps, the rest is rounding of the text"
    scores, v = program.example
    assert gains[chosen] == pytest.approx(sqnr(scores, v, lambda a: law(a, chosen, bits, s)), abs=0.1)
    for other, figure in gains.items():
        assert figure == pytest.approx(held_out((scores, v), (scores, v), other, bits), abs=0.06)


def held_out(chooses: tuple[Tensor, Tensor], judges: tuple[Tensor, Tensor], candidate: str | int, bits: int) -> float:
    """The SQNR on one item with the scale that is best on another."""
    top = max(float(scores.softmax(-1).max()) for scores, _ in (chooses, judges))
    steps = [top * 2 ** (-i / 4) / (2**bits - 1 if candidate == "uniform" else 1) for i in range(9)]
    best = max(steps, key=lambda s: sqnr(*chooses, lambda a: law(a, candidate, bits, s)))
    return sqnr(*judges, lambda a: law(a, candidate, bits, best))


def test_candidates_are_judged_on_items_that_chose_no_scale() -> None:
    """Four items: the first and third choose, the others judge. Three: all do both."""
    even, odd = ((drawn(spread=s, seed=s), seeded(1, HEADS, 7, SIZE, seed=s)) for s in (2, 5))
    program = attention(even[0])
    for candidate, figure in figures(run(program, [even, odd, even, odd], bits=4)[1])[2].items():
        assert figure == pytest.approx(held_out(even, odd, candidate, 4), abs=0.06), candidate
    both = tuple(torch.cat(parts) for parts in zip(even, odd, odd, strict=True))
    for candidate, figure in figures(run(program, [even, odd, odd], bits=4)[1])[2].items():
        assert figure == pytest.approx(held_out(both, both, candidate, 4), abs=0.06), candidate


def test_what_is_as_good_is_even_steps() -> None:
    """Halves, and nothing else, are exact on every grid."""
    scores = torch.tensor([0.0, 0.0, -math.inf]).expand(1, HEADS, 4, 3).contiguous()
    _, report = run(attention(scores))
    assert reason(report).startswith("uniform, s = 0.001961: inf dB")


def test_even_steps_are_those_of_quant_insert() -> None:
    program = attention(drawn())
    mine, _ = run(program, candidates=("uniform",), bits=8)
    manager = Manager(program.copy(), Target(name="test"), program.example, "each", Statistics([program.example]))
    manager.run([(Step(use="quant.insert"), named("quant.insert"))])
    assert torch.equal(mine.constants["softmax.scale"], manager.program.constants["softmax.scale"])
    assert torch.equal(mine.constants["softmax.zero_point"], manager.program.constants["softmax.zero_point"])


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("candidate", ["uniform", *TAUS])
def test_two_to_the_bits_values_at_most(candidate: str | int, bits: int) -> None:
    after, _ = run(attention(drawn(64, 64, spread=4)), bits=bits, candidates=(candidate,))
    assert 2 <= len(kept(after)[2].unique()) <= 2**bits


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bits": 9}, "bits: Input should be less than or equal to 8"),
        ({"candidates": ["uniform", 3]}, "candidates: 3: some of uniform, 1, 2, 4, 8"),
        ({"candidates": []}, "candidates: 'nothing': some of uniform, 1, 2, 4, 8"),
    ],
)
def test_options_are_checked_before_anything_runs(options: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(load_recipe({"passes": [{NAME: options}, "quant.finalize"]}))
    assert f"why   {why}\n" in str(caught.value)


# masks and heads


MASK = (torch.arange(49).view(7, 7) % 3 > 0).index_fill(0, torch.tensor(2), False)  # a row of nothing
MASKS: dict[str, dict[str, Any]] = {
    "boolean": {"attn_mask": MASK},
    "float": {"attn_mask": torch.where(MASK, 0.5, -math.inf)},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("kind", MASKS)
def test_what_a_mask_hides_stays_nought(kind: str) -> None:
    q, k, v = (2 * seeded(1, HEADS, 7, SIZE, seed=i) for i in range(3))
    before = function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **MASKS[kind]), q, k, v, dynamic=False)
    after, report = run(before, bits=4)
    assert report.fired == 1
    hidden = ~MASK if kind != "causal" else ~torch.ones(7, 7).tril().bool()
    _, a, quantised = kept(after)
    assert not quantised[..., hidden].any() and a[..., ~hidden].all()
    assert report.checks[0].figure > 12


def test_heads_that_share_keys() -> None:
    q, k, v = (2 * seeded(1, heads, 7, SIZE, seed=i) for i, heads in enumerate((4, 2, 2)))
    before = function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k, v, dynamic=False)
    _, report = run(before, bits=6)
    assert report.fired == 1 and report.checks[0].figure > 25
    assert figures(report)[2][figures(report)[0]] == pytest.approx(report.checks[0].figure, abs=0.1), "the probe is the feed here"


def products_sqnr(before: Program, after: Program) -> float:
    old, new = (interpret(p, before.example)[0].double() for p in (before, after))
    return float(10 * torch.log10(old.square().sum() / (old - new).square().sum()))


def test_values_that_all_heads_share() -> None:
    before = function(eager, drawn(), seeded(1, 1, 7, SIZE, seed=1), dynamic=False)
    after, report = run(before, bits=6)
    chosen, _, gains = figures(report)
    assert gains[chosen] == pytest.approx(products_sqnr(before, after), abs=0.06)


def test_dynamic_sizes() -> None:
    before = function(eager, drawn(), seeded(1, HEADS, 7, SIZE, seed=1), dynamic={"scores": {0: "batch", 2: "queries"}, "v": {0: "batch"}})
    after, report = run(before, bits=6)
    assert report.fired == 1
    other = drawn(5), seeded(1, HEADS, 7, SIZE, seed=3)
    assert interpret(after, other)[0].shape == (1, HEADS, 5, SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    before = function(eager, drawn().to(dtype), seeded(1, HEADS, 7, SIZE, seed=1).to(dtype), dynamic=False)
    after, report = run(before, bits=4, candidates=(2,))
    assert after.constants["softmax.scale"].dtype == dtype
    chosen, _, gains = figures(report)
    assert gains[chosen] == pytest.approx(products_sqnr(before, after), abs=0.06 if dtype == torch.float64 else 1.0)


# what is declined


def wrong_axis(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-2) @ v


def turned(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1).transpose(-1, -2) @ v


def turned_back(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-2).transpose(-1, -2) @ v


def mixed(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1).reshape(1, HEADS, -1, 1).reshape(1, HEADS, 7, 7) @ v


def one_key(scores: Tensor, v: Tensor) -> Tensor:
    return scores[..., :1].softmax(-1) @ v[..., :1, :]


def one_hot(scores: Tensor, v: Tensor) -> Tensor:
    return (scores * 1e4).softmax(-1) @ v


def negative(scores: Tensor, v: Tensor) -> Tensor:
    return torch.where(scores > 1, scores.softmax(-1), -0.5) @ v


ON_FEED = "on the calibration feed"
DECLINED: dict[str, tuple[Callable[..., Any], str]] = {
    "another axis": (wrong_axis, "matmul sums over axis 3 of softmax, softmax normalised axis 2"),
    "another axis, turned": (turned, "matmul sums over axis 3 of transpose, softmax normalised axis 2"),
    "an axis that is lost": (mixed, "matmul reads softmax after moves behind which the axis it normalised isn't known"),
    "one key": (one_key, f"the probabilities of matmul are 1 everywhere {ON_FEED}"),
    "one-hot": (one_hot, f"the probabilities of matmul are only 0 and 1 {ON_FEED}, which doesn't tell grids apart"),
    "negative": (negative, f"the probabilities of matmul go down to -0.5 {ON_FEED}"),
}


@pytest.mark.parametrize("kind", DECLINED)
def test_declined(kind: str) -> None:
    body, why = DECLINED[kind]
    before = attention(drawn(), body)
    after, report = run(before)
    assert declined(report) == [("matmul", why)]
    assert text(after) == text(before)


def test_an_axis_that_is_turned_into_the_summed_one_is_not_declined() -> None:
    _, report = run(attention(drawn(), turned_back))
    assert report.fired == 1


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda s, v: whole(1e4 * s, v), f"only 0 and 1 {ON_FEED}, which doesn't tell grids apart"),
        (lambda s, v: whole(s[..., :1], v[..., :1, :]), f"1 everywhere {ON_FEED}"),
    ],
)
def test_a_declined_op_stays_whole(body: Callable[..., Any], why: str) -> None:
    before = attention(drawn(), body)
    after, report = run(before)
    assert declined(report) == [("scaled_dot_product_attention", f"the probabilities of scaled_dot_product_attention are {why}")]
    assert text(after) == text(before)


def test_an_op_that_cannot_be_opened_says_why() -> None:
    built = Builder(q=drawn(), k=drawn(seed=1), v=drawn(seed=2))
    dropping = built.op(torch.ops.aten.scaled_dot_product_attention.default, built.q, built.k, built.v, None, 0.5)
    _, report = run(built.program(dropping))
    assert [why for _, why in declined(report)] == [f"{dropping.name} drops at random in every call, with p = 0.5"]


def test_products_without_softmax_are_nobodys_business() -> None:
    before = attention(drawn(), lambda s, v: s.sigmoid() @ v)
    after, report = run(before)
    assert (report.fired, declined(report), text(after)) == (0, [], text(before))


# passes behind it


def inserted(target: Target, **options: Any) -> tuple[Program, PassReport]:
    """quant.insert behind this pass."""
    program = attention(drawn(spread=4), lambda s, v: eager(s, v * 2))
    manager = Manager(program.copy(), target, program.example, "each", Statistics([program.example]))
    names = (NAME, options), ("quant.insert", {})
    reports = manager.run([(Step(use=name), named(name, **given)) for name, given in names])
    return manager.program, reports[-1]


KERNELS = Target(name="test", activations=(ActivationKernel(families=("product",), activations=("uint8/tensor",)),))


def test_integer_kernels_take_even_steps_and_no_logs() -> None:
    after, report = inserted(KERNELS, candidates=("uniform",))
    assert (report.fired, declined(report)) == (1, [])
    assert [str(n.args[3]) for n in after.graph.nodes if n.target is torch.ops.fxc.dequantize.default] == ["uint8", "uint8"]
    after, report = inserted(KERNELS, candidates=(2,))
    why = "matmul stays in float: test has no kernel for dequantize_default, codes of log8:2"
    assert (report.fired, declined(report)) == (0, [("matmul", why)])


def test_without_kernels_values_are_quantised_beside_logs() -> None:
    after, report = inserted(Target(name="test"), candidates=(2,))
    assert (report.fired, declined(report)) == (1, [])
    assert [str(n.args[3]) for n in after.graph.nodes if n.target is torch.ops.fxc.dequantize.default] == ["log8:2", "uint8"]


def test_ranges_chosen_again_leave_logs_alone() -> None:
    program = attention(drawn(spread=4))
    manager = Manager(program.copy(), Target(name="test"), program.example, "each", Statistics([program.example]))
    reports = manager.run([(Step(use=NAME), named(NAME, candidates=(2,))), (Step(use="quant.ranges"), named("quant.ranges"))])
    assert (reports[-1].fired, declined(reports[-1])) == (0, [])
