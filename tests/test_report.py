"""The report: its published schema is the code's, real reports keep to it, and its figures are those of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import fxcompress as fxc
from fxcompress.report import Check, Report, schema
from tests.zoo import ZOO

PUBLISHED = Path(__file__).parents[1] / "docs/report.schema.json"
WEIGHT_ONLY = [{"quant.weight_only": {"weights": "int4/group:4", "where": {"exclude": ["0"]}}}, "quant.finalize"]
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
KNOWN = {"type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"}
IGNORED = {"title", "description", "default", "$defs"}


def faults(value: Any, rule: Any, root: dict[str, Any], place: str = "") -> Iterator[str]:
    """Where the value breaks the schema: the part of JSON Schema that the published one uses, anything else is an error."""
    if rule is True:
        return
    if "$ref" in rule:
        rule = root["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    assert rule.keys() <= KNOWN | IGNORED, rule.keys()
    kind = TYPES[rule["type"]] if "type" in rule else object
    if not isinstance(value, kind) or (isinstance(value, bool) and rule.get("type") in ("integer", "number")):
        yield f"{place} is no {rule['type']}"
        return
    if "enum" in rule and value not in rule["enum"]:
        yield f"{place} is none of {rule['enum']}"
    if "anyOf" in rule and all(list(faults(value, choice, root, place)) for choice in rule["anyOf"]):
        yield f"{place} fits none of its forms"
    if isinstance(value, dict):
        yield from object_faults(value, rule, root, place)
    if isinstance(value, list):
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", math.inf):
            yield f"{place} has {len(value)} items"
        inner = [*rule.get("prefixItems", ()), *[rule.get("items", True)] * len(value)]
        for i, item in enumerate(value):
            yield from faults(item, inner[i], root, f"{place}[{i}]")


def object_faults(value: dict[str, Any], rule: Any, root: dict[str, Any], place: str) -> Iterator[str]:
    properties = rule.get("properties", {})
    yield from (f"{place}.{name} is missing" for name in rule.get("required", ()) if name not in value)
    for name, item in value.items():
        inner = properties.get(name, rule.get("additionalProperties", True))
        if inner is False:
            yield f"{place}.{name} is unknown"
        else:
            yield from faults(item, inner, root, f"{place}.{name}")


def no_constants(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def as_json(report: Report) -> Any:
    return json.loads(report.model_dump_json(), parse_constant=no_constants)


class Two(nn.Module):
    """Two linears, one of them with a weight that is also added to."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(8, 8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        x = self.first(getattr(self, "0")(x).relu())
        return self.second(x), (x > 0), self.second.weight + x.mean()


@pytest.fixture(scope="module")
def compiled() -> fxc.CompiledModel:
    torch.manual_seed(0)
    return fxc.compile(Two().eval(), {"name": "two", "passes": WEIGHT_ONLY}, (torch.randn(2, 8),), backend="reference")


def test_the_published_schema_is_the_codes() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == schema(), "python -m fxcompress.report > docs/report.schema.json"


def test_a_report_keeps_to_the_published_schema(compiled: fxc.CompiledModel) -> None:
    root = json.loads(PUBLISHED.read_text())
    assert list(faults(as_json(compiled.report), root, root)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "unet2d_cond", "detr"])
