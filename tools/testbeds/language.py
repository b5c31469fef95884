"""The language testbed: SmolLM2-135M-Instruct as its package ships it (make model), on the four domains of tools/domains.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.calibrate import Feed
from fxcompress.calibrate.feed import Items
from fxcompress.calibrate.text import token_ids
from fxcompress.evaluate import Estimate, bootstrap, perplexity
from fxcompress.sources import resolve
from tools.demo import MODEL
from tools.domains import CALIBRATION, EVALUATION

WINDOW = 256


def load() -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    loaded = resolve(MODEL)
    assert loaded.tokenizer is not None
    return loaded.model, loaded.tokenizer()


def feed(tokenizer: Any) -> Feed:
    """One window of each domain's calibration document, and another of the first, which is left for the contracts."""
    texts = [token_ids(tokenizer, file) for file in CALIBRATION.values()]
    starts = [(ids, 0) for ids in texts] + [(texts[0], WINDOW)]
    return Items([{"input_ids": ids[None, at : at + WINDOW]} for ids, at in starts])


def perplexities(logits: Callable[[Tensor], Tensor], tokenizer: Any, windows: int) -> dict[str, Estimate]:
    """Of each domain's evaluation document, its first windows, with an interval over windows."""
    found = {}
    for domain, file in EVALUATION.items():
        rows = token_ids(tokenizer, file)[: windows * WINDOW].view(windows, WINDOW)
        each = torch.tensor([math.log(perplexity(logits, row, WINDOW).value) for row in rows], dtype=torch.float64)
        found[domain] = bootstrap(lambda part: math.exp(float(part.mean())), each)
    return found
