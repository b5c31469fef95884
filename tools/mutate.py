"""Plant every fault of tests/faults in every edit of every pass, on small real models, and say who noticed.

    python -m tools.mutate [--models llama,vit] [--passes tidy.no_ops,quant.weight_only] [--sample N] [--json FILE]

One line a model and pass: sites, faults, how many changed nothing, who caught the others. Survivors follow by name. Exits 1 if there is one,
or if an edit without a fault isn't held.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from fxcompress.checker import check
from fxcompress.edit import Edit
from tests.faults import faults
from tests.faults.cases import CASES, Case
from tests.faults.trial import Outcome, Trial
from tests.passes.helpers import zoo
from tests.zoo import ZOO


def main() -> int:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(ZOO), help="names from tests/zoo.py")
    parser.add_argument("--passes", default=",".join(dict.fromkeys(c.use for c in CASES)))
    parser.add_argument("--sample", type=int, help="faults per model and pass, drawn at random, in place of all")
    parser.add_argument("--json", type=Path, help="where to write all rows")
    given, console = parser.parse_args(), Console(width=200)
    torch.set_num_threads(1)
    rows = []
    for model in given.models.split(","):
        for case in (c for c in CASES if c.use in given.passes.split(",")):
            rows.append(swept(model, case, given.sample))
            show(console, rows[-1])
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))
    total = Counter(verdict for row in rows for verdict, n in row["verdicts"].items() for _ in range(n))
    console.print(f"{sum(total.values())} faults: {counted(total)}")
    return int(bool(total["survived"]) or any(row["refused"] for row in rows))


@torch.no_grad()
def swept(model: str, case: Case, sample: int | None) -> dict[str, Any]:
    """One row: every fault of one pass on one model."""
    edit, contract = case.opened(zoo(model)), case.item().contract
    planted = list(faults(edit)) if edit.sites else []
    if sample and sample < len(planted):
        planted = random.Random(f"{model} {case}").sample(planted, sample)
    trial = Trial(edit, contract) if planted else None
    outcomes = [trial.run(fault) for fault in planted if trial]
    return {
        "model": model,
        "pass": str(case),
        "sites": len(edit.sites),
        "verdicts": dict(Counter("caught by " + o.caught if o.caught else o.verdict for o in outcomes)),
        "survivors": [survivor(o) for o in outcomes if o.verdict == "survived"],
        "refused": refused(edit, contract) if edit.sites else [],
    }


def survivor(outcome: Outcome) -> dict[str, Any]:
    """What survived where, and how much it changes."""
    return {"fault": str(outcome.fault), "site": outcome.fault.site, "change": outcome.change}


def refused(edit: Edit, contract: Any) -> list[str]:
    """What isn't held of the edit without a fault."""
    measured = check(edit.program, edit, contract, edit.program.example)
    return [f"{m.value}: {m.verdict}, {m.figure:.3g}, limit {m.limit:.3g} {m.why}" for m in measured if m.verdict != "held"]


def show(console: Console, row: dict[str, Any]) -> None:
    """One line, and one a survivor."""
    if row["sites"]:
        console.print(escape(f"{row['model']:16}{row['pass']:66}{row['sites']:4} sites  {counted(row['verdicts'])}"))
    for found in row["survivors"]:
        console.print(f"    [red]survived[/red] {escape(found['fault'])}  in {escape(found['site'])}, changes values by {found['change']:.2g}")
    for sentence in row["refused"]:
        console.print(f"    [red]not held without a fault[/red] {escape(sentence)}")


def counted(verdicts: Any) -> str:
    """The counts, most frequent first."""
    return ", ".join(f"{n} {verdict}" for verdict, n in Counter(verdicts).most_common())


if __name__ == "__main__":
    sys.exit(main())
