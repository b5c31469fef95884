"""Small models of real architectures, with weights and inputs that leave nothing degenerate.

The classes are those of diffusers and transformers, unchanged; only sizes are small. `ZOO` is what the compiler is developed on, `HELD_OUT`
(tests/held_out.py) what it is measured on. Each maps a name to a builder that returns (model, example inputs by parameter name), seeded,
float32, eval mode, batch 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Builder = Callable[[], tuple[nn.Module, Inputs]]
Feed = Callable[[], Inputs]

BATCH, TOKENS, VOCAB = 2, 10, 99
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def redraw(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter and batch-norm statistic anew, in place, so that no part of the model is an identity, a zero or a constant.

    Matrices and kernels ~ N(0, 1 / fan_in), so that activations stay O(1); embeddings and position tables ~ N(0, 1/10), also
    fit for a tied head; vectors that are constant move off their constant: scales to c (1 + 0.2 n), zeros and tiny gates to 0.2 n.
    Vectors that vary already are kept: they may be structured (decay rates). Goes by shape and by the torch class of the holder, never
    by names or model classes.
    """
    rng = torch.Generator().manual_seed(seed)
    seen: set[Tensor] = set()
    with torch.no_grad():
        for holder in model.modules():
            for value in holder.parameters(recurse=False):
                if value.is_floating_point() and value not in seen:
                    value.copy_(_drawn(holder, value, rng))
                    seen.add(value)
            if isinstance(getattr(holder, "running_var", None), Tensor):
                _draw_statistics(holder, rng)
            for value in holder.buffers(recurse=False):  # codebooks wait for training as zeros
                if value.is_floating_point() and value.ndim > 1 and not value.any():
                    value.copy_(_drawn(holder, value, rng))
    return model.eval()