def test_reports_of_real_models_keep_to_it(name: str) -> None:
    model, inputs = ZOO[name]()
    recipe = {"passes": ["tidy.fold_constants", "tidy.no_ops", {"quant.weight_only": {"weights": "int8/group:16"}}, "quant.finalize"]}
    report = fxc.compile(model, recipe, inputs, backend="reference").report
    root = json.loads(PUBLISHED.read_text())
    assert list(faults(as_json(report), root, root)) == []
    assert all(p.fired for p in report.passes[2:])


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a missing field": (lambda d: d.pop("origin"), ".origin is missing"),
    "an unknown field": (lambda d: d.update(extra=1), ".extra is unknown"),
    "text for a number": (lambda d: d.update(nodes="3"), ".nodes is no integer"),
    "a flag for a number": (lambda d: d.update(nodes=True), ".nodes is no integer"),
    "an unknown check": (lambda d: d.update(check="some"), ".check is none of ['each', 'end', 'off']"),
    "three bounds": (lambda d: d["symbols"].update(batch=[1, 2, 3]), ".symbols.batch has 3 items"),
    "a verdict": (lambda d: d["passes"][0]["checks"][0].update(verdict="fine"), ".passes[0].checks[0].verdict is none of"),
    "a figure as text": (lambda d: d["passes"][0]["worst"].update(figure="inf"), ".passes[0].worst fits none of its forms"),
}


@pytest.mark.parametrize(("fault", "found"), FAULTS.values(), ids=FAULTS)
def test_the_schema_bites(fault: Callable[[Any], Any], found: str, compiled: fxc.CompiledModel) -> None:
    data, root = as_json(compiled.report), json.loads(PUBLISHED.read_text())
    fault(data)
    first, *more = faults(data, root, root)
    assert first.startswith(found)
    assert more == []
    with pytest.raises(ValidationError):
        Report.model_validate_json(json.dumps(data), strict=True)


def test_a_report_survives_its_file(compiled: fxc.CompiledModel, tmp_path: Path) -> None:
    assert fxc.load(compiled.save(tmp_path / "out")).report == compiled.report


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_figures_that_json_cannot_hold_are_null(value: float) -> None:
    check = Check(site="a", value="b", figure=value, limit=value, verdict="held", why="")
    assert json.loads(check.model_dump_json(), parse_constant=no_constants)["figure"] is None


def test_figures_are_those_of_the_run(compiled: fxc.CompiledModel) -> None:
    """Everything recomputed from the model: 3 linears of 8 x 8, one excluded, one read by an addition too."""
    report, weights = compiled.report, 64 * 4
    quantise, finalise = report.passes
    assert report.parameters == 3 * 64 + 2 * 8
    assert report.float_bytes == 3 * weights + 2 * 8 * 4
    assert (quantise.fired, quantise.legal) == (1, 2), "legal counts what the recipe excluded"
    assert [c.module for c in quantise.changes] == ["first"]
    assert [(d.site, d.reason) for d in quantise.declined] == [("second_weight", "second_weight is also read by add, not as a weight")]
    assert quantise.worst in quantise.checks
    assert [c.verdict for c in quantise.checks] == ["held"]
    scales = 8 * 2 * 4
    assert (quantise.bytes_before, quantise.bytes_after) == (report.float_bytes, report.float_bytes + scales)
    assert finalise.bytes_after == report.weight_bytes == report.float_bytes - weights + scales + 64 // 2
    assert report.bytes_by_width == {"float32": 2 * weights + 2 * 8 * 4 + scales, "int4": 32}
    assert quantise.nodes_after - quantise.nodes_before == 3  # scale, quantize, dequantize
    assert finalise.nodes_after == quantise.nodes_after  # packed and unpack for weight and quantize
    assert report.nodes == finalise.nodes_after == len(compiled.program.graph.nodes)
    assert (quantise.output_sqnr, finalise.output_sqnr) == (report.output_sqnr, None), "an exact pass has no figure of loss"
    assert report.regions == 4
    assert [(t.name, t.shape, t.dtype, t.role) for t in report.inputs] == [("x", ("batch", 8), "float32", "input")]
    assert [t.dtype for t in report.outputs] == ["float32", "bool", "float32"]
    assert report.recipe["passes"][0]["options"] == {"weights": "int4/group:4"}
    own = {"weights": "int4/group:4", "embeddings": None, "symmetric": True, "range": "mse", "storage": False}
    assert quantise.options == {**own, "where": {"exclude": ["0"]}}, "what the recipe says beside the pass's own options is there too"
