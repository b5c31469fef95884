"""How the recipes of two runs differ, pass by pass and option by option."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fxcompress.diff import Diff
from fxcompress.report import PassReport

ABSENT = "–"
PRESENT = "runs"


class Difference(NamedTuple):
    """One option of a pass as either side has it; option "": a pass that only one side runs; "place": both do, in another
    order. occurrence: which of the passes of that name it is, from 1."""

    name: str
    option: str
    first: str
    second: str
    occurrence: int = 1

    @property
    def label(self) -> str:
        """The pass, with its number where a recipe names it again."""
        return self.name if self.occurrence == 1 else f"{self.name} ({self.occurrence})"

    @property
    def row(self) -> list[str]:
        """As a table tells it."""
        return [self.label, self.option or "the pass", self.first, self.second]


def differing(diff: Diff) -> list[Difference]:
    """Options that differ, and passes that only one run has; nothing where a side has no passes, a model as it was among them."""
    if len(diff.runs) < 2 or not all(run.passes for run in diff.runs):
        return []
    return [*_differing(*(run.passes for run in diff.runs))]


def flow(value: Any) -> str:
    """Plain data as YAML in one line, its texts quoted."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def numbered(passes: Sequence[PassReport]) -> list[str]:
    """What passes are called, with a number behind the name where a recipe names one again."""
    return [name if occurrence == 1 else f"{name} ({occurrence})" for name, occurrence in _numbered(passes)]


def _differing(first: Sequence[PassReport], second: Sequence[PassReport]) -> Iterator[Difference]:
    one, other = _numbered(first), _numbered(second)
    ranks = [{key: rank for rank, key in enumerate((k for k in side if k in one and k in other), 1)} for side in (one, other)]
    for key in {**one, **other}:
        name, occurrence = key
        if key not in one or key not in other:
            first_has, second_has = (PRESENT if key in side else ABSENT for side in (one, other))
            yield Difference(name, "", first_has, second_has, occurrence)
            continue
        if ranks[0][key] != ranks[1][key]:
            was, now = (f"{r[key]} of {len(r)} in both" for r in ranks)
            yield Difference(name, "place", was, now, occurrence)
        sides = one[key].options, other[key].options
        for option in dict.fromkeys([*sides[0], *sides[1]]):
            was, now = (_told(options, option) for options in sides)
            if was != now:
                yield Difference(name, option, was, now, occurrence)


def _numbered(passes: Sequence[PassReport]) -> dict[tuple[str, int], PassReport]:
    """By name and number among those of that name."""
    names = [p.name for p in passes]
    return {(p.name, names[: place + 1].count(p.name)): p for place, p in enumerate(passes)}


def _told(options: Mapping[str, Any], option: str) -> str:
    """A text as it is, all else as a recipe writes it; a dash where the recipe doesn't say it."""
    if option not in options:
        return ABSENT
    return options[option] if isinstance(options[option], str) else flow(options[option])
