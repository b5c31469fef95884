"""Speed and error of ONNX Runtime's n-bit and 8-bit kernels against its float32 ones, one thread.

    python tools/bench/onnx_kernels.py nbit [N K]    weights by bits, group and accuracy level: GROUPS of backends/onnx/blocks.py
    python tools/bench/onnx_kernels.py int8 [N K]    activations by storage and granularity: what backends/onnx/codes.py stores, and as what
    python tools/bench/onnx_kernels.py logs [N]      softmax of N x N scores times values, probabilities as codes of logs (log4:4)

Every line is one interleaved run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROWS = (1, 64)
RNG = np.random.default_rng(0)
Run = Callable[[np.ndarray], np.ndarray]


def session(nodes: list[onnx.NodeProto], rank: int, constants: dict[str, np.ndarray], kind: int = TensorProto.FLOAT) -> Run:
    """y = nodes(x) as a function."""
    x, y = (helper.make_tensor_value_info(name, of, [None] * rank) for name, of in (("x", kind), ("y", TensorProto.FLOAT)))
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(v, name) for name, v in constants.items()])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    runtime = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda value: runtime.run(None, {"x": value})[0]


def nbit(n: int, k: int, bits: int, group: int, level: int) -> tuple[Run, np.ndarray]:
    """(MatMulNBits on random codes, the weight it stands for)."""
    blocks = -(-k // group)
    codes = RNG.integers(0, 2**bits, (n, blocks, group), dtype=np.uint8)
    codes.reshape(n, -1)[:, k:] = 0
    scale = RNG.uniform(0.5, 1.5, (n, blocks)).astype(np.float32)
    packed = sum(codes[..., i :: 8 // bits] << (i * bits) for i in range(8 // bits)).astype(np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=group, accuracy_level=level
    )
    weight = ((codes.astype(np.float64) - 2 ** (bits - 1)) * scale[..., None]).reshape(n, -1)[:, :k]
    return session([node], 2, {"b": packed, "s": scale}), weight


def ratio(old: Run, new: Run, x: np.ndarray, repeats: int = 20) -> float:
    """Time of old over time of new, the best of interleaved runs."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        for i, run in enumerate((old, new)):
            start = time.perf_counter()
            run(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


def nbit_table(n: int = 1536, k: int = 576) -> None:
    """MatMulNBits."""
    dense = RNG.standard_normal((k, n)).astype(np.float32)
    float32 = session([helper.make_node("MatMul", ["x", "w"], ["y"])], 2, {"w": dense})
    inputs = [RNG.standard_normal((m, k)).astype(np.float32) for m in ROWS]
    print(f"[{n}, {k}]  bits group level  error/rms  speed at " + ", ".join(f"M={m}" for m in ROWS))
    for bits in (2, 4, 8):
        for group in (16, 32, 64, 128, 256):
            for level in (1, 4):
                kernel, weight = nbit(n, k, bits, group, level)
                wanted = inputs[-1] @ weight.T
                error = np.abs(kernel(inputs[-1]) - wanted).max() / np.sqrt((wanted**2).mean())
                speed = "  ".join(f"{ratio(float32, kernel, x):5.2f}x" for x in inputs)
                print(f"{bits:4} {group:5} {level:5}  {error:.1e}  {speed}", flush=True)


def codes(kind: type, shape: tuple[int, ...]) -> np.ndarray:
    """Random codes around the middle of the type."""
    return (RNG.integers(-127, 128, shape) + (128 if kind == np.uint8 else 0)).astype(kind)


def matmul(left: type, right: type, weight: np.ndarray, how: str) -> Run:
    """x [.., K] float -> codes -> MatMulIntegerToFloat. how: static, token (a scale a row) or dynamic (DynamicQuantizeLinear)."""
    middle = {np.uint8: np.uint8(128), np.int8: np.int8(0)}
    given = {
        "b": weight,
        "s": np.float32(0.02),
        "one": np.float32(1),
        "sb": np.full(weight.shape[-1:], 0.01, np.float32),
        "top": np.float32(127),
    }
    given |= {"z": middle[left], "zb": middle[right], "last": np.array([-1])}
    node = helper.make_node
    product = "MatMulIntegerToFloat"
    if how == "static":
        first = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node(product, ["q", "b", "s", "sb", "z", "zb"], ["y"], domain=MS)]
    elif how == "dynamic":
        first = [node("DynamicQuantizeLinear", ["x"], ["q", "d", "dz"]), node(product, ["q", "b", "d", "sb", "dz", "zb"], ["y"], domain=MS)]
    else:
        first = [node("Abs", ["x"], ["a"]), node("ReduceMax", ["a", "last"], ["m"], keepdims=1), node("Div", ["m", "top"], ["r"])]
        first += [node("Div", ["x", "r"], ["u"]), node("QuantizeLinear", ["u", "one", "z"], ["q"])]
        first += [node(product, ["q", "b", "one", "sb", "z", "zb"], ["p"], domain=MS), node("Mul", ["p", "r"], ["y"])]
    return session(first, weight.ndim, given)


