"""Contracts bite: a seeded sample of the faults that tools/mutate.py plants; what is equivalent is found out, what survives is seen."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxcompress.checker import check
from fxcompress.contract import Bounded, Contract, Exact, Lossy
from fxcompress.edit import Edit
from fxcompress.program import Program
from fxcompress.transport import Kind, Seed, Transport
from tests.faults import faults
from tests.faults.cases import CASES, Case, opened
from tests.faults.fault import Fault, Undo, given
from tests.faults.trial import Outcome, Trial
from tests.passes.helpers import Builder, chain, named, node, seeded, snapshot, zoo

aten = torch.ops.aten

SAMPLES: tuple[tuple[str, str, int], ...] = (  # model, case, faults
    ("llama", "tidy.fold_constants", 5),
    ("llama", "tidy.no_ops", 15),
    ("resnet", "tidy.fold_batch_norm", 20),
    ("llama", "tidy.open_attention", 20),
    ("llama", "tidy.fold_norm_gain", 15),
    ("vit", "tidy.fold_norm_gain {'beta': True}", 20),
    ("llama", "rotate.residual", 25),
    ("llama", "sparsity.remove_channels", 20),
    ("llama", "quant.weight_only", 15),
    ("llama", "quant.weight_only {'weights': 'int4/group:32'}", 15),
    ("llama", "quant.weight_only {'weights': 'uint4/group:16', 'symmetric': False}", 15),
    ("llama", "quant.finalize", 15),
    ("vit", "reparam.smooth", 15),
    ("vit", "quant.insert", 20),
    ("vit", "quant.insert {'activations': 'int8/token', 'products': False}", 15),
    ("vit", "quant.ranges", 20),
    ("vit", "quant.bias_correction", 15),
    ("vit", "quant.reconstruct {'iterations': 3}", 15),
    ("vit", "signs.bimodal", 15),
    ("vit", "signs.centre_keys", 15),
    ("vit", "softmax.adaptive {'bits': 4}", 20),
)
KINDS = (
    "negate",
    "transpose",
    "wrong axis",
    "roll axis",
    "one more",
    "keeps reading",
    "swap with",
    "swap operands",
    "keep the old",
    "halve a channel",
)


@functools.cache
def case_of(name: str) -> Case:
    return next(c for c in CASES if str(c) == name)


@functools.cache
def edit_of(model: str, name: str) -> Edit:
    return case_of(name).opened(zoo(model))


def outcomes(edit: Edit, contract: Contract, planted: list[Fault]) -> Iterator[Outcome]:
    trial = Trial(edit, contract)
    with torch.no_grad():
        yield from map(trial.run, planted)


@pytest.mark.parametrize(("model", "name", "count"), SAMPLES)
def test_no_fault_survives(model: str, name: str, count: int) -> None:
    edit, contract = edit_of(model, name), case_of(name).item().contract
    assert {m.verdict for m in check(edit.program, edit, contract, edit.program.example)} == {"held"}
    planted = list(faults(edit))
    before = snapshot(edit.program)
    found = list(outcomes(edit, contract, random.Random(0).sample(planted, min(count, len(planted)))))
    assert [(str(o.fault), o.change) for o in found if o.verdict == "survived"] == []
    assert sum(o.caught == "contract" for o in found) > count / 4
    assert snapshot(edit.program) == before, "every fault is taken back"


def test_every_kind_of_fault_is_planted() -> None:
    planted = {f.kind for model, name, _ in SAMPLES for f in faults(edit_of(model, name))}
    assert [kind for kind in KINDS if not any(kind in p for p in planted)] == []


def folded(weight: Tensor, new: Tensor) -> Edit:
    """One layer with another weight."""
    built = Builder(x=seeded(4, 8))
    program = built.program(built.op(aten.linear.default, built.x, built.constant("w", weight)))
    edit = Edit(program)
    with edit.site(program.results()[0]):
        edit.fold(node(program, "w"), new)
    return edit


def verdict(edit: Edit, kind: str, contract: Contract) -> str:
    (outcome,) = outcomes(edit, contract, [f for f in faults(edit) if f.kind == kind])
    return outcome.verdict


W = seeded(8, 8)
EQUIVALENT = {
    "transpose": W + W.t(),
    "negate": torch.zeros(8, 8),
    "roll axis 0": torch.ones(8, 8),
    "keep the old one": W,
    "halve a channel of axis 1": W * (torch.arange(8) != 4),
}


@pytest.mark.parametrize("kind", EQUIVALENT)
def test_what_changes_nothing_is_found_out_by_evaluation(kind: str) -> None:
    """Under a contract that notices nothing, so that the verdict is evaluation's alone."""
    weight = EQUIVALENT[kind]
    assert verdict(folded(W if kind == "keep the old one" else weight, weight), kind, Lossy()) == "equivalent"
    assert verdict(folded(W + 1, W), kind, Lossy()) == "survived"
    assert verdict(folded(W, W), kind, Exact()) == ("equivalent" if kind == "keep the old one" else "contract")


@pytest.mark.parametrize(("factor", "verdict"), [(1 + 1e-4, "as good"), (1.5, "survived")])
def test_another_grid_is_as_good_only_if_nothing_is_farther_off(factor: float, verdict: str) -> None:
    """Under a bound that notices nothing. What rounds to other codes and as near is no fault; what is farther off is."""
    edit = opened(perceptron(), named("quant.weight_only"))
    constants = edit.program.constants
    scale = constants["w0.scale"]

    def plant() -> Undo:
        constants["w0.scale"] = scale * factor
        return lambda: constants.update({"w0.scale": scale})

    (outcome,) = outcomes(edit, Bounded(limit=-100.0), [Fault("another scale", "w0.scale", "", plant)])
    assert (outcome.verdict, outcome.change > 5e-5) == (verdict, True)


