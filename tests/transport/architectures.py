"""What lands, what is declined and what is missed on seventeen architectures: the table that the engine and the passes are held to.

    python -m tests.transport.architectures [NAME ...]      rewrites architectures.json, or those entries of it

A seed is a change at the input of a linear layer or convolution, or at the keys or values of an attention. It lands in whole or in part, or is
declined, with the engine's reasons; node names in reasons are replaced by their ops. `missed` counts the seeds where tests/transport/oracle.py,
which knows no rules, finds a change that the engine doesn't.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.capture import capture
from fxcompress.dataflow import weight_uses
from fxcompress.edit import Edit
from fxcompress.interpret import run as interpret
from fxcompress.passes.norms import norms
from fxcompress.passes.rotate.values import weighings
from fxcompress.passes.sparsity.nulls import Nulls
from fxcompress.passes.tidy.fold_constants import FoldConstants
from fxcompress.program import Program
from fxcompress.report import PassReport
from fxcompress.transport import Kind, Plan, Seed, Transport
from tests.passes.helpers import op_name, run, zoo
from tests.transport.helpers import error, vector_for
from tests.transport.oracle import LIMIT as NEAR
from tests.transport.oracle import Oracle
from tests.zoo import UNET, ZOO, Builder, both, diffusers, noise, timestep

aten = torch.ops.aten
TABLE = Path(__file__).with_suffix(".json")
NAMES = (
    *("llama", "qwen2", "gemma2", "mixtral", "gpt2", "opt", "bert", "t5", "vit", "swin", "sam"),
    *("dit", "pixart", "sd3", "flux", "unet2d_cond", "unet3d_cond"),
)
LIMIT, OUTLIER = 1e-5, 20.0
READ = (
    "is read by some layer",
    "go only together with others",
    "reads the channels too, without a weight",
    "are gains of two norms, and one would go into the other",
)  # reasons that lie in the numbers, of which the oracle knows nothing
SMALL = {**UNET, "block_out_channels": (16, 32), "norm_num_groups": 4, "sample_size": 8}  # the oracle's time goes into convolutions
BUILDERS: Mapping[str, Builder] = {
    **{name: ZOO[name] for name in NAMES},
    "unet2d_cond": diffusers(
        "UNet2DConditionModel",
        both(noise(sample=(4, 8, 8), encoder_hidden_states=(7, 24)), timestep()),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **SMALL,
    ),
    "unet3d_cond": diffusers(
        "UNet3DConditionModel",
        both(noise(sample=(4, 3, 4, 4), encoder_hidden_states=(7, 24)), timestep()),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **SMALL,
    ),
}
LAYERS: Mapping[Any, tuple[int, int, int]] = {  # op: (place of the input, its channel axis, place of the weight)
    aten.linear.default: (0, -1, 1),
    aten.mm.default: (0, -1, 1),
    aten.addmm.default: (1, -1, 2),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), (0, 1, 1)),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), (0, 1, 1)),
}
PRODUCTS = (aten.matmul.default, aten.bmm.default)
COPIES = (aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.type_as.default, aten.clone.default)
ELEMENTWISE = (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default)
SITES: Mapping[str, tuple[Kind, ...]] = {
    "layers": (Kind.SCALE, Kind.SIGN, Kind.SHIFT, Kind.PERMUTE, Kind.ROTATE, Kind.REMOVE),
    "keys": (Kind.SCALE, Kind.SIGN, Kind.SHIFT),
    "values": (Kind.SCALE, Kind.SIGN, Kind.SHIFT),
}


@functools.cache
def program_of(name: str) -> Program:
    """The architecture in float32, constants folded, with outlier channels."""
    program = zoo(name) if BUILDERS[name] is ZOO[name] else capture(*BUILDERS[name]())
    program, _ = run(program, FoldConstants(), check="off")
    return with_outliers(program)


def with_outliers(program: Program) -> Program:
    """Where layers' inputs can be scaled, every 32nd channel OUTLIER times as great, the function as before: with gains of that size alone
    float32 itself is too coarse for LIMIT."""
    planted, seen = program.copy(), set[fx.Node]()
    engine, edit = Transport(planted), Edit(planted)
    for seed in dict.fromkeys(seeds(planted, "layers")):
        plan = engine.solve(Kind.SCALE, seed)
        if plan.count >= 32 and not plan.extras and seen.isdisjoint(plan.leaves):
            seen.update(plan.leaves)
            plan.apply(edit, torch.where(torch.arange(plan.count) % 32 == 5, OUTLIER, 1.0))
    edit.commit()
    assert error(interpret(program, program.example), interpret(planted, program.example)) < LIMIT
    return planted


def seeds(program: Program, site: str) -> Iterator[Seed]:
    """Where changes start."""
    constant = Transport(program).facts.is_constant
    for node in program.graph.nodes:
        if site == "layers" and node.target in LAYERS:
            place, axis, weight = LAYERS[node.target]
            if constant(node.args[weight]):
                yield Seed(node.args[place], (axis,))
    for key, key_axis, value, value_axis in attentions(program) if site != "layers" else ():
        node, axis = (key, key_axis) if site == "keys" else (value, value_axis)
        rank = node.meta["val"].dim()
        yield Seed(node, (*range(1, rank - 2), rank + axis))


def attentions(program: Program) -> Iterator[tuple[fx.Node, int, fx.Node, int]]:
    """(keys, their channel axis, values, theirs) of every attention, whole or spelled out."""
    for node in program.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            yield node.args[1], -1, node.args[2], -1
        elif node.target in PRODUCTS and (weights := _back(node.args[0], *COPIES)).target is aten.softmax.int:
            scores = _back(weights.args[0], *COPIES, *ELEMENTWISE)
            yield scores.args[1], -2, node.args[1], -1


def _back(value: Any, *through: Any) -> fx.Node:
    """The first value, going back along first operands, that isn't made by one of these ops."""
    while value.target in through:
        value = value.args[0]
    return value  # type: ignore[no-any-return]


