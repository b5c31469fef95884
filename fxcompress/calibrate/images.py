"""A feed of images for vision models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.calibrate.feed import Items
from fxcompress.errors import CalibrationError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def images(
    source: Tensor | Path, prepare: Callable[[Any], Tensor] | None = None, *, name: str = "pixel_values", batch: int = 4, limit: int = 256
) -> Items:
    """Dicts {name: [batch, ...]} of the first `limit` images, in order; the last dict may have fewer.

    source: prepared images [N, ...], or a folder, whose image files are read in the order of their names, subfolders left out. prepare: from a
    PIL image in RGB to what the model takes, [C, H, W]; for a folder it is needed, for there is no preparation that fits every model.
    CalibrationError when there is no image, `prepare` is missing, or a file can't be read.
    """
    rows = source[:limit] if isinstance(source, Tensor) else _read(source, prepare, limit)
    return Items([{name: part} for part in rows.split(batch)] if len(rows) else [])  # type: ignore[no-untyped-call]


def _read(folder: Path, prepare: Callable[[Any], Tensor] | None, limit: int) -> Tensor:
    files = sorted(f for f in folder.glob("*") if f.suffix.lower() in SUFFIXES)[:limit]
    if prepare is None or not files:
        raise CalibrationError(
            "the images can't be read",
            where=str(folder),
            why=f"{len(files)} image files, {'no' if prepare is None else 'a'} preparation",
            do="pass a folder of images and the model's own preparation: images(folder, lambda image: processor(image)...)",
        )
    return torch.stack([prepare(_open(file)) for file in files])


def _open(file: Path) -> Any:
    try:
        from PIL import Image

        with Image.open(file) as image:
            return image.convert("RGB")
    except (ImportError, OSError) as error:
        raise CalibrationError(
            "an image can't be read", where=str(file), why=str(error), do="remove the file, or pip install pillow"
        ) from error
