"""Scenes of promptable segmentation, their prompts, and the two answers that need no model."""

import pytest
import torch

from fxcompress.evaluate import mask_iou
from tools.testbeds import fashion, scenes, segment, weights
from tools.testbeds.scenes import SIZE, boxes_of, filled, held_out, nearest_object, points_in

TEST = fashion.read("t10k")


def mask(*rectangles: tuple[int, int, int, int]) -> torch.Tensor:
    """Rows and columns from .. to, the last not among them."""
    found = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for top, bottom, left, right in rectangles:
        found[top:bottom, left:right] = True
    return found


def test_boxes_are_the_outer_pixels_and_filled_are_those_between():
    masks = torch.stack([mask((3, 9, 20, 50)), mask((0, 1, 63, 64), (40, 64, 0, 1))])
    boxes = boxes_of(masks)
    assert boxes.tolist() == [[20, 3, 49, 8], [0, 0, 63, 63]]
    assert torch.equal(filled(boxes)[0], masks[0])
    assert filled(boxes)[1].all()


def test_points_lie_inside_and_off_the_edge_where_there_is_an_inside():
    masks = torch.stack([mask((10, 13, 20, 23)), mask((5, 6, 7, 9))]).expand(40, 2, SIZE, SIZE)
    torch.manual_seed(0)
    points = points_in(masks).long()
    assert (points[:, 0] == torch.tensor([21, 11])).float().mean() > 0.98  # a pixel of the edge counts for 1e-4
    assert set(map(tuple, points[:, 1].flatten(0, 1).tolist())) == {(7, 5), (8, 5)}


def test_the_nearest_object_is_all_that_hangs_together():
    """A corner connects, a gap of one pixel doesn't; the point itself may lie beside."""
    first, second = mask((4, 10, 4, 10), (10, 14, 10, 20)), mask((15, 20, 4, 10))
    points = torch.tensor([[5.0, 5.0], [2.0, 16.0], [63.0, 0.0]])[:, None].expand(3, 3, 2)
    found = nearest_object((first | second)[None], points[None])[0]
    assert [torch.equal(f, w) for f, w in zip(found, (first, second, first), strict=True)] == [True] * 3


def test_scenes_depend_on_their_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = held_out(TEST, 120, 3), held_out(TEST, 120, 3), held_out(TEST, 120, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.images, again.images) and torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_what_a_scene_says_is_so():
    found = held_out(TEST, 200, 5)
    assert not (found.masks[:, 0] & found.masks[:, 1]).any()
    assert (found.foreground[:, None] >= found.masks).all()
    at = found.points.long()
    rows = torch.arange(200)[:, None, None]
    assert found.masks[rows, torch.arange(2)[:, None], at[..., 1], at[..., 0]].all()
    assert torch.equal(filled(found.boxes) & found.masks, found.masks)
    assert (found.masks.sum((2, 3)) >= scenes.LEAST).float().mean() > 0.98
    inside = found.images[:, 0][found.foreground].mean() - found.images[:, 0][~found.foreground].mean()
    assert inside > 0.5


@pytest.mark.skipif("sam" not in weights.published(), reason="its weights aren't trained yet")
def test_the_segmenter_does_what_its_card_says():
    """100 scenes: within three standard errors of the card's figure, and far from what needs no model."""
    said = weights.card("sam")["metrics"]
    model, asked = weights.read(segment.sam(), "sam"), held_out(TEST, 100, seed=9)
    for kind, without in (("boxes", "iou_fill_the_box"), ("points", "iou_nearest_object")):
        found = mask_iou(segment.masks(model, asked, kind), asked.masks)
        assert abs(found.value - said[f"iou_{kind}"]) < 1.5 * (found.high - found.low)
        assert said[f"iou_{kind}"] >= 0.25 + said[without]
        other = scenes.Scenes(asked.images.flip(0), asked.masks, asked.foreground, asked.points, asked.boxes)
        assert mask_iou(segment.masks(model, other, kind), asked.masks).value < found.value - 0.2
