"""Finds passes and backends: entry points `fxcompress.passes` and `fxcompress.backends`, loaded when first named.

One that fails to load is kept with its error: `doctor` shows it, and naming it in a recipe raises it.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fxcompress.errors import RecipeError, nearest


def passes() -> list[str]:
    """Names of all passes, ours and the user's."""
    return sorted(_found("fxcompress.passes"))


def backends() -> list[str]:
    """Names of all backends."""
    return sorted(_found("fxcompress.backends"))


def find_pass(name: str) -> Any:
    """The class of a pass. RecipeError with the nearest name if unknown, or with the reason if it can't be loaded."""
    return _load("pass", "fxcompress.passes", name)


def find_backend(name: str) -> Any:
    """The class of a backend. RecipeError as for passes."""
    return _load("backend", "fxcompress.backends", name)


def absent() -> dict[str, str]:
    """Backends that need something that isn't installed, with the command that installs it."""
    commands = {name: find_backend(name).absent() for name in backends() if name not in broken()}
    return {name: command for name, command in commands.items() if command}


def broken() -> dict[str, str]:
    """Passes and backends that can't be loaded, with the reason."""
    failures = {}
    for kind, group in (("pass", "fxcompress.passes"), ("backend", "fxcompress.backends")):
        for name in _found(group):
            try:
                _load(kind, group, name)
            except RecipeError as error:
                failures[name] = error.why
    return failures


@cache
def _found(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in found and found[point.name].value != point.value:
            raise RecipeError(
                f"two packages provide {point.name!r}",
                why=f"{found[point.name].value} and {point.value}",
                do="uninstall one, or rename its entry point",
            )
        found[point.name] = point
    return found


def _load(kind: str, group: str, name: str) -> Any:
    points = _found(group)
    if name not in points:
        raise RecipeError(f"unknown {kind} {name!r}", why=nearest(name, points), do=f"fxcompress {kind}es lists them" if kind == "pass" else "")
    try:
        return points[name].load()
    except Exception as error:
        raise RecipeError(
            f"{kind} {name!r} can't be loaded", where=points[name].value, why=f"{type(error).__name__}: {error}", do="fxcompress doctor"
        ) from error
