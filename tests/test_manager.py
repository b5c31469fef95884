"""Manager: a failed pass leaves the program as before, checks run when asked for, reports say what happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import yaml
from torch import fx

from fxcompress.contract import Bounded, Contract, Exact, Lossy
from fxcompress.edit import Edit
from fxcompress.errors import ContractViolation, VerifierError
from fxcompress.manager import CheckMode, Manager, candidates, lowest_sqnr, weight_bytes
from fxcompress.program import Program
from fxcompress.recipe import Step, Where
from fxcompress.report import PassReport
from fxcompress.rewrite import Context, Match, Options, Pass, Reject, Rewrite, Transform
from fxcompress.target import Target
from tests.passes.helpers import Builder, chain, declined, lines, node, run, seeded, snapshot, text

aten = torch.ops.aten


class RemakeOptions(Options):
    """factor: what the remade layers are multiplied by. at: only this node, or all."""

    factor: float = 1.0
    at: str = ""


class Remake(Rewrite):
    """linear(x, w) -> linear(x, w) * factor. A layer whose weight's first entry is negative is declined."""

    name = "test.remake"
    contract: Contract = Exact()  # type: ignore[misc]
    Options = RemakeOptions
    targets = (aten.linear.default,)

    def match(self, node: fx.Node, on: Context) -> Match | Reject:
        """Any linear layer; declined by its weight's first entry."""
        weight = on.constant(node.args[1])
        assert weight is not None
        return Reject("{} starts with {:.2f}", node, weight[0, 0].item()) if weight[0, 0] < 0 else Match(node)

    def apply(self, match: Any, edit: Edit) -> None:
        """Insert the layer and the product."""
        old, factor = match.node, self.options.factor
        with edit.site(old, "remade"):
            new = edit.insert(old.target, *old.args, like=old)
            if factor != 1 and self.options.at in ("", old.name):
                new = edit.insert(aten.mul.Tensor, new, factor, like=old)
            edit.replace(old, new)


class RemakeBounded(Remake):
    """The same under another contract."""

    contract = Bounded(limit=30.0)


class RemakeLossy(Remake):
    """The same without a limit."""

    contract = Lossy()


class Faulty(Remake):
    """Changes the program, then fails in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def apply(self, match: Any, edit: Edit) -> None:
        """Remake, then do the wrong thing."""
        super().apply(match, edit)
        if self.how == "raises":
            raise KeyError("lost")
        if self.how == "interrupted":
            raise KeyboardInterrupt
        last = edit.program.results()[0]
        with edit.site(last):
            if self.how == "in the wrong order":
                late = edit.insert(aten.neg.default, last, like=last, before=edit.program.output_node)
                edit.update(match.node.next, late, *match.node.next.args[1:])
            else:
                edit.replace(last, edit.insert(aten.add_.Tensor, last, 0, like=last, before=edit.program.output_node))


class Counting(Transform):
    """Declines every constant, changes one."""

    name = "test.counting"
    contract = Exact(limit=0.0)

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One constant stored again."""
        first = next(n for n in on.program.graph.nodes if n.op == "get_attr")
        with edit.site(first):
            edit.fold(first, on.program.constants[str(first.target)].clone())
        return {n.name: Reject("{} is a constant", n) for n in on.program.graph.nodes if n.op == "get_attr"}


class InParts(Transform):
    """Declines a part of every linear layer."""

    name = "test.in_parts"
    contract = Exact()

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """Under the name of the part."""
        linears = [n for n in on.program.graph.nodes if n.target is torch.ops.aten.linear.default]
        return {f"{n.name}.bias": Reject("{} has none", n) for n in linears}


def test_a_part_of_a_node_has_the_module_of_the_node() -> None:
    _, report = run(chain(2), InParts())
    assert [d.module for d in report.declined] == ["layer.0", "layer.1"]


def positive_chain(layers: int = 4) -> Program:
    """A chain whose weights all start with a positive entry."""
    program = chain(layers)
    for weight in program.constants.values():
        weight[0, 0] = weight[0, 0].abs()
    return program


def managed(program: Program, *items: Pass, check: CheckMode = "each", **step: Any) -> tuple[Program, list[PassReport]]:
    manager = Manager(program.copy(), Target(name="test"), program.example, check)
    return manager.program, manager.run([(Step(use=i.name, **step), i) for i in items])


def remake(**options: Any) -> Remake:
    return Remake(RemakeOptions(**options))


def test_report_of_a_pass() -> None:
    program, (report,) = managed(positive_chain(), remake())
    assert text(program) != ""
    assert (report.name, report.options, report.contract, report.unit) == ("test.remake", {"factor": 1.0, "at": ""}, "exact", "relative error")
    assert (report.fired, report.legal, report.declined) == (4, 4, ())
    assert [(c.site, c.value, c.verdict, c.figure) for c in report.checks][:1] == [
        ("layer.0  (linear_default)", "linear_default_4", "held", 0.0)
    ]
    assert (report.nodes_before, report.nodes_after) == (18, 18)
    assert report.bytes_before == report.bytes_after == 4 * 64 * 4
    assert report.changes[0].replaced == {"linear_default": "linear_default_4"}
    assert (report.changes[0].module, report.changes[0].reason) == ("layer.0", "remade")


