import copy
import sys

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from fxcompress.calibrate import Guidance, Sampler, recorded, trajectory
from fxcompress.calibrate.feed import Items, Spool
from fxcompress.capture import capture
from fxcompress.errors import CalibrationError

SHAPE = (1, 4, 4)
TARGET = torch.linspace(-0.8, 0.8, 16).view(1, 1, 4, 4)
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
DIFFUSION = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler)
FLOWS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


class Known(nn.Module):
    """The exact noise prediction where the data is one image, c: (x_t - a c) / s, and the exact velocity of a flow to it, (x_t - c) / σ."""

    def __init__(self, flow: bool, sign: float = 1.0) -> None:
        super().__init__()
        self.flow, self.sign, self.rows = flow, sign, []

    def forward(self, sample: Tensor, timestep: Tensor, shift: Tensor | None = None) -> Tensor:
        self.rows.append(len(sample))
        target = TARGET if shift is None else TARGET + shift.view(-1, 1, 1, 1)
        if self.flow:
            return self.sign * (sample - target) / (timestep / 1000).view(-1, 1, 1, 1)
        cumulative = DDPMScheduler(**COSINE).alphas_cumprod
        low = timestep.floor().long()
        mixed = torch.lerp(cumulative[low], cumulative[(low + 1).clamp(max=999)], (timestep - low).float())
        a, s = mixed.sqrt().view(-1, 1, 1, 1), (1 - mixed).sqrt().view(-1, 1, 1, 1)
        return self.sign * (sample - a * target) / s


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def scheduler_of(kind: type) -> object:
    return kind() if kind in FLOWS else kind(**COSINE, **({"clip_sample": False} if kind in DIFFUSION[:2] else {}))


@pytest.mark.parametrize("kind", [*DIFFUSION, *FLOWS], ids=lambda k: k.__name__)
def test_every_sampler_reaches_the_only_image_there_is(kind):
    sampler = Sampler(scheduler_of(kind), 10)
    assert (sampler.run(Known(kind in FLOWS), noise(2), {}) - TARGET).abs().max() < 0.02
    assert (sampler.run(Known(kind in FLOWS, sign=-1.0), noise(2), {}) - TARGET).abs().max() > 0.2


@pytest.mark.parametrize("kind", [*DIFFUSION, *FLOWS], ids=lambda k: k.__name__)
def test_each_run_holds_every_call_of_the_sampler(kind):
    scheduler = scheduler_of(kind)
    before = copy.deepcopy(vars(scheduler))
    feed = list(trajectory(Known(kind in FLOWS), Sampler(scheduler, 6), 5, shape=SHAPE, batch=2))
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[k])) for k, v in vars(scheduler).items() if isinstance(v, Tensor | int))
    scheduler.set_timesteps(6)
    calls = scheduler.timesteps.tolist()
    assert [len(item.kwargs["sample"]) for item in feed] == [2] * 2 * len(calls) + [1] * len(calls)
    for run in range(3):
        times = [item.kwargs["timestep"].tolist() for item in feed[run * len(calls) : (run + 1) * len(calls)]]
        assert sorted(t[0] for t in times) == sorted(calls)
        assert times != sorted(times, reverse=True)
    assert all(item.roles == {"timestep": "timestep"} for item in feed)


def first_states(feed: object) -> Tensor:
    latest = max(float(item.kwargs["timestep"][0]) for item in feed)
    return torch.cat([item.kwargs["sample"] for item in feed if float(item.kwargs["timestep"][0]) == latest])


def test_noise_follows_the_seed_and_not_the_batch():
    sampler = Sampler(scheduler_of(DDIMScheduler), 4)
    feeds = [trajectory(Known(False), sampler, 3, shape=SHAPE, batch=b, seed=s) for b, s in ((3, 1), (2, 1), (3, 2), (3, 1))]
    assert torch.equal(first_states(feeds[0]), noise(3, 1))
    assert torch.equal(first_states(feeds[0]), first_states(feeds[1]))
    assert not torch.equal(first_states(feeds[0]), first_states(feeds[2]))
    assert feeds[0].digest == feeds[3].digest


