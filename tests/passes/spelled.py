"""Norms over the last axis in the words in which models spell them out, without gain and bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

EPS = 1e-6


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - mean(x)


ROOTS: dict[str, Callable[[Tensor], Tensor]] = {
    "eps first": lambda x: x * torch.rsqrt(EPS + mean(x.pow(2))),
    "power": lambda x: x * torch.pow(mean(x.pow(2)) + EPS, -0.5),
    "quotient": lambda x: x / torch.sqrt(mean(x**2) + EPS),
    "square": lambda x: x / (mean(x.square()) + EPS).sqrt(),
    "sum": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS),
    "reciprocal": lambda x: x * (1 / torch.sqrt(mean(x * x) + EPS)),
    "normalize": lambda x: nnf.normalize(x, dim=-1) * x.shape[-1] ** 0.5,
    "length": lambda x: x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + EPS),
    "cast": lambda x: (x.double() * torch.rsqrt(mean(x.double() ** 2) + EPS)).type_as(x),
    "copied": lambda x: (x * torch.rsqrt(mean(x**2) + EPS)).clone(),
}
CENTRED: dict[str, Callable[[Tensor], Tensor]] = {
    "variance": lambda x: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS),
    "deviation": lambda x: centred(x) / (x.std(-1, keepdim=True) + EPS),
    "squares": lambda x: centred(x) * torch.rsqrt(mean(centred(x) ** 2) + EPS),
    "squares of one value": lambda x: (c := centred(x)) / torch.sqrt(EPS + mean(c**2)),
    "moments": lambda x: centred(x) * torch.rsqrt(mean(x * x) - mean(x) ** 2 + EPS),
    "pair": lambda x: (x - (s := torch.var_mean(x, -1, keepdim=True, correction=0))[1]) * torch.rsqrt(s[0] + EPS),
}
