"""Multiple-choice questions answered by likelihood, for language models that can't be asked in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.evaluate.given import require_tensors
from fxcompress.evaluate.intervals import Estimate, bootstrap


@dataclass(frozen=True)
class Question:
    """prompt: token ids [P]. choices: token ids [C_i] of each possible continuation. right: the index of the true one."""

    prompt: Tensor
    choices: Sequence[Tensor]
    right: int


def multiple_choice(logits: Callable[[Tensor], Tensor], questions: Sequence[Question], by_token: bool = False) -> Estimate:
    """The share of questions whose true choice has the greatest Σ log p(token | prompt, tokens of the choice before it), with an interval.

    logits: [1, n] int64 -> [1, n, vocabulary], one call a choice. by_token: the sum is divided by the choice's tokens, so that long choices
    aren't punished. Ties go to the earlier choice. InputError for no question, an empty prompt or choice, `right` that is no choice, or logits
    of another shape or not finite.
    """
    if not questions:
        raise InputError("there is no question")
    hits = [_answer(logits, question, by_token) == question.right for question in questions]
    return bootstrap(lambda rows: float(rows.mean()), torch.tensor(hits, dtype=torch.float64))


def log_likelihoods(logits: Callable[[Tensor], Tensor], question: Question) -> Tensor:
    """Σ log p of each choice after the prompt, [choices], float64."""
    require_tensors(prompt=question.prompt, **{f"choice {i}": choice for i, choice in enumerate(question.choices)})
    if not len(question.prompt) or not all(map(len, question.choices)) or not 0 <= question.right < len(question.choices):
        why = f"prompt of {len(question.prompt)} tokens, choices of {[len(c) for c in question.choices]}, right is {question.right}"
        raise InputError("the question can't be asked", why=why)
    return torch.stack([_log_likelihood(logits, question.prompt, choice) for choice in question.choices])


def _answer(logits: Callable[[Tensor], Tensor], question: Question, by_token: bool) -> int:
    scores = log_likelihoods(logits, question)
    lengths = torch.tensor([len(c) for c in question.choices])
    return int((scores / lengths if by_token else scores).argmax())


def _log_likelihood(logits: Callable[[Tensor], Tensor], prompt: Tensor, choice: Tensor) -> Tensor:
    ids = torch.cat([prompt, choice])[None]
    with torch.no_grad():
        scores = logits(ids)
    if scores.dim() != 3 or scores.shape[:2] != ids.shape or not torch.isfinite(scores).all():
        raise InputError(
            "the logits don't fit the tokens", why=f"tokens {list(ids.shape)} gave logits {list(scores.shape)}, or inf or nan in them"
        )
    rows = scores[0, len(prompt) - 1 : -1].double().log_softmax(1)
    return rows.gather(1, choice[:, None]).sum()
