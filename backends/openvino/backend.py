"""The openvino backend: model.onnx with its weights in plain Q/DQ form, run by OpenVINO on CPU.

Which layers run on integers is OpenVINO's own choice, read back from the model it made. Its integer kernels take codes of weights without zero
point; activations may have one in linear layers and convolutions, but not in products of two activations and transposed convolutions, which
run in float then.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import field_validator
from torch import Tensor, fx

from fxcompress.backend import Backend
from fxcompress.backends.onnx.drift import check_drift
from fxcompress.backends.onnx.elsewhere import check_other_sizes
from fxcompress.backends.onnx.files import MODEL, WEIGHTS, read_graph, write_model
from fxcompress.backends.onnx.outline import QUANTIZE, outline
from fxcompress.backends.onnx.parity import end_to_end
from fxcompress.backends.onnx.sites import in_logs, quantised_sites, readers_of_codes, reads_codes, share
from fxcompress.backends.onnx.stepwise import step_by_step
from fxcompress.backends.onnx.translate import translate
from fxcompress.backends.openvino.bind import bind
from fxcompress.backends.openvino.kernels import Kernel, kernels
from fxcompress.backends.openvino.session import OpenVinoSession, absent, check_it_survives, runtime
from fxcompress.cost import macs
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.numerics.noise import sqnr
from fxcompress.program import Program, module_path
from fxcompress.report import BackendReport, FloatSite
from fxcompress.rewrite import Options
from fxcompress.target import ActivationKernel, Target, WeightKernel

IN_FLOAT = "fxc.in_float"


class OpenVinoOptions(Options):
    """activation_rounding: "int8" lets kernels that decompress weights round each group of 32 activations to int8, where OpenVINO finds that
    faster; "off" keeps float activations. What it costs in accuracy is measured and reported."""

    activation_rounding: Literal["int8", "off"] = "int8"

    @field_validator("activation_rounding", mode="before")
    @classmethod
    def _is_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false


class OpenVinoBackend(Backend):
    """OpenVINO on CPU."""

    name = "openvino"
    Options = OpenVinoOptions
    target = Target(
        name="openvino",
        kernels=(WeightKernel(families=("linear", "embedding"), formats=("int8", "uint8"), ragged=False),),
        activations=(
            ActivationKernel(families=("linear", "conv"), activations=("uint8/tensor", "int8/tensor")),
            ActivationKernel(families=("product", "transposed"), activations=("int8/tensor",)),
        ),
    )

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        runtime()

    @classmethod
    def absent(cls) -> str:
        """The command that installs OpenVINO."""
        return absent()

    def write(self, program: Program, folder: Path) -> None:
        """model.onnx and weights.bin. The model runs in plain OpenVINO, without this package."""
        bound = bind(translate(program), program.constants)
        bound.model.metadata_props[IN_FLOAT] = json.dumps(bound.in_float)
        write_model(bound.model, folder)

    def open(self, folder: Path, threads: int | None = None) -> OpenVinoSession:
        """A session over model.onnx."""
        read_graph(folder)  # says what is wrong with the files
        return OpenVinoSession(folder / MODEL, threads, self.options.activation_rounding == "int8")

    def report(self, program: Program, folder: Path, probe: Sequence[Tensor]) -> BackendReport:
        """Shares from OpenVINO's own model, parity with the interpreter (limit: that of exact rewrites) and what int8 activations cost."""
        model = read_graph(folder)
        check_it_survives(folder / MODEL, self.options.activation_rounding == "int8")
        session = self.open(folder)
        shapes: dict[fx.Node, Sequence[int]] = {}
        wanted = run(program, probe, lambda node, value: shapes.update({node: value.shape} if isinstance(value, Tensor) else {}))
        rounded = session.run(probe)
        plain = session if self.options.activation_rounding == "off" else OpenVinoSession(folder / MODEL)
        exact = rounded if plain is session else plain.run(probe)
        outlined = outline(program)
        work = {n: macs(n, shapes) for n in outlined.nodes}
        sites = quantised_sites(program, work)
        # products of two activations are judged by the codes after them: read out, an int8 MatMul of OpenVINO 2026.4 spoils what follows it
        judged = readers_of_codes(outlined)
        steps = step_by_step(program, judged, model, lambda changed, inputs: _run_changed(changed, folder, inputs), probe)
        parity = _parity(program, probe, wanted, exact)
        check_other_sizes(program, plain.run)
        found = kernels(session.compiled, program, sites)
        covered = {n for n in sites if n in found and (found[n].is_integer if reads_codes(n) else found[n].reads_codes)}
        reasons = json.loads(next((p.value for p in model.metadata_props if p.key == IN_FLOAT), "{}"))
        return BackendReport(
            name=self.name,
            options=self.options.model_dump(mode="json"),
            opset=next(o.version for o in model.opset_import if o.domain == ""),
            integer_share=share(covered, work, work),
            quantised_share=share(covered, sites, work),
            in_float=_in_float((n for n in sites if n not in covered), work, reasons, found),
            parity=parity,
            site_parity=max(steps.errors.values(), default=None),
            code_flips=max(steps.flips.values(), default=None),
            rounding_sqnr=min((sqnr(a, b) for a, b in zip(exact, rounded, strict=True) if a.is_floating_point()), default=None),
            file_bytes=sum(f.stat().st_size for f in folder.iterdir()),
        )


def _parity(program: Program, probe: Sequence[Tensor], wanted: Sequence[Any], given: Sequence[Tensor]) -> float:
    """Worst relative error of the outputs of the model as shipped. BackendRefusal beyond what rounding, or codes off by one, explain."""
    if not any(n.target is QUANTIZE for n in program.graph.nodes):
        return end_to_end(program, probe, wanted, given)
    check_drift(program, probe, wanted, given)
    return max(map(relative_error, wanted, given), default=0.0)


def _run_changed(model: onnx.ModelProto, folder: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of a model whose weights lie in the folder. OpenVINO reads weights from beside a model only, and follows no link out of there."""
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch, WEIGHTS)
        try:
            weights.hardlink_to(folder / WEIGHTS)
        except OSError:
            shutil.copyfile(folder / WEIGHTS, weights)
        Path(scratch, MODEL).write_bytes(model.SerializeToString())
        return OpenVinoSession(Path(scratch, MODEL)).run(inputs)


def _in_float(
    sites: Iterable[fx.Node], work: Mapping[fx.Node, int], reasons: Mapping[str, str], found: Mapping[fx.Node, Kernel]
) -> tuple[FloatSite, ...]:
    """Sites without an integer kernel, each with the reason."""

    def reason(node: fx.Node) -> str:
        known = f"OpenVINO runs it as {found[node]}" if node in found else "it isn't a layer of its own in the model that OpenVINO runs"
        return in_logs(node) or reasons.get(node.name, known)

    return tuple(FloatSite(site=n.name, module=module_path(n), macs=work[n], reason=reason(n)) for n in sites)
