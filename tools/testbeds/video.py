"""Video diffusion: diffusers' LatteTransformer3DModel on clips of a moving handwritten digit, and a ResNet of transformers that judges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from fxcompress.calibrate import Feed, Guidance, Sampler, images, trajectory
from fxcompress.evaluate import frechet, noise_floor
from tools.testbeds import classify, denoise, weights
from tools.testbeds.denoise import PROCESS
from tools.testbeds.fashion import Split

FRAMES, SIZE, DIGIT = 8, 16, 8
SHAPE = (1, FRAMES, SIZE, SIZE)
DIGITS, MOVES = 10, ("left", "right", "up", "down")
KINDS = DIGITS * len(MOVES)
GUIDANCE = 1.5
TOKENS = torch.randn(DIGITS + len(MOVES) + 2, 32, generator=torch.Generator().manual_seed(0))  # fixed ones: digits, moves, no digit, no move


@dataclass(frozen=True)
class Clips:
    """videos: [N, 1, 8, 16, 16] in [-1, 1]. kinds: [N], 4 digit + move."""

    videos: Tensor
    kinds: Tensor


def latte() -> nn.Module:
    """Three pairs of a spatial and a temporal block of width 96, patches of 4 x 4 pixels of a frame, 0.9 M parameters."""
    return LatteTransformer3DModel(
        sample_size=SIZE,
        patch_size=4,
        in_channels=1,
        out_channels=1,
        video_length=FRAMES,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=24,
        attention_bias=True,
        cross_attention_dim=96,
        caption_channels=TOKENS.shape[1],
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )


def judge() -> nn.Module:
    """A classifier of 40 kinds that sees the frames as channels, 0.2 M parameters."""
    shape = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, num_channels=FRAMES, num_labels=KINDS))


def compose(data: Split, n: int) -> Clips:
    """n clips drawn with the global random state: a digit moves by a pixel a frame along one axis, the other place is any."""
    at, move, start = (torch.randint(high, (n,)) for high in (len(data), len(MOVES), SIZE - DIGIT - FRAMES + 2))
    path = start[:, None] + torch.arange(FRAMES)
    path = torch.where((move % 2 == 0)[:, None], SIZE - DIGIT - path, path)
    still = torch.randint(SIZE - DIGIT + 1, (n, 1)).expand(n, FRAMES)
    sideways = (move < 2)[:, None]
    videos = _drawn(data.images[at] / 8 - 1, torch.where(sideways, still, path), torch.where(sideways, path, still))
    return Clips(videos, data.labels[at] * len(MOVES) + move)


def _drawn(digits: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """[N, 8, 8] digits to [N, 1, T, 16, 16], their upper left corners at y, x, [N, T]."""
    padded = nn.functional.pad(digits, (1, 1, 1, 1), value=-1.0)
    rows, columns = ((torch.arange(SIZE) - v[..., None]).clamp(-1, DIGIT) + 1 for v in (y, x))
    return padded[torch.arange(len(digits))[:, None, None, None], rows[..., None], columns[:, :, None]][:, None]


def held_out(data: Split, n: int, seed: int) -> Clips:
    """n clips from a seed; the random state outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return compose(data, n)


def judging_loss(model: nn.Module, data: Split, batch: int) -> Tensor:
    """Cross entropy of clips with some noise, so that the small faults of drawn ones don't throw it off."""
    clips = compose(data, batch)
    x = clips.videos[:, 0]
    return nn.functional.cross_entropy(model(pixel_values=x + 0.2 * torch.randn_like(x)).logits, clips.kinds)


def judging_metrics(model: nn.Module, train: Split, test: Split) -> dict[str, float]:
    """Shares of 2000 clips of test digits whose digit, direction and both are recognised."""
    clips = held_out(test, 2000, seed=1)
    return kept(model, clips.videos, clips.kinds)


def kept(judged_by: Callable[..., Any], videos: Tensor, kinds: Tensor) -> dict[str, float]:
    """Shares of the videos in which the judge sees the digit, the direction, and both."""
    return {name: float(right.double().mean()) for name, right in hits(judged_by, videos, kinds).items()}


