"""Metrics: of whole models here; of tensors in `numerics.noise`, of which `sqnr` is passed on."""

from fxcompress.evaluate.denoising import Ratios, image_snr, step_sqnr
from fxcompress.evaluate.distributions import frechet, kid
from fxcompress.evaluate.intervals import Estimate, bootstrap, noise_floor
from fxcompress.evaluate.perplexity import Perplexity, perplexity
from fxcompress.evaluate.recognition import accuracy, mean_iou, recall
from fxcompress.numerics.noise import sqnr

__all__ = [
    "Estimate",
    "Perplexity",
    "Ratios",
    "accuracy",
    "bootstrap",
    "frechet",
    "image_snr",
    "kid",
    "mean_iou",
    "noise_floor",
    "perplexity",
    "recall",
    "sqnr",
    "step_sqnr",
]
