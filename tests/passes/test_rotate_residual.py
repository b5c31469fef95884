"""rotate.residual: the stream turns as one, values per head, tied heads keep their table; refusals with the engine's reasons; faults."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.edit import Edit
from fxcompress.errors import ContractViolation
from fxcompress.interpret import run as interpret
from fxcompress.measure import relative_error
from fxcompress.numerics.hadamard import mean_keeping, randomised_hadamard
from fxcompress.passes.rotate import residual
from fxcompress.passes.rotate.residual import Residual
from fxcompress.passes.tidy.fold_norm_gain import FoldNormGain
from fxcompress.program import Program
from fxcompress.rewrite import Context
from fxcompress.target import Target
from fxcompress.transport import Plan
from tests.held_out import CAUSAL_TEXT, ENCODED_TEXT
from tests.passes import spelled as spelled_out
from tests.passes.helpers import declined, error, function, lines, planted, run, seeded, text, zoo
from tests.zoo import GROUPED, IMAGE, PIXELS, PROMPT, transformers

IDS = torch.tensor([[1, 2, 4], [3, 3, 0]])
D, HEADS = 12, 3
E, G = seeded(7, D), seeded(D, seed=1).abs() + 0.5
WQ, WV, WO, W1, W2, H = (seeded(D, D, seed=i) / D**0.5 for i in range(2, 8))
WEIGHTS = {"e": E, "wq": WQ, "wv": WV, "wo": WO, "w1": W1, "w2": W2, "h": H}


def turning(**options: Any) -> Residual:
    return Residual(Residual.Options(**options))


def norm(x: Tensor, g: Tensor | None = None) -> Tensor:
    return nnf.rms_norm(x, (D,), g, 1e-6)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def block(ids: Tensor, e: Tensor, wq: Tensor, wv: Tensor, wo: Tensor, w1: Tensor, w2: Tensor, h: Tensor) -> Tensor:
    """One layer of a language model: attention whose queries are its keys, a perceptron, a head."""
    x = nnf.embedding(ids, e)
    y = norm(x)
    q, v = heads(nnf.linear(y, wq)), heads(nnf.linear(y, wv))
    x = x + nnf.linear(nnf.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2), wo)
    x = x + nnf.linear(nnf.silu(nnf.linear(norm(x), w1)), w2)
    return nnf.linear(norm(x), h)


def layer() -> Program:
    return function(block, IDS, **WEIGHTS, dynamic=False)


def test_the_stream_turns() -> None:
    """Before and after by their weights: the graph stays as it is. R is the same on every side of the stream."""
    after, report = run(layer(), turning(values=False, seed=3))
    R, c = randomised_hadamard(D, 3).float(), after.constants
    assert text(after) == text(layer())
    assert (report.fired, declined(report), [s.site for s in report.changes]) == (1, [], ["<root>  (rms_norm)"])
    wanted = {"e": E @ R, "wq": WQ @ R, "wv": WV @ R, "wo": R.T @ WO, "w1": W1 @ R, "w2": R.T @ W2, "h": H @ R}
    assert all(torch.allclose(c[n], w, atol=1e-5) for n, w in wanted.items())
    assert error(layer(), after) < 1e-5


def test_values_turn_per_head() -> None:
    at = function(lambda x, q, wv, wo: nnf.linear(attended(q, nnf.linear(x, wv)), wo), X, Q, wv=WV, wo=WO, dynamic=False)
    after, report = run(at, turning())
    size = D // HEADS
    R = torch.block_diag(*(randomised_hadamard(size, n) for n in range(HEADS))).float()
    assert text(after) == text(at)
    assert [s.reason for s in report.changes] == [f"turned in {HEADS} blocks"]
    assert torch.allclose(after.constants["wv"], R.T @ WV, atol=1e-5)
    assert torch.allclose(after.constants["wo"], WO @ R, atol=1e-5)
    assert error(at, after) < 1e-5


X, Q = seeded(2, 3, D, seed=9), seeded(2, HEADS, 3, D // HEADS, seed=10)


def attended(q: Tensor, v: Tensor) -> Tensor:
    return nnf.scaled_dot_product_attention(q, q, heads(v)).transpose(1, 2).flatten(2)


def test_opened_attention() -> None:
    before, _ = run(layer(), "tidy.open_attention")
    after, report = run(before, turning())
    assert (report.fired, declined(report)) == (2, [])
    assert error(before, after) < 1e-5


Mix = Callable[..., Tensor]


def spelled(x: Tensor, wq: Tensor, wv: Tensor, wo: Tensor, mix: Mix) -> Tensor:
    """Attention whose product with the values is mix(q, k, v), back to [examples, tokens, heads, channels]."""
    q, v = heads(nnf.linear(x, wq)), heads(nnf.linear(x, wv))
    return nnf.linear(mix(q, q + 1, v).flatten(2), wo)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / 2


def seen(q: Tensor) -> Tensor:
    """A mask that the inputs decide."""
    return (q.mean((1, 3))[:, None, None] > 0).float() + 0.5


def in_batch(q: Tensor, k: Tensor, v: Tensor, product: Any = torch.bmm) -> Tensor:
    tokens, size = v.shape[2:]
    q, k, v = (t.reshape(-1, tokens, size) for t in (q, k, v))
    return product(scores(q, k).softmax(-1), v).view(-1, HEADS, tokens, size).transpose(1, 2)


SPELLED: dict[str, Mix] = {
    "softmax": lambda q, k, v: (scores(q, k).softmax(-1) @ v).transpose(1, 2),
    "masked after the softmax": lambda q, k, v: ((scores(q, k).softmax(-1) * seen(q)) @ v).transpose(1, 2),
    "made sums of one again": lambda q, k, v: ((p := scores(q, k).exp()) / p.sum(-1, keepdim=True) @ v).transpose(1, 2),
    "relu": lambda q, k, v: (scores(q, k).relu() @ v).transpose(1, 2),
    "sigmoid": lambda q, k, v: (scores(q, k).sigmoid() @ v).transpose(1, 2),
    "nothing": lambda q, k, v: (scores(q, k) @ v).transpose(1, 2),
    "linear": lambda q, k, v: (q.relu() @ (k.relu().transpose(-1, -2) @ v)).transpose(1, 2),
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
    "einsum, values first": lambda q, k, v: torch.einsum("bhjd,bhij->bihd", v, scores(q, k).relu()),
    "einsum of three": lambda q, k, v: torch.einsum("bhid,bhjd,bhje->bihe", q, k, v),
    "values first": lambda q, k, v: (v.transpose(-1, -2) @ scores(q, k).sigmoid()).permute(0, 3, 1, 2),
    "in the batch": in_batch,
    "in the batch, added to": lambda q, k, v: in_batch(q, k, v, lambda p, v: torch.baddbmm(v, p.relu(), v, beta=0.5)),
    "the values' own products": lambda q, k, v: (scores(v, v).relu() @ v).transpose(1, 2),
}


@pytest.mark.parametrize("dynamic", [False, None], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", list(SPELLED))
def test_values_turn_whatever_weighs_them(name: str, dynamic: bool | None) -> None:
    """Heads that share an axis with a batch of any size share a rotation. What multiplies them has no site of its own."""
    before = function(lambda x, wq, wv, wo: spelled(x, wq, wv, wo, SPELLED[name]), X, wq=WQ, wv=WV, wo=WO, dynamic=dynamic)
    after, report = run(before, turning())
    is_shared = dynamic is None and "batch" in name
    assert (report.fired, declined(report)) == (1, [])
    assert [s.reason for s in report.changes] == [f"turned in {1 if is_shared else HEADS} blocks"]
    assert [n for n, t in before.constants.items() if not torch.equal(t, after.constants[n])] == ["wv", "wo"]
    assert error(before, after) < 1e-5
    again, report = run(after, turning(seed=1))
    assert (report.fired, declined(report), text(again)) == (0, [], text(after))


STUCK: dict[str, tuple[Mix, list[tuple[str, str]]]] = {
    "a gate": (
        lambda q, k, v: (scores(q, k).relu() @ v * q.sigmoid()).transpose(1, 2),
        [("matmul_1", "mul multiplies the channels by different factors, sigmoid")],
    ),
    "a function": (
        lambda q, k, v: nnf.gelu(scores(q, k).relu() @ v).transpose(1, 2),
        [("matmul_1", "gelu (gelu) doesn't commute with a rotate")],
    ),
    "weights that see the values": (
        lambda q, k, v: (scores(v.relu(), k).sigmoid() @ v).transpose(1, 2),
        [("matmul_1", "relu (relu) doesn't commute with a rotate")],
    ),
    "weights that are the values": (
        lambda q, k, v: (v.transpose(-1, -2).softmax(-1) @ v).transpose(1, 2),
        [("matmul", "softmax doesn't commute with a rotate along its axis")],
    ),
}


@pytest.mark.parametrize("name", list(STUCK))
def test_values_that_something_sees_stay(name: str) -> None:
    mix, wanted = STUCK[name]
    before = function(lambda x, wq, wv, wo: spelled(x, wq, wv, wo, mix), X, wq=WQ, wv=WV, wo=WO, dynamic=False)
    after, report = run(before, turning())
    assert (report.fired, declined(report), text(after)) == (0, wanted, text(before))


def test_products_that_no_layer_reads_have_no_site() -> None:
    """Scores alone, and what goes on to a softmax."""
    before = function(lambda x, wq, wv: scores(heads(nnf.linear(x, wq)), heads(nnf.linear(x, wv))).softmax(-1), X, wq=WQ, wv=WV, dynamic=False)
    _, report = run(before, turning())
    assert (report.fired, declined(report)) == (0, [])


TIED: dict[str, Callable[..., Tensor]] = {
    "gain": lambda ids, e, w, g: nnf.linear(norm(stream(ids, e, w), g), e),
    "no gain": lambda ids, e, w, g: nnf.linear(norm(stream(ids, e, w)), e),
}


def stream(ids: Tensor, e: Tensor, w: Tensor) -> Tensor:
    x = nnf.embedding(ids, e)
    return x + nnf.linear(norm(x), w)


def test_a_tied_head_gets_a_layer_before_it() -> None:
    before = function(TIED["gain"], IDS, e=E, w=W1, g=G, dynamic=False)
    after, report = run(before, turning())
    assert text(after) == lines("""
        embedding = embedding(%e, ids)
        rms_norm = rms_norm(embedding, [12], None, 1e-06)
        linear = linear(rms_norm, %w)
        add = add.Tensor(embedding, linear)
        rms_norm_1 = rms_norm(add, [12], %g, 1e-06)
        linear_default = linear(rms_norm_1, %rms_norm_1.rotate)
        linear_1 = linear(linear_default, %e)
        return linear_1""")
    R = randomised_hadamard(D, 0).float()
    assert torch.allclose(after.constants["rms_norm_1.rotate"], R.T @ torch.diag(G) @ R, atol=1e-5)
    assert torch.allclose(after.constants["e"], E @ R, atol=1e-5)
    assert declined(report) == []
    assert error(before, after) < 1e-5


def test_a_tied_head_without_gain_needs_no_layer() -> None:
    before = function(TIED["no gain"], IDS, e=E, w=W1, g=G, dynamic=False)
    after, report = run(before, turning())
    assert text(after) == text(before)
    assert (report.fired, declined(report)) == (1, [])


def test_no_layer_is_left_where_the_stream_stays() -> None:
    """The stream is handed out as well: a layer before the tied head would be for nothing."""

    def body(ids: Tensor, e: Tensor, w: Tensor, g: Tensor) -> Any:
        x = stream(ids, e, w)
        return nnf.linear(norm(x, g), e), x

    before = function(body, IDS, e=E, w=W1, g=G, dynamic=False)
    after, report = run(before, turning())
    assert text(after) == text(before)
    assert after.constants.keys() == before.constants.keys()
    assert (report.fired, declined(report)) == (0, [("rms_norm", "the value is an output of the program")])


SCALED: dict[str, Callable[..., Tensor]] = {
    "at once": lambda y, w, s: nnf.linear(y, w) * s,
    "through dropout": lambda y, w, s: s * nnf.dropout(nnf.linear(y, w), 0.1, training=False),
    "a product": lambda y, w, s: s[None, None] * (y @ w.T),
    "of two layers": lambda y, w, s: (nnf.linear(y, w) + nnf.linear(y * 0.5, w)) * s,
}


@pytest.mark.parametrize("zeros", [0, 2])
@pytest.mark.parametrize("head", ["tied", "own"])
@pytest.mark.parametrize("branch", [pytest.param(b, id=i) for i, b in SCALED.items()])
def test_a_scaled_branch_takes_its_scale_first(branch: Callable[..., Tensor], head: str, zeros: int) -> None:
    """What a LayerScale multiplies is made by a layer, whose rows it goes into."""

    def body(ids: Tensor, e: Tensor, w: Tensor, v: Tensor, s: Tensor, h: Tensor, g: Tensor) -> Tensor:
        x = nnf.embedding(ids, e)
        x = x + nnf.linear(norm(x), w)
        x = x + branch(norm(x), v, s)
        return nnf.linear(norm(x, g), e) if head == "tied" else nnf.linear(norm(x), h)

    scale = seeded(D, seed=11) * (torch.arange(D) >= zeros)
    before = function(body, IDS, e=E, w=W1, v=W2, s=scale, h=H, g=G, dynamic=False)
    before, _ = run(before, "tidy.fold_constants")
    after, report = run(before, turning())
    assert declined(report) == []
    assert "turned in 1 blocks" in [s.reason for s in report.changes]
    assert any(torch.equal(t.flatten(), torch.ones(D)) for t in after.constants.values())
    assert error(before, after) < 1e-5
    twice, report = run(after, turning(seed=1))
    assert (report.fired, declined(report), text(twice)) == (0, [], text(after))


def test_a_scale_stays_where_the_stream_stays() -> None:
    def body(ids: Tensor, e: Tensor, w: Tensor, s: Tensor) -> Tensor:
        x = nnf.embedding(ids, e)
        return x + nnf.linear(norm(x), w) * s

    before = function(body, IDS, e=E, w=W1, s=G, dynamic=False)
    after, report = run(before, turning())
    assert (report.fired, declined(report)) == (0, [("rms_norm", "the value is an output of the program")])
    assert all(torch.equal(after.constants[n], t) for n, t in before.constants.items())


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a gain": (lambda x, w, g: nnf.linear(norm(x, g), w), "rms_norm_1 scales the channels by different gains, g"),
    "a spelled-out gain": (lambda x, w, g: nnf.linear(norm(x) * g, w), "mul multiplies the channels by different factors, g"),
    "a layer norm's gain": (lambda x, w, g: nnf.linear(nnf.layer_norm(x, (D,), g), w), "layer_norm scales the channels by different gains, g"),
    "an output": (lambda x, w, g: x, "the value is an output of the program"),
    "an activation": (lambda x, w, g: nnf.linear(nnf.silu(x), w), "silu (silu) doesn't commute with a rotate"),
}


@pytest.mark.parametrize(("tail", "reason"), [pytest.param(*c, id=i) for i, c in REFUSED.items()])
def test_refuses(tail: Callable[..., Any], reason: str) -> None:
    before = function(lambda ids, e, w, h, g: tail(stream(ids, e, w), h, g), IDS, e=E, w=W1, h=H, g=G, dynamic=False)
    after, report = run(before, turning())
    assert text(after) == text(before)
    assert (report.fired, declined(report)) == (0, [("rms_norm", reason)])


OF_TIED: dict[str, tuple[Callable[..., Tensor], dict[str, bool], str]] = {
    "a gain": (
        lambda x, e, g: nnf.linear(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * g, e),
        {"keep_tied": False},
        "mul multiplies the channels by different factors, g, and linear_1 can't take it: its weight e is the embedding's too",
    ),
    "computed": (
        lambda x, e, g: nnf.linear(norm(x, 1 + g), e),
        {},
        "rms_norm_1 scales the channels by different gains, add_1, made in the graph: fold constants first",
    ),
    "an activation": (lambda x, e, g: nnf.linear(norm(x).relu(), e), {}, "relu (relu) doesn't commute with a rotate"),
}


@pytest.mark.parametrize("name", list(OF_TIED))
def test_a_tied_head_is_named_where_it_is_why(name: str) -> None:
    tail, options, reason = OF_TIED[name]
    before = function(lambda ids, e, w, g: tail(stream(ids, e, w), e, g), IDS, e=E, w=W1, g=G, dynamic=False)
    after, report = run(before, turning(**options))
    assert (report.fired, declined(report), text(after)) == (0, [("rms_norm", reason)], text(before))


def test_a_tied_head_may_cast_its_table() -> None:
    before = function(lambda ids, e, w, g: nnf.linear(norm(stream(ids, e, w), g).double(), e.double()), IDS, e=E, w=W1, g=G, dynamic=False)
    after, report = run(before, turning())
    assert declined(report) == []
    assert error(before, after) < 1e-5


def test_refuses_a_tied_head_if_no_layer_may_be_added() -> None:
    before = function(TIED["gain"], IDS, e=E, w=W1, g=G, dynamic=False)
    _, report = run(before, turning(keep_tied=False))
    assert (report.fired, declined(report)) == (
        0,
        [("rms_norm", "rms_norm_1 scales the channels by different gains, g, and linear_1 can't take it: its weight e is the embedding's too")],
    )


def test_a_second_run_changes_nothing() -> None:
    """With another seed too; what was left alone before may still turn."""
    once, _ = run(layer(), turning(values=False))
    twice, report = run(once, turning(values=False, seed=1))
    assert (report.fired, declined(report)) == (0, [])
    assert all(torch.equal(once.constants[n], t) for n, t in twice.constants.items())
    thrice, report = run(twice, turning())
    assert [s.reason for s in report.changes] == [f"turned in {HEADS} blocks"]
    assert error(layer(), thrice) < 1e-5


def test_a_tied_head_gets_no_second_layer() -> None:
    once, _ = run(function(TIED["gain"], IDS, e=E, w=W1, g=G, dynamic=False), turning())
    twice, report = run(once, turning())
    assert (report.fired, declined(report), text(twice)) == (0, [], text(once))


def test_a_failed_turn_leaves_no_mark() -> None:
    program = layer()
    edit = Edit(program)
    assert not Residual().run(Context(program, Target(name="test")), edit)
    edit.rollback()
    assert not [n for n in program.graph.nodes if residual.TURNED in n.meta]


def test_numbers_that_are_no_rotation_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, residual, "rotations", lambda r: {b: m * 1.5 for b, m in r.items()})
    with pytest.raises(ValueError, match="is off orthogonal by"):
        run(layer(), turning())


@pytest.mark.parametrize("leaf", WEIGHTS)
@pytest.mark.parametrize("fault", ["dropped", "transposed", "negated", "one channel"])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, leaf: str, fault: str) -> None:
    """One of the seven weights gets something else than its rotation."""
    made = {
        "dropped": lambda old, new: old,
        "transposed": lambda old, new: new.T.contiguous() if new.shape[0] == new.shape[1] else new.roll(1, 1),
        "negated": lambda old, new: -new,
        "one channel": lambda old, new: torch.cat([old[:1], new[1:]]),
    }[fault]
    right = Plan.apply

    def wrong(plan: Plan, edit: Edit, *args: Any, **kwargs: Any) -> Any:
        old = edit.program.constants[leaf]
        site = right(plan, edit, *args, **kwargs)
        edit.program.constants[leaf] = made(old, edit.program.constants[leaf])
        return site

    monkeypatch.setattr(Plan, "apply", wrong)
    with pytest.raises(ContractViolation, match=r"rotate\.residual breaks its exact contract"):
        run(layer(), turning(values=False))


@functools.cache
def folded(name: str) -> Program:
    program, _ = run(zoo(name), "tidy.fold_constants")
    return run(program, FoldNormGain())[0]


@pytest.mark.parametrize("name", ["llama", "qwen2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_real_model(name: str) -> None:
    after, report = run(folded(name), turning())
    assert (report.fired, declined(report)) == (3, [])
    assert [s.reason for s in report.changes] == ["turned in 1 blocks", "turned in 2 blocks", "turned in 2 blocks"]
    assert error(folded(name), after) < 1e-5
    assert error(zoo(name), after) < 1e-5


def test_real_model_with_a_tied_head() -> None:
    model, inputs = transformers("LlamaForCausalLM", PROMPT, **GROUPED, tie_word_embeddings=True)()
    before = capture(model, inputs)
    program, _ = run(run(before, "tidy.fold_constants")[0], FoldNormGain())
    after, report = run(program, turning())
    assert (report.fired, declined(report)) == (5, [])
    assert report.bytes_after - report.bytes_before == 64 * 64 * 4
    assert error(before, after) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_real_model_with_layer_norms(name: str) -> None:
    """Its stream turns about its mean."""
    after, report = run(folded(name), turning())
    assert declined(report) == []
    assert "turned in 1 blocks" in [s.reason for s in report.changes]
    assert error(folded(name), after) < 1e-5
    assert error(zoo(name), after) < 1e-5


def test_real_model_whose_branches_are_scaled() -> None:
    before = capture(*transformers("Dinov2ForImageClassification", PIXELS, **IMAGE, num_labels=10)())
    program, _ = run(run(before, "tidy.fold_constants")[0], FoldNormGain())
    after, report = run(program, turning())
    assert declined(report) == []
    assert "turned in 1 blocks" in [s.reason for s in report.changes]
    assert error(before, after) < 1e-5


def test_torchs_own_attention() -> None:
    """Its heads are merged with a batch of any size, and still turn each by a rotation of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, 16, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(6, D), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.LayerNorm(D), nn.Linear(D, 5))
    before = capture(model.eval(), (seeded(2, 5, 6),))
    after, report = run(run(before, FoldNormGain())[0], turning())
    assert declined(report) == []
    assert [s.reason for s in report.changes] == ["turned in 1 blocks", *["turned in 3 blocks"] * 2]
    assert error(before, after) < 1e-5
    other = (seeded(3, 7, 6, seed=4),)
    assert relative_error(interpret(before, other)[0], interpret(after, other)[0]) < 1e-5