def grouped(program: Program, reason: str) -> str:
    """A reason without node names: each is replaced by its op, constants and inputs by what they are."""
    kinds = {n.name: op_name(n) if n.op == "call_function" else KINDS[n.op] for n in program.graph.nodes}
    words = (kinds.get(word.rstrip(",:"), word) + word[len(word.rstrip(",:")) :] * (word.rstrip(",:") in kinds) for word in reason.split(" "))
    return " ".join(words)


KINDS = {"placeholder": "INPUT", "get_attr": "CONSTANT", "output": "OUTPUT"}


def entry(name: str, judged: bool = True) -> dict[str, Any]:
    """One architecture's part of the table. judged: whether `missed` is counted, which takes most of the time."""
    program, sites = program_of(name), site_rows(name)
    oracle = Oracle(program) if judged else None
    rows: dict[str, Any] = {s: {k.value: with_missed(sites[s, k], oracle, k) for k in kinds} for s, kinds in SITES.items()}
    passes = {which: pass_row(before, report, judged) for which, before, _, report in pass_runs(name)}
    return {**rows, "passes": passes}


@functools.cache
def site_rows(name: str) -> dict[tuple[str, Kind], tuple[dict[str, Any], list[Seed]]]:
    """Per site and kind the row without `missed`, and the seeds that were declined."""
    program = program_of(name)
    return {(s, k): site_row(program, k, list(seeds(program, s)), plans) for (s, k), plans in plans_of(name).items()}


@functools.cache
def plans_of(name: str) -> dict[tuple[str, Kind], dict[Seed, Plan]]:
    """Per site and kind the plans, once per value."""
    program = program_of(name)
    engine, found = Transport(program), {site: dict.fromkeys(seeds(program, site)) for site in SITES}
    return {(s, k): {seed: engine.solve(k, seed) for seed in found[s]} for s, kinds in SITES.items() for k in kinds}


def with_missed(found: tuple[dict[str, Any], list[Seed]], oracle: Oracle | None, kind: Kind) -> dict[str, Any]:
    """The row, with the declined seeds at which the oracle finds a change, if it is asked."""
    row, declined = found
    if oracle is None:
        return row
    head = {key: row[key] for key in ("seeds", "whole", "part")}
    return {**head, "missed": sum(oracle.freedom(kind, seed) > 0 for seed in declined), **row}


def site_row(program: Program, kind: Kind, found: list[Seed], plans: Mapping[Seed, Plan]) -> tuple[dict[str, Any], list[Seed]]:
    """Counts over seeds, and the declined ones."""
    reasons = {seed: plan.reason() or (unwritable(program, plan) if kind == Kind.REMOVE else "") for seed, plan in plans.items()}
    whole = [seed for seed in found if not reasons[seed]]
    part = [seed for seed in found if reasons[seed] and plans[seed].count and not (kind == Kind.REMOVE and unwritable(program, plans[seed]))]
    declined = [seed for seed in found if seed not in whole and seed not in part]
    row = {"seeds": len(found), "whole": len(whole), "part": len(part), "declined": len(declined)}
    return {**row, "reasons": counted(program, [r for seed in found if (r := reasons[seed])])}, declined


def unwritable(program: Program, plan: Plan) -> str:
    """Why a removal has no form; "" if it has."""
    try:
        moved(program, plan)
    except ValueError as why:
        return str(why)
    return ""


