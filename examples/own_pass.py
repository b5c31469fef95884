"""A pass of your own, run and held to its contract: two multiplications by numbers become one.

    python -m examples.own_pass

With an entry point in your own package, a recipe can name it (CONTRIBUTING.md).
"""

import torch
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.manager import Manager
from fxcompress.recipe import Step
from fxcompress.report import PassReport
from fxcompress.rewrite import Context, Match, Reject, Rewrite
from fxcompress.target import Target

MUL = torch.ops.aten.mul.Tensor


class MergeFactors(Rewrite):
    """x * a * b = x * (a * b), for numbers a and b."""

    name = "mine.merge_factors"
    contract = Exact()
    targets = (MUL,)

    def match(self, node: fx.Node, on: Context) -> Match | Reject | None:
        """A product with a number, of a product with a number that nobody else reads."""
        inner, number = node.args
        if not (isinstance(number, float) and isinstance(inner, fx.Node) and inner.target is MUL and isinstance(inner.args[1], float)):
            return None
        if len(inner.users) > 1:
            return Reject("{} is read by others too", inner)
        return Match(node, x=inner.args[0], factor=inner.args[1] * number)

    def apply(self, match: Match, edit: Edit) -> None:
        """One product in the place of two."""
        with edit.site(match.node, f"both factors are {match.factor:g}"):
            edit.replace(match.node, edit.insert(MUL, match.x, match.factor, like=match.node, val=match.node.meta["val"]))


class Scaled(nn.Module):
    """Something to try it on."""

    def forward(self, x: Tensor) -> Tensor:
        """x * 0.5 * 3, and a place where the inner product is needed as well."""
        half = x * 0.5
        return x * 0.5 * 3.0 + half + half * 2.0


def main() -> PassReport:
    """Returns what the pass did."""
    program = fxc.capture(Scaled().eval(), (torch.randn(2, 8),))
    manager = Manager(program, Target(name="any"), program.example)
    (report,) = manager.run([(Step(use=MergeFactors.name), MergeFactors())])
    print(f"{report.fired} place changed, error {report.worst.figure}; declined: {[d.reason for d in report.declined]}")
    fxc.compile(manager.program, {"name": "then", "passes": ["tidy.fold_constants"]})
    return report


if __name__ == "__main__":
    main()
