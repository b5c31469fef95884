"""The texts inside an exported program's graph that torch 2.13 turns into Python, and what each of them may look like.

- Symbolic sizes are evaluated (sympy.sympify): only calls of known functions on numbers, known names and quoted symbol names.
- Names and strings are written into source which is run (FX, guards): names must be identifiers, strings plain.
- Whatever a node names is looked up and called: only registered operators, and none that takes a file name.
- A tree spec may name modules to import (defaultdict, enums): it may not.
Every function gives the reason why a text is refused, "" when it may stay.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

PLAIN = re.compile(r"[\w.,:>@+\-/ ]*")  # nothing that opens, closes, quotes or ends a piece of Python
FREE_TEXT = ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node", "custom", "guards_code")
IMPORTING = ("__enum__", "default_factory_module")

SIZE_FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """Symbol Integer Float Rational Add Mul Pow Max Min Mod Abs floor ceiling Equality Unequality GreaterThan LessThan StrictGreaterThan
        StrictLessThan And Or Not ITE Piecewise ExprCondPair FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv
        LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt
        RoundDecimal ToFloat Identity""",
    )
)
SIZE_NAMES = ("true", "false", "oo", "int_oo")
SCALAR_TARGET = re.compile(
    r"_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift)"
    r"|math\.(trunc|ceil|floor|sqrt)|torch\.sym_(int|float|ite|max|min|not|sum)|torch\._sym_sqrt"
)
HIGHER_ORDER = re.compile(
    r"torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop|scan|map_impl|associative_scan|invoke_subgraph"
    r"|flex_attention)"
)
OPERATOR = re.compile(r"torch\.ops\.([a-zA-Z]\w*)\.(\w+)\.(\w+)")


def faults(document: Any) -> Iterator[str]:
    """The reasons why texts of the graph, a JSON document, are refused."""
    for key, text in strings(document):
        reason = RULES.get(key, plain)(text)
        if reason:
            yield f"{text if len(text) <= 60 else text[:57] + '...'!r} {reason}"


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string under the value with the key it stands under, keys included."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "name" if key.endswith("_values") else "", name
            yield from strings(item, name)


def plain(text: str) -> str:
    """Any other name or option: letters, digits and a few signs."""
    return "" if PLAIN.fullmatch(text) else "holds characters that no name or option has"


def free(text: str) -> str:
    """A description, which torch only stores, or a guard, which is dropped after loading."""
    return ""


def identifier(text: str) -> str:
    """The name of a node or argument; empty for an argument given by position."""
    return "" if not text or text.isidentifier() else "is not a name, and torch writes it into source that it runs"


def size(text: str) -> str:
    """A symbolic size as sympy prints it: Mul(Integer(2), Symbol('s77', positive=True))."""
    try:
        fine = _is_size(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        fine = False
    return "" if fine else "is not a symbolic size, and torch evaluates it as Python"


def _is_size(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=int() | float()):
            return True
        case ast.Name(id=name):
            return name in SIZE_NAMES
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_size(operand)
        case ast.Call(func=ast.Name(id="Symbol" | "Float"), args=[ast.Constant(value=str(text))], keywords=options):
            return bool(re.fullmatch(r"[\w.+\-]+", text)) and _are_flags(options)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=options):
            return name in SIZE_FUNCTIONS and all(map(_is_size, args)) and _are_flags(options)
    return False


def _are_flags(options: list[ast.keyword]) -> bool:
    return all(o.arg and isinstance(o.value, ast.Constant) and isinstance(o.value.value, int) for o in options)


def tree_spec(text: str) -> str:
    """JSON that holds JSON: every string in it is plain, and none makes torch import a module."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list | dict):
        return plain(text)
    parts = [part for _, part in strings(value)]
    if any(part in IMPORTING for part in parts):
        return "holds a container that makes torch import a module"
    return next((reason for part in parts if (reason := tree_spec(part))), "")


def operator(text: str) -> str:
    """The target of a node."""
    if SCALAR_TARGET.fullmatch(text) or HIGHER_ORDER.fullmatch(text):
        return ""
    found = OPERATOR.fullmatch(text)
    target: Any = torch.ops
    for name in found.groups() if found else ():
        target = getattr(target, name, None)
    if not isinstance(target, torch._ops.OpOverload):
        return "is not a registered operator; if it is one of your own, import the package that registers it first"
    return "reads or writes a file" if any(a.name == "filename" for a in target._schema.arguments) else ""


RULES: dict[str, Callable[[str], str]] = {
    "target": operator,
    "as_operator": operator,
    "expr_str": size,
    "name": identifier,
    "as_name": identifier,
    "in_spec": tree_spec,
    "out_spec": tree_spec,
    **dict.fromkeys(FREE_TEXT, free),
}