@pytest.mark.parametrize("name", ["deberta_v2", "xlnet", "funnel"])
def test_real_models_that_spell_their_attention_out(name: str) -> None:
    before = capture(*{**CAUSAL_TEXT, **ENCODED_TEXT}[name]())
    before, _ = run(before, "tidy.fold_constants")
    after, report = run(before, turning())
    values = [s for s in report.changes if not s.site.endswith("norm)")]
    assert len(values) == (3 if name == "funnel" else 2)
    assert not [site for site, _ in declined(report) if "norm" not in site]
    assert error(before, after) < 1e-5


CENTRED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "whole": lambda x, b: nnf.layer_norm(x, (D,), None, b),
    "spelled out": lambda x, b: (c := x - x.mean(-1, keepdim=True)) * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) + b,
    "a number added": lambda x, b: norm(x + 0.5) + b,
}


@pytest.mark.parametrize("form", [pytest.param(f, id=i) for i, f in CENTRED.items()])
def test_a_stream_whose_mean_is_seen_turns_about_it(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    before = function(lambda ids, e, w, h, g: nnf.linear(form(stream(ids, e, w), g), h), IDS, e=E, w=W1, h=H, g=G, dynamic=False)
    after, report = run(before, turning(seed=2))
    R = mean_keeping(randomised_hadamard(D, 2)).float()
    assert text(after) == text(before)
    assert (report.fired, declined(report)) == (1, [])
    wanted = {"e": E @ R, "w": R.T @ W1 @ R, "h": H @ R, "g": G @ R}
    assert all(torch.allclose(after.constants[n], w, atol=1e-5) for n, w in wanted.items())
    assert error(before, after) < 1e-5


@pytest.mark.parametrize("form", [pytest.param(f, id=i) for i, f in {**spelled_out.ROOTS, **spelled_out.CENTRED}.items()])
def test_a_stream_turns_whatever_its_norms_are_spelled_as(form: Callable[[Tensor], Tensor]) -> None:
    before = function(lambda ids, e, w, h: nnf.linear(form(spelled_stream(ids, e, w, form)), h), IDS, e=E, w=W1, h=H, dynamic=False)
    after, report = run(before, turning(seed=2))
    R = randomised_hadamard(D, 2)
    R = (mean_keeping(R) if form in spelled_out.CENTRED.values() else R).float()
    assert text(after) == text(before)
    assert (report.fired, declined(report)) == (1, [])
    assert all(torch.allclose(after.constants[n], w, atol=1e-5) for n, w in {"e": E @ R, "w": R.T @ W1 @ R, "h": H @ R}.items())
    assert error(before, after) < 1e-5


def spelled_stream(ids: Tensor, e: Tensor, w: Tensor, form: Callable[[Tensor], Tensor]) -> Tensor:
    x = nnf.embedding(ids, e)
    return x + nnf.linear(form(x), w)


def test_a_rotation_that_moves_the_mean_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "mean_keeping", lambda matrix: matrix)
    before = function(lambda ids, e, w: nnf.linear(nnf.layer_norm(stream(ids, e, w), (D,)), e), IDS, e=E, w=W1, dynamic=False)
    with pytest.raises(ValueError, match="block 0 must keep its mean"):
        run(before, turning())


def test_a_weighted_addition_is_declined() -> None:
    """addmm with other weights than 1 is no plain product, which the engine says."""

    def weighed(x: Any, y: Any, w: Any) -> Any:
        return torch.nn.functional.linear(torch.addmm(x, torch.softmax(y, -1), x @ w, beta=0.5), w)

    program = function(weighed, seeded(6, 6), seeded(6, 6, seed=1), w=seeded(6, 6, seed=2), dynamic=False)
    _, report = run(program, "rotate.residual")
    assert (report.fired, declined(report)) == (0, [("addmm", "addmm weighs its terms")])
