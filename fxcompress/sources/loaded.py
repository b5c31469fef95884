"""Loaded: what every source returns, and the refusals that all of them share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxcompress.errors import CaptureError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")


@dataclass(frozen=True)
class Loaded:
    """A model with what its source knows about it.

    example: the arguments of one call (tuple, dict by parameter name or Inputs), None where the source has none. roles: parameter name ->
    role. tokenizer: builds the tokenizer when called, since that takes seconds; None where there is none.
    """

    model: nn.Module | ExportedProgram
    origin: str
    example: Any = None
    roles: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Callable[[], Any] | None = None


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in the file; CaptureError when it isn't one."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CaptureError("a config file can't be read", where=str(path), why=str(error), do="copy the folder again") from None
    if not isinstance(config, dict):
        raise CaptureError("a config file can't be read", where=str(path), why="it holds no JSON object", do="copy the folder again")
    return config


def require_safetensors(folder: Path) -> None:
    """CaptureError unless the folder has its weights as .safetensors: a pickle runs code while it is read, and is never opened."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if pickles:
        raise CaptureError(
            "the weights are stored in a format that isn't read",
            where=str(folder),
            why=f"found {', '.join(pickles)} and no .safetensors; a pickle runs code while it is read",
            do="convert them where you trust them: model.save_pretrained(folder, safe_serialization=True)",
        )
    raise CaptureError(
        "the folder has no weights",
        where=str(folder),
        why="it holds no .safetensors file",
        do="download the .safetensors files of the model into this folder",
    )


def missing_extra(package: str, error: ImportError) -> CaptureError:
    """The error for a source whose library isn't installed."""
    return CaptureError(f"{package} is needed to load this model", why=str(error), do="pip install 'fxcompress[models]'")


def require_complete(folder: Path, info: Mapping[str, Any]) -> None:
    """CaptureError when the library filled weights in by itself: `info` is its loading report."""
    lost = sorted({*map(str, info.get("missing_keys", ())), *(str(m[0]) for m in info.get("mismatched_keys", ()))})
    if lost:
        raise CaptureError(
            "the weights don't fit the model",
            where=str(folder),
            why=f"{len(lost)} missing or of another shape, which would be random numbers: {', '.join(lost[:3])}{', …' * (len(lost) > 3)}",
            do="download the whole model again; config.json and the .safetensors files belong together",
        )


def load_failed(path: Path, error: Exception) -> CaptureError:
    """The error for anything a library raises while it loads a model."""
    first = (str(error).strip().splitlines() or [""])[0]
    return CaptureError(
        "the model can't be loaded", where=str(path), why=f"{type(error).__name__}: {first}", do="load it with its own library to see more"
    )
