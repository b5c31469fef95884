"""Testbeds through the int8 recipe, in a file of its own so that another worker can run it."""

import itertools
import math

import pytest
import torch

import fxcompress
from fxcompress.calibrate.trajectory import first_tensor
from fxcompress.signature import Inputs
from tools.testbeds import load, weights

OTHERWISE = ("unet_outliers", "sam")  # the graph is that of "unet"; an example compiles the segmenter


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in weights.published() if n not in OTHERWISE])
def test_every_testbed_compiles_to_integers(name):
    """The int8 recipe on ONNX Runtime: nearly all multiplications in integers, and the outputs of inputs that calibration never saw stay.
    Of the long feeds, which draw with the model, a quarter of the items is enough for that."""
    bed = load(name)
    items = list(bed.calibration)
    made = fxcompress.compile(bed.model, "int8", items[0], calibration=items[:: 4 if len(items) > 16 else 1], check="end", threads=1)
    assert made.report.backend.integer_share > 0.95
    signal = noise = 0.0
    with torch.no_grad():
        for item in map(Inputs.of, itertools.islice(bed.evaluation, 6)):
            a, b = (first_tensor(m(*item.args, **item.kwargs)).double() for m in (bed.model, made))
            signal, noise = signal + float(a.square().sum()), noise + float((a - b).square().sum())
    assert 10 * math.log10(signal / noise) > 15
