import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import fxcompress
from fxcompress.calibrate import Sampler, trajectory
from fxcompress.errors import InputError
from fxcompress.evaluate import (
    Boxes,
    Question,
    Running,
    accuracy,
    bootstrap,
    frame_difference_error,
    frechet,
    image_snr,
    kid,
    mask_iou,
    mean_average_precision,
    mean_iou,
    multiple_choice,
    noise_floor,
    paired_distance,
    perplexity,
    recall,
    rollout,
    step_sqnr,
    video_features,
)
from fxcompress.signature import Inputs


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(mean: Tensor, factor: Tensor, n: int, seed: int) -> Tensor:
    """n rows whose sample mean is `mean` and whose sample covariance is factor @ factor.T, both exactly."""
    z = torch.randn(n, len(mean), generator=rng(seed), dtype=torch.float64)
    z = z - z.mean(0)
    white = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    return white @ factor.T + mean


MEANS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.5]], dtype=torch.float64)
SIGMAS = torch.tensor([[1.0, 2.0, 0.1], [3.0, 2.0, 0.4]], dtype=torch.float64)
A, B = (rows(MEANS[i], torch.diag(SIGMAS[i]), n, seed=i) for i, n in ((0, 40), (1, 25)))
INDEPENDENT = float((MEANS[0] - MEANS[1]).square().sum() + (SIGMAS[0] - SIGMAS[1]).square().sum())