def counted(program: Program, reasons: list[str]) -> dict[str, int]:
    """How often each reason was given, node names apart."""
    return dict(sorted(Counter(grouped(program, r) for r in reasons).items()))


@functools.cache
def pass_runs(name: str) -> tuple[tuple[str, Program, Program, PassReport], ...]:
    """(pass, program before, program after, report), each under its contract."""
    before = program_of(name)
    after, folded = run(before, "tidy.fold_norm_gain")
    turned, rotated = run(after, "rotate.residual")
    sparse = with_unread_channels(before)
    less, removed = run(sparse, "sparsity.remove_channels")
    return (folded.name, before, after, folded), (rotated.name, after, turned, rotated), (removed.name, sparse, less, removed)


def pass_row(before: Program, report: PassReport, judged: bool) -> dict[str, Any]:
    """Sites of one pass. A stream is judged over the whole program."""
    row: dict[str, Any] = {"fired": report.fired}
    if judged:
        oracle = Oracle(before, limit=len(before.graph.nodes) if report.name == "rotate.residual" else NEAR)
        asked = [d.site for d in report.declined if not d.reason.endswith(READ)]
        row["missed"] = sum(oracle.freedom(*_asked(report.name, before, site)) > 0 for site in asked)
    return {**row, "declined": len(report.declined), "reasons": counted(before, [d.reason for d in report.declined])}


def _asked(which: str, program: Program, site: str) -> tuple[Kind, Seed]:
    """The change that a pass would have made where it declined."""
    node = next(n for n in program.graph.nodes if n.name == site.split(".", maxsplit=1)[0])
    if which == "tidy.fold_norm_gain":
        return Kind.SCALE, Seed(node)
    if which == "rotate.residual":
        streams = {n.node: Seed(n.x, (n.axis,)) for n in norms(program)}
        if node in streams:
            return Kind.ROTATE, streams[node]
        values = dict(weighings(Transport(program)))[node][0]
        return Kind.ROTATE, Seed(values.node, values.axes[-1:])
    place, axis, _ = LAYERS[node.target]
    return Kind.REMOVE, Seed(node.args[place], (axis,))  # type: ignore[arg-type]


def with_unread_channels(program: Program) -> Program:
    """Every layer stops reading channels 1, 5, 9, ... of its input."""
    sparse = program.copy()
    for node in sparse.graph.nodes:
        weight = node.args[LAYERS[node.target][2]] if node.target in LAYERS else None
        if weight is not None and weight.op == "get_attr":
            tensor = sparse.constants[str(weight.target)].clone()
            is_first = node.target in (aten.mm.default, aten.addmm.default) or "transpose" in str(node.target)
            tensor.movedim(0 if is_first else 1, 0)[1::4] = 0
            sparse.constants[str(weight.target)] = tensor
    return sparse


def landed(name: str) -> Iterator[tuple[str, Seed, Plan]]:
    """Every plan that moves something, once per value and kind."""
    for (site, _), plans in plans_of(name).items():
        yield from ((site, seed, plan) for seed, plan in plans.items() if plan.count)


def moved(program: Program, plan: Plan, before: Sequence[Tensor] | None = None) -> float:
    """How far the outputs move when the plan is applied, relative. Of a removal: from those of layers that don't read what goes. ValueError
    where the program without it can't be written down. The program is as before afterwards. before: its outputs, where they are known."""
    vector, kept = vector_for(plan), dict(program.constants)
    if plan.kind == Kind.REMOVE:
        program.constants.update(unread(program, plan, vector))
    if plan.kind == Kind.REMOVE or before is None:
        before = interpret(program, program.example)
    edit = Edit(program)
    try:
        plan.apply(edit, vector)
        return error(before, interpret(program, program.example))
    finally:
        edit.rollback()
        program.constants.update(kept)


def unread(program: Program, plan: Plan, keep: Any) -> dict[str, Tensor]:
    """The weights that sum over channels that go, with zeros there; all weights that have them where a product sums over them too."""
    found: dict[str, Tensor] = {}
    everywhere = Nulls(plan, program).weightless() is not None
    per_parameter = np.append(np.append(keep, True)[plan.classes], True)
    for leaf, labels in plan.leaves.items():
        tensor = program.constants[str(leaf.target)]
        summed = {use.contraction for use in weight_uses(leaf, tensor)[0] if use.family != "embedding"}
        for label in labels:
            if everywhere or summed.intersection(label.slot):
                tensor = tensor * torch.from_numpy(per_parameter[label.index])
        found[str(leaf.target)] = tensor
    return found


def main() -> None:
    """Write the table."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name in sys.argv[1:] or NAMES:
        table[name] = entry(name)
        TABLE.write_text(json.dumps({n: table[n] for n in NAMES if n in table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
