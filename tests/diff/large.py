"""A run of the size the viewer must hold: 8 000 nodes in 100 blocks, 30 passes that fold and quantise, with reasons, checks and histograms."""

from __future__ import annotations

from dataclasses import replace

from fxcompress.diff import Run
from fxcompress.history import Graph, History, Node
from fxcompress.report import Change, Check, Declined, Histogram, PassReport

BLOCKS, PASSES = 100, 30
SHAPE = "float32[batch, sequence, 576]"
PARTS = {"attention": ("query", "key", "value", "out"), "mlp": ("gate", "up", "down")}
OPS = ("aten.mul.Tensor", "aten.add.Tensor", "aten.silu.default", "aten.reshape.default", "aten.transpose.int")
QUANTISERS = (6, 13, 20, 27)  # passes that quantise a seventh of the weights each; the others change a constant of every tenth block


def large() -> Run:
    """The run. Each weight is quantised once; other passes fold into constants, and every pass declines 60 sites."""
    history, reports = History([captured()]), []
    for number in range(PASSES):
        before = history.graphs[-1]
        after, changes, checks = quantised(before, number) if number in QUANTISERS else folded(before, number)
        history.graphs.append(after)
        reports.append(report(number, before, after, changes, checks))
    return Run("Large, everything", history, reports)


def captured() -> Graph:
    """Blocks of 80 nodes: seven linears with weight and bias, and elementwise ops between."""
    nodes = {"x": Node("x", "input", (), "x", "", SHAPE)}
    kinds, parents = {"": "Large", "model": "Model"}, {"model": ""}
    value = "x"
    for block in range(BLOCKS):
        at = f"model.layers.{block}"
        kinds[at], parents[at] = "Block", "model"
        for part, linears in PARTS.items():
            kinds[f"{at}.{part}"], parents[f"{at}.{part}"] = part.title(), at
            for linear in linears:
                value = add_linear(nodes, kinds, parents, f"{at}.{part}", linear, value)
    nodes["output"] = Node("output", "output", (value,), "[%]", "", "")
    return Graph(nodes, kinds, parents)


def add_linear(nodes: dict[str, Node], kinds: dict[str, str], parents: dict[str, str], at: str, linear: str, value: str) -> str:
    path = f"{at}.{linear}"
    kinds[path], parents[path] = "Linear", at
    stem = path.replace(".", "_")
    for kind, shape in (("weight", "float32[576, 576]"), ("bias", "float32[576]")):
        statistics = (-0.51, 0.49, 0.0012, 0.083, len(nodes) * 2654435761 % 2**32)
        nodes[f"{stem}_{kind}"] = Node(f"{stem}_{kind}", "constant", (), f"{path}.{kind}", path, shape, "", 0, 1327104, statistics)
    number, source = len(nodes), f"models/large.py:{len(linear) * 11}  x = self.{linear}(x)"
    made = f"linear_{number}"
    nodes[made] = Node(made, "aten.linear.default", (value, f"{stem}_weight", f"{stem}_bias"), "%, %, %", path, SHAPE, source, 42467328)
    value = made
    for step in range(8 + (linear == "query") + (linear == "key") + (linear == "value")):
        op = OPS[(step + len(linear)) % len(OPS)]
        name = f"{op.split('.')[1]}_{number}_{step}"
        inputs = (value, made) if ".Tensor" in op else (value,)
        nodes[name] = Node(
            name, op, inputs, ", ".join("%" for _ in inputs), at, SHAPE, f"models/large.py:{60 + step}  x = act(x, {step})", 36864
        )
        value = name
    return value


