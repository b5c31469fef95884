"""Small models trained on real data: `load("resnet")` gives one with its weights, its data and the card of its figures.

Architectures are those of transformers and diffusers, unchanged. `tools.testbeds.train` makes the weights from nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.calibrate import Feed, images
from tools.testbeds import classify, denoise, detect, fashion, latent, segment, video, weights
from tools.testbeds.fashion import Split

DIGITS = Path(__file__).parent / "data/digits"
CALIBRATION, EVALUATION = 0, 1  # seeds of the noise that denoisers start from


@dataclass(frozen=True)
class Plan:
    """AdamW, beta2 0.99, gradients clipped at 1, a cosine to zero after 100 warm-up steps, the weights averaged over 1 / (1 - ema) steps.

    muon: the learning rate of Muon, momentum 0.95, which then takes the weights of linear layers from AdamW.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.05
    ema: float = 0.995
    seed: int = 0
    channels_last: bool = False  # training is faster so where depthwise convolutions are many
    muon: float = 0.0


@dataclass(frozen=True)
class Source:
    """Where images come from. whole: the folder that training reads. subset: the committed one that everything else reads."""

    words: str
    licence: str
    whole: Path
    subset: Path


FASHION = Source(
    "Fashion-MNIST, its 60 000 training images; the metrics are over its 10 000 test images or as many samples as they say",
    "MIT, Zalando SE",
    fashion.WHOLE,
    fashion.SUBSET,
)

HANDWRITTEN = Source(
    "the handwritten digits of scikit-learn, 1 437 of 1 797; the metrics are over the other 360 or as many samples as they say",
    "CC BY 4.0, E. Alpaydin and C. Kaynak (UCI), and BSD 3-Clause, scikit-learn",
    DIGITS,
    DIGITS,
)


@dataclass(frozen=True)
class Testbed:
    """What makes one model. finish: what is settled after training. metrics: of model, training split and test split, for the card.

    feed: inputs for the model from a split and a seed; those for calibration and for evaluation share neither images nor noise. note: what the
    card has to say beside.
    """

    build: Callable[[], nn.Module]
    plan: Plan
    loss: Callable[[nn.Module, Split, int], Tensor]
    metrics: Callable[[nn.Module, Split, Split], dict[str, float]]
    feed: Callable[[nn.Module, Split, int], Feed]
    finish: Callable[[nn.Module, Split], None] = lambda model, data: None
    note: str = ""
    source: Source = FASHION


_classifier = partial(
    Testbed,
    loss=classify.loss,
    finish=classify.settle,
    metrics=classify.metrics,
    feed=lambda model, data, seed: images(fashion.pixels(data.images), batch=32, limit=len(data)),
)
SETTLED = "the guidance scale was settled before any figure was taken"
_denoiser = partial(
    Testbed,
    loss=denoise.loss,
    metrics=denoise.metrics,
    feed=lambda model, data, seed: denoise.states(model, seed),
)
_digits = partial(Testbed, source=HANDWRITTEN)

TESTBEDS = {
    "resnet": _classifier(classify.resnet, Plan(steps=3500, batch=128, lr=2e-3)),
    "vit": _classifier(classify.vit, Plan(steps=7000, batch=64, lr=1.5e-3), loss=partial(classify.loss, reach=0)),
    "mobilenet": _classifier(classify.mobilenet, Plan(steps=7000, batch=128, lr=2e-3, channels_last=True)),
    "convnext": _classifier(classify.convnext, Plan(steps=7000, batch=128, lr=2e-3), loss=partial(classify.loss, reach=1)),
    "unet": _denoiser(denoise.unet, Plan(steps=4500, batch=32, lr=1.5e-3, weight_decay=0.01, ema=0.998)),
    "unet_outliers": _denoiser(denoise.unet_outliers, Plan(steps=4500, batch=32, lr=1.5e-3, weight_decay=0.01, ema=0.998), note=SETTLED),
    "sam": Testbed(
        segment.sam,
        Plan(steps=6200, batch=32, lr=2e-3, weight_decay=0.02, ema=0.998, muon=6e-3),
        loss=segment.loss,
        metrics=segment.metrics,
        feed=lambda model, data, seed: segment.feed(data, seed),
        note="scenes: tools/testbeds/scenes.py; one mask an object (multimask_output=False): the three multimask tokens aren't trained",
    ),
    "vae": Testbed(
        latent.autoencoder,
        Plan(steps=700, batch=32, lr=2e-3, weight_decay=0.01),
        loss=latent.coding_loss,
        finish=latent.standardise,
        metrics=latent.coding_metrics,
        feed=lambda model, data, seed: latent.coding_feed(data),
    ),
    "latent": _denoiser(
        latent.unet,
        Plan(steps=2300, batch=32, lr=1.5e-3, weight_decay=0.01, ema=0.998),
        loss=latent.loss,
        metrics=latent.metrics,
        feed=lambda model, data, seed: latent.states(model, seed),
        note=SETTLED + "; latents of the vae testbed; what is drawn is decoded and halved before it is judged",
    ),
    "yolos": _digits(
        detect.yolos,
        Plan(steps=9000, batch=64, lr=2e-3, weight_decay=0.02, ema=0.998, muon=6e-3),
        loss=detect.loss,
        metrics=detect.metrics,
        feed=lambda model, data, seed: detect.feed(data, seed),
        note="canvases: tools/testbeds/detect.py",
    ),
    "video_judge": _digits(
        video.judge,
        Plan(steps=1000, batch=64, lr=2e-3),
        loss=video.judging_loss,
        finish=partial(classify.settle, loss=video.judging_loss),
        metrics=video.judging_metrics,
        feed=lambda model, data, seed: video.clip_feed(data, seed),
        note="clips: tools/testbeds/video.py",
    ),
    "video": _digits(
        video.latte,
        Plan(steps=10000, batch=16, lr=2e-3, weight_decay=0.01, ema=0.998, muon=6e-3),
        loss=video.loss,
        metrics=video.metrics,
        feed=lambda model, data, seed: video.states(model, seed),
        note=SETTLED + "; judged by the video_judge testbed",
    ),
    "dit": _denoiser(denoise.dit, Plan(steps=6000, batch=32, lr=1e-3, weight_decay=0.01, ema=0.998), note=SETTLED),
}


@dataclass(frozen=True)
class Loaded:
    """A trained model in eval mode and float32. calibration, evaluation: feeds of its inputs that share nothing. test: images it never saw.

    A classifier's evaluation feed is `test` in its order.
    """

    model: nn.Module
    calibration: Feed
    evaluation: Feed
    test: Split
    card: dict[str, Any]


def load(name: str) -> Loaded:
    """A testbed by its name in TESTBEDS, from committed files alone. The random state outside is left as it was. KeyError for another."""
    if name not in TESTBEDS:
        raise KeyError(f"no testbed {name!r}, only {', '.join(TESTBEDS)}")
    testbed = TESTBEDS[name]
    with torch.random.fork_rng(devices=[]):
        model = weights.read(testbed.build(), name)
    train, test = (fashion.read(split, testbed.source.subset) for split in ("train", "t10k"))
    few = Split(train.images[:512], train.labels[:512])
    return Loaded(model, testbed.feed(model, few, CALIBRATION), testbed.feed(model, test, EVALUATION), test, weights.card(name))
