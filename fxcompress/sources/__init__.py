"""Sources: what a user calls "the model", turned into a module or an exported program. Nothing is downloaded and no pickle is opened."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxcompress import artifact, checkpoint
from fxcompress.errors import CaptureError, FxcError, raised_at
from fxcompress.sources.loaded import PICKLED, Loaded, read_config

__all__ = ["Loaded", "call_function", "resolve"]

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FORMS = "an nn.Module, an ExportedProgram, a .pt2 or .gguf file, a diffusers or transformers folder, or 'package.module:function'"


def resolve(model: Any, component: str | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """The model behind whatever names it.

    model: an nn.Module or ExportedProgram, returned as is; the path of a .pt2 file, a .gguf file, a diffusers pipeline (with `component`), a
    diffusers component or a transformers folder; or "package.module:function", called without arguments, which returns a module, an exported
    program, or (one of them, example inputs). dtype: for folders and .gguf; by default as stored, float32 for .gguf.
    CaptureError for anything else, a hub's name included: hubs are never contacted.
    """
    loaded = _resolve(model, component, dtype)
    if component is not None and not _is_pipeline(model):
        raise CaptureError(
            f"component={component!r} has no meaning here",
            where=loaded.origin,
            why="only a diffusers pipeline folder, one with a model_index.json, has components",
            do="leave component out",
        )
    return loaded


def _resolve(model: Any, component: str | None, dtype: torch.dtype | None) -> Loaded:
    if isinstance(model, nn.Module):
        return Loaded(model, origin=type(model).__qualname__)
    if isinstance(model, ExportedProgram):
        return Loaded(model, origin="ExportedProgram", example=_example(model))
    if not isinstance(model, str | os.PathLike):
        raise CaptureError("this is not a model", why=f"got {type(model).__qualname__}", do=f"pass {FORMS}")
    path = Path(model)
    if path.is_dir():
        return _from_folder(path, component, dtype)
    if path.is_file():
        return _from_file(path, dtype)
    if FUNCTION.fullmatch(str(model)):
        return _from_function(str(model))
    raise _not_found(str(model))


def _is_pipeline(model: Any) -> bool:
    return isinstance(model, str | os.PathLike) and (Path(model) / "model_index.json").is_file()


def _from_folder(folder: Path, component: str | None, dtype: torch.dtype | None) -> Loaded:
    from fxcompress.sources import diffusers, transformers

    for name, what in ((artifact.MANIFEST, "an artifact: a model that is compiled"), (checkpoint.STATE, "a checkpoint of a compilation")):
        if (folder / name).is_file():
            do = f"fxcompress diff {folder} shows its graphs, fxcompress explain {folder} NODE one place; or pass {FORMS}"
            raise CaptureError("the folder holds no model", where=str(folder), why=f"it is {what}", do=do)
    if (folder / "model_index.json").is_file():
        folder = diffusers.component_folder(folder, component)
    if not (folder / "config.json").is_file():
        raise CaptureError(
            "the folder holds no model",
            where=str(folder),
            why="it has neither model_index.json (a diffusers pipeline) nor config.json (a diffusers or transformers model)",
            do=f"pass {FORMS}",
        )
    is_diffusers = "_class_name" in read_config(folder / "config.json")
    return diffusers.load_component(folder, dtype) if is_diffusers else transformers.load_folder(folder, dtype)


def _from_file(path: Path, dtype: torch.dtype | None) -> Loaded:
    if path.suffix == ".pt2":
        from fxcompress.sources.pt2 import load_pt2

        program = load_pt2(path)
        return Loaded(program, origin=f"exported program {path}", example=_example(program))
    if path.suffix == ".gguf":
        from fxcompress.sources.transformers import load_gguf

        return load_gguf(path, dtype)
    if path.suffix in PICKLED:
        why = "it may be a pickle, which runs code while it is read"
    else:
        why = "weights alone have no graph" if path.suffix == ".safetensors" else f"unknown file type {path.suffix!r}"
    raise CaptureError("this file holds no model that can be loaded", where=str(path), why=why, do=f"pass {FORMS}")


def _example(program: ExportedProgram) -> Any:
    """The example inputs of an exported program as one item; None where it was saved without them."""
    if program.example_inputs is None:
        return None
    from fxcompress.signature import Inputs

    args, kwargs = program.example_inputs
    return Inputs(*args, **kwargs)


def call_function(name: str) -> Any:
    """What "package.module:function" returns, or the object of that name if it can't be called. CaptureError if it can't be found or
    raises."""
    module_name, _, attribute = name.partition(":")
    try:
        made = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise _raised(f"importing {module_name!r} raises", name, error) from error
        raise CaptureError(
            f"the module {module_name!r} can't be imported", where=name, why=str(error), do="set PYTHONPATH to the folder it is in"
        ) from error
    except Exception as error:
        raise _raised(f"importing {module_name!r} raises", name, error) from error
    for part in attribute.split("."):
        if not hasattr(made, part):
            raise CaptureError(f"{module_name} has no {attribute!r}", where=name, do="check the name after the colon")
        made = getattr(made, part)
    if isinstance(made, nn.Module) or not callable(made):
        return made
    try:
        return made()
    except FxcError:
        raise
    except Exception as error:
        raise _raised("the function raises", name, error) from error


def _raised(what: str, name: str, error: Exception) -> CaptureError:
    """An exception of the user's own code, with the line of it."""
    place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else raised_at(error)
    why = "\n".join([f"{type(error).__name__}: {error}", *[f"at {place}"] * bool(place)])
    return CaptureError(f"{what} {type(error).__name__}", where=name, why=why, do="call it in Python, which shows the whole traceback")


def _from_function(name: str) -> Loaded:
    made = call_function(name)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module | ExportedProgram):
        raise CaptureError(
            "the function returns no model",
            where=name,
            why=f"got {type(model).__qualname__}",
            do="return an nn.Module or an ExportedProgram, or one of them and example inputs as a pair",
        )
    return Loaded(model, origin=name, example=example)


def _not_found(name: str) -> CaptureError:
    if HUB_NAME.fullmatch(name):
        return CaptureError(
            f"there is no file or folder {name!r}",
            why="if this is a model on a hub: hubs are never contacted",
            do="download the model first and pass its folder",
        )
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        return CaptureError(
            f"there is no file or folder {name!r}",
            why="if this is a function: its module isn't named",
            do=f'"package.module:{name.rpartition(".")[2]}"',
        )
    return CaptureError(f"there is no file or folder {name!r}", do=f"pass {FORMS}")
