"""Diffusers folders: a pipeline folder with one of its components named, or a component's own folder.

The class is looked up in diffusers itself by the name the config holds; code that comes with a folder is never run, pickles are never
opened, and nothing is downloaded. The timestep's role comes from diffusers' convention: its denoisers call that parameter `timestep`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fxcompress.errors import CaptureError, nearest
from fxcompress.sources.loaded import Loaded, load_failed, missing_extra, read_config, require_complete, require_safetensors

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def component_folder(folder: Path, component: str | None) -> Path:
    """The folder of one component of the pipeline. CaptureError listing the components when it is unnamed or unknown."""
    entries = read_config(folder / "model_index.json")
    known = [n for n, v in entries.items() if isinstance(v, list) and v and v[0] and (folder / n / "config.json").is_file()]
    if component is None:
        raise CaptureError(
            "a pipeline is compiled one component at a time",
            where=str(folder),
            why=f"its models: {', '.join(sorted(known))}",
            do=f'component="{_likely(known)}"',
        )
    if component not in known:
        raise CaptureError(
            f"the pipeline has no model {component!r}",
            where=str(folder),
            why=nearest(component, known),
            do=f'component="{_likely(known)}"',
        )
    return folder / component


def load_component(folder: Path, dtype: torch.dtype | None = None) -> Loaded:
    """The model in the folder, in eval mode and in the dtype its weights are stored in unless `dtype` says otherwise."""
    name = str(read_config(folder / "config.json")["_class_name"])
    model_class = _model_class(folder, name)
    require_safetensors(folder)
    try:
        model, info = model_class.from_pretrained(
            str(folder), torch_dtype=dtype or _stored_dtype(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise load_failed(folder, error) from error
    require_complete(folder, info)
    parameters = inspect.signature(model.forward).parameters
    roles = {"timestep": "timestep"} if "timestep" in parameters else {}
    return Loaded(model.eval(), origin=f"diffusers {name} from {folder}", roles=roles)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The float dtype most tensors are stored in; diffusers itself would turn everything into float32."""
    found: Counter[str] = Counter()
    for file in folder.glob("diffusion_pytorch_model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found.update(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118 - not a dict
    return next((FLOATS[name] for name, _ in found.most_common() if name in FLOATS), torch.float32)


def _model_class(folder: Path, name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise missing_extra("diffusers", error) from error
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.ModelMixin)):
        raise CaptureError(
            f"diffusers {diffusers.__version__} has no model class {name!r}",
            where=str(folder / "config.json"),
            why="the class is looked up in diffusers itself; code that comes with a folder is never run",
            do='build the model yourself and name the function: "package.module:function"',
        )
    return found


def _likely(known: list[str]) -> str:
    return next((n for n in ("unet", "transformer", "vae") if n in known), known[0] if known else "")
