"""What a report offers as a recipe's exclusion of a place: it compiles, leaves that place alone, and no other that has a name of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxcompress import registry
from fxcompress.calibrate.statistics import Statistics
from fxcompress.errors import VerifierError
from fxcompress.manager import Manager
from fxcompress.program import Program
from fxcompress.recipe import Recipe, Where, build, check_globs, load_recipe
from fxcompress.report import Change, PassReport
from fxcompress.verify import audit
from tests.passes.helpers import captured, seeded, zoo

QUANT: list[Any] = ["quant.insert", {"quant.ranges": {"method": "entropy"}}, "quant.bias_correction", "quant.finalize"]
RECIPES: dict[str, list[Any]] = {
    "attention opened": ["tidy.fold_constants", "tidy.open_attention", "reparam.smooth", *QUANT],
    "probabilities of few bits": [{"softmax.adaptive": {"bits": 4}}, *QUANT],
    "attention closed": ["reparam.smooth", *QUANT],
    "everything before": ["tidy.no_ops", "tidy.fold_norm_gain", "rotate.residual", "signs.bimodal", "signs.centre_keys", "tidy.dead_code"],
    "weights alone": [{"quant.weight_only": {"weights": "int4/channel"}}, "quant.finalize"],
}


class Attention(nn.Module):
    """Two attentions in one module, which no path tells apart, on layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attend = nn.functional.scaled_dot_product_attention
        return self.o(attend(attend(q, k, v), k, v).transpose(1, 2).flatten(2))


def ran(program: Program, recipe: Recipe) -> list[PassReport]:
    """As a compilation on ONNX Runtime would, without contracts and lowering."""
    check_globs(recipe, program)
    target = registry.find_backend("onnxruntime").target
    manager = Manager(program.copy(), target, program.example, "off", Statistics([program.example]))
    done = manager.run(build(recipe))
    audit(manager.program)
    return done


def without(recipe: Recipe, number: int, exclude: tuple[str, ...]) -> Recipe:
    steps = [s.model_copy(update={"where": Where(exclude=exclude)}) if i == number else s for i, s in enumerate(recipe.passes)]
    return recipe.model_copy(update={"passes": tuple(steps)})


def key(change: Change) -> tuple[str, str]:
    return change.site, change.reason.partition(" ")[0]


@pytest.mark.parametrize("passes", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("model", ["attention", pytest.param("llama", marks=pytest.mark.slow)])
def test_what_is_offered_compiles_and_holds(model: str, passes: list[Any]) -> None:
    """Three exclusions of each pass."""
    program = captured(Attention().eval(), seeded(2, 3, 16)) if model == "attention" else zoo(model)
    recipe, offered = load_recipe({"name": "mine", "passes": passes}), 0
    done = ran(program, recipe)
    for number, report in enumerate(done):
        for exclude in [*{c.exclude: c for c in report.changes if c.exclude}][:3]:
            again = {key(c) for c in ran(program, without(recipe, number, exclude))[number].changes}
            meant = {key(c) for c in report.changes if c.exclude == exclude}
            assert again.isdisjoint(meant), (report.name, exclude)
            offered += 1
    assert offered >= 2


def test_one_activation_of_an_attention() -> None:
    """The products of one attention stay in float; the other's, and the layers around, are still quantised."""
    program = captured(Attention().eval(), seeded(2, 3, 16))
    recipe = load_recipe({"name": "mine", "passes": RECIPES["attention opened"]})
    report = next(p for p in ran(program, recipe) if p.name == "quant.insert")
    weights = {c.exclude for c in report.changes if c.reason == "softmax_int as uint8/tensor"}
    assert weights == {("matmul_default_1",)}, "the product with the values, not the module"
    layers = {c.exclude for c in report.changes if c.reason.startswith("int8 in blocks")}
    assert layers == {("q",), ("k",), ("v",), ("o",)}
    assert {c.exclude for c in report.changes if c.reason == "x as uint8/tensor"} == {("q", "k", "v")}


def test_what_can_t_be_left_out_says_why() -> None:
    program = captured(Attention().eval(), seeded(2, 3, 16))
    done = ran(program, load_recipe({"name": "mine", "passes": RECIPES["attention closed"]}))
    last = done[-1]
    assert last.whole.startswith("codes are stored for every quantised weight") and all(c.exclude == () for c in last.changes)
    with pytest.raises(VerifierError):
        ran(program, without(load_recipe({"name": "mine", "passes": RECIPES["attention closed"]}), 4, ("q",)))
    assert all(p.whole == "" for p in done[:-1])


def test_a_name_that_a_pass_made_is_offered_where_recipes_may_use_it() -> None:
    """Ranges stand at nodes of quant.insert: at a module of their own by its path, else only behind a pass that is known to make nodes."""
    program = captured(Attention().eval(), seeded(2, 3, 16))
    for passes, expected in (("attention opened", True), ("attention closed", False)):
        done = ran(program, load_recipe({"name": "mine", "passes": RECIPES[passes]}))
        ranges = next(p for p in done if p.name == "quant.ranges")
        named = [c.exclude for c in ranges.changes if any(g.startswith("quantize") for g in c.exclude)]
        assert bool(named) == expected
        assert ("q", "k", "v") in {c.exclude for c in ranges.changes}, "three modules that read one value"


def test_brackets_of_a_path_are_no_pattern() -> None:
    from fxcompress.recipe import _globs

    assert _globs(["a[0].b*", "c"]) == ("a[[]0].b[*]", "c")
    assert _globs(["a", None]) == ()


def test_options_say_what_the_recipe_said() -> None:
    """So that a line copied from the report keeps the limits and exclusions that were there."""
    program = captured(Attention().eval(), seeded(2, 3, 16))
    given = {"quant.weight_only": {"weights": "int4/channel", "where": {"exclude": ["q"]}, "limit": 3.0}}
    done = ran(program, load_recipe({"name": "mine", "passes": [given, "quant.finalize"]}))
    assert done[0].options["where"] == {"exclude": ["q"]}
    assert done[0].options["limit"] == 3.0
