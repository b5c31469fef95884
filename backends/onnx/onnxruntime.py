"""The onnxruntime backend: model.onnx with its weights, run by ONNX Runtime on CPU.

Weight-only formats of 2, 4 and 8 bits run in ONNX Runtime's n-bit kernels from the packed bytes. Measured on one AVX-512 VNNI thread,
[M, 576] x [576, 1536], against float32, for M = 1 and M = 64: 4 bits in groups of 128 2.6 x and 1.4 x, of 32 2.0 x and 1.1 x; 8 bits
2.3 x and 1.5 x; 2 bits 1.8 x and 0.9 x, all with `activation_rounding: int8`. With "off": 0.8 x at 4 bits, 0.03 x at 2 and 8 bits.

Programs with quantised activations run in integer kernels (`integer`). The same products, quantisers included: static 2.0 x and 3.2 x, one
scale a token 1.8 x and 2.6 x; at M = 576 3.5 x and 2.8 x, where 8-bit weights alone give 1.4 x. DynamicQuantizeLinear is no faster than a
static quantiser. Convolutions from float to float: 3 x 3 of 64 channels 2.8 x, 1 x 1 1.9 x, one axis 2.8 x, three axes 1.2 x; with groups they
gain nothing (0.8 x).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
from pydantic import field_validator
from torch import Tensor, fx

from fxcompress.backend import Backend, Session
from fxcompress.backends.onnx.bind import FLOAT_KERNEL, INT8_KERNEL, bind
from fxcompress.backends.onnx.blocks import GROUPS
from fxcompress.backends.onnx.elsewhere import check_other_sizes
from fxcompress.backends.onnx.files import read_graph, write_model
from fxcompress.backends.onnx.norms import part_norms
from fxcompress.backends.onnx.outline import QUANTIZE, outline
from fxcompress.backends.onnx.parity import end_to_end, site_by_site
from fxcompress.backends.onnx.rotary import fuse_rotary
from fxcompress.backends.onnx.scales import take_up_scales
from fxcompress.backends.onnx.session import OnnxSession
from fxcompress.backends.onnx.siblings import AND, merge_siblings
from fxcompress.backends.onnx.sites import in_logs, quantised_sites, share
from fxcompress.backends.onnx.stepwise import Steps, step_by_step
from fxcompress.backends.onnx.translate import translate
from fxcompress.cost import macs
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.numerics.noise import sqnr
from fxcompress.program import Program, module_path
from fxcompress.report import BackendReport, FloatSite
from fxcompress.rewrite import Options
from fxcompress.target import ActivationKernel, Target, WeightKernel

IN_FLOAT = "fxc.in_float"
KERNELS = ("MatMulNBits", "GatherBlockQuantized", "MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul", "QGemm")
_LAYOUT = re.compile(r"_token_\d+$")  # what ONNX Runtime adds to the name of a node it changes the layout of


class OnnxRuntimeOptions(Options):
    """activation_rounding: "int8" lets the n-bit kernels round each block of activations to int8, which is what makes them fast; "off" keeps
    float activations. What it costs in accuracy is measured and reported."""

    activation_rounding: Literal["int8", "off"] = "int8"

    @field_validator("activation_rounding", mode="before")
    @classmethod
    def _is_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false


@dataclass(frozen=True)
class Lowered:
    """A program as an ONNX model that shares its constants. in_float: quantised readers (node names) without n-bit kernel, with the reason."""

    model: ir.Model
    in_float: Mapping[str, str]


def _kernels() -> tuple[WeightKernel, ...]:
    names = {bits: (f"int{bits}", f"uint{bits}") for bits in GROUPS}
    return tuple(
        WeightKernel(families=("linear", "embedding"), formats=names[bits], least_group=min(groups), power_of_two=True)
        for bits, groups in GROUPS.items()
    )


INTEGER_KERNELS = (
    ActivationKernel(families=("linear",), activations=("uint8/tensor", "int8/tensor", "int8/token"), weights=("int8",)),
    ActivationKernel(families=("product",), activations=("uint8/tensor", "int8/tensor"), weights=("int8",)),
    ActivationKernel(families=("conv",), activations=("uint8/tensor", "int8/tensor"), weights=("int8",), needs_output=True),
)


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime on CPU."""

    name = "onnxruntime"
    Options = OnnxRuntimeOptions
    target = Target(name="onnxruntime", kernels=_kernels(), activations=INTEGER_KERNELS, sums=("uint8/tensor", "int8/tensor"))

    def lower(self, program: Program) -> Lowered:
        """The program as ONNX. BackendRefusal for what ONNX or ONNX Runtime can't say."""
        level = INT8_KERNEL if self.options.activation_rounding == "int8" else FLOAT_KERNEL
        skeleton = translate(program)
        fuse_rotary(skeleton.model)
        bound = bind(skeleton, program.constants, level)
        merge_siblings(bound.model)
        part_norms(bound.model)
        take_up_scales(bound.model)
        bound.model.metadata_props[IN_FLOAT] = json.dumps(bound.in_float)
        return Lowered(bound.model, bound.in_float)

    def write(self, program: Program, folder: Path) -> None:
        """model.onnx and weights.bin. The model runs in plain ONNX Runtime, without this package."""
        write_model(self.lower(program).model, folder)

    def open(self, folder: Path, threads: int | None = None) -> Session:
        """A session over model.onnx."""
        return OnnxSession(read_graph(folder), folder, threads)

    def report(self, program: Program, folder: Path, probe: Sequence[Tensor]) -> BackendReport:
        """Shares from the optimised graph, parity with the interpreter (limit: that of exact rewrites) and what int8 activations cost."""
        model = read_graph(folder)
        shapes: dict[fx.Node, Sequence[int]] = {}
        wanted = run(program, probe, lambda node, value: shapes.update({node: value.shape} if isinstance(value, Tensor) else {}))
        rounded, kernels = _outputs_and_kernels(model, folder, probe)
        plain = _without_rounding(model)
        session = OnnxSession(plain, folder)
        exact = rounded if self.options.activation_rounding == "off" else session.run(probe)
        work = {n: macs(n, shapes) for n in outline(program).nodes}
        sites = quantised_sites(program, work)
        judged = _judge(program, sites, plain, folder, probe)
        parity = max(map(relative_error, wanted, exact), default=0.0) if judged.flips else end_to_end(program, probe, wanted, exact)
        check_other_sizes(program, session.run)
        covered = {n for n in sites if kernels.get(n.name) in KERNELS}
        reasons = json.loads(next((p.value for p in model.metadata_props if p.key == IN_FLOAT), "{}"))
        return BackendReport(
            name=self.name,
            options=self.options.model_dump(mode="json"),
            opset=next(o.version for o in model.opset_import if o.domain == ""),
            integer_share=share(covered, work, work),
            quantised_share=share(covered, sites, work),
            in_float=tuple(
                FloatSite(site=n.name, module=module_path(n), macs=work[n], reason=_reason(n, reasons, kernels))
                for n in sites
                if n not in covered
            ),
            parity=parity,
            site_parity=max(judged.errors.values(), default=None),
            code_flips=max(judged.flips.values(), default=None),
            rounding_sqnr=min((sqnr(a, b) for a, b in zip(exact, rounded, strict=True) if a.is_floating_point()), default=None),
            file_bytes=sum(f.stat().st_size for f in folder.iterdir()),
        )


