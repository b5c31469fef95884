"""Rewrite and Transform: what a pass is. Match, Reject, Context: what it gets and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, fx

from fxcompress.contract import Contract
from fxcompress.edit import Edit
from fxcompress.errors import CalibrationError
from fxcompress.program import Program
from fxcompress.target import Target


class Options(BaseModel):
    """Base of every pass's options: frozen, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _no_items() -> Iterable[Sequence[Tensor]]:
    raise CalibrationError(
        "there is no calibration data",
        why="a pass of the recipe measures the model's values on it",
        do="pass calibration=[item, ...], items of the form of the example inputs, two or more",
    )


def _without_feed(asked: Iterable[tuple[Any, Any]]) -> Mapping[tuple[Any, Any], Any]:
    if list(asked):
        _no_items()
    return {}


class Kept:
    """What a long pass has finished of itself: tensors under a key that says all they depend on. This one keeps nothing."""

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was kept under the key; None if nothing was."""
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep it."""


@dataclass(frozen=True)
class Context:
    """What a pass may look at. `probe`: flat inputs kept out of the statistics, on which contracts are measured.

    observe: answers questions (node or nodes, observer of `calibrate.observers`) about the program's values from a run over the feed.
    items: the feed itself, as flat inputs. note: leaves a sentence for the report. progress: tells the user how far a long pass is. kept: what
    it had finished when a run before was cut short.
    """

    program: Program
    target: Target
    probe: tuple[Tensor, ...] = ()
    admits: Callable[[fx.Node], bool] = lambda node: True  # whether the recipe lets a Transform touch a site; Rewrites needn't ask
    observe: Callable[[Iterable[tuple[Any, Any]]], Mapping[tuple[Any, Any], Any]] = _without_feed
    items: Callable[[], Iterable[Sequence[Tensor]]] = _no_items
    note: Callable[[str], None] = lambda sentence: None
    progress: Callable[[str], None] = lambda sentence: None
    kept: Kept = field(default_factory=Kept)

    def constant(self, node: Any) -> Tensor | None:
        """The tensor a constant node reads; None for anything else."""
        return self.program.constant(node) if isinstance(node, fx.Node) else None


class Match:
    """A legal site: its node and what `apply` needs, as attributes. places: all nodes the recipe must admit, if more than that one."""

    def __init__(self, node: fx.Node, *, places: Sequence[fx.Node] = (), **found: Any) -> None:
        self.node, self.places = node, tuple(places) or (node,)
        self.__dict__.update(found)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this match holds no {name!r}, only {sorted(self.__dict__)}")


class Reject:
    """An illegal site: "mine, but not here, because". The sentence is rendered when read; nodes appear by name."""

    def __init__(self, sentence: str, *values: Any) -> None:
        self.sentence, self.values = sentence, values

    @property
    def reason(self) -> str:
        """The sentence with its values filled in."""
        return self.sentence.format(*(v.name if isinstance(v, fx.Node) else v for v in self.values))

    def but(self, words: str) -> Reject:
        """The same, and what was done all the same."""
        return Reject(f"{self.sentence}; {words}", *self.values)


class Pass(ABC):
    """Base of both kinds. needs, gives, breaks, excludes: facts about the program ("quantised", "finalised") that order is checked with.
    whole: why a recipe can't leave single places out, and what to do instead; "" where it can."""

    name: ClassVar[str]
    contract: ClassVar[Contract]
    Options: ClassVar[type[Options]] = Options
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    excludes: ClassVar[frozenset[str]] = frozenset()
    whole: ClassVar[str] = ""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options


class Rewrite(Pass):
    """A local pass. `targets`: the ops (or "get_attr") whose nodes `match` is asked about; running twice changes nothing more."""

    targets: ClassVar[tuple[Callable[..., Any] | str, ...]]

    @abstractmethod
    def match(self, node: fx.Node, on: Context) -> Match | Reject | None:
        """None: not mine. Reject: mine, but illegal, with the reason. Match: legal."""

    @abstractmethod
    def apply(self, match: Any, edit: Edit) -> None:
        """Change the program at the match. Can't refuse."""


class Transform(Pass):
    """A pass that sees the whole program."""

    @abstractmethod
    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """Change the program; returns declined sites by name."""
