"""signs.bimodal and signs.centre_keys: functions kept, ranges shrunk, what is declined, faults that the contracts catch, real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from torch import Tensor

from fxcompress.calibrate.statistics import Statistics
from fxcompress.checker import check
from fxcompress.interpret import run as interpret
from fxcompress.manager import Manager
from fxcompress.measure import relative_error
from fxcompress.numerics.histogram import Histogram
from fxcompress.numerics.peaks import peaks
from fxcompress.passes.signs.keys import keys_of
from fxcompress.program import Program
from fxcompress.recipe import Step
from fxcompress.report import PassReport
from fxcompress.target import Target
from tests.faults.cases import opened
from tests.passes.helpers import declined, function, named, seeded, zoo
from tests.passes.helpers import run as run_pass

TOKENS, HEADS, SIZE = 6, 2, 4
WIDTH = HEADS * SIZE
OFFSETS = 5.0 * torch.where(torch.arange(WIDTH) % 3 == 0, -1.0, 1.0)
Body = Callable[..., Tensor]


def run(program: Program, use: str, **options: Any) -> tuple[Program, PassReport]:
    """(a copy after the pass, its report), calibrated on the example and half of it."""
    feed = [program.example, [v / 2 if v.is_floating_point() else v for v in program.example]]
    manager = Manager(program.copy(), Target(name="test"), feed[0], "each", Statistics(feed))
    return manager.program, manager.run([(Step(use=use), named(use, **options))])[-1]


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)


def attention(change: Body = F.scaled_dot_product_attention, bias: Tensor | None = OFFSETS, mean: float = 0.0, first: float = 1.0) -> Program:
    """One attention whose keys have these offsets. first: times the weights of the first channel of the keys."""

    def body(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, **b: Tensor) -> Tensor:
        q, k, v = split(F.linear(x, wq)), split(F.linear(x, wk, b.get("bk"))), split(F.linear(x, wv))
        return change(q, k, v).transpose(1, 2).flatten(-2)

    weights = {name: seeded(WIDTH, WIDTH, seed=i) / 3 for i, name in enumerate(("wq", "wk", "wv"))}
    weights["wk"][0] *= first
    return function(body, seeded(2, TOKENS, WIDTH, seed=9) + mean, **weights, **({} if bias is None else {"bk": bias}))


def spread(program: Program) -> float:
    """The range of the first attention's keys."""
    keys, values = next(iter(keys_of(program))), {}
    interpret(program, program.example, lambda node, value: values.__setitem__(node, value) if node is keys.value else None)
    value = values[keys.value]
    return float(value.max() - value.min())


def outputs(program: Program) -> Tensor:
    return interpret(program, program.example)[0]


@pytest.mark.parametrize("options", [{}, {"when": "two_peaks"}], ids=str)
def test_signs_leave_every_bit_and_halve_the_range(options: dict[str, Any]) -> None:
    before = attention()
    after, report = run(before, "signs.bimodal", **options)
    assert report.fired == 1
    assert torch.equal(outputs(before), outputs(after))
    assert spread(after) < 0.7 * spread(before)
    assert run(after, "signs.bimodal", **options)[1].fired == 0


def test_centring_takes_all_of_an_offset() -> None:
    """Keys with offsets, centred, have the range of keys that never had any, centred."""
    planted, _ = run(attention(), "signs.centre_keys")
    clean, _ = run(attention(bias=torch.zeros(WIDTH)), "signs.centre_keys")
    assert relative_error(outputs(attention()), outputs(planted)) < 1e-5
    assert spread(planted) == pytest.approx(spread(clean), rel=1e-4)
    assert run(planted, "signs.centre_keys")[1].fired == 0


@pytest.mark.parametrize("first", [1e-3, 1e-4, 1e-8, 0.0])
def test_centring_takes_an_offset_that_keys_hardly_leave(first: float) -> None:
    """The keys less it are rounding noise as they were computed before, and are right now."""
    before = attention(first=first)
    after, report = run(before, "signs.centre_keys")
    assert report.fired == 1
    assert relative_error(outputs(before), outputs(after)) < 1e-5


def test_keys_without_a_bias_get_one() -> None:
    skewed = attention(bias=None, mean=2.0)
    after, report = run(skewed, "signs.centre_keys")
    assert report.fired == 1
    assert len(after.constants) == len(skewed.constants) + 1
    assert relative_error(outputs(skewed), outputs(after)) < 1e-5


