"""Metrics: of whole models here; of tensors in `numerics.noise`, of which `sqnr` is passed on.

Models are anything to call: an eager module, `Running(program)`, a compiled artifact.
"""

from fxcompress.evaluate.choices import Question, log_likelihoods, multiple_choice
from fxcompress.evaluate.denoising import Ratios, Rollout, image_snr, rollout, step_sqnr
from fxcompress.evaluate.detection import Boxes, mean_average_precision
from fxcompress.evaluate.distributions import frechet, kid, paired_distance
from fxcompress.evaluate.intervals import Estimate, bootstrap, noise_floor
from fxcompress.evaluate.perplexity import Perplexity, perplexity
from fxcompress.evaluate.recognition import accuracy, mask_iou, mean_iou, recall
from fxcompress.evaluate.running import Running
from fxcompress.evaluate.video import frame_difference_error, video_distance, video_features
from fxcompress.numerics.noise import sqnr

__all__ = [
    "Boxes",
    "Estimate",
    "Perplexity",
    "Question",
    "Ratios",
    "Rollout",
    "Running",
    "accuracy",
    "bootstrap",
    "frame_difference_error",
    "frechet",
    "image_snr",
    "kid",
    "log_likelihoods",
    "mask_iou",
    "mean_average_precision",
    "mean_iou",
    "multiple_choice",
    "noise_floor",
    "paired_distance",
    "perplexity",
    "recall",
    "rollout",
    "sqnr",
    "step_sqnr",
    "video_distance",
    "video_features",
]
