"""Perplexity of a language model on a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.evaluate.given import require_finite, require_tensors


@dataclass(frozen=True)
class Perplexity:
    """value: exp of the mean negative log-likelihood over `tokens` scored tokens, from `windows` windows."""

    value: float
    tokens: int
    windows: int


def perplexity(logits: Callable[[Tensor], Tensor], token_ids: Tensor, window: int = 256, batch: int = 1) -> Perplexity:
    """exp(-mean log p(token | the tokens before it in its window)), in float64.

    logits: [b, window] int64 -> [b, window, vocabulary]. token_ids: [N], int64. Conventions: windows don't overlap (stride = window), no
    BOS is put in front, the first token of each window is context only and isn't scored, and the last N mod window tokens are left out.
    Figures are comparable only under one tokenizer and one window. batch: windows a call; the last call may have fewer.
    InputError when N < window, window < 2, batch < 1, or logits have another shape or aren't finite.
    """
    require_tensors(token_ids=token_ids)
    if window < 2 or batch < 1 or token_ids.dim() != 1 or len(token_ids) < window:
        raise InputError(
            "there is no window to score",
            why=f"token_ids has shape {list(token_ids.shape)}, the window is {window} tokens, batch {batch}",
            do="pass one row of at least `window` token ids, with a window of 2 or more and a batch of 1 or more",
        )
    windows = token_ids[: len(token_ids) // window * window].view(-1, window)
    total = 0.0
    for rows in torch.split(windows, batch):
        total += _negative_log_likelihood(logits(rows), rows)
    tokens = windows.shape[0] * (window - 1)
    return Perplexity(torch.tensor(total / tokens, dtype=torch.float64).exp().item(), tokens, windows.shape[0])


def _negative_log_likelihood(logits: Tensor, rows: Tensor) -> float:
    """Summed over every token of the rows but the first of each."""
    if logits.dim() != 3 or logits.shape[:2] != rows.shape:
        raise InputError(
            "the logits don't fit the tokens",
            why=f"tokens {list(rows.shape)} gave logits {list(logits.shape)}, not [batch, window, vocabulary]",
        )
    if int(rows.min()) < 0 or int(rows.max()) >= logits.shape[2]:
        raise InputError("a token has no logit", why=f"ids are {int(rows.min())}..{int(rows.max())}, the vocabulary has {logits.shape[2]}")
    scores = logits[:, :-1].double()
    require_finite("the logits", scores)
    chosen = scores.gather(2, rows[:, 1:, None]).squeeze(2)
    return float((scores.logsumexp(2) - chosen).sum())