def hits(judged_by: Callable[..., Any], videos: Tensor, kinds: Tensor) -> dict[str, Tensor]:
    """In which of the videos the judge sees the "digit", the "direction", and "both", [N] each."""
    with torch.no_grad():
        seen = torch.cat([judged_by(pixel_values=rows[:, 0]).logits.argmax(1) for rows in videos.split(250)])
    moves = len(MOVES)
    return {"digit": seen // moves == kinds // moves, "direction": seen % moves == kinds % moves, "both": seen == kinds}


def clip_feed(data: Split, seed: int) -> Feed:
    """Clips as the judge is called."""
    return images(held_out(data, 64, seed + 100).videos[:, 0], batch=8, limit=64)


def tokens(kinds: Tensor) -> Tensor:
    """What the network is told about each clip, a token for the digit and one for the move, [N, 2, 32]; a kind of KINDS: none of either."""
    digit, move = kinds // len(MOVES), kinds % len(MOVES)
    none = kinds == KINDS
    first = torch.where(none, DIGITS + len(MOVES), digit)
    second = torch.where(none, DIGITS + len(MOVES) + 1, DIGITS + move)
    return TOKENS.to(kinds.device)[torch.stack([first, second], 1)]


def loss(model: nn.Module, data: Split, batch: int) -> Tensor:
    """Mean squared error of the velocity, half of the timesteps from the noisier half: there the tokens decide, that of the move above 800 of
    1000, and any that are alike likely teach it late. A tenth of the clips has the tokens that say "none"."""
    clips, steps = compose(data, batch), PROCESS.config.num_train_timesteps
    x, kinds = clips.videos, torch.where(torch.rand(batch) < 0.1, KINDS, clips.kinds)
    t = torch.where(torch.rand(batch) < 0.5, torch.randint(steps // 2, steps, (batch,)), torch.randint(steps, (batch,)))
    noise = torch.randn_like(x)
    told = {"timestep": t, "encoder_hidden_states": tokens(kinds)}
    return nn.functional.mse_loss(model(PROCESS.add_noise(x, noise, t), **told).sample, PROCESS.get_velocity(x, noise, t))


def sampler(steps: int = 20) -> Sampler:
    """DDIM, guided by GUIDANCE."""
    return Sampler(denoise.scheduler(), steps, Guidance(GUIDANCE, {"encoder_hidden_states": tokens(torch.tensor([KINDS]))}))


def conditions(kinds: Tensor) -> dict[str, Tensor]:
    """What `Sampler` passes on."""
    return {"encoder_hidden_states": tokens(kinds)}


def sample(model: Callable[..., Any], kinds: Tensor, seed: int, how: Sampler | None = None) -> Tensor:
    """[N, 1, 8, 16, 16], one clip a kind. The same seed gives the same noise, whatever the model."""
    noise = torch.randn(len(kinds), *SHAPE, generator=torch.Generator().manual_seed(seed))
    rows = zip(noise.split(20), kinds.split(20), strict=True)
    return torch.cat([(how or sampler()).run(model, x, conditions(y)) for x, y in rows])


def states(model: nn.Module, seed: int, n: int = 12, steps: int = 20) -> Feed:
    """What the model sees while it draws n clips of kinds that stand apart: both halves of the guidance in each item."""
    return trajectory(model, sampler(steps), n, shape=SHAPE, conditions=conditions(torch.arange(n) * 7 % KINDS), seed=seed)


def features(judged_by: nn.Module, videos: Tensor) -> Tensor:
    """What the judge's last layer reads, [N, 64]: form and motion in one."""
    return classify.features(judged_by, videos[:, 0])


def metrics(model: nn.Module, train: Split, test: Split) -> dict[str, float]:
    """Of 400 clips, ten of each kind, guided by GUIDANCE.

    frechet_ratio: the distance to 2000 clips of training digits over that of 400 other ones, mean of two draws. ..._real: of test digits.
    """
    by, kinds = weights.read(judge(), "video_judge"), torch.arange(400) % KINDS
    drawn, real = sample(model, kinds, seed=1), held_out(train, 3000, seed=2)
    seen = features(by, real.videos)
    distance, floor = frechet(features(by, drawn), seen[:2000]), noise_floor(frechet, seen, 400, 2000)
    shown = held_out(test, 2000, seed=1)
    return {
        "guidance": GUIDANCE,
        **kept(by, drawn, kinds),
        **{f"{name}_real": share for name, share in kept(by, shown.videos, shown.kinds).items()},
        "frechet": distance,
        "frechet_ratio": distance * len(floor) / sum(floor),
    }
