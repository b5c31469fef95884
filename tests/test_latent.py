"""Latent diffusion: the autoencoder's latents are standardised without changing what is decoded, and the sampler tells the UNet its class."""

import pytest
import torch

from fxcompress.capture import capture
from tools.testbeds import fashion, latent
from tools.testbeds.fashion import Split

TRAIN = fashion.read("train")


def autoencoder() -> torch.nn.Module:
    """One whose latents are neither centred nor of one size: an untrained encoder gives them almost alike."""
    torch.manual_seed(0)
    model = latent.autoencoder().eval()
    with torch.no_grad():
        model.quant_conv.weight.mul_(torch.tensor([9.0, 1, 3, 0.5, 1, 1, 1, 1])[:, None, None, None])
        model.quant_conv.bias.add_(torch.tensor([5.0, -2, 0, 1, 0.3, -0.3, 0, 1]))
    return model


def test_standard_latents_decode_to_the_same_images():
    model, few = autoencoder(), TRAIN.images[:20]
    before, posterior = latent.encode(model, few), model.encode(fashion.pixels(few)).latent_dist
    images = latent.decode(model, before)
    latent.standardise(model, TRAIN)
    z = latent.encode(model, TRAIN.images)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)
    assert not torch.allclose(z[:20], before, atol=0.1)
    torch.testing.assert_close(latent.decode(model, z[:20]), images, rtol=0, atol=1e-5)
    scale = (before[:, :, 0, 0] - before[:, :, 4, 4]) / (z[:20, :, 0, 0] - z[:20, :, 4, 4])
    after = model.encode(fashion.pixels(few)).latent_dist
    torch.testing.assert_close(after.std * scale[:, :, None, None], posterior.std, rtol=1e-2, atol=1e-4)


def test_the_unet_is_told_the_class_and_in_the_first_half_none():
    torch.manual_seed(0)
    items = list(latent.states(latent.unet().eval(), seed=0, n=4, steps=3))
    assert len(items) == 3
    told = items[0].kwargs["encoder_hidden_states"]
    torch.testing.assert_close(told, torch.cat([latent.TOKENS[10:].expand(4, -1, -1), latent.TOKENS[:4]]))
    assert sorted({int(t) for item in items for t in item.kwargs["timestep"]}) == [332, 666, 999]
    assert items[0].roles == {"timestep": "timestep"}


def test_the_network_is_captured_with_its_tokens():
    torch.manual_seed(0)
    model = latent.unet().eval()
    item = next(iter(latent.states(model, seed=0, n=2, steps=2)))
    program = capture(model, item)
    assert {i.name for i in program.inputs} == {"sample", "timestep", "encoder_hidden_states"}


def test_latents_are_not_clipped():
    """Where the network says that nothing is noise but v = -x, DDIM leads away from [-1, 1]; pixels would be held in it."""
    calls = []

    def model(sample, timestep, encoder_hidden_states):
        calls.append(sample.abs().max())
        return -2.0 * sample

    end = latent.sampler(5, guidance=1.0).run(model, torch.ones(1, *latent.SHAPE), latent.conditions(torch.zeros(1, dtype=torch.int64)))
    assert end.abs().max() > 1.5


@pytest.mark.parametrize("part", [slice(0, 3), slice(3, 5)])
def test_a_pixel_image_is_what_was_encoded_at_half_the_size(part, monkeypatch):
    model = autoencoder()
    monkeypatch.setattr(latent, "coder", lambda: model)
    z = latent.encode(model, TRAIN.images[part])
    torch.testing.assert_close(latent.drawn(z), fashion.halved(latent.decode(model, z)))


def test_the_loss_learns_from_latents_of_the_committed_coder(monkeypatch):
    model = autoencoder()
    monkeypatch.setattr(latent, "coder", lambda: model)
    torch.manual_seed(0)
    value = latent.loss(latent.unet(), Split(TRAIN.images[:64], TRAIN.labels[:64]), 8)
    assert torch.isfinite(value)
    assert value.requires_grad
