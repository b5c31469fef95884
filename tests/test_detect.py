"""Canvases of digits, the matching of tokens with them, and the loss of boxes."""

from types import SimpleNamespace

import pytest
import torch

from fxcompress.evaluate import mean_average_precision
from tools.testbeds import DIGITS, detect, fashion
from tools.testbeds.detect import FOUND, SIZE

CANVASES = detect.held_out(fashion.read("train", DIGITS), 200, seed=0)
REAL = CANVASES.labels < 10


def test_boxes_hold_the_ink_and_nothing_else_does():
    """Off every box there is noise of 0.05, at twice the scale; inside, ink."""
    at = torch.arange(SIZE)
    for image, boxes in zip(CANVASES.images[:, 0], [t.boxes for t in CANVASES.truth()], strict=True):
        outside = torch.ones(SIZE, SIZE, dtype=torch.bool)
        for x1, y1, x2, y2 in boxes.tolist():
            inside = (at >= x1) & (at < x2) & (at[:, None] >= y1) & (at[:, None] < y2)
            assert (image[inside] + 1).mean() > 0.2
            outside &= ~inside
        assert image[outside].max() < -0.2  # 0.2 of the brightest ink, doubled, and eight deviations of the noise


def test_digits_lie_apart_and_absent_ones_have_no_label():
    assert REAL[:, 0].all()
    assert 0.1 < REAL[:, 2].float().mean() < 0.9
    for boxes in [t.boxes for t in CANVASES.truth()]:
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert ((torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])) <= 0).any()


@pytest.mark.parametrize(
    ("a", "b", "giou"),
    [
        ((0.0, 0.0, 0.2, 0.2), (0.0, 0.0, 0.2, 0.2), 1.0),
        ((0.0, 0.0, 0.2, 0.2), (0.1, 0.0, 0.3, 0.2), 1 / 3),  # hull and union alike
        ((0.0, 0.0, 0.1, 0.1), (0.1, 0.1, 0.2, 0.2), -0.5),  # no overlap, half of the hull empty
    ],
)
def test_how_far_boxes_are_apart_by_hand(a, b, giou):
    first, second = torch.tensor(a), torch.tensor(b)
    wanted = 5 * float((first - second).abs().sum()) + 2 * (1 - giou)
    assert float(detect._apartness(first, second)) == pytest.approx(wanted, abs=1e-5)


def answer(canvases: detect.Canvases, order: list[int], shift: float = 0.0) -> SimpleNamespace:
    """What a detector says that knows the truth, its object k in token order[k], boxes moved by shift pixels."""
    n = len(canvases.labels)
    logits, boxes = torch.zeros(n, FOUND, 11), torch.full((n, FOUND, 4), 0.5)
    logits[..., 10] = 9.0
    corners = (canvases.boxes + shift) / SIZE
    centred = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], 2)
    logits[:, order] = 9.0 * torch.nn.functional.one_hot(canvases.labels, 11).float()
    boxes[:, order] = centred
    return SimpleNamespace(logits=logits, pred_boxes=boxes)


@pytest.mark.parametrize("order", [[0, 1, 2], [7, 2, 5]])
def test_tokens_are_matched_with_what_they_show(order):
    out = answer(CANVASES, order)
    chosen = detect._matched(out.logits, detect._corners(out.pred_boxes), CANVASES.labels, CANVASES.boxes / SIZE)
    assert torch.equal(chosen[REAL], torch.tensor(order).expand(200, 3)[REAL])


def test_who_knows_the_truth_finds_everything_and_who_is_off_does_not():
    def figure(shift: float) -> float:
        parts = iter([answer(part, [4, 0, 6], shift) for part in split])
        return mean_average_precision(detect.detections(lambda pixel_values: next(parts), CANVASES.images), CANVASES.truth())

    rows = [slice(start, start + 50) for start in range(0, 200, 50)]
    split = [detect.Canvases(CANVASES.images[r], CANVASES.boxes[r], CANVASES.labels[r]) for r in rows]
    assert figure(0.0) == 1.0
    assert 0.3 < figure(1.5) < 0.99
    assert figure(6.0) < 0.05


@pytest.mark.parametrize("fault", ["box", "digit", "nothing"])
def test_the_loss_sees_every_fault(fault, monkeypatch):
    right, wrong = answer(CANVASES, [1, 2, 3]), answer(CANVASES, [1, 2, 3], shift=2.0 if fault == "box" else 0.0)
    if fault == "digit":
        wrong.logits = wrong.logits.roll(1, 2)
    if fault == "nothing":
        wrong.logits[:, 7] = 9.0 * torch.eye(11)[3]
    monkeypatch.setattr(detect, "compose", lambda data, batch: CANVASES)
    values = [float(detect.loss(lambda pixel_values, out=out: out, None, 200)) for out in (right, wrong)]
    assert values[0] < 0.01
    assert values[1] > 0.1
