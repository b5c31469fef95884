"""The typed errors of the project and the one builder that renders them.

Every message answers five questions in a fixed order: what went wrong (the first line), where, why with the figure and the limit,
in which state things were left, and what to do, as text to paste. A line whose answer is empty is left out.
"""

from __future__ import annotations

import difflib
import os
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

_HERE = f"{Path(__file__).parent}{os.sep}"
_MADE = ("<frozen", "<eval_with_key>", "<string>")  # code without a file: Python's own, torch's, and what libraries compile as they run
LISTED = 30  # names in a sentence


class FxcError(Exception):
    """Base of all errors a user can cause or must act on. `what`, `where`, `why`, `state`, `do` stay readable as attributes."""

    def __init__(self, what: str, *, where: str = "", why: str = "", state: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.state, self.do = what, where, why, state, do
        super().__init__(what)

    def __str__(self) -> str:
        answers = (("where", self.where), ("why", self.why), ("state", self.state), ("do", self.do))
        lines = [f"  {name:<6}{_indented(text)}" for name, text in answers if text]
        return "\n".join([self.what, *lines])

    def placed(self, *, where: str = "", state: str = "") -> FxcError:
        """The same error with place and state filled in where they were empty: each is added once, by whoever knows it first."""
        self.where = self.where or where
        self.state = self.state or state
        return self


class RecipeError(FxcError):
    """A recipe, pass option, glob or order that can't be run; raised before any work is done."""


class InputError(FxcError):
    """Inputs that don't fit the model's forward or the captured signature, at compile or at call."""


class CaptureError(FxcError):
    """A model that can't be captured, or whose captured graph doesn't give the model's own numbers."""


class CalibrationError(FxcError):
    """A feed or statistic that can't be used."""


class ContractViolation(FxcError):  # noqa: N818 - the name the field and DESIGN use
    """A pass changed the function more than its contract allows."""


class VerifierError(FxcError):
    """A program that is not legal at its stage: a bug in a pass or in capture, never in the user's model."""


class BackendRefusal(FxcError):  # noqa: N818
    """Something the chosen backend can't run; never lowered to something else in silence."""


class ArtifactError(FxcError):
    """A saved artifact or checkpoint that is missing, altered, truncated, unsafe or from another version."""


def nearest(name: str, known: Iterable[str], most: int = 1) -> str:
    """A sentence for an unknown name: the nearest known ones if any is near, else all of them, or the first where they are many."""
    names = sorted(n for n in known if n)  # the root module has no name
    if close := difflib.get_close_matches(name, names, n=most, cutoff=0.6):
        return f"did you mean {' or '.join(map(repr, close))}?"
    listed = ", ".join(names[:LISTED]) + (f", … ({len(names)} in all)" if len(names) > LISTED else "")
    return f"known: {listed}" if names else "none is known"


def raised_at(error: BaseException) -> str:
    """File, line and code of the user's own source in which an exception was raised: of the innermost frame that is neither this package's nor
    an installed one's nor Python's own; of an installed model its own; "" where only torch ran."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_HERE, *_MADE))]
    own = [f for f in frames if not _is_installed(f.filename)] or [f for f in frames if "torch" not in Path(f.filename).parts]
    return f"{own[-1].filename}:{own[-1].lineno}  {own[-1].line}".strip() if own else ""


def _is_installed(file: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts) or Path(file).is_relative_to(sysconfig.get_path("stdlib"))


def _indented(text: str) -> str:
    return text.replace("\n", "\n        ")
