"""A multiplication of a product of codes is taken up by its scale: the same numbers, in one node. Near misses stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto as Type
from onnx import helper

from fxcompress.backends.onnx.scales import take_up_scales

NUMBERS = np.random.default_rng(0)
CODES = {"a": NUMBERS.integers(0, 256, (2, 3, 5, 8)).astype(np.uint8), "b": NUMBERS.integers(-128, 128, (2, 3, 8, 7)).astype(np.int8)}
MISSES = ["two readers", "an output", "negative", "a row", "a scale of its own", "a bias", "a sum", "a square"]


def model(miss: str = "", swapped: bool = False) -> onnx.ModelProto:
    """A B c with everything as it is to be, or not in one respect."""
    held = {"s": np.float32(0.02), "t": np.float32(0.01), "y": np.uint8(120), "z": np.int8(3), "c": np.float32(0.125)}
    if miss == "negative":
        held["c"] = np.float32(-0.125)
    if miss == "a row":
        held["c"] = np.linspace(0.1, 1, 7, dtype=np.float32)
    inputs = ["a", "b", "s", "t", "y", "z"]
    if miss == "a bias":
        held["bias"] = np.ones(7, np.float32)
        inputs.append("bias")
    if miss == "a scale of its own":
        inputs[2] = "given"
    factors = ["p", "p"] if miss == "a square" else ["c", "p"] if swapped else ["p", "c"]
    nodes = [helper.make_node("MatMulIntegerToFloat", inputs, ["p"], "product", domain="com.microsoft")]
    nodes.append(helper.make_node("Add" if miss == "a sum" else "Mul", factors, ["q"], "times"))
    nodes.append(helper.make_node("Neg", ["q"], ["r"]))
    results = ["r", *(["p"] if miss == "an output" else []), *(["o"] if miss == "two readers" else [])]
    if miss == "two readers":
        nodes.append(helper.make_node("Abs", ["p"], ["o"]))
    given = [helper.make_tensor_value_info("a", Type.UINT8, [2, 3, 5, 8]), helper.make_tensor_value_info("b", Type.INT8, [2, 3, 8, 7])]
    if miss == "a scale of its own":
        given.append(helper.make_tensor_value_info("given", Type.FLOAT, []))
    made = [helper.make_tensor_value_info(name, Type.FLOAT, [2, 3, 5, 7]) for name in results]
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "graph", given, made, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)], ir_version=10)


def results(proto: onnx.ModelProto) -> list[Any]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {**CODES, "given": np.array(0.03, np.float32)}
    return session.run(None, {i.name: given[i.name] for i in session.get_inputs()})


def after(proto: onnx.ModelProto) -> onnx.ModelProto:
    rewritten = ir.serde.deserialize_model(proto)
    take_up_scales(rewritten)
    return ir.serde.serialize_model(rewritten)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_number_goes_into_the_scale(swapped: bool) -> None:
    before = model(swapped=swapped)
    found = after(before)
    assert Counter(n.op_type for n in found.graph.node) == {"MatMulIntegerToFloat": 1, "Neg": 1}
    assert next((n.name, n.output[0]) for n in found.graph.node) == ("product", "q")
    for wanted, given in zip(results(before), results(found), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("miss", MISSES)
def test_near_misses_stay(miss: str) -> None:
    before = model(miss)
    found = after(before)
    assert [n.op_type for n in found.graph.node] == [n.op_type for n in before.graph.node]
    for wanted, given in zip(results(before), results(found), strict=True):
        np.testing.assert_array_equal(given, wanted)


def test_two_products_of_one_scale_have_their_own() -> None:
    before = model()
    nodes = list(before.graph.node)
    nodes += [helper.make_node("MatMulIntegerToFloat", ["a", "b", "s", "t", "y", "z"], ["p2"], "other", domain="com.microsoft")]
    nodes += [helper.make_node("Mul", ["p2", "half"], ["q2"])]
    before.graph.ClearField("node")
    before.graph.node.extend(nodes)
    before.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.5), "half"))
    before.graph.output.append(helper.make_tensor_value_info("q2", Type.FLOAT, [2, 3, 5, 7]))
    found = after(before)
    assert Counter(n.op_type for n in found.graph.node) == {"MatMulIntegerToFloat": 2, "Neg": 1}
    for wanted, given in zip(results(before), results(found), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-6)
