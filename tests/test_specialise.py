"""specialise: numbers are the original's at sizes never seen, the time MLP is gone, and nothing is folded that depends on a size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress import specialise as module
from fxcompress.dynamic import at_sizes
from fxcompress.errors import InputError, VerifierError
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.program import Program
from fxcompress.signature import Inputs
from fxcompress.specialise import specialise
from fxcompress.verify import verify
from tests.passes.helpers import function, lines, seeded, text, zoo

X, T = seeded(2, 4), seeded(2, seed=1)


def snapshot(program: Program) -> tuple[Any, ...]:
    nodes = [(n, n.target, n.args, dict(n.kwargs)) for n in program.graph.nodes]
    return nodes, {k: (id(t), t._version) for k, t in program.constants.items()}, program.inputs, program.example


def difference(program: Program, variant: Program, bindings: dict[str, Tensor], **sizes: int) -> float:
    """The greatest relative error over the outputs at these sizes, on values that are not the example's."""
    sizes = {**{s: low for s, (low, _) in program.symbols.items()}, **sizes}
    full = at_sizes([t * 0.9 + 0.05 if t.is_floating_point() else t for t in program.example], [v.shape for v in program.inputs], sizes)
    full = [bindings[v.name].expand_as(t) if v.name in bindings else t for v, t in zip(program.inputs, full, strict=True)]
    free = [t for v, t in zip(program.inputs, full, strict=True) if v.name not in bindings]
    return max(relative_error(a, b) for a, b in zip(run(program, full), run(variant, free), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("unet2d_cond", {"batch": 5, "encoder_hidden_states_1": 3}), ("dit", {"batch": 5})])
def test_timestep_of_real_models(name: str, sizes: dict[str, int]) -> None:
    before = zoo(name)
    was = snapshot(before)
    bindings = {"timestep": torch.tensor([37])}
    variant = specialise(before, bindings)
    assert snapshot(before) == was, "the original was changed"
    verify(variant)

    assert [v.name for v in variant.inputs] == [v.name for v in before.inputs if v.name != "timestep"]
    assert difference(before, variant, bindings, **sizes) < 1e-5  # the tables are rounded once, as the nodes were
    assert difference(before, variant, {"timestep": torch.tensor([38])}, **sizes) > 1e-3, "the timestep means nothing here"

    kept = before.constants.keys() & variant.constants.keys()
    assert all(variant.constants[k].data_ptr() == before.constants[k].data_ptr() for k in kept), "weights are shared"
    time = {k for k in before.constants if "time" in k.lower()}  # time_embedding, time_emb_proj, timestep_embedder
    assert before.constants.keys() - kept == time
    assert not [n for n in variant.graph.nodes if "time" in "".join(n.meta.get("module", ())).lower() and n.op == "call_function"]


@pytest.mark.slow
def test_what_is_bound_may_be_repeated_or_left_out_but_not_changed() -> None:
    signature = specialise(zoo("dit"), {"timestep": torch.tensor([37])}).signature
    given = {"hidden_states": torch.zeros(3, 4, 8, 8), "class_labels": torch.zeros(3, dtype=torch.long)}
    assert len(signature.flatten(given)) == 2
    assert len(signature.flatten({**given, "timestep": torch.tensor([37, 37, 37])})) == 2
    for other in (torch.tensor([37, 37, 38]), torch.zeros(2, 3), None):
        with pytest.raises(InputError, match="argument 'timestep' doesn't have the form it had at capture"):
            signature.flatten({**given, "timestep": other})


def test_a_bound_cone_is_one_constant() -> None:
    before = function(lambda x, t, w: x + (t.sin() @ w).exp(), X, seeded(3), w=seeded(3, 4))
    t = seeded(3, seed=2)
    after = specialise(before, {"t": t})
    assert text(after) == lines("""
        add = add.Tensor(x, %bound.exp)
        return add""")
    assert list(after.constants) == ["bound.exp"]
    assert torch.equal(after.constants["bound.exp"], (t.sin() @ before.constants["w"]).exp())


FLAGGED = function(lambda x, y, flag: torch.where(flag, x.exp(), y.sin()), X, X + 1, torch.tensor(True))


@pytest.mark.parametrize(("flag", "expected"), [(True, "exp = exp(x)\nreturn exp"), (False, "sin = sin(y)\nreturn sin")])
def test_a_decided_branch_is_taken_and_the_other_goes(flag: bool, expected: str) -> None:
    after = specialise(FLAGGED, {"flag": torch.tensor(flag)})
    assert text(after) == expected
    assert [v.name for v in after.inputs] == ["x", "y"], "an input that is no longer read is still part of the signature"


def test_a_mixed_condition_decides_nothing() -> None:
    before = function(lambda x, m: torch.where(m, x.exp(), x.sin()), X, torch.tensor([True, False, True, True]), dynamic=False)
    after = specialise(before, {"m": torch.tensor([False, True, False, False])})
    assert text(after) == text(before).replace("m,", "%bound.m,")


def test_a_branch_of_another_shape_is_not_taken() -> None:
    before = function(lambda x, f: torch.where(f, x.sum(1, keepdim=True), x), X, torch.tensor(True))
    after = specialise(before, {"f": torch.tensor(True)})
    assert "where" in text(after)
    assert difference(before, after, {"f": torch.tensor(True)}, batch=3) == 0


