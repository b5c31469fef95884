"""A promptable segmentation model with 8-bit weights and activations: an image and boxes in, masks out.

python -m examples.segmentation_int8
"""

import fxcompress as fxc
from fxcompress.evaluate import mask_iou
from tools.testbeds import load, scenes, segment


def main(images: int = 100) -> tuple[float, float]:
    """Returns the mean IoU of the float and of the int8 model on scenes that neither has seen."""
    sam = load("sam")  # transformers' SamModel, small
    example = next(iter(sam.calibration))  # {"pixel_values": ..., "input_boxes": ..., "multimask_output": False}
    small = fxc.compile(sam.model, "int8", example, calibration=sam.calibration)

    asked = scenes.held_out(sam.test, images, seed=7)
    before, after = (mask_iou(segment.masks(model, asked, "boxes"), asked.masks) for model in (sam.model, small))
    print(f"mean IoU {before.value:.3f} in float, {after.value:.3f} ± {(after.high - after.low) / 2:.3f} in int8")
    return before.value, after.value


if __name__ == "__main__":
    main()
