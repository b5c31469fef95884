"""Speed and error of ONNX Runtime's n-bit kernels against its float32 MatMul, one thread, by bits, group and accuracy level.

    python tools/bench/onnx_kernels.py [N K]

Decides `GROUPS` of backends/onnx/blocks.py: which kernel blocks are worth their name. Every line is one interleaved run.
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


def session(node: onnx.NodeProto, k: int, n: int, constants: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """y = node(x) as a function."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in (("x", k), ("y", n)))
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(v, name) for name, v in constants.items()])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    runtime = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda value: runtime.run(None, {"x": value})[0]


def nbit(n: int, k: int, bits: int, group: int, level: int) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
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
    return session(node, k, n, {"b": packed, "s": scale}), weight


def ratio(old: Callable[[np.ndarray], np.ndarray], new: Callable[[np.ndarray], np.ndarray], x: np.ndarray, repeats: int = 20) -> float:
    """Time of old over time of new, the best of interleaved runs."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        for i, run in enumerate((old, new)):
            start = time.perf_counter()
            run(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


def main(n: int = 1536, k: int = 576) -> None:
    """The table."""
    dense = RNG.standard_normal((k, n)).astype(np.float32)
    float32 = session(helper.make_node("MatMul", ["x", "w"], ["y"]), k, n, {"w": dense})
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


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
