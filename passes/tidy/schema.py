"""Arguments of an op node by name, as its schema has them."""

from __future__ import annotations

from typing import Any

from torch import fx


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of a torch op in order: given by position, by keyword, or the schema's default."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**{a.name: value for a, value in zip(declared, node.args, strict=False)}, **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in declared}