def test_frechet_of_independent_features():
    assert frechet(A, B) == pytest.approx(INDEPENDENT, rel=1e-10)
    assert frechet(B, A) == pytest.approx(INDEPENDENT, rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute():
    """In two dimensions tr (PQ)^½ = (tr PQ + 2 det(PQ)^½)^½."""
    left, right = (torch.tensor(m, dtype=torch.float64) for m in ([[1.0, 0.0], [0.9, 0.3]], [[0.5, 0.0], [-1.0, 2.0]]))
    p, q = left @ left.T, right @ right.T
    cross = ((p @ q).trace() + 2 * torch.linalg.det(p @ q).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet(rows(zero, left, 30, 5), rows(zero, right, 30, 6))
    assert found == pytest.approx(float(p.trace() + q.trace() - 2 * cross), rel=1e-10)


def test_frechet_of_equal_sets_of_fewer_rows_than_features_is_zero():
    few = torch.randn(5, 20, generator=rng(7))
    assert abs(frechet(few, few.flip(0))) < 1e-6 * float(few.var(0).sum())


FAULTS = {
    "one mean moved": lambda x: x + torch.tensor([0.0, 0.01, 0.0]),
    "scaled": lambda x: 1.01 * x,
    "axes swapped": lambda x: x[:, [1, 0, 2]],
    "mirrored": lambda x: -x,
    "a row left out": lambda x: x[1:],
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_changed_features_show(fault):
    assert abs(frechet(A, fault(B)) / INDEPENDENT - 1) > 1e-4
    assert abs(kid(A, fault(B)) / kid(A, B) - 1) > 1e-4


def kid_by_hand(x: list[list[float]], y: list[list[float]]) -> float:
    def kernel(u: list[float], v: list[float]) -> float:
        return (math.fsum(p * q for p, q in zip(u, v, strict=True)) / len(u) + 1) ** 3

    def among(z: list[list[float]]) -> float:
        return math.fsum(kernel(u, v) for (i, u), (j, v) in product(enumerate(z), repeat=2) if i != j) / (len(z) * (len(z) - 1))

    return among(x) + among(y) - 2 * math.fsum(kernel(u, v) for u, v in product(x, y)) / (len(x) * len(y))


def test_kid_against_the_definition():
    assert kid(A, B) == pytest.approx(kid_by_hand(A.tolist(), B.tolist()), rel=1e-12)


def test_kid_of_one_distribution_has_no_bias():
    found = torch.tensor([kid(*torch.randn(2, 20, 3, generator=rng(seed))) for seed in range(200)])
    assert found.mean().abs() < 3 * found.std() / math.sqrt(len(found))


def test_features_that_cannot_be_compared():
    with pytest.raises(InputError) as error:
        frechet(A, B[:, :2])
    assert str(error.value) == (
        "the features can't be compared\n  why   they are [40, 3] and [25, 2], not real [N, D] and [M, D] of at least 2 rows\n"
        "  do    flatten each item's features to one row"
    )
    with pytest.raises(InputError, match="aren't finite"):
        kid(A, torch.where(B[3, 1] == B, torch.inf, B))
    with pytest.raises(InputError, match="not real"):
        frechet(A.to(torch.complex64), B)
    with pytest.raises(InputError, match=r"\[40, 0\] and \[25, 0\]"):
        kid(A[:, :0], B[:, :0])


@pytest.mark.parametrize("other", [lambda t: t.numpy(), lambda t: t.tolist()], ids=["array", "list"])
def test_metrics_take_tensors(other):
    """What else comes is named with its type, not met by an AttributeError half-way."""
    masks, clip = torch.ones(2, 3, 3, dtype=torch.bool), torch.randn(2, 1, 3, 4, 4, generator=rng(2))
    boxes = Boxes(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0]), torch.tensor([0.5]))
    calls = [
        lambda: frechet(other(A), B),
        lambda: kid(A, other(B)),
        lambda: paired_distance(A, other(A)),
        lambda: image_snr(other(A), A),
        lambda: video_features(lambda x: x.flatten(1), other(clip)),
        lambda: frame_difference_error(clip, other(clip)),
        lambda: perplexity(lambda ids: torch.zeros(*ids.shape, 9), other(torch.arange(8)), window=4),
        lambda: accuracy(lambda x: x, A, other(torch.zeros(40, dtype=torch.int64))),
        lambda: mask_iou(masks, other(masks)),
        lambda: mean_iou(other(masks.long()), masks.long(), 2),
        lambda: mean_average_precision([boxes], [replace(boxes, boxes=other(boxes.boxes))]),
        lambda: multiple_choice(lambda ids: torch.zeros(*ids.shape, 9), [Question(torch.arange(2), [other(torch.arange(2))], 0)]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"is no tensor\n  why   it is a {type(other(A)).__name__}\n"):
            call()


def test_figures_of_what_is_not_finite_are_refused():
    """A NaN among decibels would hide in a mean, or look like the least."""
    wrong = torch.where(A[3, 1] == A, torch.nan, A)
    for call in (lambda: image_snr(A, wrong), lambda: paired_distance(A, wrong)):
        with pytest.raises(InputError, match="1 of 240 values are inf or nan"):
            call()
    with pytest.raises(InputError, match="the outputs aren't finite"):
        step_sqnr(lambda x, t: x, lambda x, t: x / 0, [Inputs(torch.ones(2), t=torch.tensor(1), roles={"t": "timestep"})])
    clip = torch.randn(2, 1, 3, 4, 4, generator=rng(2))
    with pytest.raises(InputError, match="the videos aren't finite"):
        frame_difference_error(clip, clip / 0)


def test_nothing_to_draw():
    with pytest.raises(InputError, match="draws of 0 and 0"):
        noise_floor(frechet, A, 0)
    with pytest.raises(InputError, match="nothing to sample"):
        rollout(lambda x, t: x, lambda x, t: x, Sampler(DDIMScheduler(), 2), 0, shape=(1, 2, 2))


def test_the_standard_error_of_a_mean_is_found():
    x = torch.randn(100, generator=rng(1), dtype=torch.float64)
    found = bootstrap(lambda v: float(v.mean()), x, resamples=4000)
    assert found.value == pytest.approx(float(x.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * float(x.std(correction=0)) / 10, rel=0.05)
    assert bootstrap(lambda v: float(v.mean()), x, resamples=4000) == found


def test_the_interval_holds_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        found = bootstrap(lambda a, b: float(a.mean() - b.mean()), torch.randn(40, generator=rng(seed)), torch.ones(3), resamples=100)
        hits += found.low < -1 < found.high
    assert 0.90 < hits / 200 < 0.99


def test_nothing_to_resample():
    with pytest.raises(InputError, match="nothing to resample"):
        bootstrap(lambda v: 0.0, torch.zeros(0))


def test_the_noise_floor_draws_disjoint_rows():
    drawn = []

    def keep(a: Tensor, b: Tensor) -> float:
        drawn.append((set(a.tolist()), set(b.tolist())))
        return float(a[0])

    first, second = noise_floor(keep, torch.arange(10), 3, 6)
    assert [(len(a), len(b), len(a & b)) for a, b in drawn] == [(3, 6, 0)] * 2
    assert first != second
    assert noise_floor(keep, torch.arange(10), 3, 6) == (first, second)
    with pytest.raises(InputError, match="need 11, there are 10"):
        noise_floor(keep, torch.arange(10), 5, 6)


SCORES = torch.tensor([[0.0, 1.0, 0.5], [2.0, 2.0, 1.0], [0.0, 0.0, 9.0], [0.1, 0.0, 0.0]])
LABELS = torch.tensor([1, 0, 1, 2])


@pytest.mark.parametrize("batch", [1, 3, 250])
def test_accuracy_and_recall(batch):
    assert accuracy(lambda i: SCORES[i], torch.arange(4), LABELS, batch).value == 0.5
    assert recall(lambda i: SCORES[i], torch.arange(4), LABELS, batch) == {0: 1.0, 1: 0.5, 2: 0.0}


def test_the_interval_of_an_accuracy_is_that_of_a_share():
    right = torch.arange(400) % 5 > 0
    found = accuracy(lambda hit: torch.stack([~hit, hit], 1).float(), right, torch.ones(400, dtype=torch.int64))
    assert found.value == pytest.approx(0.8)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 400), rel=0.15)


def test_logits_that_do_not_fit():
    with pytest.raises(InputError, match="isn't one label a row"):
        accuracy(lambda i: SCORES[i], torch.arange(4), LABELS[:3])
    with pytest.raises(InputError, match=r"4 rows gave logits \[4\]"):
        accuracy(lambda i: SCORES[i, 0], torch.arange(4), LABELS)
    with pytest.raises(InputError, match="1 of 12 values are inf or nan"):
        accuracy(lambda i: SCORES[i].masked_fill(SCORES[i] == 9, torch.nan), torch.arange(4), LABELS)


def iou_by_hand(found: list[int], wanted: list[int], classes: int, ignore: int | None) -> float:
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if w != ignore]
    shares = []
    for c in range(classes):
        both, either = (sum(rule([f == c, w == c]) for f, w in pairs) for rule in (all, any))
        shares += [both / either] if either else []
    return math.fsum(shares) / len(shares)