def settle(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Move the batch norms' running statistics nine tenths of the way to what they see on the example: without, deep stacks fade out."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None]
    kept = [layer.momentum for layer in norms]
    for layer in norms:
        layer.train().momentum = 0.9
    if norms:
        with torch.no_grad():
            model(**inputs)
    for layer, momentum in zip(norms, kept, strict=True):
        layer.eval().momentum = momentum
    return model


def _drawn(holder: nn.Module, value: Tensor, rng: torch.Generator) -> Tensor:
    """A fresh value for one parameter of `holder`."""
    if isinstance(holder, NORMS) and value is holder.weight:
        return 1 + 0.2 * torch.randn(value.shape, generator=rng)  # some libraries start them near zero
    if value.ndim < 2:
        return _drawn_vector(value, rng)
    noise = torch.randn(value.shape, generator=rng)
    if isinstance(holder, nn.Embedding) or value.shape[0] == 1:
        return noise * math.sqrt(0.1)
    return noise / math.sqrt(_fan_in(holder, value))


def _drawn_vector(value: Tensor, rng: torch.Generator) -> Tensor:
    if value.numel() > 1 and value.std() > 1e-3:
        return value
    noise, center = torch.randn(value.shape, generator=rng), value.mean()
    if center.abs() < 0.5:
        return 0.2 * noise
    return center * (1 + 0.2 * noise) if value.numel() > 1 else value


def _fan_in(holder: nn.Module, value: Tensor) -> float:
    """Values summed into one output. A bare parameter may be used either way round (experts, Conv1D): the larger side is safe."""
    if isinstance(holder, nn.modules.conv._ConvTransposeNd):
        return value[:, 0].numel() / math.prod(holder.stride)
    if isinstance(holder, nn.Linear | nn.modules.conv._ConvNd):
        return value[0].numel()
    return max(value.shape[-2:])


def _draw_statistics(norm: nn.Module, rng: torch.Generator) -> None:
    """Running mean and variance; where the affine part is frozen into buffers, that too."""
    for name, value in norm.named_buffers(recurse=False):
        if name == "running_var":
            value.copy_(0.5 + torch.rand(value.shape, generator=rng))
        elif value.is_floating_point():
            value.copy_(_drawn_vector(value, rng))


def _built(make: Callable[[], nn.Module], feed: Feed) -> tuple[nn.Module, Inputs]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = redraw(make(), seed=1), feed()
        return settle(model, inputs), inputs


def transformers(cls: str, feed: Feed, **config: Any) -> Builder:
    """A builder of a transformers class from the values of its config."""

    def build() -> tuple[nn.Module, Inputs]:
        import transformers as library

        model = getattr(library, cls)
        return _built(lambda: model(model.config_class(**config)), feed)

    return build


def diffusers(cls: str, feed: Feed, **config: Any) -> Builder:
    """A builder of a diffusers class from its keyword arguments."""

    def build() -> tuple[nn.Module, Inputs]:
        import diffusers as library

        return _built(lambda: getattr(library, cls)(**config), feed)

    return build


def part(whole: Builder, of: Callable[[nn.Module], nn.Module]) -> Builder:
    """A builder of one part of a model, taking the inputs of `whole`."""

    def build() -> tuple[nn.Module, Inputs]:
        model, inputs = whole()
        return of(model).eval(), inputs

    return build


def noise(**shapes: tuple[int, ...]) -> Feed:
    """Standard normal values by name; a shape is without the batch."""
    return lambda: {name: torch.randn(BATCH, *shape) for name, shape in shapes.items()}


def timestep(name: str = "timestep") -> Feed:
    """One integer step an example."""
    return lambda: {name: torch.tensor([37, 611])}


def labels(name: str, count: int) -> Feed:
    """One class an example."""
    return lambda: {name: torch.tensor([1, count - 1])}


def mask(name: str = "attention_mask", length: int = TOKENS, left: bool = False) -> Feed:
    """1 where a token is real; the second example is padded by two, on the right or left."""

    def feed() -> Inputs:
        value = torch.ones(BATCH, length, dtype=torch.long)
        value[1, slice(2) if left else slice(-2, None)] = 0
        return {name: value}

    return feed


def tokens(name: str = "input_ids", length: int = TOKENS, vocab: int = VOCAB) -> Feed:
    """Token ids clear of the special ones at the low end."""
    return lambda: {name: torch.randint(5, vocab, (BATCH, length))}


def both(*feeds: Feed) -> Feed:
    """The inputs of all feeds."""
    return lambda: {name: value for feed in feeds for name, value in feed().items()}


def under(name: str, feed: Feed) -> Feed:
    """The inputs of a feed as one dict argument."""
    return lambda: {name: feed()}


class VaeDecoder(nn.Module):
    """The decoding half of an AutoencoderKL: latents to images."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """[B, 4, h, w] to [B, 3, 2h, 2w]."""
        return self.decoder(self.post_quant_conv(latents))


def sam_prompts() -> Inputs:
    """Two points and a box for each of two masks an image, in pixels."""
    corner = torch.tensor([8.0, 10.0]) + 6 * torch.rand(BATCH, 2, 2)
    return {
        "pixel_values": torch.randn(BATCH, 3, 64, 64),
        "input_points": 64 * torch.rand(BATCH, 2, 2, 2),
        "input_labels": torch.tensor([1, 0]).repeat(BATCH, 2, 1),
        "input_boxes": torch.cat([corner, corner + 30 + 10 * torch.rand(BATCH, 2, 2)], dim=-1),
    }


def packed_positions() -> Inputs:
    """Row and column of 4 x 4 image tokens; text tokens numbered along the first axis."""
    grid = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=-1)
    text = torch.stack([torch.arange(TOKENS), torch.zeros(TOKENS), torch.zeros(TOKENS)], dim=-1)
    return {"img_ids": grid.float(), "txt_ids": text.float()}


DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "use_cache": False,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
ENCODER = {name: value for name, value in DECODER.items() if name != "use_cache"}
IMAGE = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}
PROMPT = both(tokens(), mask(left=True))
TEXT = both(tokens(), mask())
PAIR = both(TEXT, tokens("decoder_input_ids", 6))
PIXELS = noise(pixel_values=(3, 32, 32))
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "sample_size": 16,
}


def backbone(stages: tuple[str, ...]) -> Any:
    """The config of a small ResNet that hands out these stages."""
    from transformers import ResNetConfig

    return ResNetConfig(embedding_size=16, **STAGES, layer_type="basic", out_features=list(stages))


def _detr() -> tuple[nn.Module, Inputs]:
    config = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "num_queries": 6}
    feed = both(noise(pixel_values=(3, 64, 64)), pixel_mask)
    whole = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone(("stage4",))}
    return transformers("DetrForObjectDetection", feed, **config, **layers, **whole)()


def pixel_mask() -> Inputs:
    """The second image fills only the left half of its frame."""
    value = torch.ones(BATCH, 64, 64, dtype=torch.long)
    value[1, :, 32:] = 0
    return {"pixel_mask": value}


def _sam() -> tuple[nn.Module, Inputs]:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "window_size": 4}
    more = {"output_channels": 32, "global_attn_indexes": [1], "mlp_dim": 64, "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8}
    masks = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    configs = {"vision_config": {**vision, **more}, "prompt_encoder_config": prompt, "mask_decoder_config": masks}
    return transformers("SamModel", sam_prompts, **configs)()


ZOO: dict[str, Builder] = {
    "unet2d_cond": diffusers(
        "UNet2DConditionModel",
        both(noise(sample=(4, 16, 16), encoder_hidden_states=(7, 24)), timestep()),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **UNET,
    ),
    "unet3d_cond": diffusers(
        "UNet3DConditionModel",
        both(noise(sample=(4, 3, 8, 8), encoder_hidden_states=(7, 24)), timestep()),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **UNET,
    ),
    "dit": diffusers(
        "DiTTransformer2DModel",
        both(noise(hidden_states=(4, 8, 8)), timestep(), labels("class_labels", 10)),
        num_attention_heads=4,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    ),
    "pixart": diffusers(
        "PixArtTransformer2DModel",
        both(noise(hidden_states=(4, 8, 8), encoder_hidden_states=(TOKENS, 24)), timestep(), mask("encoder_attention_mask")),
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=64,
        caption_channels=24,
        sample_size=8,
        use_additional_conditions=False,
    ),
    "sd3": diffusers(
        "SD3Transformer2DModel",
        both(noise(hidden_states=(4, 8, 8), encoder_hidden_states=(7, 24), pooled_projections=(32,)), timestep()),
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "flux": diffusers(
        "FluxTransformer2DModel",
        both(
            noise(hidden_states=(16, 8), encoder_hidden_states=(TOKENS, 24), pooled_projections=(32,)),
            lambda: {"timestep": torch.tensor([0.13, 0.71]), "guidance": torch.tensor([3.5, 5.0])},
            packed_positions,
        ),
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ),
    "vae_decoder": part(
        diffusers(
            "AutoencoderKL",
            noise(latents=(4, 8, 8)),
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
        ),
        VaeDecoder,
    ),
    "llama": transformers("LlamaForCausalLM", PROMPT, **GROUPED),
    "qwen2": transformers("Qwen2ForCausalLM", PROMPT, **GROUPED),
    "gemma2": transformers("Gemma2ForCausalLM", PROMPT, **GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=4),
    "mixtral": transformers("MixtralForCausalLM", PROMPT, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": transformers("GPT2LMHeadModel", PROMPT, vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=2, n_head=4, use_cache=False),
    "opt": transformers("OPTForCausalLM", PROMPT, **DECODER, ffn_dim=128, word_embed_proj_dim=64),
    "bert": transformers("BertModel", both(TEXT, lambda: {"token_type_ids": torch.arange(TOKENS).ge(6).long().repeat(BATCH, 1)}), **ENCODER),
    "t5_encoder": transformers("T5EncoderModel", TEXT, vocab_size=VOCAB, d_model=64, d_kv=8, d_ff=128, num_layers=2, num_heads=4),
    "t5": transformers(
        "T5ForConditionalGeneration", PAIR, vocab_size=VOCAB, d_model=64, d_kv=8, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "vit": transformers("ViTForImageClassification", PIXELS, **IMAGE, num_labels=10),
    "swin": transformers(
        "SwinForImageClassification",
        PIXELS,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=10,
    ),
    "convnext": transformers("ConvNextForImageClassification", noise(pixel_values=(3, 64, 64)), **STAGES, num_labels=10),
    "resnet": transformers(
        "ResNetForImageClassification", noise(pixel_values=(3, 64, 64)), embedding_size=16, **STAGES, layer_type="bottleneck", num_labels=10
    ),
    "detr": _detr,
    "sam": _sam,
    "whisper_encoder": part(
        transformers(
            "WhisperModel",
            noise(input_features=(16, 40)),
            vocab_size=VOCAB,
            num_mel_bins=16,
            d_model=64,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_source_positions=20,
            max_target_positions=16,
            pad_token_id=0,
        ),
        lambda model: model.get_encoder(),
    ),
}
