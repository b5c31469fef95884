"""Promptable segmentation: transformers' SamModel, small, on scenes of overlapping objects; a box or three points say which object is meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from fxcompress.calibrate import Feed
from fxcompress.calibrate.feed import Items
from fxcompress.evaluate import mask_iou
from tools.testbeds.fashion import Split
from tools.testbeds.scenes import SIZE, Scenes, compose, filled, held_out, nearest_object

WIDTH = 128
SPREAD = 0.05  # standard deviation of first weights; transformers' own for the vision encoder, 1e-10, costs a short training most of its steps
PROMPTS = ("boxes", "points")


def sam() -> nn.Module:
    """Four blocks of width 128 on 64 patches, two of them windowed, and the two-way decoder of two layers: 1.3 M parameters.

    The random Fourier features of positions are drawn as published SAM weights have them, with standard deviation 1, and stay as drawn.
    """
    shape = {"image_size": SIZE, "patch_size": 8}
    blocks = {"num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 256, "window_size": 4, "global_attn_indexes": [1, 3]}
    vision = {**shape, **blocks, "num_channels": 1, "hidden_size": WIDTH, "output_channels": WIDTH, "num_pos_feats": WIDTH // 2}
    vision["initializer_range"] = SPREAD
    decoder = {"hidden_size": WIDTH, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64}
    prompts = {**shape, "hidden_size": WIDTH, "mask_input_channels": 8}
    parts = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
    model = SamModel(SamConfig(**parts, initializer_range=SPREAD))
    positions = model.shared_image_embedding.positional_embedding
    with torch.no_grad():
        positions.normal_()
    positions.requires_grad_(False)
    model.mask_decoder.output_hypernetworks_mlps[1:].requires_grad_(False)  # what they make is asked for nowhere
    return model


def prompt(scenes: Scenes, kind: str, rows: slice = slice(None)) -> dict[str, Any]:
    """The arguments that ask a SamModel for one mask an object, by "boxes" or "points"."""
    if kind == "boxes":
        asked = {"input_boxes": scenes.boxes[rows]}
    else:
        points = scenes.points[rows]
        asked = {"input_points": points, "input_labels": torch.ones(points.shape[:3], dtype=torch.int64)}
    return {**asked, "multimask_output": False}


def loss(model: nn.Module, data: Split, batch: int) -> Tensor:
    """Soft IoU and cross entropy of the masks at the scene's resolution, and the error of the predicted IoU. Both objects of two scenes in five
    are asked for by boxes, those of the others by points, which are harder."""
    scenes = compose(data, batch)
    seen = model.vision_encoder(2 * scenes.images).last_hidden_state
    total, cut = torch.zeros(()), round(0.4 * batch)
    for kind, rows in zip(PROMPTS, (slice(cut), slice(cut, batch)), strict=True):
        out = model(image_embeddings=seen[rows], **prompt(scenes, kind, rows))
        total = total + len(seen[rows]) / batch * _mask_loss(_whole(out.pred_masks), out.iou_scores[:, :, 0], scenes.masks[rows])
    return total


def _mask_loss(logits: Tensor, iou: Tensor, wanted: Tensor) -> Tensor:
    target, share = wanted.float(), logits.sigmoid()
    overlap = (share * target).sum((2, 3))
    soft = 1 - (overlap + 1) / (share.sum((2, 3)) + target.sum((2, 3)) - overlap + 1)
    both, either = (logits > 0) & wanted, (logits > 0) | wanted
    truth = both.sum((2, 3)) / either.sum((2, 3)).clamp(min=1)
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, target)
    return 2 * entropy + soft.mean() + 0.1 * nn.functional.mse_loss(iou, truth)


def _whole(masks: Tensor) -> Tensor:
    """The decoder's logits of one mask an object at the scene's resolution: [N, objects, 1, 32, 32] to [N, objects, 64, 64]."""
    return nn.functional.interpolate(masks[:, :, 0], scale_factor=2, mode="bilinear", align_corners=False)


def masks(model: Callable[..., Any], scenes: Scenes, kind: str) -> Tensor:
    """What the model finds: [N, 2, 64, 64], bool. model: called as a SamModel, by name."""
    found = []
    with torch.no_grad():
        for start in range(0, len(scenes), 50):
            rows = slice(start, start + 50)
            low = model(pixel_values=2 * scenes.images[rows], **prompt(scenes, kind, rows)).pred_masks
            found.append(_whole(low) > 0)
    return torch.cat(found)


def metrics(model: nn.Module, train: Split, test: Split) -> dict[str, float]:
    """Mean IoU over 2000 objects of 1000 scenes of test garments, of the model and of what needs no model.

    fill_the_box, nearest_object: see `scenes`; foreground_in_box: the true foreground inside the true box, which is no baseline of equal
    knowledge, but says how much of the task is telling objects from each other.
    """
    scenes = held_out(test, 1000, seed=1)
    answers = {f"iou_{kind}": masks(model, scenes, kind) for kind in PROMPTS}
    box = filled(scenes.boxes)
    answers["iou_fill_the_box"] = box
    answers["iou_nearest_object"] = nearest_object(scenes.foreground, scenes.points)
    answers["iou_foreground_in_box"] = box & scenes.foreground[:, None]
    return {name: mask_iou(found, scenes.masks).value for name, found in answers.items()}


def feed(data: Split, seed: int, n: int = 64, kind: str = "boxes", batch: int = 8) -> Feed:
    """Scenes with their prompts, as a SamModel is called."""
    scenes = held_out(data, n, seed + 100)
    rows = [slice(start, start + batch) for start in range(0, n, batch)]
    return Items([{"pixel_values": 2 * scenes.images[r], **prompt(scenes, kind, r)} for r in rows])
