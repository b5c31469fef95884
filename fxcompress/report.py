"""Report: what a compilation did, as frozen data with a published JSON schema. Viewers are built on it.

The schema is docs/report.schema.json: python -m fxcompress.report > docs/report.schema.json

Figures that JSON can't hold (an SQNR of infinity) are null. `SCHEMA_VERSION` grows with every change that a reader of old reports would notice.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

SCHEMA_VERSION = 2

Figure = Annotated[float | None, BeforeValidator(lambda v: None if isinstance(v, float) and not math.isfinite(v) else v)]


class Frozen(BaseModel):
    """Base of all parts of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tensor(Frozen):
    """An input or output: sizes, or names and expressions of sizes where dynamic."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    role: str


def as_tensor(value: Any) -> Tensor:
    """A program's input or output as it stands in the report."""
    return Tensor(name=value.name, shape=value.shape, dtype=str(value.dtype).removeprefix("torch."), role=value.role)


class Declined(Frozen):
    """A site a pass recognised and left alone, with the reason."""

    site: str
    module: str
    reason: str


class Excluded(Frozen):
    """A place that the recipe keeps a pass from. glob: the one under `exclude` that hits it; "": none under `include` does."""

    site: str
    module: str
    glob: str


class Change(Frozen):
    """One site of the journal: nodes before and after, constants changed. exclude: globs of a recipe that leave this site alone; () where none
    do. moved: of each of its floating-point constants how far the pass moved it, |new - old| / |old| over all entries."""

    site: str
    module: str
    reason: str
    replaced: dict[str, str]
    inserted: tuple[str, ...]
    touched: tuple[str, ...]
    constants: tuple[str, ...]
    erased: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    moved: dict[str, float] = {}


class Histogram(Frozen):
    """A value before and after, in equal bins from low to high; counts of a sample of its entries."""

    low: float
    high: float
    before: tuple[int, ...]
    after: tuple[int, ...]


class Check(Frozen):
    """One contract measurement. unit: "relative error" (figure <= limit) or "dB" (figure >= limit).
    histogram: where the value may lose something. unmeasured: the value changes on purpose, and the figure doesn't say how much: it is
    the relative error to the change that the pass recorded, whatever the pass's unit, or null of codes that differ, which have no SQNR."""

    site: str
    value: str
    figure: Figure
    limit: Figure
    verdict: Literal["held", "broken", "unverified"]
    why: str
    histogram: Histogram | None = None
    unmeasured: bool = False


def worst_of(checks: Iterable[Check], unit: str) -> Check | None:
    """The one with the lowest SQNR or the greatest error, whatever its limit; None where nothing was measured in that unit."""
    if unit == "dB":
        measured = [c for c in checks if not c.unmeasured]
        return min(measured, key=lambda c: math.inf if c.figure is None else c.figure, default=None)
    return max(checks, key=lambda c: math.inf if c.figure is None else c.figure, default=None)


class PassReport(Frozen):
    """One finished pass. options: as the recipe says them, `where` and `limit` with them. legal = fired + excluded by the recipe; notes: what
    the pass has to say beside its sites; output_sqnr: lowest over the outputs against the captured model, in dB; whole: why single places
    can't be left out, "" where they can; excluded: what the pass asked about and the recipe didn't admit, illegal sites among it."""

    name: str
    options: dict[str, Any]
    cpu_seconds: float
    fired: int
    legal: int
    declined: tuple[Declined, ...]
    contract: Literal["exact", "bounded", "lossy"]
    unit: str
    checks: tuple[Check, ...]
    worst: Check | None
    output_sqnr: Figure
    bytes_before: int
    bytes_after: int
    nodes_before: int
    nodes_after: int
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    whole: str = ""
    excluded: tuple[Excluded, ...] = ()


class FloatSite(Frozen):
    """A site that runs in float on the backend, with the reason."""

    site: str
    module: str
    macs: int
    reason: str


class BackendReport(Frozen):
    """What the backend made of the program. Shares are of MACs on the example inputs, read back from the runtime's own optimised graph.

    integer_share: of all MACs, in integer or n-bit kernels. quantised_share: of the MACs in quantised sites. parity: max relative error of the
    outputs against the interpreter, kernel-internal rounding off; without a limit where activations are quantised, since codes that round the
    other way cascade. site_parity: the same of each quantised site on the input it got there, the worst. code_flips: the greatest share of one
    quantiser's codes that are one step from the interpreter's on identical inputs. rounding_sqnr: lowest output SQNR in dB between the session
    as shipped and the one without kernel-internal rounding.
    """

    name: str
    options: dict[str, Any]
    opset: int | None = None
    integer_share: Figure = None
    quantised_share: Figure = None
    in_float: tuple[FloatSite, ...] = ()
    parity: Figure = None
    site_parity: Figure = None
    code_flips: Figure = None
    rounding_sqnr: Figure = None
    file_bytes: int | None = None


class GuardReport(Frozen):
    """What the quality guard did: the user's metric in float, with every site quantised and as shipped; the nodes given back to float, the
    costliest first, and the line that says so in a recipe."""

    float_metric: float
    quantised_metric: float
    metric: float
    max_drop: float
    given_back: tuple[str, ...]
    recipe_line: str


class Report(Frozen):
    """Everything a compilation has to say. `notes`: what capture had to fix or leave out. `states`: input -> the output it is at the next call.

    output_sqnr: lowest SQNR in dB over the outputs of the artifact as shipped, on its backend, against the captured model, on the probe.
    """

    schema_version: int = SCHEMA_VERSION
    versions: dict[str, str]
    origin: str
    parameters: int
    float_bytes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: dict[str, str] = {}
    symbols: dict[str, tuple[int, int]]
    notes: tuple[str, ...]
    recipe: dict[str, Any]
    check: Literal["each", "end", "off"]
    nodes: int
    regions: int
    weight_bytes: int
    bytes_by_width: dict[str, int]
    output_sqnr: Figure
    passes: tuple[PassReport, ...]
    backend: BackendReport | None = None
    guard: GuardReport | None = None


def schema() -> str:
    """The published JSON schema of a report, as text."""
    return json.dumps(Report.model_json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema())
