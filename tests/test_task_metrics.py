"""Metrics of videos, detectors, and language models that answer questions; each against a closed form."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import InputError
from fxcompress.evaluate import (
    Boxes,
    Question,
    Running,
    frame_difference_error,
    frechet,
    log_likelihoods,
    mean_average_precision,
    multiple_choice,
    video_distance,
    video_features,
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


VIDEOS = torch.randn(6, 2, 5, 3, 4, generator=rng(1))


def brightness(frames: Tensor) -> Tensor:
    """Mean and greatest value of a frame, [n, 2]."""
    return torch.stack([frames.flatten(1).mean(1), frames.flatten(1).amax(1)], 1)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_the_features_of_a_video_by_hand(batch):
    for row, video in zip(video_features(brightness, VIDEOS, batch), VIDEOS, strict=True):
        frames = [brightness(video[None, :, t])[0] for t in range(5)]
        changes = [(b - a).abs() for a, b in pairwise(frames)]
        torch.testing.assert_close(row, torch.cat([sum(frames) / 5, sum(changes) / 4]))


def test_a_still_video_changes_nothing_and_a_reversed_one_looks_the_same():
    still = VIDEOS[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert video_features(brightness, still)[:, 2:].abs().max() < 1e-6
    torch.testing.assert_close(video_features(brightness, VIDEOS.flip(2)), video_features(brightness, VIDEOS))
    assert not torch.allclose(video_features(brightness, VIDEOS[:, :, [0, 2, 1, 3, 4]]), video_features(brightness, VIDEOS))


def test_videos_a_brightness_apart():
    """Every feature's mean moves by the brightness, no covariance does, no frame changes more: two features of the first half move."""
    moved = video_distance(brightness, VIDEOS, VIDEOS + 0.5)
    assert moved == pytest.approx(2 * 0.5**2, rel=1e-4)
    assert moved == frechet(video_features(brightness, VIDEOS), video_features(brightness, VIDEOS + 0.5))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, -1.0])
def test_motion_of_another_size(share):
    """Differences `share` times as great are 1 - share off, whatever stands still."""
    still = VIDEOS.mean(2, keepdim=True)
    assert frame_difference_error(VIDEOS, 3 + still + share * (VIDEOS - still)).value == pytest.approx(1 - share, abs=1e-6)


def test_flicker_counts_and_a_constant_error_does_not():
    assert frame_difference_error(VIDEOS, VIDEOS + torch.randn(6, 2, 1, 3, 4, generator=rng(2))).value < 1e-6
    flicker = VIDEOS + 0.1 * torch.tensor([1.0, -1, 1, -1, 1]).view(1, 1, 5, 1, 1)
    wanted = math.sqrt(4 * VIDEOS[:, :, 0].numel() * 0.2**2 / float(VIDEOS.double().diff(dim=2).square().sum()))
    found = frame_difference_error(VIDEOS, flicker)
    assert found.value == pytest.approx(wanted, rel=1e-5)
    assert found.low < found.value < found.high


def test_what_is_no_video():
    with pytest.raises(InputError, match=r"\[6, 2, 1, 3, 4\], not \[N, C, T >= 2, H, W\]"):
        video_features(brightness, VIDEOS[:, :, :1])
    with pytest.raises(InputError, match="all its frames are equal"):
        frame_difference_error(torch.ones(2, 1, 3, 4, 4), torch.ones(2, 1, 3, 4, 4))
    with pytest.raises(InputError, match="can't be paired"):
        frame_difference_error(VIDEOS, VIDEOS[:, :, :4])


def boxes(*rows: tuple[float, float, float, float, int], scores: tuple[float, ...] | None = None) -> Boxes:
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 5)
    return Boxes(table[:, :4], table[:, 4].long(), None if scores is None else torch.tensor(scores))


CAT, DOG = 0, 1
TRUTH = [boxes((0, 0, 10, 10, CAT), (20, 20, 30, 30, CAT)), boxes((0, 0, 10, 10, CAT), (5, 5, 9, 9, DOG))]


def test_average_precision_by_hand():
    """Cats by score: hit, miss (no cat there), hit, miss (found twice). Recall 1/3 at precision 1, 2/3 at 2/3. The dog: missed by its IoU."""
    found = [
        boxes((0, 0, 10, 10, CAT), (50, 50, 60, 60, CAT), (20, 20, 30, 30, CAT), scores=(0.9, 0.8, 0.7)),
        boxes((5, 5, 9, 7, DOG), scores=(0.99,)),
    ]
    twice = [
        boxes((0, 0, 10, 10, CAT), (50, 50, 60, 60, CAT), (20, 20, 30, 30, CAT), (0, 0, 10, 10, CAT), scores=(0.9, 0.8, 0.7, 0.6)),
        found[1],
    ]
    cats = (1 + 2 / 3) / 3
    for given in (found, twice):
        assert mean_average_precision(given, TRUTH, 0.51) == pytest.approx(cats / 2)
    assert mean_average_precision(found, TRUTH, 0.5) == pytest.approx((cats + 1) / 2)  # the dog's box is half of the true one


