"""Recipes: which passes run, in which order, with which options. Validated as a whole before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import fx

from fxcompress import registry
from fxcompress.errors import RecipeError, nearest
from fxcompress.program import Program, module_path
from fxcompress.rewrite import Pass

RESERVED = ("where", "limit", "unverified")
NEEDED = "a recipe needs a list of at least one pass"


class Where(BaseModel):
    """Which sites a pass may touch: globs over module paths, node names and op names. include empty means all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def admits(self, node: fx.Node) -> bool:
        """Whether the node is included and not excluded."""
        return self.against(node) is None

    def against(self, node: fx.Node) -> str | None:
        """The glob that excludes the node; "" where it is none of those that are included; None where it is admitted."""
        if self.include and not _hit(self.include, node):
            return ""
        return next((glob for glob in self.exclude if _hit((glob,), node)), None)


class Step(BaseModel):
    """One pass of a recipe. limit: a looser contract limit (relative error or dB), printed in the report.

    unverified: whether sites whose check can't bite (an all-zero value, say) are refused or let through, listed in the report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: str
    options: dict[str, Any] = Field(default_factory=dict)
    where: Where = Where()
    limit: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    unverified: Literal["refuse", "allow"] = "refuse"

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"use": value}
        if isinstance(value, Mapping) and "use" in value:
            return value
        if not isinstance(value, Mapping) or len(value) != 1:
            raise ValueError("a pass is a name, or one name with its options: - quant.weight_only: {weights: int4}")
        name, options = next(iter(value.items()))
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"the options of {name} must be a mapping")
        options = dict(options or {})
        reserved = {key: options.pop(key) for key in RESERVED if key in options}
        return {"use": str(name), "options": options, **reserved}


class BackendChoice(BaseModel):
    """A backend by name with its options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(BaseModel):
    """name, what it is for, passes in order, and the backend it is meant for (an argument of compile may name another)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    passes: tuple[Step, ...]
    backend: BackendChoice | None = None

    @field_validator("passes")
    @classmethod
    def _some(cls, value: tuple[Step, ...]) -> tuple[Step, ...]:
        if not value:
            raise ValueError(NEEDED)
        return value

    @field_validator("backend", mode="before")
    @classmethod
    def _backend(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "name" not in value and len(value) == 1:
            name, options = next(iter(value.items()))
            return {"name": name, "options": dict(options or {})}
        return value


def load_recipe(source: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A Recipe from itself, a mapping, the path of a YAML file or the name of a shipped recipe. Raises RecipeError."""
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validated(dict(source), "the given mapping")
    if not isinstance(source, str | Path) or not str(source):
        raise RecipeError(f"this is no recipe: {source!r}", do="pass a Recipe, a mapping, a YAML file or the name of a shipped recipe")
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}", do=f"fxcompress recipes lists the shipped ones: {', '.join(shipped())}")
        try:
            return parse(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise RecipeError("the recipe is not text", where=str(path), why=str(error), do="save it as UTF-8") from None
    if str(source) not in shipped():
        raise RecipeError(f"unknown recipe {str(source)!r}", why=nearest(str(source), shipped()), do="name a shipped recipe or a .yaml file")
    file = resources.files("fxcompress.recipes") / f"{source}.yaml"
    return parse(file.read_text(encoding="utf-8"), f"recipe {source}")


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in resources.files("fxcompress.recipes").iterdir() if f.name.endswith(".yaml"))


def parse(text: str, where: str) -> Recipe:
    """A Recipe from YAML text. RecipeError with line and column for a syntax error or a repeated key."""
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise RecipeError("the recipe is not valid YAML", where=place, why=str(error.problem), do="mend that line") from None
    if not isinstance(data, Mapping):
        raise RecipeError("the recipe is not a mapping", where=where, why=f"it is a {type(data).__name__}", do="start with name: and passes:")
    return _validated(dict(data), where)


