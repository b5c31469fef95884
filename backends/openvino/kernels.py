"""What OpenVINO made of a model: the kernel each product of the program runs in, from the runtime model of a compiled one.

The runtime model names, for each layer, the ONNX nodes it came from. A factor after a product may take its place and name; then the product is
found where that factor is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcompress.program import Program

LAYERS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution", "Gather", "Subgraph")
INTEGERS = ("u8", "i8")


@dataclass(frozen=True)
class Kernel:
    """A layer: its type, the precision it reads and the implementation, such as brgconv_avx512_I8."""

    layer: str
    precision: str
    implementation: str

    def __str__(self) -> str:
        return f"{self.layer} ({self.implementation}, {self.precision})"

    @property
    def is_integer(self) -> bool:
        """Whether it multiplies codes by codes."""
        return self.implementation.lower().endswith("i8") and self.precision in INTEGERS

    @property
    def reads_codes(self) -> bool:
        """Whether it reads 8-bit codes, and may multiply them in float."""
        return self.precision in INTEGERS and self.layer != "Subgraph"


def kernels(compiled: Any, program: Program, sites: Iterable[fx.Node]) -> dict[fx.Node, Kernel]:
    """The kernel of each site that has one of its own."""
    layers = _layers(compiled, program)
    chosen, found = set(sites), dict[fx.Node, Kernel]()
    for site in chosen:
        node: fx.Node | None = site
        while node is not None and node.name not in layers:
            node = next(iter(node.users)) if len(node.users) == 1 else None
            node = None if node in chosen else node
        if node is not None:
            found[site] = layers[node.name]
    return found


def _layers(compiled: Any, program: Program) -> Mapping[str, Kernel]:
    """Layers that can hold a site, by the names of the program's nodes they came from."""
    results = {str(port.get_any_name()): node.name for port, node in zip(compiled.outputs, program.results(), strict=True)}
    found: dict[str, Kernel] = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        facts = {k: str(op.get_rt_info()[k].astype(str)) for k in ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")}
        if facts["layerType"] in LAYERS:
            kernel = Kernel(facts["layerType"], facts["runtimePrecision"], facts["primitiveType"])
            for name in facts["originalLayersNames"].split(","):
                origin = name.partition("/")[0].removesuffix("_original")
                found[results.get(origin, origin.partition(".")[0])] = kernel
    return found