@pytest.mark.parametrize("use", ["signs.bimodal", "signs.centre_keys"])
def test_an_opened_attention_is_one_site(use: str) -> None:
    opened_attention, _ = run_pass(attention(), "tidy.open_attention")
    after, report = run(opened_attention, use)
    assert report.fired == 1
    assert relative_error(outputs(opened_attention), outputs(after)) < 1e-5


def rotary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angles = torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.3, 1.0, 0.3])

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    return F.scaled_dot_product_attention(turn(q), turn(k), v)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tanh() * 3).softmax(-1) @ v


LATER = torch.ones(TOKENS, TOKENS).triu(1).bool()
LOWEST = torch.finfo(torch.float32).min
MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill": lambda scores: (scores / 2).masked_fill(LATER, -torch.inf),
    "masked_fill by a tensor": lambda scores: scores.masked_fill(LATER, torch.tensor(-1e9)),
    "where": lambda scores: torch.where(LATER, LOWEST, scores * 0.5),
    "where, scores first": lambda scores: torch.where(~LATER, scores, torch.full((), LOWEST)),
    "a row without a key": lambda scores: scores.masked_fill(LATER | (torch.arange(TOKENS) == 2)[:, None], LOWEST),
    "two masks": lambda scores: (scores + torch.arange(TOKENS)).masked_fill(LATER, -1e9).masked_fill(LATER.mT & LATER, -1e8),
}


@pytest.mark.parametrize("name", MASKED)
def test_centring_passes_masks_that_fill(name: str) -> None:
    """Softmax gives 0 to what a mask has filled in, whatever the other scores are."""
    program = attention(lambda q, k, v: MASKED[name](q @ k.mT).softmax(-1) @ v)
    after, report = run(program, "signs.centre_keys")
    assert (report.fired, declined(report)) == (1, [])
    assert relative_error(outputs(program), outputs(after)) < 1e-5
    assert spread(after) < 0.7 * spread(program)


CENTRED: dict[str, tuple[Body, str]] = {
    "rotary": (rotary, "a factor that isn't one number"),
    "soft cap": (capped, "tanh lies between matmul and a softmax, which then can't take off a shift of m_t"),
    "a mask that hides nothing": (
        lambda q, k, v: (q @ k.mT).masked_fill(LATER, 0.0).softmax(-1) @ v,
        "masked_fill lies between matmul and a softmax",
    ),
    "a mask made smaller": (lambda q, k, v: (q @ k.mT).masked_fill(LATER, -1e9).mul(1e-9).softmax(-1) @ v, "mul lies between matmul and"),
    "keys are values too": (lambda q, k, v: F.scaled_dot_product_attention(q, k, k), "output of the program"),
}


@pytest.mark.parametrize("name", CENTRED)
def test_centring_is_declined_with_what_stops_it(name: str) -> None:
    change, why = CENTRED[name]
    program = attention(change)
    after, report = run(program, "signs.centre_keys")
    assert report.fired == 0
    assert torch.equal(outputs(program), outputs(after))
    assert why in declined(report)[0][1]


@pytest.mark.parametrize("change", [rotary, capped], ids=["rotary", "soft cap"])
def test_signs_pass_where_shifts_stop(change: Body) -> None:
    """Rotary pairs get one sign; a cap sees the same scores. Bit for bit."""
    pairs = 5.0 * torch.tensor([-1.0, 1, -1, 1]).repeat(HEADS)
    program = attention(change, pairs)
    after, report = run(program, "signs.bimodal")
    assert report.fired == (1 if change is capped else report.fired)
    assert torch.equal(outputs(program), outputs(after))


def test_keys_on_one_side_stay() -> None:
    program = attention(bias=OFFSETS.abs())
    assert "mean below 0" in declined(run(program, "signs.bimodal")[1])[0][1]
    assert run(program, "signs.centre_keys")[1].fired == 1


@pytest.mark.parametrize("use", ["signs.bimodal", "signs.centre_keys"])
def test_a_change_on_one_side_only_is_caught(use: str) -> None:
    """Each constant that the pass changed, put back alone."""
    program = attention()
    old = dict(program.constants)
    edit = opened(program, named(use))
    contract = named(use).contract
    changed = [n for n in old if not torch.equal(old[n], program.constants[n])]
    assert len(changed) == (3 if use == "signs.bimodal" else 1)
    for name in changed:
        new, program.constants[name] = program.constants[name], old[name]
        assert any(m.verdict == "broken" for m in check(program, edit, contract, program.example)), name
        program.constants[name] = new