def quantised(before: Graph, number: int) -> tuple[Graph, list[Change], list[Check]]:
    """Every seventh weight gets a pair of quantise and dequantise nodes and a scale."""
    nodes: dict[str, Node] = {}
    stands: dict[str, str] = {}
    changes, checks = [], []
    weights = [n.name for n in before.nodes.values() if n.op == "constant" and n.name.endswith("_weight")]
    chosen = set(weights[QUANTISERS.index(number) :: len(QUANTISERS)])
    for node in before.nodes.values():
        nodes[node.name] = replace(node, inputs=tuple(stands.get(i, i) for i in node.inputs)) if set(node.inputs) & stands.keys() else node
        if node.name in chosen:
            scale, codes, back = f"{node.name}_scale", f"quantize_{node.name}", f"dequantize_{node.name}"
            told = "'int8', [1, -1]"
            nodes[scale] = Node(
                scale,
                "constant",
                (),
                f"{node.attributes}.scale",
                node.region,
                "float32[576, 1]",
                "",
                0,
                2304,
                (0.001, 0.004, 0.002, 0.0007, len(nodes) * 2654435761 % 2**32),
            )
            nodes[codes] = Node(codes, "fxc.quantize.default", (node.name, scale), f"%, %, None, {told}", node.region, "int8[576, 576]")
            nodes[back] = Node(back, "fxc.dequantize.default", (codes, scale), f"%, %, None, {told}", node.region, "float32[576, 576]")
            stands[node.name] = back
            changes.append(change(node, "int8 in blocks of [1, -1]", {node.name: back}, (codes, back)))
            bins = tuple(max(0, 4000 - (i - 16) ** 2 * (17 + len(changes) % 5)) for i in range(32))
            spread = Histogram(low=-0.5, high=0.5, before=bins, after=tuple(b - b % 7 for b in bins))
            figure = 43.1 + len(changes) % 37 / 10
            checks.append(Check(site=changes[-1].site, value=back, figure=figure, limit=40.1, verdict="held", why="", histogram=spread))
    return Graph(nodes, before.kinds, before.parents), changes, checks


def folded(before: Graph, number: int) -> tuple[Graph, list[Change], list[Check]]:
    """The biases of every tenth block get another content."""
    nodes = dict(before.nodes)
    changes, checks = [], []
    for node in before.nodes.values():
        if node.name.endswith("_bias") and int(node.region.split(".")[2]) % 10 == number % 10:
            statistics = (-0.4 - number / 100, 0.4, 0.001 * number, 0.08, len(nodes) * number)
            nodes[node.name] = replace(node, revision=node.revision + 1, statistics=statistics)
            changes.append(change(node, f"its scale is folded, step {number}", {}, ()))
            figure = 1e-6 * (1 + len(changes) % 9)
            checks.append(Check(site=changes[-1].site, value=node.name, figure=figure, limit=1e-4, verdict="held", why=""))
    return Graph(nodes, before.kinds, before.parents), changes, checks


def change(node: Node, reason: str, replaced: dict[str, str], inserted: tuple[str, ...]) -> Change:
    site = f"{node.region}  ({node.name})"
    touched = () if replaced else (node.name,)
    return Change(
        site=site,
        module=node.region,
        reason=reason,
        replaced=replaced,
        inserted=inserted,
        touched=touched,
        constants=(node.attributes,),
        erased=(),
        exclude=(node.region,),
    )


def report(number: int, before: Graph, after: Graph, changes: list[Change], checks: list[Check]) -> PassReport:
    is_bounded = number in QUANTISERS
    sites = [n for n in before.nodes.values() if n.op == "aten.linear.default"][number : number + 60]
    declined = [
        Declined(site=n.name, module=n.region, reason=f"{n.name}: its output also feeds {n.inputs[0]}, which doesn't commute") for n in sites
    ]
    return PassReport(
        name=f"family{number % 5}.pass_{number}",
        options={"bits": 8, "where": {"exclude": ["head"]}},
        cpu_seconds=0.25 * number,
        fired=len(changes),
        legal=len(changes),
        declined=tuple(declined),
        contract="bounded" if is_bounded else "exact",
        unit="dB" if is_bounded else "relative error",
        checks=tuple(checks),
        worst=checks[0],
        output_sqnr=40.0 - number if is_bounded else None,
        bytes_before=before.stored,
        bytes_after=after.stored,
        nodes_before=len(before.nodes),
        nodes_after=len(after.nodes),
        changes=tuple(changes),
    )
