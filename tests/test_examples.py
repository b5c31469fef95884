"""The scripts of examples/ run and do what they say."""

import pytest
import torch
from PIL import Image

from examples import diffusion_int8, language_int4, own_pass, segmentation_int8


@pytest.mark.slow
@pytest.mark.skipif(not language_int4.MODEL.exists(), reason="needs the model: make model")
def test_a_language_model_in_four_bits_answers(tmp_path):
    assert "Paris" in language_int4.main(tmp_path / "model")


def test_a_diffusion_model_in_eight_bits_draws_nearly_the_same():
    found = diffusion_int8.main(samples=10)
    assert found.given.mean > 20
    assert found.own.worst > 10
    assert not torch.equal(found.reference, found.changed)


def test_segmentation_in_eight_bits_keeps_its_iou(tmp_path):
    before, after = segmentation_int8.main(images=50, out=tmp_path / "masks.png")
    assert Image.open(tmp_path / "masks.png").size == (8 * 64 * 2, 4 * 64 * 2)
    assert before > 0.7
    assert 0 < abs(before - after) < 0.05


def test_an_own_pass_fires_and_declines():
    report = own_pass.main()
    assert (report.fired, report.worst.verdict) == (1, "held")
    assert [d.reason for d in report.declined] == ["mul is read by others too"]
