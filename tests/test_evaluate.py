import math

import pytest
import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.evaluate import Perplexity, perplexity

VOCABULARY = 5


def uniform(rows: Tensor) -> Tensor:
    return torch.zeros(*rows.shape, VOCABULARY)


def bigram(rows: Tensor) -> Tensor:
    """p(next | token) from one fixed table, so that every scored token is known in closed form."""
    return TABLE[rows]


TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
IDS = torch.randint(VOCABULARY, (23,), generator=torch.Generator().manual_seed(4))


def by_hand(window: int) -> float:
    """The definition in plain loops: -log p of every token but the first of each whole window."""
    log_p = TABLE.double().log_softmax(1)
    scored = [-float(log_p[IDS[start + i - 1], IDS[start + i]]) for start in range(0, len(IDS) - window + 1, window) for i in range(1, window)]
    return math.exp(math.fsum(scored) / len(scored))


def test_uniform_logits_give_the_vocabulary():
    result = perplexity(uniform, IDS, window=4)
    assert result.value == pytest.approx(VOCABULARY, rel=1e-15)
    assert (result.tokens, result.windows) == (5 * 3, 5)


@pytest.mark.parametrize(("window", "batch"), [(2, 1), (4, 1), (4, 2), (23, 1), (22, 7)])
def test_against_the_definition(window, batch):
    assert perplexity(bigram, IDS, window, batch).value == pytest.approx(by_hand(window), rel=1e-13)


@pytest.mark.parametrize(
    "fault",
    [
        lambda rows: torch.roll(bigram(rows), 1, dims=1),  # scores shifted by one position
        lambda rows: -bigram(rows),
        lambda rows: 1.001 * bigram(rows),
        lambda rows: torch.roll(bigram(rows), 1, dims=2),  # another token's score
    ],
)
def test_wrong_logits_show(fault):
    assert abs(perplexity(fault, IDS, 4).value / by_hand(4) - 1) > 1e-5


def test_the_tail_and_the_first_tokens_are_not_scored():
    changed = IDS.clone()
    changed[[20, 21, 22]] = (changed[[20, 21, 22]] + 1) % VOCABULARY
    assert perplexity(bigram, changed, 4) == perplexity(bigram, IDS, 4)
    seen: list[Tensor] = []
    perplexity(lambda rows: seen.append(rows) or uniform(rows), IDS, 4, batch=2)
    assert torch.equal(torch.cat(seen), IDS[:20].view(5, 4))
    assert [len(rows) for rows in seen] == [2, 2, 1]


def test_large_logits_do_not_overflow():
    """Token 1 lies 40 below token 2, so -log p = 40 + log(1 + 4 e^-40); exp(1040) is beyond float64."""
    logits = torch.full((VOCABULARY,), 1000.0)
    logits[2] += 40
    result = perplexity(lambda rows: logits.expand(*rows.shape, VOCABULARY), torch.full((8,), 1), 4)
    assert math.log(result.value) == pytest.approx(40, rel=1e-13)


@pytest.mark.parametrize(("ids", "window"), [(IDS, 24), (IDS, 1), (IDS.view(1, -1), 4)])
def test_no_window(ids, window):
    with pytest.raises(InputError) as refused:
        perplexity(uniform, ids, window)
    assert str(refused.value) == (
        "there is no window to score\n"
        f"  why   token_ids has shape {list(ids.shape)}, the window is {window} tokens, batch 1\n"
        "  do    pass one row of at least `window` token ids, with a window of 2 or more and a batch of 1 or more"
    )


def test_tokens_without_a_logit():
    with pytest.raises(InputError, match="a token has no logit"):
        perplexity(uniform, torch.full((8,), VOCABULARY), 4)


def test_logits_of_another_shape():
    with pytest.raises(InputError, match="the logits don't fit the tokens") as refused:
        perplexity(lambda rows: uniform(rows)[:, -1], IDS, 4)
    assert refused.value.why == "tokens [1, 4] gave logits [1, 5], not [batch, window, vocabulary]"


def test_logits_that_are_not_finite():
    def broken(rows: Tensor) -> Tensor:
        logits = uniform(rows)
        logits[0, 1, 2] = torch.nan
        return logits

    with pytest.raises(InputError, match="the logits aren't finite") as refused:
        perplexity(broken, IDS, 4)
    assert refused.value.why == f"1 of {3 * VOCABULARY} values are inf or nan"


def test_the_result_reads_as_what_it_is():
    assert perplexity(uniform, IDS, 23) == Perplexity(value=pytest.approx(5.0), tokens=22, windows=1)
