"""Fashion-MNIST (Zalando SE, MIT): the whole set from Debian's package, and the committed subset that tests and calibration use."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

SUBSET = Path(__file__).parent / "data/fashion-mnist"
WHOLE = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
KINDS = {"images": (3, "images-idx3-ubyte.gz"), "labels": (1, "labels-idx1-ubyte.gz")}


@dataclass(frozen=True)
class Split:
    """images: [N, 28, 28], uint8 (digits: [N, 8, 8], 0 to 16). labels: [N], int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same on a device."""
        return Split(self.images.to(device), self.labels.to(device))


def read(split: str, folder: Path = SUBSET) -> Split:
    """split: "train" or "t10k", the names of the data set's own files."""
    return Split(_read_idx(folder, split, "images"), _read_idx(folder, split, "labels").long())


def _read_idx(folder: Path, split: str, kind: str) -> Tensor:
    dims, suffix = KINDS[kind]
    raw = gzip.decompress((folder / f"{split}-{suffix}").read_bytes())
    head = torch.frombuffer(bytearray(raw[4 : 4 + 4 * dims]), dtype=torch.uint8).view(dims, 4).long()
    shape = (head * torch.tensor([1 << 24, 1 << 16, 1 << 8, 1])).sum(1).tolist()
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != 4 + 4 * dims + math.prod(shape):
        raise ValueError(f"{split}-{suffix} is not an idx file of {dims} axes of bytes")
    return torch.frombuffer(bytearray(raw[4 + 4 * dims :]), dtype=torch.uint8).view(shape)


def write(split: str, content: Split, folder: Path = SUBSET) -> None:
    """The same files as the data set's own, of fewer images. The bytes depend on the content alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, value in (("images", content.images), ("labels", content.labels.to(torch.uint8))):
        dims, suffix = KINDS[kind]
        head = bytes([0, 0, 8, dims]) + b"".join(n.to_bytes(4, "big") for n in value.shape)
        (folder / f"{split}-{suffix}").write_bytes(gzip.compress(head + value.numpy().tobytes(), 9, mtime=0))


def pixels(images: Tensor) -> Tensor:
    """[N, 28, 28] bytes to [N, 1, 32, 32] in [-1, 1]: two pixels of background at each side."""
    return nn.functional.pad(images[:, None].float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)


def halved(x: Tensor) -> Tensor:
    """[N, 1, 32, 32] to [N, 1, 16, 16], the mean of each 2 x 2: the form the diffusion models draw."""
    return nn.functional.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """[N, 1, 16, 16] to [N, 1, 32, 32], bilinear: how a classifier gets to see what a diffusion model drew."""
    return nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
