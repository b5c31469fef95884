"""Latent diffusion of diffusers: an autoencoder of 32 x 32 pixels, and a UNet on its 8 x 8 latents with cross-attention on class tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from fxcompress.calibrate import Feed, Guidance, Sampler, images, trajectory
from fxcompress.evaluate import accuracy
from tools.testbeds import classify, denoise, weights
from tools.testbeds.denoise import GUIDANCE, NO_CLASS, PROCESS
from tools.testbeds.fashion import CLASSES, Split, halved, pixels

SHAPE = (4, 8, 8)
TOKENS = torch.randn(len(CLASSES) + 1, 4, 32, generator=torch.Generator().manual_seed(0))  # four fixed ones a class, the last say "none"


def autoencoder() -> nn.Module:
    """Three levels of 16, 32 and 32 channels, a quarter of the resolution, four latent channels, 0.24 M parameters."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=SHAPE[0],
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
    )


def unet() -> nn.Module:
    """Two levels of 32 and 64 channels, transformer blocks with cross-attention at each, 1.1 M parameters."""
    return UNet2DConditionModel(
        sample_size=SHAPE[1],
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        norm_num_groups=8,
        cross_attention_dim=TOKENS.shape[2],
        attention_head_dim=4,
    )


def coding_loss(model: nn.Module, data: Split, batch: int) -> Tensor:
    """Mean squared error of the decoded posterior sample, and a thousandth of the mean divergence of a latent from the normal distribution."""
    x = pixels(data.images[torch.randint(len(data), (batch,))])
    posterior = model.encode(x).latent_dist
    divergence = posterior.kl().mean() / torch.Size(SHAPE).numel()
    return nn.functional.mse_loss(model.decode(posterior.sample()).sample, x) + 1e-3 * divergence


def standardise(model: nn.Module, data: Split) -> None:
    """Latents get mean 0 and variance 1 a channel over 2000 training images: y = (z - m) / s goes into the encoder's last layer, z = s y + m
    into the decoder's first, so the decoded images stay."""
    model.eval()
    z = encode(model, data.images[:2000]).transpose(0, 1).flatten(1)
    mean, scale = z.mean(1), z.std(1)
    last, first = model.quant_conv, model.post_quant_conv
    with torch.no_grad():
        first.bias += first.weight[:, :, 0, 0] @ mean
        first.weight *= scale[:, None, None]
        last.bias[: len(mean)] -= mean
        last.bias[: len(mean)] /= scale
        last.weight[: len(mean)] /= scale[:, None, None, None]
        last.bias[len(mean) :] -= 2 * scale.log()  # the logarithm of the variance


def encode(model: nn.Module, data: Tensor) -> Tensor:
    """[N, 28, 28] bytes to the means of their latents, [N, 4, 8, 8]."""
    with torch.no_grad():
        return torch.cat([model.encode(pixels(rows)).latent_dist.mean for rows in data.split(250)])


def decode(model: nn.Module, z: Tensor) -> Tensor:
    """[N, 4, 8, 8] to [N, 1, 32, 32]."""
    with torch.no_grad():
        return torch.cat([model.decode(rows).sample for rows in z.split(250)])


def coding_metrics(model: nn.Module, train: Split, test: Split) -> dict[str, float]:
    """psnr: of decoded test images, whose range is 2. recognised: by the ResNet, before and after. spread: of latents, 1 on training images."""
    x, z = pixels(test.images), encode(model, test.images)
    y, judge = decode(model, z), classify.logits(weights.read(classify.resnet(), "resnet"))
    return {
        "psnr": float(10 * torch.log10(4 / nn.functional.mse_loss(y, x))),
        "recognised_decoded": accuracy(judge, y, test.labels).value,
        "recognised_real": accuracy(judge, x, test.labels).value,
        "spread": float(z.std()),
    }


def coding_feed(data: Split) -> Feed:
    """Images as the autoencoder is called."""
    return images(pixels(data.images), name="sample", batch=8, limit=64)


def coder() -> nn.Module:
    """The autoencoder with its committed weights."""
    return weights.read(autoencoder(), "vae")


@lru_cache(maxsize=1)
def _latents(data: Split) -> Tensor:
    return encode(coder(), data.images)


def loss(model: nn.Module, data: Split, batch: int) -> Tensor:
    """Mean squared error of the velocity at random timesteps; a tenth of the images has the tokens that say "no class"."""
    at = torch.randint(len(data), (batch,))
    z = _latents(data)[at]
    tokens = TOKENS.to(z.device)[torch.where(torch.rand(batch) < 0.1, NO_CLASS, data.labels[at])]
    t = torch.randint(PROCESS.config.num_train_timesteps, (batch,))
    noise = torch.randn_like(z)
    return nn.functional.mse_loss(model(PROCESS.add_noise(z, noise, t), t, tokens).sample, PROCESS.get_velocity(z, noise, t))


def sampler(steps: int = 20, guidance: float = GUIDANCE) -> Sampler:
    """DDIM; guided unless guidance is 1. Latents have no bounds to be clipped at."""
    scheduler = DDIMScheduler.from_config(PROCESS.config, clip_sample=False)
    return Sampler(scheduler, steps, None if guidance == 1.0 else Guidance(guidance, {"encoder_hidden_states": TOKENS[NO_CLASS:]}))


def conditions(labels: Tensor) -> dict[str, Tensor]:
    """What the UNet is told about each image."""
    return {"encoder_hidden_states": TOKENS[labels]}


def sample(model: Callable[..., Any], labels: Tensor, seed: int, how: Sampler | None = None) -> Tensor:
    """Latents [N, 4, 8, 8], one a label. The same seed gives the same noise, whatever the model. A captured UNet takes fewer than 64 rows."""
    noise = torch.randn(len(labels), *SHAPE, generator=torch.Generator().manual_seed(seed))
    rows = zip(noise.split(25), labels.split(25), strict=True)
    return torch.cat([(how or sampler()).run(model, x, conditions(y)) for x, y in rows])


def drawn(samples: Tensor) -> Tensor:
    """Latents to [N, 1, 16, 16]: decoded and halved, the form in which the models on pixels draw, so that figures compare."""
    return halved(decode(coder(), samples))


def states(model: nn.Module, seed: int, n: int = 20, steps: int = 20) -> Feed:
    """What the model sees while it draws n images: both halves of the guidance in each item."""
    return trajectory(model, sampler(steps), n, shape=SHAPE, conditions=conditions(torch.arange(n) % len(CLASSES)), seed=seed)


def metrics(model: nn.Module, train: Split, test: Split) -> dict[str, float]:
    """Figures of 1000 decoded samples, as those of the models on pixels."""
    draw = lambda labels, guidance: drawn(sample(model, labels, seed=1, how=sampler(guidance=guidance)))  # noqa: E731
    return denoise.judged(draw, denoise.images(train), denoise.images(test), test)