def test_declined_sites_are_reported_and_left() -> None:
    program = positive_chain(2)
    program.constants["layer.1.weight"][0, 0] = -0.5
    _, (report,) = managed(program, remake())
    assert report.fired == 1
    assert declined(report) == [("linear_default_1", "linear_default_1 starts with -0.50")]
    assert report.declined[0].module == "layer.1"


def violation(**options: Any) -> ContractViolation:
    with pytest.raises(ContractViolation) as caught:
        managed(positive_chain(), remake(), remake(**options))
    return caught.value


def test_violation_says_all_there_is_to_say() -> None:
    error = violation(factor=-1.0, at="linear_default_6")
    figure = error.why.split()[2]
    assert str(error) == lines(f"""
        test.remake breaks its exact contract at 1 of 4 sites
        where layer.2  (linear_default_6)
        why   relative error {figure} at mul_tensor on the probe inputs, limit 0.0001
        state program as before this pass; 1 finished passes are kept
        do    - test.remake: {{where: {{exclude: ["layer.2"]}}}}""").replace("\n", "\n  ")
    assert float(figure) > 1


class Uneven(Remake):
    """Layers 0, 1, 2 off by a tenth, three tenths, two tenths."""

    def apply(self, match: Any, edit: Edit) -> None:
        """Insert the layer and its product."""
        old = match.node
        factor = {"layer.0": 1.1, "layer.1": 1.3, "layer.2": 1.2}[old.meta["module"][-1]]
        with edit.site(old):
            edit.replace(old, edit.insert(aten.mul.Tensor, edit.insert(old.target, *old.args, like=old), factor, like=old))


@pytest.mark.parametrize("contract", [Exact(), Bounded(limit=30.0)], ids=repr)
def test_violation_names_the_worst(monkeypatch: pytest.MonkeyPatch, contract: Contract) -> None:
    monkeypatch.setattr(Uneven, "contract", contract)
    with pytest.raises(ContractViolation) as caught:
        managed(positive_chain(3), Uneven())
    assert caught.value.where == "layer.1  (linear_default_1)   and 2 more"


def test_the_remedy_of_a_violation_works() -> None:
    error = violation(factor=1.5, at="linear_default_5")
    (step,) = yaml.safe_load(error.do)
    where = Where(**step["test.remake"]["where"])
    first, _ = managed(positive_chain(), remake())
    _, report = run(first, remake(factor=1.5, at="linear_default_5"), where=where)
    assert (report.fired, report.legal) == (3, 4)


def test_the_remedy_at_the_root_is_the_node() -> None:
    built = Builder(x=seeded(4, 8))
    program = built.program(built.op(aten.linear.default, built.x, built.constant("w", seeded(8, 8).abs())))
    with pytest.raises(ContractViolation) as caught:
        managed(program, remake(factor=1.5))
    assert caught.value.do == '- test.remake: {where: {exclude: ["linear_default"]}}'


FAILURES: dict[str, tuple[Pass, type[BaseException]]] = {
    "breaks its contract": (remake(factor=1.5), ContractViolation),
    "raises": (Faulty("raises"), KeyError),
    "interrupted": (Faulty("interrupted"), KeyboardInterrupt),
    "in the wrong order": (Faulty("in the wrong order"), VerifierError),
    "writes its argument": (Faulty("writes"), VerifierError),
}


@pytest.mark.parametrize(("item", "error"), [pytest.param(*f, id=i) for i, f in FAILURES.items()])
def test_a_failed_pass_leaves_the_program_as_before(item: Pass, error: type[BaseException]) -> None:
    program = positive_chain()
    manager = Manager(program, Target(name="test"), program.example, "off" if error is VerifierError else "each")
    manager.run([(Step(use="test.remake"), remake())])
    before = snapshot(program)
    with pytest.raises(error) as caught:
        manager.run([(Step(use=item.name), item)])
    assert snapshot(program) == before
    assert len(manager.done) == 1
    assert getattr(caught.value, "state", "1 finished passes are kept").endswith("1 finished passes are kept")


def test_two_overlapping_rewrites_in_a_row() -> None:
    """The second pass remakes what the first one made; each is measured against what it found."""
    _, reports = managed(positive_chain(), remake(), RemakeBounded(RemakeOptions(factor=1.001)))
    assert [r.fired for r in reports] == [4, 4]
    assert {c.verdict for r in reports for c in r.checks} == {"held"}
    assert reports[1].checks[0].figure == pytest.approx(60, abs=0.1)
    with pytest.raises(ContractViolation, match="at 4 of 4 sites"):
        managed(positive_chain(), RemakeBounded(RemakeOptions(factor=1.001)), RemakeBounded(RemakeOptions(factor=1.1)))