# t has the batch's size: what is computed from it must not depend on that size
OF_THE_BATCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, t: x + t.sum(),
    "times the batch": lambda x, t: x + t[:, None] * x.shape[0],
    "over the batch less one": lambda x, t: x + t[:, None] / (x.shape[0] + 1),
    "softmax over the batch": lambda x, t: x * t.softmax(0)[:, None],
    "cumsum over the batch": lambda x, t: x + t.cumsum(0)[:, None],
    "position": lambda x, t: x + (t * torch.arange(t.shape[0]))[:, None],
    "mean over the batch": lambda x, t: x + t.mean(),
    "product with itself": lambda x, t: x + t[:, None] * t[None, :].sum(),
    "repeated": lambda x, t: x + t.repeat(2)[: x.shape[0], None],
    "through a cat": lambda x, t: torch.cat([x, t[:, None].sin()], 1),
    "through a linear": lambda x, t: x + t[:, None].expand(-1, 4) @ torch.ones(4, 4),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("body", [pytest.param(f, id=i) for i, f in OF_THE_BATCH.items()])
def test_sizes_decide_nothing(body: Callable[[Tensor, Tensor], Tensor], batch: int) -> None:
    before = function(lambda x, t: (body(x, t), x[:, 0] + t), seeded(batch, 4), seeded(batch, seed=1), dynamic={"x": [0], "t": [0]})
    assert len(before.symbols) == 1, "t has the batch's own size"
    bindings = {"t": torch.tensor([0.7])}
    assert difference(before, specialise(before, bindings), bindings, batch=3) < 1e-6


def test_mean_over_the_batch_is_folded() -> None:
    """The mean of equal entries is that entry, whatever their number."""
    before = function(lambda x, t: x + t.mean(), X, T)
    assert text(specialise(before, {"t": torch.tensor([0.7])})) == "add = add.Tensor(x, %bound.mean)\nreturn add"


def test_a_size_nobody_else_has() -> None:
    before = function(lambda x, t: (x, t * 2), X, T, dynamic={"x": [0], "t": [0]})
    with pytest.raises(InputError) as caught:
        specialise(before, {"t": torch.tensor([0.7])})
    text = str(caught.value)
    assert text.startswith("the binding can't be made\n  why   no other input has the dynamic size s")
    assert text.endswith("\n  do    bind at another place")


def test_sizes_read_from_the_bound_input_are_read_elsewhere() -> None:
    before = function(lambda x, t: x.new_zeros(t.shape[0], 4) + x + t[:, None], X, T)
    after = specialise(before, {"t": torch.tensor([0.7])})
    assert difference(before, after, {"t": torch.tensor([0.7])}, batch=3) == 0
    assert [v.name for v in after.inputs] == ["x"]


def test_an_unknown_name() -> None:
    with pytest.raises(InputError) as caught:
        specialise(FLAGGED, {"flak": torch.tensor(True)})
    assert str(caught.value) == "no input 'flak' to bind\n  why   did you mean 'flag'?"


BAD = {
    "dtype": (torch.tensor(1), "it takes torch.bool [], got torch.int64 []"),
    "rank": (torch.tensor([True]), "it takes torch.bool [], got torch.bool [1]"),
}


@pytest.mark.parametrize(("value", "why"), BAD.values(), ids=BAD)
def test_a_value_that_does_not_fit(value: Tensor, why: str) -> None:
    with pytest.raises(InputError) as caught:
        specialise(FLAGGED, {"flag": value})
    assert str(caught.value) == f"input 'flag' can't be bound to this value\n  why   {why}"


def test_a_dynamic_axis_takes_a_size_of_one() -> None:
    before = function(lambda x, t: x + t[:, None], X, T)
    with pytest.raises(InputError) as caught:
        specialise(before, {"t": torch.tensor([1.0, 2.0])})
    assert str(caught.value) == "input 't' can't be bound to this value\n  why   it takes torch.float32 [1], got torch.float32 [2]"


def test_all_inputs_bound() -> None:
    with pytest.raises(InputError) as caught:
        specialise(function(lambda t: t.sin(), T), {"t": torch.tensor([1.0])})
    assert str(caught.value) == "all inputs are bound\n  why   a program needs one input at least\n  do    leave one free"


FAULTS = {"sign": lambda v: -v, "factor": lambda v: 1.5 * v, "order": lambda v: v.flip(-1), "offset": lambda v: v + 0.01}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_comparison_bites(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor]) -> None:
    before = function(lambda x, t, w: x + (t @ w), X, seeded(3), w=seeded(3, 4))
    right = module._constant
    monkeypatch.setattr(module, "_constant", lambda program, node, value: right(program, node, fault(value)))
    with pytest.raises(VerifierError, match="binding t changes output output"):
        specialise(before, {"t": seeded(3, seed=2)})


def test_the_comparison_bites_beyond_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is right at the example's batch of one only."""
    before = function(lambda x, t: x + t.cumsum(0)[:, None], seeded(1, 4), seeded(1, seed=1))
    monkeypatch.setattr(module, "_is_same", lambda one, two: True)
    with pytest.raises(VerifierError, match="binding t changes output output"):
        specialise(before, {"t": torch.tensor([0.7])})


def test_two_bindings_and_a_second_one_on_the_variant() -> None:
    before = function(lambda x, t, c: x * t.sin() + c.exp(), X, seeded(4), seeded(4, seed=1), dynamic={"x": [0]})
    t, c = seeded(4, seed=2), seeded(4, seed=3)
    together, after_another = specialise(before, {"t": t, "c": c}), specialise(specialise(before, {"t": t}), {"c": c})
    assert text(together) == text(after_another)
    assert torch.equal(run(together, [X])[0], run(before, [X, t, c])[0])
    assert len(after_another.signature.flatten(Inputs(X, t, c))) == 1
