"""Clips of moving digits: where they go, what the network is told, and how the judge's word is counted."""

from types import SimpleNamespace

import pytest
import torch

from fxcompress.capture import capture
from tools.testbeds import DIGITS, fashion, video
from tools.testbeds.video import MOVES

TRAIN = fashion.read("train", DIGITS)
AHEAD = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


def test_digits_are_what_scikit_learn_says_of_them():
    test = fashion.read("t10k", DIGITS)
    assert (len(TRAIN), len(test), TRAIN.images.shape[1:]) == (1437, 360, (8, 8))
    both = torch.cat([TRAIN.labels, test.labels]).bincount()
    assert both.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(TRAIN.images.max()) == 16


@pytest.mark.parametrize("move", MOVES)
def test_a_digit_moves_a_pixel_a_frame_and_stays_whole(move):
    clips = video.held_out(TRAIN, 200, seed=0)
    ink = clips.videos[clips.kinds % 4 == MOVES.index(move), 0] + 1
    assert len(ink) > 30
    torch.testing.assert_close(ink.sum((2, 3)), ink[:, :1].sum((2, 3)).expand(-1, 8))
    at = torch.arange(16.0)
    centre = torch.stack([(ink * at).sum((2, 3)), (ink * at[:, None]).sum((2, 3))], 2) / ink.sum((2, 3))[..., None]
    torch.testing.assert_close(centre.diff(dim=1), torch.tensor(AHEAD[move]).expand(len(ink), 7, 2), rtol=0, atol=1e-4)


def test_a_clip_shows_the_digit_that_its_kind_says():
    clips = video.held_out(TRAIN, 50, seed=3)
    for clip, kind in zip(clips.videos[:, 0], clips.kinds.tolist(), strict=True):
        windows = clip[0].unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 8, 8)
        found = (windows[:, None] == TRAIN.images / 8 - 1).all((2, 3)).any(0)
        assert kind // 4 in TRAIN.labels[found].tolist()


def test_a_network_is_told_digit_and_move_and_in_the_first_half_neither():
    told = video.tokens(torch.tensor([0, 39, video.KINDS]))
    assert torch.equal(told, video.TOKENS[torch.tensor([[0, 10], [9, 13], [14, 15]])])
    torch.manual_seed(0)
    model = video.latte().eval()
    items = list(video.states(model, seed=0, n=4, steps=3))
    assert len(items) == 3
    halves = items[0].kwargs["encoder_hidden_states"].chunk(2)
    assert torch.equal(halves[0], video.tokens(torch.full((4,), video.KINDS)))
    assert torch.equal(halves[1], video.tokens(torch.arange(4) * 7))
    assert items[0].kwargs["hidden_states"].shape == (8, *video.SHAPE)
    assert {i.name for i in capture(model, items[0]).inputs} == {"hidden_states", "timestep", "encoder_hidden_states"}


def test_hits_by_hand():
    """Of digit 3 moving right (13): seen as itself, as 3 moving up, as 5 moving right, as neither."""
    seen = torch.nn.functional.one_hot(torch.tensor([13, 14, 21, 0]), 40).float()
    videos, kinds = torch.zeros(4, *video.SHAPE), torch.full((4,), 13)
    found = video.hits(lambda pixel_values: SimpleNamespace(logits=seen), videos, kinds)
    assert {name: right.tolist() for name, right in found.items()} == {
        "digit": [True, True, False, False],
        "direction": [True, False, True, False],
        "both": [True, False, False, False],
    }