def test_signs_of_the_wrong_head_are_caught() -> None:
    """The queries' signs put in order of another grouping of heads."""
    program = attention(bias=5.0 * torch.tensor([-1.0, 1, 1, 1, 1, -1, -1, 1]))
    old = program.constants["wq"]
    edit = opened(program, named("signs.bimodal"))
    turned = program.constants["wq"] / old
    assert not torch.equal(turned, turned.roll(SIZE, 0))
    program.constants["wq"] = old * turned.roll(SIZE, 0)
    assert any(m.verdict == "broken" for m in check(program, edit, named("signs.bimodal").contract, program.example))


def normed(norm: Callable[[Tensor], Tensor]) -> Body:
    """Attention with a norm of queries and keys, head by head."""
    return lambda q, k, v: F.scaled_dot_product_attention(norm(q), norm(k), v)


def test_signs_pass_a_norm_without_a_mean_and_stop_at_one_with() -> None:
    """And folded through the latter all the same, they change the result."""
    program = attention(normed(lambda x: F.rms_norm(x, (SIZE,), eps=1e-6)))
    after, report = run(program, "signs.bimodal")
    assert report.fired == 1
    assert torch.equal(outputs(program), outputs(after))
    program = attention(normed(lambda x: F.layer_norm(x, (SIZE,))))
    after, report = run(program, "signs.bimodal")
    assert report.fired == 0
    assert "layer_norm" in declined(report)[0][1]
    for name in ("wq", "wk", "bk"):
        value = after.constants[name]
        after.constants[name] = value * OFFSETS.sign().reshape(-1, *[1] * (value.dim() - 1))
    assert relative_error(outputs(program), outputs(after)) > 0.1


def test_a_mean_of_nothing_has_a_sign() -> None:
    """A dead key channel must not take its query with it."""
    program = attention()
    rows = program.constants["wk"].clone()
    rows[0] = 0
    program.constants["wk"] = rows
    program.constants["bk"] = OFFSETS.clone().index_fill_(0, torch.tensor([0]), 0.0)
    after, _ = run(program, "signs.bimodal")
    assert all(bool((after.constants[n].abs() == program.constants[n].abs()).all()) for n in ("wq", "wk", "bk"))


def histogram(*values: np.ndarray) -> Histogram:
    found = Histogram()
    for value in values:
        found.add(torch.from_numpy(value))
    return found


def test_peaks() -> None:
    rng = np.random.default_rng(0)
    lump = rng.normal(size=4000)
    assert [peaks(histogram(lump)), peaks(histogram(lump - 8, lump + 8)), peaks(histogram(lump - 12, lump, lump + 12))] == [1, 2, 3]
    assert [peaks(histogram()), peaks(histogram(np.ones(9))), peaks(histogram(np.zeros(1)))] == [0, 0, 0]


def test_peaks_are_those_of_scipy() -> None:
    stats, signal = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.signal")
    rng = np.random.default_rng(1)
    for distance in np.linspace(0, 9, 10):
        values = np.concatenate([rng.normal(size=1000) - distance / 2, rng.normal(size=600) + distance / 2])
        density = stats.gaussian_kde(values)(np.linspace(values.min(), values.max(), 128))
        found, _ = signal.find_peaks(density, height=0.01 * density.sum(), distance=32)
        assert peaks(histogram(values)) == len(found), distance


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "vit", "detr", "dit", "llama", "whisper_encoder", "t5", "swin", "sd3"])
@pytest.mark.parametrize("use", ["signs.bimodal", "signs.centre_keys"])
def test_real_models_keep_their_outputs(name: str, use: str) -> None:
    """Every attention is a site that fires, or is declined with its reason."""
    program = zoo(name)
    after, report = run(program, use)
    assert report.fired + len(declined(report)) == len(list(keys_of(program))) > 0
    limit = 0.0 if use == "signs.bimodal" else 1e-4
    old, new = interpret(program, program.example), interpret(after, after.example)
    assert max(relative_error(a, b) for a, b in zip(old, new, strict=True) if a.is_floating_point()) <= limit