def test_precision_is_made_non_increasing():
    """Miss, hit, hit of two: precision 1/2 and 2/3 where recall steps, and the envelope lifts the first to 2/3."""
    found = [boxes((50, 50, 51, 51, CAT), (0, 0, 10, 10, CAT), (20, 20, 30, 30, CAT), scores=(0.9, 0.8, 0.7))]
    assert mean_average_precision(found, TRUTH[:1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "fault",
    [
        lambda b: Boxes(b.boxes, 1 - b.labels, b.scores),
        lambda b: Boxes(b.boxes + 6, b.labels, b.scores),
        lambda b: Boxes(b.boxes[:1], b.labels[:1], b.scores[:1]),
    ],
    ids=["other class", "moved", "one of two"],
)
def test_a_perfect_detector_has_1_and_a_faulty_one_less(fault):
    found = [Boxes(t.boxes, t.labels, torch.ones(len(t.labels))) for t in TRUTH]
    assert mean_average_precision(found, TRUTH) == 1
    assert mean_average_precision([fault(f) for f in found], TRUTH) < 0.9


def test_scores_rank_over_all_images():
    """A surer miss in another image comes first."""
    found = [boxes((0, 0, 10, 10, CAT), scores=(0.5,)), boxes((50, 50, 60, 60, CAT), scores=(0.9,))]
    assert mean_average_precision(found, [TRUTH[0], boxes()]) == pytest.approx(0.5 / 2)
    assert mean_average_precision(found[::-1], [boxes(), TRUTH[0]]) == pytest.approx(0.5 / 2)


def test_detections_that_cannot_be_judged():
    with pytest.raises(InputError, match="1 images were searched, 2 have a truth with 4 boxes"):
        mean_average_precision([boxes(scores=())], TRUTH)
    with pytest.raises(InputError, match="no scores"):
        mean_average_precision(TRUTH, TRUTH)
    with pytest.raises(InputError, match=r"boxes \[2, 4\], labels 2, scores \[1\]"):
        mean_average_precision([Boxes(TRUTH[0].boxes, TRUTH[0].labels, torch.ones(1))] * 2, TRUTH)
    found = [Boxes(t.boxes, t.labels, torch.full((len(t.labels),), torch.nan)) for t in TRUTH]
    with pytest.raises(InputError, match="boxes and scores aren't finite"):
        mean_average_precision(found, TRUTH)
    for share in (-1.0, 0.0, 2.0, math.nan):
        with pytest.raises(InputError, match="overlap"):
            mean_average_precision(TRUTH, TRUTH, share)


def test_areas_beyond_half_precision():
    found = Boxes(torch.tensor([[0.0, 0.0, 300.0, 300.0]]).half(), torch.tensor([0]), torch.tensor([0.9]))
    assert mean_average_precision([found], [Boxes(found.boxes, found.labels)]) == 1


class Bigram(nn.Module):
    """p(next | token) from one fixed table, so that every likelihood is known."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5, generator=rng(3)))

    def forward(self, ids: Tensor) -> Tensor:
        """[b, n] to [b, n, 5]."""
        return self.table[ids]


MODEL = Bigram().eval()


def likelihood(prompt: list[int], choice: list[int]) -> float:
    log_p = MODEL.table.detach().double().log_softmax(1)
    return math.fsum(float(log_p[a, b]) for a, b in pairwise([prompt[-1], *choice]))


def asked(choices: list[list[int]], right: int, prompt: list[int] | None = None) -> Question:
    return Question(torch.tensor(prompt or [0, 1]), [torch.tensor(c) for c in choices], right)


CHOICES = [[0, 2], [3], [4, 4, 1]]


def test_likelihoods_against_the_definition():
    found = log_likelihoods(MODEL, asked(CHOICES, 0))
    assert found.tolist() == pytest.approx([likelihood([0, 1], c) for c in CHOICES], rel=1e-12)
    other_prompt = log_likelihoods(MODEL, asked(CHOICES, 0, [1, 0]))
    assert other_prompt.tolist() == pytest.approx([likelihood([1, 0], c) for c in CHOICES], rel=1e-12)


def test_the_likeliest_choice_is_the_answer():
    scores = [likelihood([0, 1], c) for c in CHOICES]
    for by_token, values in ((False, scores), (True, [s / len(c) for s, c in zip(scores, CHOICES, strict=True)])):
        best = max(range(3), key=values.__getitem__)
        questions = [asked(CHOICES, r) for r in (best, best, (best + 1) % 3)]
        assert multiple_choice(MODEL, questions, by_token).value == pytest.approx(2 / 3)


def test_every_kind_of_model_is_asked_alike():
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])
    program = fxcompress.capture(MODEL, (ids,))
    artifact = fxcompress.compile(program, {"name": "none", "passes": ["tidy.fold_constants"]})
    question = asked(CHOICES, 0)
    for model in (Running(program), artifact):
        assert log_likelihoods(model, question).tolist() == pytest.approx(log_likelihoods(MODEL, question).tolist(), rel=1e-6)


def test_questions_that_cannot_be_asked():
    with pytest.raises(InputError, match="no question"):
        multiple_choice(MODEL, [])
    with pytest.raises(InputError, match=r"choices of \[0, 1\], right is 0"):
        multiple_choice(MODEL, [asked([[], [1]], 0)])
    with pytest.raises(InputError, match="right is 2"):
        multiple_choice(MODEL, [asked([[1], [2]], 2)])
    with pytest.raises(InputError, match="don't fit the tokens"):
        multiple_choice(lambda ids: MODEL(ids)[0], [asked([[1], [2]], 0)])