def test_guidance_runs_both_halves_in_one_call():
    """With the shift as condition the target is c + 0; guided by 3 away from "none" = 0.1 it is c + 0.1 + 3 (0 - 0.1)."""
    model = Known(False)
    guidance = Guidance(3.0, {"shift": torch.tensor([0.1])})
    sampler = Sampler(scheduler_of(DDIMScheduler), 10, guidance)
    found = sampler.run(model, noise(2), {"shift": torch.zeros(2)})
    assert model.rows == [4] * 10
    assert (found - (TARGET - 0.2)).abs().max() < 0.02
    item = next(iter(trajectory(model, sampler, 2, shape=SHAPE, conditions={"shift": torch.tensor([0.0, 0.5])})))
    assert item.kwargs["shift"].tolist() == pytest.approx([0.1, 0.1, 0.0, 0.5])
    assert torch.equal(*item.kwargs["sample"].chunk(2))


def test_much_goes_to_disk(monkeypatch):
    sampler = Sampler(scheduler_of(DDIMScheduler), 3)
    kept = trajectory(Known(False), sampler, 3, shape=SHAPE, batch=2)
    monkeypatch.setattr(sys.modules["fxcompress.calibrate.trajectory"], "IN_MEMORY", 0)
    spooled = trajectory(Known(False), sampler, 3, shape=SHAPE, batch=2)
    assert (type(kept), type(spooled)) == (Items, Spool)
    assert kept.digest == spooled.digest


def test_a_learned_variance_is_cut_off():
    twice = lambda sample, timestep: torch.cat([Known(False)(sample, timestep), torch.full_like(sample, 9.0)], 1)  # noqa: E731
    sampler = Sampler(scheduler_of(DDIMScheduler), 10, sample="sample")
    assert (sampler.run(twice, noise(2), {}) - TARGET).abs().max() < 0.02


def tiny() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


def test_the_items_are_those_of_the_pipeline():
    unet, scheduler = tiny(), DDIMScheduler(**COSINE)
    pipe = DDIMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    theirs = recorded(unet, lambda: pipe(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(3)))
    ours = {float(i.kwargs["timestep"]): i for i in trajectory(unet, Sampler(scheduler, 5, per_row=False), 2, shape=(1, 8, 8), seed=3)}
    assert len(list(theirs)) == 5
    for item in theirs:
        assert item.roles == {"timestep": "timestep"}
        assert torch.equal(item.kwargs["sample"], ours[float(item.kwargs["timestep"])].kwargs["sample"])


def test_a_program_takes_the_items_and_knows_the_timestep():
    feed = trajectory(tiny(), Sampler(DDIMScheduler(**COSINE), 3), 2, shape=(1, 8, 8))
    items = list(feed)
    program = capture(tiny(), items[0])
    assert {v.name: v.role for v in program.inputs} == {"sample": "input", "timestep": "timestep"}
    assert all(len(program.signature.flatten(item)) == 2 for item in items)


def test_what_cannot_be_sampled():
    with pytest.raises(CalibrationError) as error:
        trajectory(Known(False), Sampler(DDIMScheduler(), 3), 2, shape=SHAPE, conditions={"shift": torch.zeros(3)})
    assert str(error.value) == (
        "the images can't be sampled\n  why   shift is [3], the images are 2\n"
        "  do    pass n >= 1, batch >= 1 and one row of each condition an image"
    )
    with pytest.raises(CalibrationError, match="n is 2, batch 0"):
        trajectory(Known(False), Sampler(DDIMScheduler(), 3), 2, shape=SHAPE, batch=0)
    with pytest.raises(CalibrationError, match="takes 0 steps"):
        trajectory(Known(False), Sampler(DDIMScheduler(), 0), 2, shape=SHAPE)
    for scheduler in (None, "ddim", DDIMScheduler):
        with pytest.raises(CalibrationError, match="no scheduler to sample with"):
            trajectory(Known(False), Sampler(scheduler, 3), 2, shape=SHAPE)
    for without in ({}, {"shifts": torch.zeros(1)}):
        with pytest.raises(CalibrationError, match="nothing to guide by"):
            trajectory(Known(False), Sampler(DDIMScheduler(), 3, Guidance(2.0, without)), 2, shape=SHAPE, conditions={"shift": torch.zeros(2)})
    with pytest.raises(CalibrationError, match="name of the network's input"):
        trajectory(lambda **inputs: inputs, Sampler(DDIMScheduler(), 3), 2, shape=SHAPE)
    with pytest.raises(CalibrationError, match="gave no tensor"):
        trajectory(lambda sample, timestep: None, Sampler(DDIMScheduler(), 3), 2, shape=SHAPE)
    with pytest.raises(CalibrationError, match="empty"):
        recorded(Known(False), lambda: None)
