"""A diffusion model with 8-bit weights and activations, calibrated on its own trajectories and judged on samples from the same noise.

python -m examples.diffusion_int8
"""

import torch
from diffusers import DDIMScheduler

import fxcompress as fxc
from fxcompress.calibrate import Sampler, trajectory
from fxcompress.evaluate import Rollout, rollout
from tools.testbeds import load


def main(samples: int = 20) -> Rollout:
    """Returns samples of both models, and the noise of the int8 one by timestep."""
    unet = load("unet").model  # any denoiser of diffusers
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")
    sampler, shape = Sampler(scheduler, steps=10), (1, 16, 16)
    feed = trajectory(unet, sampler, 8, shape=shape, conditions={"class_labels": torch.arange(8)}, seed=0)

    small = fxc.compile(unet, "w8a8-diffusion", next(iter(feed)), calibration=feed)
    found = rollout(unet, small, sampler, samples, shape=shape, conditions={"class_labels": torch.arange(samples) % 10}, seed=1)
    print(f"{small.report.backend.integer_share:.0%} of the multiplications run in integers")
    print(
        f"noise on the float model's states {found.given.mean:.1f} dB (worst step {found.given.worst:.1f}), on its own {found.own.mean:.1f} dB"
    )
    return found


if __name__ == "__main__":
    main()
