"""Recipes: every way to write one wrongly is an error that says what, where, why and what to do, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import fxcompress as fxc
from fxcompress.recipe import Recipe, build, check_globs, load_recipe, parse, shipped

GOOD = """
name: mine
passes:
  - tidy.dead_code
  - quant.weight_only: {weights: int4/group:32, where: {exclude: ["head*"]}, limit: 12.0}
  - quant.finalize
backend: {onnxruntime: {activation_rounding: int8}}
"""


def message(text: str) -> str:
    with pytest.raises(fxc.RecipeError) as caught:
        build(parse(text, "mine.yaml"))
    return str(caught.value)


def test_every_form_of_a_step_is_understood() -> None:
    recipe = parse(GOOD, "mine.yaml")
    assert [s.use for s in recipe.passes] == ["tidy.dead_code", "quant.weight_only", "quant.finalize"]
    assert recipe.passes[1].options == {"weights": "int4/group:32"}
    assert recipe.passes[1].where.exclude == ("head*",)
    assert recipe.passes[1].limit == 12.0
    assert recipe.backend is not None
    assert (recipe.backend.name, recipe.backend.options) == ("onnxruntime", {"activation_rounding": "int8"})
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_build(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert build(recipe)


def test_unknown_recipe() -> None:
    with pytest.raises(fxc.RecipeError) as caught:
        load_recipe("int4-wieght-only")
    assert str(caught.value) == (
        "unknown recipe 'int4-wieght-only'\n  why   did you mean 'int4-weight-only'?\n  do    name a shipped recipe or a .yaml file"
    )


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(fxc.RecipeError) as caught:
        load_recipe(tmp_path / "no.yaml")
    assert str(caught.value) == (
        f"no recipe file {tmp_path}/no.yaml\n  do    fxcompress recipes lists the shipped ones: {', '.join(shipped())}"
    )


def test_unknown_pass() -> None:
    assert message("passes: [quant.wight_only]") == (
        "unknown pass 'quant.wight_only'\n  why   did you mean 'quant.weight_only'?\n  do    fxcompress passes lists them"
    )


def test_unknown_option() -> None:
    assert message("passes: [{quant.weight_only: {wieghts: int4}}]") == (
        "an option is not valid\n"
        "  where pass 1, quant.weight_only\n"
        "  why   wieghts: unknown, did you mean 'weights'?\n"
        "  do    fields: weights, embeddings, symmetric, range, storage"
    )


def test_unknown_format() -> None:
    text = message("passes: [{quant.weight_only: {weights: int5/channel}}]")
    assert text.startswith("an option is not valid\n  where pass 1, quant.weight_only\n  why   weights: unknown number format 'int5'")


def test_unknown_field_of_the_recipe() -> None:
    assert message("passes: [tidy.dead_code]\nbackent: reference") == (
        "the recipe doesn't fit its schema\n"
        "  where mine.yaml\n"
        "  why   backent: unknown, did you mean 'backend'?\n"
        "  do    fields: name, description, passes, backend"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("name: x\npasses: []\n", "passes is []"),
        ("name: x\npasses:\n", "passes is null"),
        ("passes: quant.finalize\n", 'passes is "quant.finalize"'),
        ("passes: {quant.finalize: {}}\n", 'passes is {"quant.finalize": {}}'),
        ("name: x\n", "there is none under passes"),
    ],
)
def test_a_recipe_without_a_list_of_passes(text: str, found: str) -> None:
    """What a recipe needs, where, and what to write."""
    assert message(text) == (
        "the recipe has no list of passes\n"
        "  where mine.yaml, passes\n"
        f"  why   a recipe needs a list of at least one pass, and {found}\n"
        "  do    name them in the order in which they run, passes: [tidy.fold_constants, ...]; fxcompress passes lists all"
    )


def test_a_wrong_pass_is_no_missing_one() -> None:
    """Only what is wrong is told; a Recipe made by hand needs passes too."""
    assert "at least" not in message("passes: [{quant.finalize: 3}]\n")
    with pytest.raises(ValidationError, match="a recipe needs a list of at least one pass"):
        Recipe(name="mine", passes=())


def test_yaml_syntax_has_line_and_column() -> None:
    assert message("name: x\npasses: [a, b\n") == (
        "the recipe is not valid YAML\n"
        "  where mine.yaml, line 3, column 1\n"
        "  why   expected ',' or ']', but got '<stream end>'\n"
        "  do    mend that line"
    )


def test_a_repeated_key_is_not_overwritten() -> None:
    assert message("name: x\npasses: [tidy.dead_code]\npasses: [tidy.no_ops]\n") == (
        "the recipe is not valid YAML\n  where mine.yaml, line 3, column 1\n  why   'passes' stands here twice\n  do    mend that line"
    )


def test_no_mapping_and_no_passes() -> None:
    assert message("- a\n") == ("the recipe is not a mapping\n  where mine.yaml\n  why   it is a list\n  do    start with name: and passes:")
    assert "there is none under passes" in message("name: x")


def test_yaml_builds_no_objects() -> None:
    assert "not valid YAML" in message("passes: !!python/object/apply:os.system ['touch /tmp/fxc-never']")
    assert not Path("/tmp/fxc-never").exists()


def test_order_lists_every_unmet_need_at_once() -> None:
    assert message("name: x\npasses: [quant.finalize, quant.weight_only]") == (
        "recipe 'x' can't run in this order\n"
        "  why   pass 1 quant.finalize needs 'quantised' before it, which quant.insert, quant.weight_only, softmax.adaptive gives\n"
        "        pass 2 quant.weight_only can't run on a program that is 'finalised' already\n"
        "  do    reorder or add the passes named"
    )


def test_quantising_without_finalising() -> None:
    assert "never finalises: add quant.finalize" in message("passes: [quant.weight_only]")


@pytest.fixture
def program() -> fxc.Program:
    torch.manual_seed(0)
    return fxc.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (torch.randn(2, 4),))


def test_a_glob_that_matches_nothing(program: fxc.Program) -> None:
    recipe = parse('name: x\npasses: [{tidy.no_ops: {where: {exclude: ["22*"]}}}]', "mine.yaml")
    with pytest.raises(fxc.RecipeError) as caught:
        check_globs(recipe, program)
    assert str(caught.value) == (
        "a glob of the recipe matches nothing: '22*'\n"
        "  where pass 1, tidy.no_ops\n"
        "  why   no module path, node or op of the model; known: 0, 1, 2\n"
        "  do    fxcompress inspect MODEL lists the module paths"
    )


def test_where_admits_only_what_it_names(program: fxc.Program) -> None:
    steps = [{"quant.weight_only": {"weights": "int8/channel", "where": {"exclude": ["2"]}}}, "quant.finalize"]
    report = fxc.compile(program, {"name": "x", "passes": steps}, backend="reference").report
    assert (report.passes[0].fired, report.passes[0].legal) == (1, 2)
    assert [c.module for c in report.passes[0].changes] == ["0"]


def test_unknown_backend_and_its_option(program: fxc.Program) -> None:
    with pytest.raises(fxc.RecipeError) as caught:
        fxc.compile(program, {"passes": ["tidy.dead_code"]}, backend="onxruntime")
    assert str(caught.value) == "unknown backend 'onxruntime'\n  why   did you mean 'onnxruntime'?"
    with pytest.raises(fxc.RecipeError) as caught:
        fxc.compile(program, {"passes": ["tidy.dead_code"], "backend": {"reference": {"threads": 1}}})
    assert str(caught.value) == (
        "an option is not valid\n  where the options of backend reference\n  why   threads: unknown, none is known\n  do    fields: none"
    )


@pytest.mark.parametrize("limit", [".inf", "-.inf", ".nan"])
def test_a_limit_is_a_number(limit: str) -> None:
    assert "passes.0.limit: Input should be a finite number" in message(f"passes: [{{quant.weight_only: {{limit: {limit}}}}}, quant.finalize]")


def test_a_limit_is_not_negative() -> None:
    assert message("passes: [{tidy.no_ops: {limit: -1}}]") == (
        "the recipe doesn't fit its schema\n"
        "  where mine.yaml\n"
        "  why   passes.0.limit: Input should be greater than or equal to 0\n"
        "  do    fields of passes.0: use, options, where, limit, unverified"
    )


def test_a_lossy_pass_has_no_limit() -> None:
    assert message("passes: [quant.insert, {quant.reconstruct: {limit: 3}}, quant.finalize]") == (
        "a lossy pass has no limit\n"
        "  where pass 2, quant.reconstruct\n"
        "  why   what it loses is measured, and no limit of it enforced: 3 would do nothing\n"
        "  do    leave out limit"
    )


def test_unknown_fields_inside_a_recipe() -> None:
    """Each with the fields of its own level."""
    assert message("passes: [{tidy.no_ops: {where: {exlude: [a]}}}]\nbackend: {name: reference, option: {}}") == (
        "the recipe doesn't fit its schema\n"
        "  where mine.yaml\n"
        "  why   passes.0.where.exlude: unknown, did you mean 'exclude'?\n"
        "        backend.option: unknown, did you mean 'options'?\n"
        "  do    fields of passes.0.where: include, exclude\n"
        "        fields of backend: name, options"
    )
