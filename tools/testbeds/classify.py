"""Image classifiers of transformers, which are the feature networks too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fxcompress.evaluate import accuracy
from tools.testbeds.fashion import Split, doubled, halved, pixels

IMAGE = {"num_channels": 1, "num_labels": 10}


def resnet() -> nn.Module:
    """Basic blocks, 0.7 M parameters."""
    return ResNetForImageClassification(
        ResNetConfig(**IMAGE, embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic")
    )


def mobilenet() -> nn.Module:
    """Inverted residuals with depthwise convolutions, half width."""
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(**IMAGE, image_size=32, depth_multiplier=0.5, finegrained_output=False, output_stride=16, classifier_dropout_prob=0.0)
    )


def convnext() -> nn.Module:
    """Two stages of two blocks, 64 and 128 channels: depthwise 7 x 7, LayerNorm, GELU; 0.4 M parameters.

    Layer scales start at 1 and weights at 0.08: with the usual 1e-6 and 0.02 the blocks hardly take part in so short a training.
    """
    stages = {"num_stages": 2, "hidden_sizes": [64, 128], "depths": [2, 2]}
    start = {"layer_scale_init_value": 1.0, "initializer_range": 0.08}
    return ConvNextForImageClassification(ConvNextConfig(**IMAGE, **stages, **start, image_size=32, patch_size=4))


def vit() -> nn.Module:
    """Six blocks of width 96 over 16 patches and the class token."""
    return ViTForImageClassification(
        ViTConfig(**IMAGE, image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=6, num_attention_heads=3, intermediate_size=192)
    )


def loss(model: nn.Module, data: Split, batch: int, reach: int = 2) -> Tensor:
    """Cross entropy of a random batch: flipped, moved by up to `reach` pixels, every second image at half resolution."""
    at = torch.randint(len(data), (batch,))
    x = _moved(_flipped(pixels(data.images[at])), reach)
    coarse = torch.rand(batch, 1, 1, 1) < 0.5
    x = torch.where(coarse, doubled(halved(x)), x)
    return nn.functional.cross_entropy(model(pixel_values=x).logits, data.labels[at])


def _flipped(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)


def _moved(x: Tensor, reach: int) -> Tensor:
    padded = nn.functional.pad(x, (reach,) * 4, value=-1.0)
    rows, columns = (torch.randint(2 * reach + 1, (len(x), 1)) + torch.arange(x.shape[2]) for _ in range(2))
    return padded[torch.arange(len(x))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """x [N, 1, 32, 32] to [N, 10]."""
    return lambda x: model(pixel_values=x).logits


def features(model: nn.Module, x: Tensor) -> Tensor:
    """What the last linear layer reads, [N, D]."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        for rows in x.split(500):
            model(pixel_values=rows)
    hook.remove()
    return torch.cat(read)


def metrics(model: nn.Module, train: Split, test: Split) -> dict[str, float]:
    """Shares of the test split that are recognised: as they are, and at half resolution."""
    x = pixels(test.images)
    return {
        "accuracy": accuracy(logits(model), x, test.labels).value,
        "accuracy_16x16": accuracy(logits(model), doubled(halved(x)), test.labels).value,
    }


def settle(model: nn.Module, data: Split, loss: Callable[[nn.Module, Split, int], Tensor] = loss) -> None:
    """Batch-norm statistics are the mean over 40 training batches of the final weights, not a moving average that lags behind."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(40 if norms else 0):
            loss(model, data, 250)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    model.eval()
