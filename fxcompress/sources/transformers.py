"""Transformers folders and GGUF files.

The class is looked up in transformers itself by the architecture the config names: `auto_map` and any code in the folder are never
followed, pickles are never opened, and nothing is downloaded. GGUF weights are dequantised to float32.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fxcompress.errors import CaptureError
from fxcompress.sources.loaded import Loaded, load_failed, missing_extra, read_config, require_complete, require_safetensors

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 16


def load_folder(folder: Path, dtype: torch.dtype | None = None) -> Loaded:
    """The model in the folder, in eval mode and in the dtype its weights are stored in unless `dtype` says otherwise."""
    config = read_config(folder / "config.json")
    name = _architecture(folder, config)
    _refuse_downloaded_kernels(folder, config)
    require_safetensors(folder)
    model = _from_pretrained(getattr(_transformers(), name), folder, dtype=dtype or "auto", use_safetensors=True)
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    tokenizer = partial(_tokenizer, folder) if has_tokenizer else None
    return Loaded(model, origin=f"transformers {name} from {folder}", example=_example(model), tokenizer=tokenizer)


def load_gguf(path: Path, dtype: torch.dtype | None = None) -> Loaded:
    """The language model of a .gguf file, dequantised to float32 unless `dtype` says otherwise, in eval mode."""
    model_class = _transformers().AutoModelForCausalLM
    model = _from_pretrained(model_class, path.parent, dtype=dtype or torch.float32, gguf_file=path.name)
    tokenizer = partial(_tokenizer, path.parent, gguf_file=path.name)
    return Loaded(model, origin=f"GGUF {type(model).__name__} from {path}", example=_example(model), tokenizer=tokenizer)


def _from_pretrained(model_class: Any, folder: Path, **options: Any) -> Any:
    try:
        model, info = model_class.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, weights_only=True, output_loading_info=True, **options
        )
    except Exception as error:
        raise load_failed(folder, error) from error
    require_complete(folder, info)
    return model.eval()


def _tokenizer(folder: Path, **options: Any) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        raise load_failed(folder, error) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", error) from error
    return transformers


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    """The first architecture the config names that transformers has; CaptureError when there is none."""
    library = _transformers()
    names = [str(n) for n in config.get("architectures") or ()]
    for name in names:
        found = getattr(library, name, None)
        if inspect.isclass(found) and issubclass(found, library.PreTrainedModel):
            return name
    raise CaptureError(
        f"transformers {library.__version__} has no model class {names[0]!r}" if names else "the config names no model class",
        where=str(folder / "config.json"),
        why="the class is looked up in transformers itself by `architectures`; code that comes with a folder is never run",
        do='build the model yourself and name the function: "package.module:function"',
    )


def _refuse_downloaded_kernels(folder: Path, config: dict[str, Any]) -> None:
    """An attention implementation of the form "org/name" makes transformers download and run a kernel."""
    keys = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
    named = [f"{k}: {v}" for k, v in _entries(config) if k in keys and "/" in str(v)]
    if named:
        raise CaptureError(
            "the config asks for code to be downloaded",
            where=str(folder / "config.json"),
            why=f"{named[0]}; hubs are never contacted",
            do='remove the entry, or set it to "sdpa"',
        )


def _entries(config: Any) -> list[tuple[str, Any]]:
    """Every key with its value, nested configs included."""
    if not isinstance(config, dict):
        return []
    return [pair for k, v in config.items() for pair in ((k, v), *_entries(v))]


def _example(model: Any) -> dict[str, torch.Tensor] | None:
    """Two rows of token ids, counted up from 0, for a model that needs nothing else; None for any other."""
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        return None
    vocabulary = int(model.config.get_text_config().vocab_size)
    return {"input_ids": (torch.arange(EXAMPLE_BATCH * EXAMPLE_LENGTH) % vocabulary).view(EXAMPLE_BATCH, EXAMPLE_LENGTH)}