@pytest.mark.parametrize("ignore", [None, 2, 255])
def test_mean_iou_against_the_definition(ignore):
    found, wanted = (torch.randint(4, (2, 5, 6), generator=rng(seed)) for seed in (1, 2))
    wanted = torch.where(wanted == 3, 255, wanted) if ignore == 255 else wanted
    by_hand = iou_by_hand(found.flatten().tolist(), wanted.flatten().tolist(), 6, ignore)
    assert mean_iou(found, wanted, 6, ignore) == pytest.approx(by_hand, rel=1e-12)
    assert mean_iou(found.roll(1, 2), wanted, 6, ignore) != pytest.approx(by_hand, rel=1e-3)


def test_maps_that_cannot_be_compared():
    with pytest.raises(InputError, match=r"classes 0\.\.255, known are 0\.\.2"):
        mean_iou(torch.zeros(2, dtype=torch.int64), torch.tensor([1, 255]), 3)
    with pytest.raises(InputError, match="0 pixels count"):
        mean_iou(torch.tensor([1]), torch.tensor([1]), 3, ignore=1)


def state(t: float, seed: int) -> Inputs:
    return Inputs(x=torch.randn(2, 3, generator=rng(seed)), timestep=torch.full((2,), t), roles={"timestep": "timestep"})


def linear(x: Tensor, timestep: Tensor) -> Tensor:
    return 2 * x + timestep[:, None]


def test_noise_by_timestep_has_its_closed_form():
    """An output 1 + t/100 times as great has an SQNR of -20 log10(t/100) whatever the state."""
    feed = [state(t, seed) for seed in range(3) for t in (1.0, 10.0)]
    found = step_sqnr(linear, lambda x, timestep: (linear(x, timestep) * (1 + timestep[:, None] / 100), None), feed)
    assert found.each == {1.0: pytest.approx(40, abs=1e-3), 10.0: pytest.approx(20, abs=1e-3)}
    assert (found.worst, found.mean) == (pytest.approx(20, abs=1e-3), pytest.approx(30, abs=1e-3))


def test_states_of_one_timestep_are_pooled():
    """Σ over all states, not a mean of ratios: the error stands in one state only."""
    feed = [state(5.0, 0), state(5.0, 1)]
    signal = sum(float(linear(**item.kwargs).double().square().sum()) for item in feed)
    worse = lambda x, timestep: linear(x, timestep) + (x == feed[1].kwargs["x"])  # noqa: E731
    assert step_sqnr(linear, worse, feed).each[5.0] == pytest.approx(10 * math.log10(signal / 6), rel=1e-6)