def test_a_fault_too_small_to_see_survives() -> None:
    """Beyond noise and within Exact's limit of 1e-4: the sweep says so rather than calling it equivalent."""
    edit = folded(W, W)
    constants = edit.program.constants

    def plant() -> Undo:
        constants.update(w=W * (1 + 2e-5))
        return lambda: constants.update(w=W)

    (outcome,) = outcomes(edit, Exact(), [Fault("slightly more", "w", "", plant)])
    assert (outcome.verdict, 1e-5 < outcome.change < 1e-4) == ("survived", True)


def test_one_fault_among_two_hundred_sites_is_named_with_its_node() -> None:
    edit = opened(chain(200), named("quant.weight_only"))
    value = {site.name: new.name for site in edit.sites for new in site.replaced.values()}
    planted = [f for f in faults(edit) if f.kind in ("roll axis 0", "halve a channel of axis 0") and f.at.endswith(".scale")]
    found = list(outcomes(edit, edit_contract(), random.Random(0).sample(planted, 8)))
    assert len(edit.sites) == 200
    assert [o.named for o in found] == [(value[o.fault.site],) for o in found]


TOKENS = "quant.insert {'activations': 'int8/token', 'products': False}"
ONE_STEP = ("quant.insert", "zero_point", "one more"), (TOKENS, "div_tensor", "one more in argument 1")


@pytest.mark.parametrize(("name", "at", "kind"), ONE_STEP)
def test_a_grid_that_is_one_step_off_is_caught(name: str, at: str, kind: str) -> None:
    """Though its SQNR is that of the right one: only what lies at one end of the range is moved by more than half a step."""
    edit = edit_of("vit", name)
    planted = [f for f in faults(edit) if f.kind == kind and at in f.at]
    assert len(planted) > 8
    assert {o.caught for o in outcomes(edit, case_of(name).item().contract, planted)} == {"contract"}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_grid_with_one_step_too_many_is_caught_whatever_side_the_probe_is_greatest_on(sign: int) -> None:
    """A token's -1 stays on a grid of -128 to 127 whose qmax is taken for 128; its 1 would not."""
    built = Builder(x=sign * torch.tensor([[1.0, 0.5, -0.3, 0.2]]))
    edit = opened(built.program(built.op(aten.linear.default, built.x, built.constant("w", seeded(3, 4)))), case_of(TOKENS).item())
    planted = [f for f in faults(edit) if f.kind == "one more in argument 1" and "div_tensor" in f.at]
    assert [o.caught for o in outcomes(edit, case_of(TOKENS).item().contract, planted)] == ["contract"]


STEPS = {  # per width of the grid of -1 .. 1/2 the verdict
    "int8/tensor": {128 / 1.001: "contract", 128: "", 128 / 0.999: ""},
    "int8/token": {127 / 1.001: "contract", 127: "", 127 / 0.999: ""},
}


@pytest.mark.parametrize(("activations", "width", "caught"), [(a, w, caught) for a, of in STEPS.items() for w, caught in of.items()])
def test_steps_are_no_longer_than_the_range_needs(activations: str, width: float, caught: str) -> None:
    """Though no number of the range moves by more than half of such a step."""
    inserting = named("quant.insert", activations=activations, weights="int8/channel", range="minmax")
    built = Builder(x=torch.tensor([[-1.0, 0.5, -0.3, 0.2]]))
    edit = opened(built.program(built.op(aten.linear.default, built.x, built.constant("w", seeded(3, 4)))), inserting)

    def plant() -> Undo:
        if activations == "int8/tensor":
            constants, scale = edit.program.constants, edit.program.constants["x.scale"]
            constants["x.scale"] = torch.full_like(scale, 1 / width)
            return lambda: constants.update({"x.scale": scale})
        quotient = node(edit.program, "div_tensor")
        return given(quotient, (quotient.args[0], width), {})

    (outcome,) = outcomes(edit, inserting.contract, [Fault("another scale", "x", "", plant)])
    assert outcome.caught == caught


def edit_contract() -> Contract:
    return named("quant.weight_only").contract


def perceptron() -> Program:
    """Three layers with nothing but relu between them."""
    built = Builder(x=seeded(4, 8))
    value = built.x
    for i in range(3):
        value = built.op(aten.linear.default, value, built.constant(f"w{i}", seeded(8, 8, seed=i) / 8**0.5))
        value = built.op(aten.relu.default, value) if i < 2 else value
    return built.program(value)


def twice_scaled() -> Edit:
    """Both hidden values scaled in one edit: the weight between them takes part in both folds."""
    program = perceptron()
    edit, engine = Edit(program), Transport(program)
    for name in ("relu_default", "relu_default_1"):
        plan = engine.solve(Kind.SCALE, Seed(node(program, name)))
        plan.apply(edit, torch.linspace(0.5, 2, plan.count).double())
    return edit


def test_two_overlapping_folds_in_a_row_pass() -> None:
    edit = twice_scaled()
    assert [sorted(site.constants) for site in edit.sites] == [["w0", "w1"], ["w1", "w2"]]
    assert {m.verdict for m in check(edit.program, edit, Exact(), edit.program.example)} == {"held"}


def test_every_fault_in_overlapping_folds_is_caught() -> None:
    edit = twice_scaled()
    found = list(outcomes(edit, Exact(), list(faults(edit))))
    assert len(found) > 20
    assert {o.verdict for o in found} == {"contract"}