def _outputs_and_kernels(model: onnx.ModelProto, folder: Path, probe: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, str]]:
    """The outputs, and the op by node name in the graph that ONNX Runtime made of the model and ran."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "optimized.onnx")
        session = OnnxSession(model, folder, optimized=path)
        optimized = onnx.load(str(path), load_external_data=False)
    return session.run(probe), {name: n.op_type for n in optimized.graph.node for name in _LAYOUT.sub("", n.name).split(AND)}


def _judge(program: Program, sites: Sequence[fx.Node], model: onnx.ModelProto, folder: Path, probe: Sequence[Tensor]) -> Steps:
    """Parity of each site on identical inputs; step by step where activations are codes."""

    def session(changed: onnx.ModelProto, inputs: Sequence[Tensor]) -> list[Tensor]:
        return OnnxSession(changed, folder).run(inputs)

    if any(n.target is QUANTIZE for n in program.graph.nodes):
        return step_by_step(program, set(sites), model, session, probe)
    return Steps(site_by_site(program, sites, model, session, probe))


def _reason(node: fx.Node, reasons: Mapping[str, str], kernels: Mapping[str, str]) -> str:
    default = (
        f"ONNX Runtime runs it as {kernels[node.name]}" if node.name in kernels else "its kernel is not in the graph that ONNX Runtime runs"
    )
    return in_logs(node) or reasons.get(node.name, default)


def _without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = FLOAT_KERNEL
    return changed
