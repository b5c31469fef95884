"""The recipe `ptq4sam` on the trained segmenter at 4 bits, attention by attention, and on models it wasn't made for."""

from __future__ import annotations

import functools

import pytest
import torch

import fxcompress as fxc
from fxcompress.calibrate.feed import Items
from tests.held_out import HELD_OUT
from tests.zoo import ZOO
from tools.ptq4sam import Judge, plant, recipe
from tools.ptq4sam_elsewhere import trained
from tools.testbeds import load, scenes, segment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def planted() -> Judge:
    """The segmenter with keys in two lumps."""
    return Judge(planted=True, count=8)


@pytest.fixture(scope="module")
def natural() -> Judge:
    """The segmenter as it was trained."""
    return Judge(planted=False, count=8)


@functools.cache
def figures(judge: Judge, *parts: str) -> dict[str, float]:
    """dB of scores and products, and divergence, with these parts of the recipe, where products alone are quantised, to 4 bits."""
    chosen = recipe("W4A4", parts, 1)
    next(s for s in chosen["passes"] if "quant.insert" in s)["quant.insert"]["where"] = {"include": ["matmul*"]}
    found = judge(judge.compiled(chosen))
    return {key: float(found[key].split()[0]) for key in ("scores", "A V", "divergence")}


def test_planting_changes_keys_and_nothing_else() -> None:
    model = load("sam").model
    few = scenes.held_out(load("sam").test, 4, seed=5)
    asked = {"pixel_values": 2 * few.images, **segment.prompt(few, "boxes")}
    with torch.no_grad():
        before, after = model(**asked).pred_masks, plant(model)(**asked).pred_masks
    assert torch.allclose(before, after, atol=1e-3 * float(before.abs().max()))
    keys = model.mask_decoder.transformer.layers[0].self_attn.k_proj.bias
    assert float((plant(model).mask_decoder.transformer.layers[0].self_attn.k_proj.bias - keys).abs().min()) > 1


def test_planted_lumps_cost_and_the_folds_take_them_away(planted: Judge, natural: Judge) -> None:
    lumps, folded, never = figures(planted, "softmax"), figures(planted, "keys", "softmax"), figures(natural, "keys", "softmax")
    assert folded["scores"] > lumps["scores"] + 1  # queries are as coarse as keys: of keys alone it is 5 dB and more
    assert folded["divergence"] < lumps["divergence"]
    assert abs(folded["scores"] - never["scores"]) < 0.5


def test_adaptive_codes_lose_less_of_the_products_than_even_steps(natural: Judge) -> None:
    assert figures(natural, "keys", "softmax")["A V"] >= figures(natural, "keys")["A V"]


@pytest.mark.parametrize("name", ["sam", "sam2", "vit", "detr", "dit", "llama"])
def test_other_models_as_integers(name: str) -> None:
    model, inputs = (ZOO.get(name) or HELD_OUT[name])()
    example = fxc.Inputs.of(inputs)
    made = fxc.compile(model, trained(2), example_inputs=example, calibration=Items([example, example, example]))
    assert {p.name: p.fired for p in made.report.passes}["softmax.adaptive"] > 0
    assert made.report.output_sqnr is not None
    assert made.report.output_sqnr > 20
