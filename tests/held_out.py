"""Architectures nothing was developed on: capture and the passes are measured on them, and no code may be fixed for one of their names.

Options that change what a model returns (caches, above all) stay as their libraries set them. The tables are by what goes in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo import (
    BATCH,
    DECODER,
    ENCODER,
    GROUPED,
    IMAGE,
    PAIR,
    PIXELS,
    STAGES,
    TEXT,
    TOKENS,
    UNET,
    VOCAB,
    Builder,
    Inputs,
    backbone,
    both,
    diffusers,
    labels,
    mask,
    noise,
    packed_positions,
    pixel_mask,
    sam_prompts,
    timestep,
    tokens,
    transformers,
    under,
)

CAUSAL = {name: value for name, value in DECODER.items() if name != "use_cache"}
QUERY = {name: value for name, value in GROUPED.items() if name != "use_cache"}
GPT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PROMPT = both(tokens(), mask(left=True))
LARGE = noise(pixel_values=(3, 64, 64))
FRAMES = noise(pixel_values=(4, 3, 32, 32))
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    **IDS,
    "decoder_start_token_id": 2,
}
SPEECH = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

CAUSAL_TEXT: dict[str, Builder] = {
    "gpt_neox": transformers("GPTNeoXForCausalLM", PROMPT, **CAUSAL),
    "gpt_neo": transformers(
        "GPTNeoForCausalLM",
        PROMPT,
        vocab_size=VOCAB,
        hidden_size=64,
        num_layers=2,
        num_heads=8,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "gptj": transformers("GPTJForCausalLM", PROMPT, **GPT, rotary_dim=8),
    "codegen": transformers("CodeGenForCausalLM", PROMPT, **GPT, rotary_dim=8),
    "gpt_bigcode": transformers("GPTBigCodeForCausalLM", PROMPT, **GPT),
    "falcon": transformers("FalconForCausalLM", PROMPT, **CAUSAL),
    "falcon_alibi": transformers("FalconForCausalLM", PROMPT, **CAUSAL, alibi=True, multi_query=False, parallel_attn=False),
    "phi": transformers("PhiForCausalLM", PROMPT, **QUERY),
    "phi3": transformers("Phi3ForCausalLM", PROMPT, **QUERY, **IDS),
    "gemma": transformers("GemmaForCausalLM", PROMPT, **QUERY, head_dim=16),
    "gemma3": transformers("Gemma3ForCausalLM", PROMPT, **QUERY, head_dim=16, query_pre_attn_scalar=16, sliding_window=4),
    "qwen3": transformers("Qwen3ForCausalLM", PROMPT, **QUERY, head_dim=16),
    "qwen2_moe": transformers("Qwen2MoeForCausalLM", PROMPT, **QUERY, **MOE, shared_expert_intermediate_size=64),
    "qwen3_moe": transformers("Qwen3MoeForCausalLM", PROMPT, **QUERY, **MOE),
    "mistral": transformers("MistralForCausalLM", PROMPT, **QUERY, sliding_window=4),
    "stablelm": transformers("StableLmForCausalLM", PROMPT, **QUERY),
    "starcoder2": transformers("Starcoder2ForCausalLM", PROMPT, **QUERY),
    "olmo2": transformers("Olmo2ForCausalLM", PROMPT, **QUERY, **IDS),
    "olmoe": transformers("OlmoeForCausalLM", PROMPT, **QUERY, num_experts=4, num_experts_per_tok=2),
    "cohere": transformers("CohereForCausalLM", PROMPT, **QUERY, **IDS),
    "granite": transformers("GraniteForCausalLM", PROMPT, **QUERY, attention_multiplier=0.25),
    "deepseek_v3": transformers(
        "DeepseekV3ForCausalLM",
        PROMPT,
        **{**QUERY, "num_key_value_heads": 4},
        moe_intermediate_size=64,
        n_routed_experts=4,
        kv_lora_rank=16,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        v_head_dim=16,
        qk_nope_head_dim=16,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "gpt_oss": transformers("GptOssForCausalLM", PROMPT, **QUERY, num_local_experts=4, num_experts_per_tok=2, head_dim=16, **IDS),
    "bloom": transformers("BloomForCausalLM", PROMPT, vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
    "mpt": transformers("MptForCausalLM", PROMPT, vocab_size=VOCAB, d_model=64, n_heads=4, n_layers=2, max_seq_len=64),
    "mamba": transformers("MambaForCausalLM", tokens(), vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8),
    "mamba2": transformers(
        "Mamba2ForCausalLM",
        tokens(),
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=16,
        state_size=8,
        n_groups=2,
        chunk_size=4,
    ),
    "rwkv": transformers("RwkvForCausalLM", tokens(), vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, context_length=32),
    "recurrent_gemma": transformers(
        "RecurrentGemmaForCausalLM", PROMPT, **{**QUERY, "num_hidden_layers": 3}, attention_window_size=8, lru_width=64
    ),
    "xlnet": transformers("XLNetLMHeadModel", TEXT, vocab_size=VOCAB, d_model=64, n_layer=2, n_head=4, d_inner=128),
    "xglm": transformers(
        "XGLMForCausalLM", PROMPT, vocab_size=VOCAB, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, max_position_embeddings=64
    ),
    "biogpt": transformers("BioGptForCausalLM", PROMPT, **CAUSAL),
}

ENCODED_TEXT: dict[str, Builder] = {
    "roberta": transformers("RobertaModel", TEXT, **ENCODER),
    "distilbert": transformers("DistilBertModel", TEXT, vocab_size=VOCAB, dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    "albert": transformers("AlbertModel", TEXT, **ENCODER, embedding_size=32),
    "electra": transformers("ElectraModel", TEXT, **ENCODER, embedding_size=32),
    "deberta_v2": transformers(
        "DebertaV2Model", TEXT, **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True
    ),
    "deberta": transformers("DebertaModel", TEXT, **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16),
    "mpnet": transformers("MPNetModel", TEXT, **ENCODER),
    "modernbert": transformers("ModernBertModel", TEXT, **ENCODER, local_attention=4, **IDS),
    "fnet": transformers("FNetModel", tokens(), **{k: v for k, v in ENCODER.items() if k != "num_attention_heads"}),
    "funnel": transformers(
        "FunnelModel", TEXT, vocab_size=VOCAB, block_sizes=[1, 1], num_decoder_layers=1, d_model=64, n_head=4, d_head=16, d_inner=128
    ),
    "squeezebert": transformers("SqueezeBertModel", TEXT, **ENCODER, embedding_size=64),
    "mobilebert": transformers("MobileBertModel", TEXT, **ENCODER, embedding_size=32, intra_bottleneck_size=32),
    "convbert": transformers("ConvBertModel", TEXT, **ENCODER, embedding_size=32),
    "roformer": transformers("RoFormerModel", TEXT, **ENCODER),
    "longformer": transformers("LongformerModel", both(tokens(length=16), mask(length=16)), **ENCODER, attention_window=4),
    "esm": transformers("EsmModel", TEXT, **ENCODER, position_embedding_type="rotary", pad_token_id=1, mask_token_id=4),
    "nystromformer": transformers("NystromformerModel", tokens(), **ENCODER, num_landmarks=5, segment_means_seq_len=TOKENS),
    "layoutlm": transformers(
        "LayoutLMModel",
        both(TEXT, lambda: {"bbox": torch.tensor([2, 3, 9, 12]) + torch.arange(TOKENS)[None, :, None].repeat(BATCH, 1, 4)}),
        **ENCODER,
        max_2d_position_embeddings=32,
    ),
    "perceiver": transformers(
        "PerceiverModel",
        noise(inputs=(12, 32)),
        num_latents=8,
        d_latents=64,
        d_model=32,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    ),
}

PAIRED_TEXT: dict[str, Builder] = {
    "umt5": transformers(
        "UMT5ForConditionalGeneration",
        PAIR,
        vocab_size=VOCAB,
        d_model=64,
        d_kv=8,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "switch": transformers(
        "SwitchTransformersForConditionalGeneration",
        PAIR,
        vocab_size=VOCAB,
        d_model=64,
        d_kv=8,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    ),
    "bart": transformers("BartForConditionalGeneration", PAIR, **SEQ2SEQ),
    "mbart": transformers("MBartForConditionalGeneration", PAIR, **SEQ2SEQ),
    "marian": transformers("MarianMTModel", PAIR, **SEQ2SEQ),
    "pegasus": transformers("PegasusForConditionalGeneration", PAIR, **SEQ2SEQ),
    "m2m100": transformers("M2M100ForConditionalGeneration", PAIR, **SEQ2SEQ),
    "blenderbot": transformers("BlenderbotForConditionalGeneration", PAIR, **SEQ2SEQ),
    "led": transformers(
        "LEDForConditionalGeneration",
        both(tokens(length=16), mask(length=16), tokens("decoder_input_ids", 6)),
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "prophetnet": transformers(
        "ProphetNetForConditionalGeneration",
        PAIR,
        vocab_size=VOCAB,
        hidden_size=64,
        encoder_ffn_dim=128,
        num_encoder_layers=2,
        num_encoder_attention_heads=4,
        decoder_ffn_dim=128,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
        max_position_embeddings=64,
        **IDS,
        decoder_start_token_id=2,
    ),
}

SOUND: dict[str, Builder] = {
    "whisper": transformers(
        "WhisperForConditionalGeneration",
        both(noise(input_features=(16, 40)), tokens("decoder_input_ids", 6)),
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=16,
    ),
    "speech2text": transformers(
        "Speech2TextForConditionalGeneration",
        both(noise(input_features=(40, 16)), tokens("decoder_input_ids", 6)),
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        input_feat_per_channel=16,
        max_source_positions=64,
        max_target_positions=32,
        conv_channels=32,
    ),
    "wav2vec2": transformers("Wav2Vec2Model", noise(input_values=(800,)), **SPEECH),
    "hubert": transformers("HubertModel", noise(input_values=(800,)), **SPEECH, do_stable_layer_norm=True, feat_extract_norm="layer"),
    "wavlm": transformers("WavLMModel", noise(input_values=(800,)), **SPEECH),
    "sew": transformers("SEWModel", noise(input_values=(800,)), **SPEECH, squeeze_factor=2),
    "data2vec_audio": transformers(
        "Data2VecAudioModel",
        noise(input_values=(800,)),
        **{k: v for k, v in SPEECH.items() if k != "num_conv_pos_embedding_groups"},
        conv_pos_kernel_size=5,
        num_conv_pos_embedding_groups=4,
    ),
    "wav2vec2_conformer": transformers("Wav2Vec2ConformerModel", noise(input_values=(800,)), **SPEECH),
    "ast": transformers("ASTModel", noise(input_values=(40, 16)), **{**IMAGE, "image_size": 16}, max_length=40, num_mel_bins=16),
    "encodec": transformers(
        "EncodecModel",
        noise(input_values=(1, 640)),
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=[4, 2],
        codebook_size=32,
        codebook_dim=16,
        num_lstm_layers=1,
    ),
    "mimi": transformers(
        "MimiModel",
        noise(input_values=(1, 1920)),
        hidden_size=32,
        num_filters=4,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=64,
        codebook_size=32,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=3,
        num_semantic_quantizers=1,
        upsampling_ratios=[4, 2],
        upsample_groups=32,
    ),
    "dac": transformers(
        "DacModel",
        noise(input_values=(1, 320)),
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        decoder_hidden_size=32,
        upsampling_ratios=[4, 2],
        n_codebooks=2,
        codebook_size=32,
        codebook_dim=4,
    ),
    "moonshine": transformers(
        "MoonshineForConditionalGeneration",
        both(noise(input_values=(3000,)), tokens("decoder_input_ids", 6)),
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=64,
        **IDS,
        decoder_start_token_id=1,
    ),
    "hifigan": transformers(
        "SpeechT5HifiGan",
        noise(spectrogram=(12, 16)),
        model_in_dim=16,
        upsample_initial_channel=32,
        upsample_rates=[4, 2],
        upsample_kernel_sizes=[8, 4],
        resblock_kernel_sizes=[3, 5],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
    ),
}

CLIP_TEXT = {**ENCODER, "projection_dim": 32, **IDS}
TWO_TOWERS = {"text_config": CLIP_TEXT, "vision_config": {**IMAGE, "projection_dim": 32}, "projection_dim": 32}


def _ended_text() -> Inputs:
    """Token ids whose last real one has the highest id, which is where CLIP reads the sentence off."""
    feed = TEXT()
    feed["input_ids"][0, -1] = feed["input_ids"][1, -3] = VOCAB - 1
    return feed


def _pair_of(name: str) -> Builder:
    return transformers(name, both(_ended_text, PIXELS), **TWO_TOWERS)


IMAGES: dict[str, Builder] = {
    "clip_text": transformers("CLIPTextModelWithProjection", _ended_text, **{**CLIP_TEXT, "eos_token_id": VOCAB - 1}),
    "clip_vision": transformers("CLIPVisionModelWithProjection", PIXELS, **IMAGE, projection_dim=32),
    "clip": _pair_of("CLIPModel"),
    "siglip": _pair_of("SiglipModel"),
    "blip_vision": transformers("BlipVisionModel", PIXELS, **IMAGE),
    "dinov2": transformers("Dinov2Model", PIXELS, **IMAGE),
    "dinov3": transformers("DINOv3ViTModel", PIXELS, **IMAGE, num_register_tokens=2),
    "beit": transformers("BeitModel", PIXELS, **IMAGE, use_relative_position_bias=True),
    "deit": transformers("DeiTForImageClassificationWithTeacher", PIXELS, **IMAGE, num_labels=10),
    "data2vec_vision": transformers("Data2VecVisionModel", PIXELS, **IMAGE, use_absolute_position_embeddings=True),
    "pvt": transformers(
        "PvtForImageClassification",
        LARGE,
        image_size=64,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        num_labels=10,
    ),
    "pvt_v2": transformers(
        "PvtV2ForImageClassification",
        LARGE,
        image_size=64,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        num_labels=10,
    ),
    "segformer": transformers(
        "SegformerForSemanticSegmentation",
        LARGE,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=10,
    ),
    "glpn": transformers(
        "GLPNForDepthEstimation",
        LARGE,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
    ),
    "swinv2": transformers("Swinv2Model", PIXELS, image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "swin2sr": transformers(
        "Swin2SRForImageSuperResolution",
        PIXELS,
        image_size=32,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        upsampler="pixelshuffle",
    ),
    "mobilevit": transformers(
        "MobileViTForImageClassification",
        LARGE,
        image_size=64,
        hidden_sizes=[32, 32, 48],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 48],
        num_attention_heads=4,
        num_labels=10,
    ),
    "mobilevit_v2": transformers(
        "MobileViTV2ForImageClassification",
        LARGE,
        image_size=64,
        base_attn_unit_dims=[16, 24, 32],
        n_attn_blocks=[1, 1, 1],
        width_multiplier=0.25,
        num_labels=10,
    ),
    "mobilenet_v1": transformers("MobileNetV1ForImageClassification", LARGE, depth_multiplier=0.25, num_labels=10),
    "mobilenet_v2": transformers("MobileNetV2ForImageClassification", LARGE, depth_multiplier=0.25, num_labels=10),
    "efficientnet": transformers(
        "EfficientNetForImageClassification",
        LARGE,
        image_size=64,
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
        num_labels=10,
    ),
    "regnet": transformers(
        "RegNetForImageClassification",
        LARGE,
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        groups_width=8,
        num_labels=10,
    ),
    "levit": transformers(
        "LevitForImageClassification",
        LARGE,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
        num_labels=10,
    ),
    "poolformer": transformers("PoolFormerForImageClassification", LARGE, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_labels=10),
    "cvt": transformers("CvtForImageClassification", LARGE, embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3], num_labels=10),
    "focalnet": transformers(
        "FocalNetForImageClassification",
        LARGE,
        image_size=64,
        embed_dim=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        num_labels=10,
    ),
    "bit": transformers("BitForImageClassification", LARGE, embedding_size=16, **STAGES, num_groups=8, num_labels=10),
    "convnext_v2": transformers("ConvNextV2ForImageClassification", LARGE, **STAGES, num_labels=10),
    "hiera": transformers(
        "HieraModel", LARGE, embed_dim=16, image_size=[64, 64], depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], masked_unit_size=[8, 8]
    ),
    "swiftformer": transformers(
        "SwiftFormerForImageClassification", LARGE, image_size=64, depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48], num_labels=10
    ),
    "vit_mae": transformers(
        "ViTMAEModel",
        both(PIXELS, noise(noise=(16,))),
        **IMAGE,
        decoder_num_attention_heads=4,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=64,
    ),
    "vitdet": transformers(
        "VitDetModel",
        PIXELS,
        **{k: v for k, v in IMAGE.items() if k != "intermediate_size"},
        pretrain_image_size=32,
        window_block_indices=[0],
        window_size=2,
        use_relative_position_embeddings=True,
    ),
    "imagegpt": transformers("ImageGPTModel", tokens(), **GPT),
    "videomae": transformers("VideoMAEModel", FRAMES, **IMAGE, num_frames=4),
    "timesformer": transformers("TimesformerModel", FRAMES, **IMAGE, num_frames=4),
    "vivit": transformers("VivitModel", FRAMES, **IMAGE, num_frames=4, tubelet_size=[2, 8, 8], video_size=[4, 32, 32]),
    "vjepa2": transformers(
        "VJEPA2Model",
        noise(pixel_values_videos=(4, 3, 32, 32)),
        crop_size=32,
        patch_size=8,
        frames_per_clip=4,
        tubelet_size=2,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pred_hidden_size=32,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=2,
    ),
    "dpt": transformers(
        "DPTForDepthEstimation",
        PIXELS,
        **{**IMAGE, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
    ),
    "vilt": transformers("ViltModel", both(TEXT, PIXELS), **ENCODER, image_size=32, patch_size=8),
}


def _depth_anything() -> tuple[nn.Module, Inputs]:
    from transformers import Dinov2Config

    size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    vit = Dinov2Config(**size, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    sizes = {"patch_size": 8, "reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 16, 16, 16], "fusion_hidden_size": 16}
    return transformers("DepthAnythingForDepthEstimation", PIXELS, backbone_config=vit, **sizes, head_hidden_size=8)()


def _upernet() -> tuple[nn.Module, Inputs]:
    from transformers import ConvNextConfig

    stages = ConvNextConfig(**STAGES, out_features=["stage1", "stage2", "stage3", "stage4"])
    return transformers(
        "UperNetForSemanticSegmentation", LARGE, backbone_config=stages, hidden_size=32, use_auxiliary_head=False, num_labels=5
    )()


DETECTOR: dict[str, Any] = {
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_queries": 6,
}
MASKED = both(LARGE, pixel_mask)


def _detector(name: str, stages: tuple[str, ...] = ("stage4",), **more: Any) -> Builder:
    """A detector on the small ResNet."""
    whole = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return transformers(name, MASKED, **DETECTOR, **whole, backbone_config=backbone(stages), **more)


def _maskformer() -> tuple[nn.Module, Inputs]:
    from transformers import DetrConfig, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], window_size=2, out_features=stages)
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    return transformers("MaskFormerModel", LARGE, backbone_config=swin, decoder_config=DetrConfig(**DETECTOR), **sizes)()


def _mask2former() -> tuple[nn.Module, Inputs]:
    from transformers import SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], window_size=2, out_features=stages)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64, "dim_feedforward": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4, "num_queries": 6}
    return transformers("Mask2FormerModel", LARGE, backbone_config=swin, **sizes, **layers)()


def _rt_detr() -> tuple[nn.Module, Inputs]:
    from transformers import RTDetrResNetConfig

    net = RTDetrResNetConfig(embedding_size=16, **STAGES, layer_type="basic", out_features=["stage2", "stage3", "stage4"])
    sizes = {"encoder_hidden_dim": 32, "d_model": 32, "encoder_in_channels": [24, 32, 48], "decoder_in_channels": [32, 32, 32]}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    more = {"decoder_layers": 2, "num_queries": 6, "num_denoising": 0}
    return transformers("RTDetrForObjectDetection", LARGE, backbone_config=net, **sizes, **heads, **more)()


def _sam2() -> tuple[nn.Module, Inputs]:
    from transformers import Sam2HieraDetConfig, Sam2VisionConfig

    stages = {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8]}
    windows = {"window_size_per_stage": [4, 4, 4, 2], "global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4]}
    hiera = Sam2HieraDetConfig(hidden_size=16, image_size=[64, 64], **stages, **windows)
    features = {"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    parts = {
        "vision_config": Sam2VisionConfig(backbone_config=hiera, fpn_hidden_size=32, **features),
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "mask_input_channels": 8},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    }
    return transformers("Sam2Model", sam_prompts, **parts)()


DENSE: dict[str, Builder] = {
    "sam2": _sam2,
    "depth_anything": _depth_anything,
    "upernet": _upernet,
    "yolos": transformers("YolosForObjectDetection", PIXELS, **{**IMAGE, "image_size": [32, 32]}, num_detection_tokens=5),
    "conditional_detr": _detector("ConditionalDetrForObjectDetection"),
    "deformable_detr": _detector("DeformableDetrForObjectDetection", ("stage2", "stage3", "stage4"), num_feature_levels=4),
    "dab_detr": transformers(
        "DabDetrForObjectDetection",
        MASKED,
        **{("hidden_size" if k == "d_model" else k): v for k, v in DETECTOR.items()},
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone(("stage4",)),
    ),
    "table_transformer": _detector("TableTransformerForObjectDetection"),
    "maskformer": _maskformer,
    "mask2former": _mask2former,
    "rt_detr": _rt_detr,
}

SERIES: dict[str, Builder] = {
    "patchtst": transformers(
        "PatchTSTForPrediction",
        noise(past_values=(32, 3)),
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        prediction_length=8,
        loss="mse",
    ),
    "patchtsmixer": transformers(
        "PatchTSMixerForPrediction",
        noise(past_values=(32, 3)),
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        d_model=16,
        num_layers=2,
        prediction_length=8,
        loss="mse",
    ),
    "decision_transformer": transformers(
        "DecisionTransformerModel",
        both(
            noise(states=(5, 6), actions=(5, 3), returns_to_go=(5, 1)),
            lambda: {"timesteps": torch.arange(1, 6).repeat(BATCH, 1), "attention_mask": torch.ones(BATCH, 5, dtype=torch.long).tril(2)},
        ),
        state_dim=6,
        act_dim=3,
        hidden_size=32,
        max_ep_len=32,
        n_positions=32,
        n_layer=2,
        n_head=4,
        vocab_size=1,
    ),
}

LATENTS = both(noise(sample=(4, 16, 16), encoder_hidden_states=(7, 24)), timestep())
WITH_ATTENTION = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
TINY_VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}

UNETS: dict[str, Builder] = {
    "unet2d": diffusers(
        "UNet2DModel",
        both(noise(sample=(3, 16, 16)), timestep()),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        sample_size=16,
    ),
    "unet2d_shift": diffusers(
        "UNet2DModel",
        both(noise(sample=(3, 16, 16)), timestep(), labels("class_labels", 10)),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        num_class_embeds=10,
        sample_size=16,
    ),
    "unet1d": diffusers(
        "UNet1DModel",
        both(noise(sample=(2, 64)), timestep()),
        sample_size=64,
        block_out_channels=(32, 32, 64),
        extra_in_channels=64,
    ),
    "unet_sdxl": diffusers(
        "UNet2DConditionModel",
        both(LATENTS, under("added_cond_kwargs", lambda: {"text_embeds": torch.randn(BATCH, 16), "time_ids": 64 * torch.rand(BATCH, 6)})),
        **WITH_ATTENTION,
        **UNET,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
    ),
    "unet_video": diffusers(
        "UNetSpatioTemporalConditionModel",
        both(noise(sample=(3, 8, 8, 8), encoder_hidden_states=(1, 24), added_time_ids=(3,)), timestep()),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=4,
        num_frames=3,
    ),
    "unet_motion": diffusers(
        "UNetMotionModel",
        both(noise(sample=(4, 3, 8, 8)), timestep(), lambda: {"encoder_hidden_states": torch.randn(3 * BATCH, 7, 24)}),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=8,
    ),
    "i2vgen": diffusers(
        "I2VGenXLUNet",
        both(
            noise(sample=(4, 3, 8, 8), image_latents=(4, 3, 8, 8), image_embeddings=(24,), encoder_hidden_states=(7, 24)),
            timestep(),
            lambda: {"fps": torch.tensor([8, 24])},
        ),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
    ),
    "kandinsky3": diffusers(
        "Kandinsky3UNet",
        both(noise(sample=(4, 16, 16), encoder_hidden_states=(TOKENS, 24)), timestep(), mask("encoder_attention_mask")),
        time_embedding_dim=64,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 32, 32, 32),
        cross_attention_dim=32,
        encoder_hid_dim=24,
    ),
    "stable_cascade": diffusers(
        "StableCascadeUNet",
        noise(sample=(4, 8, 8), clip_text_pooled=(1, 16), timestep_ratio=()),
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=16,
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(4, 4),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=16,
        clip_seq=2,
    ),
    "controlnet": diffusers(
        "ControlNetModel",
        both(LATENTS, noise(controlnet_cond=(3, 32, 32))),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
        **{k: v for k, v in UNET.items() if k != "sample_size"},
    ),
    "t2i_adapter": diffusers("T2IAdapter", noise(x=(3, 64, 64)), channels=[16, 32, 32, 32], num_res_blocks=1),
    "uvit2d": diffusers(
        "UVit2DModel",
        both(
            lambda: {"input_ids": torch.randint(0, 40, (BATCH, 4, 4)), "micro_conds": 64 * torch.rand(BATCH, 5)},
            noise(encoder_hidden_states=(7, 24), pooled_text_emb=(16,)),
        ),
        hidden_size=64,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=24,
        vocab_size=48,
        codebook_size=40,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        sample_size=4,
    ),
}

AUTOENCODERS: dict[str, Builder] = {
    "vae": diffusers("AutoencoderKL", noise(sample=(3, 16, 16)), **TINY_VAE),
    "vae_tiny": diffusers(
        "AutoencoderTiny",
        lambda: {"sample": torch.rand(BATCH, 3, 16, 16)},
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    ),
    "vae_asymmetric": diffusers(
        "AsymmetricAutoencoderKL",
        noise(sample=(3, 16, 16)),
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(16, 32),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(16, 32),
        norm_num_groups=8,
    ),
    "vae_temporal": diffusers(
        "AutoencoderKLTemporalDecoder",
        lambda: {"sample": torch.randn(BATCH, 3, 16, 16), "num_frames": 2},
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
    ),
    "vq": diffusers("VQModel", noise(sample=(3, 16, 16)), **TINY_VAE, num_vq_embeddings=32),
    "vae_cogvideox": diffusers(
        "AutoencoderKLCogVideoX",
        noise(sample=(3, 5, 16, 16)),
        block_out_channels=(8, 8, 16, 16),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    ),
    "vae_wan": diffusers("AutoencoderKLWan", noise(sample=(3, 5, 16, 16)), base_dim=8, z_dim=4, num_res_blocks=1),
    "vae_hunyuan_video": diffusers(
        "AutoencoderKLHunyuanVideo",
        noise(sample=(3, 5, 16, 16)),
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    ),
    "vae_dc": diffusers(
        "AutoencoderDC",
        noise(sample=(3, 16, 16)),
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    ),
    "vae_oobleck": diffusers(
        "AutoencoderOobleck",
        noise(sample=(2, 128)),
        encoder_hidden_size=12,
        decoder_channels=12,
        decoder_input_channels=6,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
    ),
}

LATENT = noise(hidden_states=(4, 8, 8))
HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
VIDEO = noise(hidden_states=(4, 3, 8, 8), encoder_hidden_states=(TOKENS, 24))
PADDED = mask("encoder_attention_mask")


def _hunyuan_dit() -> Inputs:
    angles = torch.rand(16, 16)
    return {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "timestep": torch.tensor([37.0, 611.0]),
        "encoder_hidden_states": torch.randn(BATCH, 7, 24),
        "text_embedding_mask": mask(length=7)()["attention_mask"],
        "encoder_hidden_states_t5": torch.randn(BATCH, TOKENS, 32),
        "text_embedding_mask_t5": mask()()["attention_mask"],
        "image_meta_size": 64 * torch.rand(BATCH, 6),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


TRANSFORMERS: dict[str, Builder] = {
    "transformer2d": diffusers(
        "Transformer2DModel",
        noise(hidden_states=(32, 8, 8), encoder_hidden_states=(7, 24)),
        **HEADS,
        in_channels=32,
        norm_num_groups=8,
        cross_attention_dim=24,
    ),
    "prior": diffusers(
        "PriorTransformer",
        both(noise(hidden_states=(32,), proj_embedding=(32,), encoder_hidden_states=(7, 32)), timestep(), mask(length=7)),
        **HEADS,
        num_layers=2,
        embedding_dim=32,
        num_embeddings=7,
        additional_embeddings=4,
    ),
    "cogvideox": diffusers(
        "CogVideoXTransformer3DModel",
        both(noise(hidden_states=(3, 4, 8, 8), encoder_hidden_states=(TOKENS, 24)), timestep()),
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TOKENS,
    ),
    "cogview4": diffusers(
        "CogView4Transformer2DModel",
        both(
            noise(hidden_states=(4, 8, 8), encoder_hidden_states=(TOKENS, 24)),
            timestep(),
            lambda: {n: 64 * torch.rand(BATCH, 2) for n in ("original_size", "target_size", "crop_coords")},
        ),
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=16,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    ),
    "hunyuan_dit": diffusers(
        "HunyuanDiT2DModel",
        _hunyuan_dit,
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=64,
        num_layers=2,
        cross_attention_dim=24,
        cross_attention_dim_t5=32,
        pooled_projection_dim=32,
        text_len=7,
        text_len_t5=TOKENS,
    ),
    "lumina": diffusers(
        "LuminaNextDiT2DModel",
        both(
            noise(hidden_states=(4, 8, 8), encoder_hidden_states=(TOKENS, 24)),
            lambda: {"timestep": torch.tensor([0.13, 0.71])},
            mask("encoder_mask"),
            lambda: {
                "image_rotary_emb": torch.polar(torch.ones(4, 4, 8), torch.rand(4, 4, 8)),
                "cross_attention_kwargs": {"base_sequence_length": 16},
            },
        ),
        sample_size=8,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=24,
    ),
    "lumina2": diffusers(
        "Lumina2Transformer2DModel",
        both(noise(hidden_states=(4, 8, 8), encoder_hidden_states=(TOKENS, 24)), lambda: {"timestep": torch.tensor([0.13, 0.71])}, PADDED),
        sample_size=8,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16),
        cap_feat_dim=24,
    ),
    "auraflow": diffusers(
        "AuraFlowTransformer2DModel",
        both(noise(hidden_states=(4, 8, 8), encoder_hidden_states=(7, 24)), lambda: {"timestep": torch.tensor([0.13, 0.71])}),
        **HEADS,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=24,
        caption_projection_dim=64,
        pos_embed_max_size=16,
    ),
    "sana": diffusers(
        "SanaTransformer2DModel",
        both(noise(hidden_states=(4, 8, 8), encoder_hidden_states=(TOKENS, 24)), timestep(), PADDED),
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=24,
        sample_size=8,
    ),
    "wan": diffusers(
        "WanTransformer3DModel",
        both(VIDEO, timestep()),
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=16,
    ),
    "ltx": diffusers(
        "LTXVideoTransformer3DModel",
        both(
            noise(hidden_states=(32, 8), encoder_hidden_states=(TOKENS, 24)),
            timestep(),
            PADDED,
            lambda: {"num_frames": 2, "height": 4, "width": 4},
        ),
        **HEADS,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=24,
    ),
    "mochi": diffusers(
        "MochiTransformer3DModel",
        both(noise(hidden_states=(4, 2, 8, 8), encoder_hidden_states=(TOKENS, 24)), timestep(), PADDED),
        **HEADS,
        num_layers=2,
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=16,
        max_sequence_length=TOKENS,
    ),
    "allegro": diffusers(
        "AllegroTransformer3DModel",
        both(noise(hidden_states=(4, 2, 8, 8), encoder_hidden_states=(TOKENS, 24)), timestep(), PADDED),
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=96,
        caption_channels=24,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
    ),
    "latte": diffusers(
        "LatteTransformer3DModel",
        both(noise(hidden_states=(4, 2, 8, 8), encoder_hidden_states=(TOKENS, 24)), timestep()),
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=64,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=24,
        video_length=2,
    ),
    "chroma": diffusers(
        "ChromaTransformer2DModel",
        both(
            noise(hidden_states=(16, 8), encoder_hidden_states=(TOKENS, 24)),
            lambda: {"timestep": torch.tensor([0.13, 0.71])},
            packed_positions,
        ),
        **HEADS,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ),
    "qwen_image": diffusers(
        "QwenImageTransformer2DModel",
        both(
            noise(hidden_states=(16, 8), encoder_hidden_states=(TOKENS, 24)),
            mask("encoder_hidden_states_mask"),
            lambda: {"timestep": torch.tensor([0.13, 0.71]), "img_shapes": [(1, 4, 4)] * BATCH},
        ),
        **HEADS,
        in_channels=8,
        out_channels=2,
        num_layers=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ),
    "hunyuan_video": diffusers(
        "HunyuanVideoTransformer3DModel",
        both(
            noise(hidden_states=(4, 2, 8, 8), encoder_hidden_states=(TOKENS, 24), pooled_projections=(32,)),
            timestep(),
            PADDED,
            lambda: {"guidance": torch.tensor([3500.0, 6000.0])},
        ),
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    ),
    "stable_audio": diffusers(
        "StableAudioDiTModel",
        both(
            noise(hidden_states=(8, 16), encoder_hidden_states=(TOKENS, 24), global_hidden_states=(1, 32)),
            lambda: {"timestep": torch.tensor([0.13, 0.71])},
        ),
        **HEADS,
        sample_size=16,
        in_channels=8,
        num_layers=2,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=32,
        cross_attention_input_dim=24,
    ),
    "prx": diffusers(
        "PRXTransformer2DModel",
        both(noise(hidden_states=(4, 8, 8), encoder_hidden_states=(TOKENS, 24)), lambda: {"timestep": torch.tensor([0.13, 0.71])}, mask()),
        in_channels=4,
        context_in_dim=24,
        hidden_size=64,
        num_heads=4,
        depth=2,
        axes_dim=(8, 8),
    ),
    "flux2": diffusers(
        "Flux2Transformer2DModel",
        both(
            noise(hidden_states=(16, 8), encoder_hidden_states=(TOKENS, 24)),
            lambda: {
                "timestep": torch.tensor([0.13, 0.71]),
                "guidance": torch.tensor([3.5, 5.0]),
                "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)),
                "txt_ids": torch.cartesian_prod(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.arange(float(TOKENS))),
            },
        ),
        **HEADS,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ),
}

HELD_OUT: dict[str, Builder] = {
    **CAUSAL_TEXT,
    **ENCODED_TEXT,
    **PAIRED_TEXT,
    **SOUND,
    **IMAGES,
    **DENSE,
    **SERIES,
    **UNETS,
    **AUTOENCODERS,
    **TRANSFORMERS,
}
