"""tidy.fold_norm_gain: gains of whole and spelled-out norms, shifts, signs; refusals with the engine's reasons; faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fxcompress.capture import capture
from fxcompress.errors import ContractViolation
from fxcompress.passes import vectors
from fxcompress.passes.tidy.fold_norm_gain import FoldNormGain
from fxcompress.program import Program
from tests.passes.helpers import declined, error, function, lines, planted, run, seeded, text, zoo
from tests.passes.spelled import CENTRED, ROOTS
from tests.zoo import ENCODER, GROUPED, PROMPT, TEXT, transformers

X, W, V = seeded(2, 3, 6), seeded(5, 6, seed=1), seeded(4, 6, seed=2)
G, B, C = seeded(6, seed=3).abs() + 0.5, seeded(6, seed=4), seeded(5, seed=5)
SIGNED = G * torch.tensor([1.0, -1, 1, 1, -1, 1])


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def folding(**options: Any) -> FoldNormGain:
    return FoldNormGain(FoldNormGain.Options(**options))


def layer_norm(g: Tensor = G) -> Program:
    """One norm with two readers, of which one has a bias."""

    def body(x: Tensor, g: Tensor, b: Tensor, w: Tensor, v: Tensor, c: Tensor) -> Any:
        y = nnf.layer_norm(x, (6,), g, b)
        return nnf.linear(y, w, c), nnf.linear(y, v)

    return function(body, X, g=g, b=B, w=W, v=V, c=C, dynamic=False)


NORMS: dict[str, Callable[..., Tensor]] = {
    "whole": lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), g, 1e-6), w),
    "gain first": lambda x, g, w: nnf.linear(g * rms(x), w),
    "gain last": lambda x, g, w: nnf.linear(rms(x) * g, w),
    "squared by product": lambda x, g, w: nnf.linear(x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * g, w),
    "cast": lambda x, g, w: nnf.linear(g * rms(x.double()).float(), w),
    "layer norm": lambda x, g, w: nnf.linear(nnf.layer_norm(x, (6,), g), w),
}


@pytest.mark.parametrize("gain", [pytest.param(G, id="positive"), pytest.param(SIGNED, id="signed")])
@pytest.mark.parametrize("body", [pytest.param(b, id=i) for i, b in NORMS.items()])
def test_gain(body: Callable[..., Tensor], gain: Tensor) -> None:
    before = function(body, X, g=gain, w=W, dynamic=False)
    after, report = run(before, folding())
    assert text(after) == text(before)
    assert declined(report) == []
    assert torch.equal(after.constants["g"], torch.ones(6))
    assert torch.allclose(after.constants["w"], W * gain, rtol=1e-6, atol=0)
    assert error(before, after) < 1e-5


def test_gain_and_beta_go_to_products_without_a_bias() -> None:
    """They get an addition, which stands for the product from then on."""
    before = function(lambda x, g, b, w: nnf.layer_norm(x, (6,), g, b) @ w, X, g=G, b=B, w=W.T.contiguous(), dynamic=False)
    after, report = run(before, folding(beta=True))
    assert (report.fired, declined(report)) == (3, [])
    assert text(after) == lines("""
        layer_norm = layer_norm(x, [6], %g, None, 1e-05, False)
        matmul_default = matmul(layer_norm, %w)
        add_tensor = add.Tensor(matmul_default, %matmul.bias)
        return add_tensor
    """)
    assert error(before, after) < 1e-5


def test_beta_stays() -> None:
    after, report = run(layer_norm(), folding())
    assert text(after) == text(layer_norm())
    assert (report.fired, declined(report)) == (1, [])
    assert torch.allclose(after.constants["b"], B / G, rtol=1e-6, atol=0)
    assert error(layer_norm(), after) < 1e-5


def test_beta_moves_on() -> None:
    after, report = run(layer_norm(), folding(beta=True))
    assert text(after) == lines("""
        layer_norm = layer_norm(x, [6], %g, None, 1e-05, False)
        linear = linear(layer_norm, %w, %c)
        linear_1 = linear(layer_norm, %v, %linear_1.bias)
        return linear, linear_1""")
    assert (report.fired, declined(report)) == (3, [])
    assert "b" not in after.constants
    assert torch.allclose(after.constants["c"], C + W @ B, rtol=1e-5, atol=1e-6)
    assert torch.allclose(after.constants["linear_1.bias"], V @ B, rtol=1e-5, atol=1e-6)
    assert error(layer_norm(), after) < 1e-5


@pytest.mark.parametrize("form", [pytest.param(f, id=i) for i, f in {**ROOTS, **CENTRED}.items()])
@pytest.mark.parametrize("beta", [False, True])
def test_spelled_out(form: Callable[[Tensor], Tensor], beta: bool) -> None:
    """Gain and shift of whatever divides a length of x out of x, on either side of the shift."""
    before = function(lambda x, g, b, w, c: nnf.linear(form(x) * g + b, w, c), X, g=SIGNED, b=B, w=W, c=C, dynamic=False)
    after, report = run(before, folding(beta=beta))
    assert text(after) == text(before)
    assert declined(report) == []
    assert torch.equal(after.constants["g"], torch.ones(6))
    assert torch.allclose(after.constants["b"], torch.zeros(6) if beta else B / SIGNED, rtol=1e-6, atol=0)
    assert torch.allclose(after.constants["w"], W * SIGNED, rtol=1e-6, atol=0)
    assert error(before, after) < 1e-5
    again, report = run(after, folding(beta=beta))
    assert (report.fired, declined(report), text(again)) == (0, [], text(after))


def test_channels_first() -> None:
    """The norm of a convolutional network, over axis 1."""

    def body(x: Tensor, g: Tensor, b: Tensor, w: Tensor) -> Tensor:
        c = x - x.mean(1, keepdim=True)
        y = c / torch.sqrt(c.pow(2).mean(1, keepdim=True) + 1e-6)
        return nnf.conv2d(g[:, None, None] * y + b[:, None, None], w)

    before = function(body, seeded(2, 6, 3, 4), g=G, b=B, w=W[..., None, None], dynamic=False)
    after, report = run(before, folding())
    assert (report.fired, declined(report)) == (1, [])
    assert torch.equal(after.constants["g"], torch.ones(6))
    assert error(before, after) < 1e-5


NO_NORMS: dict[str, Callable[..., Tensor]] = {
    "a gate": lambda x, g, w: nnf.linear(x * x.mean(-1, keepdim=True).sigmoid() * g, w),
    "a length squared": lambda x, g, w: nnf.linear(x / (x * x).sum(-1, keepdim=True) * g, w),
    "of another value": lambda x, g, w: nnf.linear(x * torch.rsqrt((x.sin() ** 2).mean(-1, keepdim=True) + 1e-6) * g, w),
    "of all tokens": lambda x, g, w: nnf.linear(x * torch.rsqrt((x**2).mean((1, 2), keepdim=True)) * g, w),
}


@pytest.mark.parametrize("body", [pytest.param(b, id=i) for i, b in NO_NORMS.items()])
def test_what_leaves_the_size_of_x_is_no_norm(body: Callable[..., Tensor]) -> None:
    before = function(body, X, g=G, w=W, dynamic=False)
    after, report = run(before, folding())
    assert (report.fired, declined(report), text(after)) == (0, [], text(before))


def tied(ids: Tensor, g: Tensor, w: Tensor) -> Tensor:
    return nnf.linear(nnf.rms_norm(nnf.embedding(ids, w), (6,), g), w)


def shared_by_two(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
    return nnf.linear(nnf.layer_norm(x, (6,), g), w) + nnf.linear(nnf.layer_norm(x * 2, (6,), g), w).sigmoid()


REFUSED: dict[str, tuple[Callable[..., Any], Any, Tensor, str]] = {
    "an output": (lambda x, g, w: [y := nnf.rms_norm(x, (6,), g), nnf.linear(y, w)], X, G, "the value is an output of the program"),
    "an activation": (
        lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), g).sigmoid(), w),
        X,
        G,
        "sigmoid (sigmoid) doesn't commute with a scale",
    ),
    "a tied head": (
        tied,
        torch.tensor([[1, 2, 4]]),
        G,
        "linear is tied, its weight w is the embedding's too, and so the statistics of rms_norm would change",
    ),
    "not finite": (lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), g), w), X, G / (G[1] != G), "rms_norm has a gain that isn't finite, g"),
    "computed from constants": (
        lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), 1 + g), w),
        X,
        G,
        "rms_norm has a gain that is computed, add: tidy.fold_constants makes a constant of it",
    ),
    "0 where one channel can't be left alone": (
        lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), g).unflatten(-1, (3, 2)), w[:, :2]),
        X,
        torch.tensor([1.0, 1, 0, 1, 1, 1]),
        "g is 0 where a reader can't tell channels apart",
    ),
    "computed": (lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), g + x[0, 0]), w), X, G, "rms_norm has a gain that is computed, add"),
    "the gain read elsewhere": (
        lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), g), w) + g.sigmoid().sum(),
        X,
        G,
        "sigmoid (sigmoid) doesn't commute with a scale",
    ),
    "channels seen as one": (
        lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), g).unflatten(-1, (3, 2)), w[:, :2]),
        X,
        G,
        "g differs between channels that a reader can't tell apart",
    ),
}


@pytest.mark.parametrize(("body", "x", "gain", "reason"), [pytest.param(*c, id=i) for i, c in REFUSED.items()])
def test_refuses(body: Callable[..., Any], x: Tensor, gain: Tensor, reason: str) -> None:
    before = function(body, x, g=gain, w=W, dynamic=False)
    after, report = run(before, folding())
    assert text(after) == text(before)
    assert report.fired == 0
    assert declined(report) == [("rms_norm", reason)]
    assert all(torch.equal(after.constants[n], t) for n, t in before.constants.items())


def test_refuses_a_shift_that_padding_would_see() -> None:
    def body(x: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return nnf.conv1d(nnf.layer_norm(x, (6,), None, b).transpose(1, 2), w[..., None].expand(-1, -1, 3).contiguous(), padding=1)

    before = function(body, X, b=B, w=W, dynamic=False)
    before, _ = run(before, "tidy.fold_constants")
    after, report = run(before, folding(beta=True))
    assert text(after) == text(before)
    assert declined(report) == [("layer_norm.beta", "conv1d pads with zeros, which a shift would have to change")]


DEAD = torch.where(torch.arange(6) == 1, 0.0, SIGNED)
WITH_DEAD: dict[str, Callable[..., Tensor]] = {
    **{name: NORMS[name] for name in ("whole", "gain first", "layer norm")},
    "behind an activation": lambda x, g, w: nnf.linear((rms(x) * g.abs()).relu(), w),
    "a product of two values": lambda x, g, w: nnf.rms_norm(x, (6,), g) @ nnf.linear(x, w.T @ w, w[0]).transpose(1, 2),
    "a shift elsewhere": lambda x, g, w: nnf.linear(nnf.layer_norm(x, (6,), g, DEAD_SHIFT), w),
    "two alike": lambda x, g, w: nnf.linear(nnf.rms_norm(x, (6,), g), w) * nnf.linear(nnf.rms_norm(x.sin(), (6,), g.clone()), w),
}
DEAD_SHIFT = torch.where(torch.arange(6) == 1, 0.0, B)


@pytest.mark.parametrize("body", [pytest.param(b, id=i) for i, b in WITH_DEAD.items()])
def test_channels_of_gain_0_are_read_no_more(body: Callable[..., Tensor]) -> None:
    before, _ = run(function(body, X, g=DEAD, w=W, dynamic=False), "tidy.fold_constants")
    after, report = run(before, folding())
    assert declined(report) == []
    assert text(after) == text(before)
    gains = [n for n, t in before.constants.items() if t.shape == (6,) and (torch.equal(t, DEAD) or torch.equal(t, DEAD.abs()))]
    assert gains
    assert all(torch.equal(after.constants[n], torch.ones(6)) for n in gains)
    assert error(before, after) < 1e-5
    assert [s.reason for s in report.changes][-1] == "1 channels of gain 0 are read no more"
    again, report = run(after, folding())
    assert (report.fired, declined(report), text(again)) == (0, [], text(after))


def test_a_dead_channel_that_a_shift_keeps_alive_stays() -> None:
    before = function(lambda x, g, b, w: nnf.linear(nnf.layer_norm(x, (6,), g, b), w), X, g=DEAD, b=B, w=W, dynamic=False)
    after, report = run(before, folding())
    assert (report.fired, declined(report)) == (0, [("layer_norm", "g is 0 for channels to which b gives something else")])
    assert all(torch.equal(after.constants[n], t) for n, t in before.constants.items())


def test_the_contract_sees_a_dead_channel_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, vectors, "_dead_in", torch.zeros_like)
    with pytest.raises(ContractViolation, match=r"tidy\.fold_norm_gain breaks its exact contract"):
        run(function(NORMS["whole"], X, g=DEAD, w=W, dynamic=False), folding())


def read_together(x: Tensor, g: Tensor, h: Tensor, w: Tensor) -> Tensor:
    return nnf.linear(nnf.rms_norm(x, (6,), g), w) * nnf.linear(nnf.rms_norm(x.sin(), (6,), h), w)


def test_different_gains_of_one_layer_stay() -> None:
    """Either would only go into the other, and back in the next run."""
    before = function(read_together, X, g=G, h=G.flip(0), w=W, dynamic=False)
    after, report = run(before, folding())
    why = "{} and {} are gains of two norms, and one would go into the other"
    assert (report.fired, declined(report)) == (0, [("rms_norm", why.format("g", "h")), ("rms_norm_1", why.format("h", "g"))])
    assert all(torch.equal(after.constants[n], t) for n, t in before.constants.items())


@pytest.mark.parametrize("other", [G, G.flip(0)], ids=["equal", "different"])
def test_gains_of_two_factors_stay(other: Tensor) -> None:
    """Of queries and keys that are normed: one is multiplied by what the other is divided by."""
    before = function(
        lambda x, g, h: nnf.rms_norm(x, (6,), g) @ nnf.rms_norm(x.sin(), (6,), h).transpose(1, 2), X, g=G, h=other.clone(), dynamic=False
    )
    after, report = run(before, folding())
    assert report.fired == 0
    assert {reason.split(" are ")[1] for _, reason in declined(report)} == {"gains of two norms, and one would go into the other"}
    assert all(torch.equal(after.constants[n], t) for n, t in before.constants.items())


def test_equal_gains_of_one_layer_fold_at_once() -> None:
    before = function(read_together, X, g=SIGNED, h=SIGNED.clone(), w=W, dynamic=False)
    after, report = run(before, folding())
    assert (report.fired, declined(report)) == (2, [])
    assert all(torch.equal(after.constants[n], torch.ones(6)) for n in "gh")
    assert error(before, after) < 1e-5
    _, report = run(after, folding())
    assert (report.fired, declined(report)) == (0, [])


@pytest.mark.parametrize("mask", [torch.arange(6) > 1, (torch.arange(6) > 1).long()], ids=["bool", "int"])
def test_a_mask_is_no_gain(mask: Tensor) -> None:
    before = function(lambda x, mask, w: nnf.linear(rms(x) * mask, w), X, mask=mask, w=W, dynamic=False)
    after, report = run(before, folding())
    assert all(after.constants[name] is before.constants[name] for name in before.constants)
    assert (report.fired, declined(report)) == (0, [])


def test_a_gain_shared_by_two_norms_folds_once() -> None:
    before = function(shared_by_two, X, g=G, w=W, dynamic=False)
    after, report = run(before, folding())
    assert (report.fired, declined(report)) == (1, [])
    assert error(before, after) < 1e-5


@pytest.mark.parametrize("beta", [False, True])
def test_second_run_changes_nothing(beta: bool) -> None:
    once, _ = run(layer_norm(SIGNED), folding(beta=beta))
    twice, report = run(once, folding(beta=beta))
    assert (report.fired, declined(report)) == (0, [])
    assert text(twice) == text(once)
    assert all(torch.equal(once.constants[n], t) for n, t in twice.constants.items())


FAULTS: dict[str, Callable[[Any], Any]] = {
    "inverse": lambda g: 1 / g,
    "factor": lambda g: g * 1.5,
    "off by one channel": lambda g: g.roll(1),
    "one channel dropped": lambda g: torch.cat([torch.ones(1, dtype=g.dtype), g[1:]]),
    "squared": lambda g: g * g,
}


@pytest.mark.parametrize("fault", [pytest.param(f, id=i) for i, f in FAULTS.items()])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any]) -> None:
    """The numbers of the plan are wrong where the gain is said to be 1."""
    before, right = layer_norm(), vectors.refusal(*_plan_of(layer_norm()))
    assert right == ""
    monkeypatch.setattr(vectors, "refusal", lambda *_: "")
    planted(monkeypatch, vectors, "factors", fault)
    with pytest.raises(ContractViolation, match=r"tidy\.fold_norm_gain breaks its exact contract at 1 of 1 sites"):
        run(before, folding())


def _plan_of(program: Program) -> tuple[Any, Any, Tensor]:
    from fxcompress.transport import Kind, Seed, transport

    leaf = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == "g")
    return transport(program, Kind.SCALE, Seed(leaf, (0,), power=-1)), leaf, G


TIED = "linear is tied, its weight transformer_wte_weight is the embedding's too, and so the statistics of layer_norm would change"
SITES = {"llama": (5, []), "qwen2": (5, []), "gpt2": (4, [("layer_norm_4", TIED)]), "vit": (5, [])}


@pytest.mark.parametrize("name", SITES)
def test_real_model(name: str) -> None:
    before, _ = run(zoo(name), "tidy.fold_constants")
    after, report = run(before, folding())
    assert (report.fired, declined(report)) == SITES[name]
    assert error(before, after) < 1e-5


SPELLERS = {
    "llama4": transformers(
        "Llama4ForCausalLM",
        PROMPT,
        **{**GROUPED, "head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 2, "moe_layers": [], "pad_token_id": 0},
    ),
    "cohere2": transformers(
        "Cohere2ForCausalLM", PROMPT, **GROUPED, sliding_window=4, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False
    ),
}


@pytest.mark.parametrize(("name", "count"), [("llama4", 5), ("cohere2", 3)])
def test_real_models_that_spell_their_norms_out(name: str, count: int) -> None:
    """A cast between norm and gain, and layer norms without a shift; then their streams turn."""
    before, _ = run(capture(*SPELLERS[name]()), "tidy.fold_constants")
    after, report = run(before, folding())
    assert (report.fired, declined(report)) == (count, [])
    assert error(before, after) < 1e-5
    turned, report = run(after, "rotate.residual")
    assert (report.fired, declined(report)) == (3, [])
    assert error(after, turned) < 1e-5


def test_norms_after_the_sum_are_declined() -> None:
    """I-BERT: the next norm's statistics see what comes out of a norm."""
    before, _ = run(capture(*transformers("IBertModel", TEXT, **ENCODER)()), "tidy.fold_constants")
    _, report = run(before, folding())
    assert report.fired == 0
    reasons = [reason.split(" ", maxsplit=1)[1] for _, reason in declined(report)]
    assert reasons == ["sums over the channels that a scale would change"] * 4 + ["value is an output of the program"]


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_shifts_of_real_models(name: str) -> None:
    before, _ = run(zoo(name), "tidy.fold_constants")
    after, report = run(before, folding(beta=True))
    assert report.fired == 3 * 5 - (name == "gpt2")
    assert error(before, after) < 1e-5
