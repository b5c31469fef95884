"""A feed of text for language models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.calibrate.feed import Items
from fxcompress.errors import CalibrationError


def text(tokenizer: Callable[..., Any], source: str | Path, length: int, items: int, batch: int = 1) -> Items:
    """`items` dicts {"input_ids": [batch, length], int64}: the text's first items * batch * length tokens, cut into rows that don't overlap.

    source: a Path is a UTF-8 file, a str is the text itself. No special token is added and nothing is padded, so there is no mask.
    CalibrationError when the text is too short.
    """
    ids = token_ids(tokenizer, source)
    needed = items * batch * length
    if len(ids) < needed:
        raise CalibrationError(
            "the text is too short",
            where=str(source) if isinstance(source, Path) else "",
            why=f"it has {len(ids)} tokens; {items} items of {batch} x {length} need {needed}",
            do="pass a longer text (a file is given as a pathlib.Path), fewer items or a smaller length",
        )
    return Items([{"input_ids": rows} for rows in ids[:needed].view(items, batch, length)])


def token_ids(tokenizer: Callable[..., Any], source: str | Path) -> Tensor:
    """All tokens of the text, int64 [N], without special tokens. source: as for `text`."""
    content = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    return torch.tensor(tokenizer(content, add_special_tokens=False)["input_ids"], dtype=torch.int64)