def convolution(kind: type, weight: np.ndarray, groups: int, float32: bool = False) -> Run:
    """x [B, C, ..] -> conv; through codes of the kind, else in float32."""
    m, axes = len(weight), weight.ndim - 2
    how = {"group": groups, "pads": [weight.shape[2] // 2] * 2 * axes}
    if float32:
        return session([helper.make_node("Conv", ["x", "w"], ["y"], **how)], weight.ndim, {"w": weight.astype(np.float32) * np.float32(0.01)})
    z = np.uint8(128) if kind == np.uint8 else np.int8(0)
    given = {"s": np.float32(0.02), "z": z, "w": weight, "sw": np.full(m, 0.01, np.float32), "zw": np.zeros(m, np.int8), "sy": np.float32(0.3)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearConv", ["q", "s", "z", "w", "sw", "zw", "sy", "z"], ["c"], **how),
        helper.make_node("DequantizeLinear", ["c", "sy", "z"], ["y"]),
    ]
    return session(nodes, weight.ndim, given)


def int8_table(n: int = 1536, k: int = 576) -> None:
    """MatMulIntegerToFloat and QLinearConv with their Q and DQ, and MatMulNBits of 8 bits."""
    rows = (*ROWS, 576)
    inputs = [RNG.standard_normal((m, k)).astype(np.float32) for m in rows]
    dense = session([helper.make_node("MatMul", ["x", "w"], ["y"])], 2, {"w": RNG.standard_normal((k, n)).astype(np.float32)})
    print(f"[{n}, {k}] at " + ", ".join(f"M={m}" for m in rows))
    kernels = {f"{how}, {a.__name__} x {b.__name__}": matmul(a, b, codes(b, (k, n)), how) for how, a, b in VARIANTS}
    kernels["MatMulNBits, level 4"] = nbit(n, k, 8, 64, 4)[0]
    for name, kernel in kernels.items():
        print(f"{name:32}" + "  ".join(f"{ratio(dense, kernel, x):5.2f}x" for x in inputs), flush=True)
    for name, (shape, weight, groups) in CONVOLUTIONS.items():
        x, w = RNG.standard_normal(shape).astype(np.float32), codes(np.int8, weight)
        plain = convolution(np.uint8, w, groups, float32=True)
        speed = "  ".join(f"{kind.__name__} {ratio(plain, convolution(kind, w, groups), x):5.2f}x" for kind in (np.uint8, np.int8))
        print(f"conv {name:27}{speed}", flush=True)


STEP, LEVELS, SCALE = np.float32(np.log(2) / 4), 2.0 ** (-np.arange(16) / 4) * (np.arange(16) < 15), np.float32(0.9)


def logs(first: list[onnx.NodeProto], last: list[onnx.NodeProto], values: np.ndarray) -> Run:
    """Scores [heads, N, N] -> what first and last make of them, times the values."""
    given = {"step": STEP, "down": -STEP, "zero": np.uint8(0), "top": np.uint8(15), "s": SCALE, "ln": np.log(SCALE), "v": values}
    given["levels"] = (LEVELS * SCALE).astype(np.float32)
    nodes = [*first, *last, *([] if last else [helper.make_node("Identity", ["a"], ["p"])])]
    used = {name: value for name, value in given.items() if name == "v" or any(name in n.input for n in nodes)}
    return session([*nodes, helper.make_node("MatMul", ["p", "v"], ["y"])], 3, used)


def logs_table(n: int = 256) -> None:
    """The forms that backends/onnx/quantisers.py chose from."""
    node = helper.make_node
    softmax = [node("Softmax", ["x"], ["a"], axis=-1)]
    rounded = [node("QuantizeLinear", ["l", "step", "zero"], ["c0"]), node("Clip", ["c0", "", "top"], ["c"])]
    scores = [node("LogSoftmax", ["x"], ["n"], axis=-1), node("Sub", ["ln", "n"], ["l"]), *rounded]
    probabilities = [*softmax, node("Log", ["a"], ["n"]), node("Sub", ["ln", "n"], ["l"]), *rounded]
    powers = [node("Cast", ["c"], ["f"], to=TensorProto.FLOAT), node("Mul", ["f", "down"], ["e"]), node("Exp", ["e"], ["w"])]
    powers += [node("ThresholdedRelu", ["w"], ["t"], alpha=float(2 ** (-14.5 / 4))), node("Mul", ["t", "s"], ["p"])]
    table = [node("Cast", ["c"], ["i"], to=TensorProto.INT32), node("Gather", ["levels", "i"], ["p"])]
    forms = {"scores, powers": (scores, powers), "scores, table": (scores, table), "probabilities, powers": (probabilities, powers)}
    values = RNG.standard_normal((16, n, 32)).astype(np.float32)
    x = 3 * RNG.standard_normal((16, n, n)).astype(np.float32)
    dense = logs(softmax, [], values)
    print(f"[16, {n}, {n}]")
    for name, form in forms.items():
        print(f"{name:24}{ratio(dense, logs(*form, values), x):5.2f}x", flush=True)


MS = "com.microsoft"
VARIANTS = (
    ("static", np.uint8, np.int8),
    ("static", np.uint8, np.uint8),
    ("static", np.int8, np.int8),
    ("token", np.uint8, np.int8),
    ("token", np.int8, np.int8),
    ("dynamic", np.uint8, np.int8),
)
CONVOLUTIONS = {
    "64 x 64, 3 x 3": ((2, 64, 32, 32), (64, 64, 3, 3), 1),
    "64 x 128, 1 x 1": ((2, 64, 32, 32), (128, 64, 1, 1), 1),
    "depthwise": ((2, 64, 32, 32), (64, 1, 3, 3), 64),
    "4 groups": ((2, 64, 32, 32), (64, 16, 3, 3), 4),
    "1 axis": ((2, 64, 256), (64, 64, 3), 1),
    "3 axes": ((1, 16, 8, 16, 16), (16, 16, 3, 3, 3), 1),
}

if __name__ == "__main__":
    {"nbit": nbit_table, "int8": int8_table, "logs": logs_table}[sys.argv[1]](*(int(a) for a in sys.argv[2:]))