class _StrictLoader(yaml.SafeLoader):
    """YAML as data, with a repeated key as an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a key that stands there twice is refused with its line."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands here twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _validated(data: dict[str, Any], where: str) -> Recipe:
    data.setdefault("name", "unnamed")
    if not isinstance(data.get("passes"), list | tuple) or not data["passes"]:
        found = f"passes is {json.dumps(data['passes'], default=str)}" if "passes" in data else "there is none under passes"
        do = "name them in the order in which they run, passes: [tidy.fold_constants, ...]; fxcompress passes lists all"
        raise RecipeError("the recipe has no list of passes", where=f"{where}, passes", why=f"{NEEDED}, and {found}", do=do)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _from_pydantic(error, "the recipe doesn't fit its schema", where, Recipe) from None


def options_error(error: ValidationError, where: str, model: type[BaseModel]) -> RecipeError:
    """The error for options of a pass or backend that its options class refuses."""
    return _from_pydantic(error, "an option is not valid", where, model)


def _from_pydantic(error: ValidationError, what: str, where: str, model: type[BaseModel]) -> RecipeError:
    lines, levels = [], dict[str, None]()
    for item in error.errors():
        place = ".".join(str(p) for p in item["loc"]) or "the whole"
        level, known = _level(item["loc"], model)
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = f"unknown, {nearest(str(item['loc'][-1]), known)}"
        lines.append(f"{place}: {text}")
        levels[f"fields{level}: {', '.join(known) or 'none'}"] = None
    return RecipeError(what, where=where, why="\n".join(lines), do="\n".join(levels))


def _level(place: Sequence[int | str], model: type[BaseModel]) -> tuple[str, list[str]]:
    """Of which part of a model a place is a field, as " of that.part", and the fields that are known there."""
    level = ""
    for depth, part in enumerate(place[:-1], 1):
        field = model.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        if inner := next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None):
            number = place[depth : depth + 1] if isinstance(place[depth], int) else []
            model, level = inner, " of " + ".".join(map(str, (*place[:depth], *number)))
    return level, [*model.model_fields]


def build(recipe: Recipe) -> list[tuple[Step, Pass]]:
    """The passes of the recipe with their options validated and their order checked. RecipeError lists every unmet need at once."""
    built = [(step, _built(step, i)) for i, step in enumerate(recipe.passes, 1)]
    _check_order(recipe, [p for _, p in built])
    return built


def _built(step: Step, number: int) -> Pass:
    kind = registry.find_pass(step.use)
    try:
        options = kind.Options.model_validate(step.options)
    except ValidationError as error:
        raise options_error(error, f"pass {number}, {step.use}", kind.Options) from None
    if step.limit is not None and kind.contract.kind == "lossy":
        why = f"what it loses is measured, and no limit of it enforced: {step.limit:g} would do nothing"
        raise RecipeError("a lossy pass has no limit", where=f"pass {number}, {step.use}", why=why, do="leave out limit")
    item: Pass = kind(options)
    return item


def step_options(step: Step, item: Pass) -> dict[str, Any]:
    """All options of a step, defaults too, and what the recipe says beside them."""
    reserved = step.model_dump(mode="json", exclude={"use", "options"}, exclude_defaults=True)
    return {**item.options.model_dump(mode="json"), **reserved}


def _check_order(recipe: Recipe, passes: Sequence[Pass]) -> None:
    facts: set[str] = set()
    unmet = []
    for number, item in enumerate(passes, 1):
        for need in sorted(item.needs - facts):
            givers = [n for n in registry.passes() if need in registry.find_pass(n).gives]
            unmet.append(f"pass {number} {item.name} needs {need!r} before it, which {', '.join(givers) or 'no pass'} gives")
        for clash in sorted(item.excludes & facts):
            unmet.append(f"pass {number} {item.name} can't run on a program that is {clash!r} already")
        facts = (facts - item.breaks) | item.gives
    if "quantised" in facts and "finalised" not in facts:
        unmet.append("the recipe quantises but never finalises: add quant.finalize as its last quant pass")
    if unmet:
        raise RecipeError(f"recipe {recipe.name!r} can't run in this order", why="\n".join(unmet), do="reorder or add the passes named")


def check_globs(recipe: Recipe, program: Program) -> None:
    """RecipeError for the first glob of the recipe that matches no module path, node or op of the program."""
    opened = False
    for number, step in enumerate(recipe.passes, 1):
        check_step(step, program, f"pass {number}, {step.use}", later=opened)
        opened = opened or "opened" in registry.find_pass(step.use).gives


def check_step(step: Step, program: Program, where: str, later: bool = False) -> None:
    """RecipeError for the first glob of the step that matches nothing in the program. later: names of nodes are let through, since a pass
    before this one makes new ones; the step is asked again when its turn comes."""
    nodes = [n for n in program.graph.nodes if n.op in ("call_function", "get_attr")]
    for glob in (*step.where.include, *step.where.exclude):
        if not any(_hit((glob,), n) for n in nodes) and not (later and glob.isidentifier()):
            paths = sorted({p for n in nodes for p in n.meta.get("module", ())} - {""})
            raise RecipeError(
                f"a glob of the recipe matches nothing: {glob!r}",
                where=where,
                why=f"no module path, node or op of the model; {nearest(glob, paths) if paths else 'it has no modules'}"[:300],
                do="fxcompress inspect MODEL lists the module paths",
            )


def _hit(globs: Sequence[str], node: fx.Node) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs for name in _names(node))


def _names(node: fx.Node) -> list[str]:
    target = str(node.target)
    return [*node.meta.get("module", ()), module_path(node), node.name, target, target.rsplit(".", 1)[0]]


def exclusions(sites: Sequence[Sequence[fx.Node]], is_named: Callable[[fx.Node], bool]) -> list[tuple[str, ...]]:
    """Per site the globs that hit all its nodes and those of no other: module paths where they do, else names of nodes, if recipes may use
    them (is_named). () where nothing does."""
    hit: dict[str, set[fx.Node]] = {}
    for node in {n for nodes in sites for n in nodes}:
        for name in _names(node):
            hit.setdefault(name, set()).add(node)
    return [_globs([_narrowest(n, hit, {*nodes}, is_named) for n in nodes]) for nodes in sites]


def _narrowest(node: fx.Node, hit: Mapping[str, set[fx.Node]], own: set[fx.Node], is_named: Callable[[fx.Node], bool]) -> str | None:
    names = [module_path(node)] * bool(module_path(node)) + [node.name] * is_named(node)
    return next((name for name in names if hit[name] <= own), None)


def _globs(names: Sequence[str | None]) -> tuple[str, ...]:
    """The names as globs that mean them alone; none where one is missing."""
    known = [name for name in dict.fromkeys(names) if name is not None]
    return tuple(re.sub(r"([*?[])", r"[\1]", name) for name in known) if None not in names else ()
