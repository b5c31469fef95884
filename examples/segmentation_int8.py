"""A promptable segmentation model with 8-bit weights and activations: an image and boxes in, masks out, and a picture of both models' masks.

python -m examples.segmentation_int8
"""

from pathlib import Path

import torch
from PIL import Image

import fxcompress as fxc
from fxcompress.evaluate import mask_iou
from tools.testbeds import load, scenes, segment

OUT = Path("out/segmentation.png")


def main(images: int = 100, out: Path = OUT) -> tuple[float, float]:
    """Returns the mean IoU of the float and of the int8 model on scenes that neither has seen."""
    sam = load("sam")  # transformers' SamModel, small
    example = next(iter(sam.calibration))  # {"pixel_values": ..., "input_boxes": ..., "multimask_output": False}
    small = fxc.compile(sam.model, "int8", example, calibration=sam.calibration)

    asked = scenes.held_out(sam.test, images, seed=7)
    found = [segment.masks(model, asked, "boxes") for model in (sam.model, small)]
    before, after = (mask_iou(masks, asked.masks) for masks in found)
    print(f"mean IoU {before.value:.3f} in float, {after.value:.3f} ± {(after.high - after.low) / 2:.3f} in int8")

    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(asked, found).numpy()).save(out)
    print(f"{out}: a column a scene; from above the image, the two objects asked for, the masks in float, the masks in int8")
    return before.value, after.value


def picture(asked: scenes.Scenes, found: list[torch.Tensor], columns: int = 8, zoom: int = 2) -> torch.Tensor:
    """[H, W, 3] bytes: each mask in a colour of its own over the image."""
    rows = [torch.zeros_like(asked.masks), asked.masks, *found]
    colour = torch.tensor([[1.0, 0.4, 0.1], [0.1, 0.7, 1.0]])
    tiles = []
    for masks in rows:
        gray = (asked.images[:columns, 0, :, :, None].clamp(-1, 1) + 1) / 2
        shown = gray.expand(-1, -1, -1, 3)
        for i in range(masks.shape[1]):
            shown = torch.where(masks[:columns, i, :, :, None], 0.4 * shown + 0.6 * colour[i], shown)
        tiles.append(torch.cat(list(shown), 1))
    whole = (255 * torch.cat(tiles, 0)).byte()
    return whole.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


if __name__ == "__main__":
    main()