def test_check_off_measures_nothing() -> None:
    program, (report,) = managed(positive_chain(), RemakeBounded(RemakeOptions(factor=1.5)), check="off")
    assert (report.fired, report.checks, report.worst, report.output_sqnr) == (4, (), None, None)
    assert "mul" in text(program)


def test_check_end_measures_end_to_end_only() -> None:
    _, reports = managed(positive_chain(), remake(), RemakeBounded(RemakeOptions(factor=1.5)), check="end")
    assert [(r.checks, r.worst) for r in reports] == [((), None), ((), None)]
    assert reports[0].output_sqnr is None
    assert reports[1].output_sqnr is not None
    assert 0 < reports[1].output_sqnr < 20


def test_check_each_gives_bounded_and_lossy_passes_one_end_to_end_figure() -> None:
    _, reports = managed(positive_chain(), remake(), RemakeLossy(RemakeOptions(factor=1.5)), RemakeBounded(RemakeOptions(factor=1.001)))
    assert reports[0].output_sqnr is None
    assert reports[1].output_sqnr == pytest.approx(reports[2].output_sqnr, abs=0.5)  # both against the captured program
    assert reports[1].worst is not None
    assert reports[1].worst.limit is None


def test_a_looser_limit_of_the_recipe_holds() -> None:
    item = remake(factor=1.001)
    with pytest.raises(ContractViolation):
        managed(positive_chain(), item)
    _, (report,) = managed(positive_chain(), item, limit=0.01)
    assert report.worst is not None
    assert report.worst.limit == 0.01


def test_excluded_sites_are_legal_and_left() -> None:
    program, (report,) = managed(positive_chain(), remake(factor=1.5, at="linear_default_1"), where=Where(exclude=("layer.1",)))
    assert (report.fired, report.legal) == (3, 4)
    assert node(program, "linear_default_1").target is aten.linear.default
    _, (report,) = managed(positive_chain(), remake(), where=Where(include=("layer.[12]",)))
    assert (report.fired, report.legal) == (2, 4)


def test_unverified_sites_are_refused_unless_allowed() -> None:
    built = Builder(x=seeded(5, 4))  # the second layer's products are too small to see beside its bias
    first = built.op(aten.linear.default, built.x, built.constant("a", seeded(4, 4).abs()))
    weight, bias = built.constant("b", seeded(3, 4).abs() * 1e-9), built.constant("c", torch.ones(3))
    program = built.program(built.op(aten.linear.default, first, weight, bias))
    with pytest.raises(ContractViolation) as caught:
        managed(program, remake())
    assert caught.value.what == "test.remake can't be checked at 1 of 2 sites"
    assert caught.value.where == "<root>  (linear_default_1)"
    assert "could change sign unseen" in caught.value.why
    assert "- test.remake: {unverified: allow}" in caught.value.do
    _, (report,) = managed(program, remake(), unverified="allow")
    assert [c.verdict for c in report.checks] == ["held", "unverified"]


def test_transform_reports_what_it_declined() -> None:
    _, (report,) = managed(positive_chain(2), Counting())
    assert (report.fired, [c.value for c in report.checks]) == (1, ["linear_default"])
    assert declined(report) == [(f"layer_{i}_weight", f"layer_{i}_weight is a constant") for i in range(2)]


def test_progress_is_told_before_each_pass_and_at_the_end() -> None:
    program, calls = positive_chain(), []
    manager = Manager(program, Target(name="test"), program.example)
    manager.run([(Step(use=i.name), i) for i in (remake(), Counting())], lambda *call: calls.append(call))
    assert calls == [("test.remake", 0, 2), ("test.counting", 1, 2), ("", 2, 2)]


def test_candidates_are_ops_and_kinds_in_order() -> None:
    class Both(Remake):
        targets = ("get_attr", aten.relu.default)

    assert [n.name for n in candidates(chain(2).graph, Both())] == ["layer_0_weight", "relu_default", "layer_1_weight", "relu_default_1"]


def test_lowest_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    reference = [x, torch.tensor([1, 2]), torch.tensor([-torch.inf, 1.0])]
    assert lowest_sqnr(reference, [x, torch.tensor([5, 6]), reference[2]]) == float("inf")
    assert lowest_sqnr(reference, [x + torch.tensor([0.0, 0.5]), reference[1], reference[2]]) == pytest.approx(20)


def test_weight_bytes_counts_each_constant_once() -> None:
    built = Builder(x=seeded(2, 4))
    w = built.constant("w", seeded(4, 4))
    program = built.program(built.op(aten.linear.default, built.op(aten.linear.default, built.x, w), w))
    assert weight_bytes(program) == 64
