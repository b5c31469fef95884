"""Class-conditional diffusion models of diffusers on 16 x 16 pixels: cosine schedule, v-prediction, labels dropped for guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from fxcompress.calibrate import Feed, Guidance, Sampler, trajectory
from fxcompress.evaluate import accuracy, frechet, noise_floor, recall
from tools.testbeds import classify, weights
from tools.testbeds.fashion import CLASSES, Split, doubled, halved, pixels

SHAPE = (1, 16, 16)
NO_CLASS = len(CLASSES)
GUIDANCE = 1.5


def unet() -> nn.Module:
    """Two levels of 32 and 64 channels, attention in the lower one, 0.7 M parameters."""
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=len(CLASSES) + 1,
    )


def unet_outliers() -> nn.Module:
    """The same with GroupNorm gains that start as exp(n), n normal: activations get the few loud channels that large models have."""
    model = unet()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
            norm.weight.normal_().exp_()
    return model


def dit() -> nn.Module:
    """Six blocks of width 128 over 64 patches, 2.2 M parameters."""
    return DiTTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=1,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        num_embeds_ada_norm=len(CLASSES),
    )


def scheduler() -> DDIMScheduler:
    """The process that the models are trained on; every sampler of diffusers can be built from its config."""
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")


PROCESS = scheduler()


def images(data: Split) -> Tensor:
    """[N, 1, 16, 16] in [-1, 1]."""
    return halved(pixels(data.images))


def loss(model: nn.Module, data: Split, batch: int) -> Tensor:
    """Mean squared error of the velocity at random timesteps; a tenth of the labels says "no class"."""
    at = torch.randint(len(data), (batch,))
    x = images(Split(data.images[at], data.labels[at]))
    labels = torch.where(torch.rand(batch) < 0.1, NO_CLASS, data.labels[at])
    t = torch.randint(PROCESS.config.num_train_timesteps, (batch,))
    noise = torch.randn_like(x)
    return nn.functional.mse_loss(model(PROCESS.add_noise(x, noise, t), t, labels).sample, PROCESS.get_velocity(x, noise, t))


def sampler(steps: int = 20, guidance: float = GUIDANCE) -> Sampler:
    """DDIM; guided unless guidance is 1."""
    return Sampler(scheduler(), steps, None if guidance == 1.0 else Guidance(guidance, {"class_labels": torch.tensor([NO_CLASS])}))


def sample(model: Callable[..., Any], labels: Tensor, seed: int, how: Sampler | None = None) -> Tensor:
    """[N, 1, 16, 16], one image a label. The same seed gives the same noise, whatever the model. A captured UNet takes fewer than 64 rows."""
    noise = torch.randn(len(labels), *SHAPE, generator=torch.Generator().manual_seed(seed))
    rows = zip(noise.split(25), labels.split(25), strict=True)
    return torch.cat([(how or sampler()).run(model, x, conditions(y)) for x, y in rows])


def conditions(labels: Tensor) -> dict[str, Tensor]:
    """What the model is told about each image."""
    return {"class_labels": labels}


def drawn(samples: Tensor) -> Tensor:
    """The images that samples stand for: these models draw them as they are."""
    return samples


def states(model: nn.Module, seed: int, n: int = 20, steps: int = 20) -> Feed:
    """What the model sees while it draws n images, two of each class for 20: both halves of the guidance in each item."""
    return trajectory(model, sampler(steps), n, shape=SHAPE, conditions=conditions(torch.arange(n) % len(CLASSES)), seed=seed)


def metrics(model: nn.Module, train: Split, test: Split) -> dict[str, float]:
    """Figures of 1000 samples, 100 a class: `judged`."""
    return judged(lambda labels, guidance: sample(model, labels, seed=1, how=sampler(guidance=guidance)), images(train), images(test), test)


def judged(draw: Callable[[Tensor, float], Tensor], train: Tensor, real: Tensor, test: Split) -> dict[str, float]:
    """Of what is drawn with GUIDANCE and, as "unguided_...", with none. Features and classes are the ResNet's.

    draw: from labels [N] and a guidance scale to [N, 1, 16, 16]. train, real: images of the same form, real those of test.
    """
    judge = weights.read(classify.resnet(), "resnet")
    labels = torch.arange(1000) % len(CLASSES)
    guided, free = (_figures(judge, draw(labels, g), labels, train, real) for g in (GUIDANCE, 1.0))
    known = accuracy(classify.logits(judge), doubled(real), test.labels).value
    return {"guidance": GUIDANCE, "recognised_real": known, **guided, **{f"unguided_{key}": value for key, value in free.items()}}


def _figures(judge: nn.Module, drawn: Tensor, labels: Tensor, train: Tensor, real: Tensor) -> dict[str, float]:
    """frechet_ratio: the distance to 5000 training images over that of 1000 other training images, mean of two draws.

    nearest_ratio: median pixel distance to the nearest training image over that of 1000 test images: far below 1 where they are copied.
    """
    features = [classify.features(judge, doubled(x)) for x in (drawn, train[:6000])]
    distance, floor = frechet(features[0], features[1][:5000]), noise_floor(frechet, features[1], 1000, 5000)
    found = recall(classify.logits(judge), doubled(drawn), labels)
    return {
        "recognised": sum(found.values()) / len(found),
        "recall_worst_class": min(found.values()),
        "frechet": distance,
        "frechet_ratio": distance * len(floor) / sum(floor),
        "nearest_ratio": nearest(drawn, train) / nearest(real[:1000], train),
    }


def nearest(x: Tensor, real: Tensor) -> float:
    """The median over x of the distance to the nearest real image."""
    return float(torch.cat([torch.cdist(rows.flatten(1), real.flatten(1)).min(1).values for rows in x.split(100)]).median())