def test_a_state_without_its_timestep_is_refused():
    bare, mixed = state(1.0, 0), state(1.0, 0)
    bare.roles.clear()
    mixed.kwargs["timestep"][1] = 2
    for item, count in ((bare, 0), (mixed, 2)):
        with pytest.raises(InputError, match=f"different values: {count}"):
            step_sqnr(linear, linear, [item])
    with pytest.raises(InputError, match="no state to compare on"):
        step_sqnr(linear, linear, [])


def test_images_are_compared_one_by_one():
    image = torch.randn(2, 1, 4, 4, generator=rng(3))
    found = image_snr(image, image * torch.tensor([1.1, 0.99]).view(2, 1, 1, 1))
    assert found.each == {0.0: pytest.approx(20, abs=1e-3), 1.0: pytest.approx(40, abs=1e-3)}
    with pytest.raises(InputError, match="can't be compared"):
        image_snr(image, image[:1])


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_paired_samples_a_shift_apart(shift):
    reference = torch.randn(40, 3, 4, generator=rng(8), dtype=torch.float64)
    apart = (reference - reference.roll(1, 0)).flatten(1).norm(dim=1).mean()
    assert paired_distance(reference, reference + shift).value == pytest.approx(shift * math.sqrt(12) / float(apart))


def test_samples_of_other_noise_are_a_whole_distance_apart():
    reference = torch.randn(400, 12, generator=rng(9))
    found = paired_distance(reference, reference.roll(1, 0))
    assert found.value == pytest.approx(1)
    assert found.low < paired_distance(reference, torch.randn(400, 12, generator=rng(10))).value < found.high


def test_samples_that_cannot_be_paired():
    with pytest.raises(InputError, match=r"\[2, 3\] and \[3, 3\]"):
        paired_distance(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InputError, match="don't differ"):
        paired_distance(torch.zeros(2, 3), torch.zeros(2, 3))


def test_the_iou_of_masks_by_hand():
    found, wanted = torch.zeros(2, 2, 4, 4, dtype=torch.bool), torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    found[0, 0, :2], wanted[0, 0, 1:3] = True, True  # 4 of 12
    found[0, 1, 0], wanted[0, 1, 0] = True, True  # all
    found[1, 0, 0] = True  # nothing of what isn't there; the last is rightly empty
    estimate = mask_iou(found, wanted)
    assert estimate.value == pytest.approx((1 / 3 + 1 + 0 + 1) / 4)
    assert estimate.low < estimate.value < estimate.high
    assert mask_iou(found[:1], wanted[:1]).value == pytest.approx(2 / 3)


def test_masks_that_cannot_be_compared():
    with pytest.raises(InputError, match=r"torch\.float32"):
        mask_iou(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))


class Denoiser(nn.Module):
    """A network whose noise is known: x, a shift by the condition and the time."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.9, 0.8, 0.7]) + off)

    def forward(self, sample: Tensor, timestep: Tensor, shift: Tensor) -> Tensor:
        """[b, 3]."""
        return sample * self.gain + shift[:, None] + timestep[:, None] / 1000


SAMPLER = Sampler(DDIMScheduler(), 4)
ROLL = {"shape": (3,), "conditions": {"shift": torch.tensor([0.0, 0.5, 1.0])}, "batch": 2, "seed": 5}


def test_both_models_are_compared_on_the_states_of_both():
    reference, changed = Denoiser().eval(), Denoiser(off=0.05).eval()
    found = rollout(reference, changed, SAMPLER, 3, **ROLL)
    given, own = (step_sqnr(reference, changed, trajectory(model, SAMPLER, 3, **ROLL)) for model in (reference, changed))
    assert found.given == given
    assert found.own == own
    assert given != own
    assert found.reference.shape == (3, 3)
    assert not torch.allclose(found.reference, found.changed)


def test_every_kind_of_model_is_rolled_out_alike():
    """The gain is off by the same in each, so noise and samples are; a program and an artifact are called as the model is."""
    reference, changed = Denoiser().eval(), Denoiser(off=0.05).eval()
    item = next(iter(trajectory(changed, SAMPLER, 3, **ROLL)))
    program = fxcompress.capture(changed, item)
    artifact = fxcompress.compile(program, {"name": "none", "passes": ["tidy.fold_constants"]}, backend="onnxruntime")
    wanted = rollout(reference, changed, SAMPLER, 3, **ROLL)
    for model in (Running(program), artifact):
        found = rollout(reference, model, SAMPLER, 3, **ROLL)
        torch.testing.assert_close(found.changed, wanted.changed)
        assert found.own.each == pytest.approx(wanted.own.each, rel=1e-4)
