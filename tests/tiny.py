"""Tiny pipelines of the hub's classes, randomly initialised and saved as folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from edgesched.micro.build import MAX_TOKENS, build_tokenizer

WIDTH = 16


def _text_config(projection: int = WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, projection_dim=projection, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32)  # fmt: skip


def _unet(context: int, **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context, **options,
    )  # fmt: skip


def save_tiny(kind: str, folder: Path) -> Path:
    """Save a random pipeline of class ``kind``; its images are 32×32."""
    torch.manual_seed(0)
    if kind == "StableDiffusionPipeline":
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(), text_encoder=CLIPTextModel(_text_config()), tokenizer=build_tokenizer(),
            unet=_unet(WIDTH), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    elif kind == "StableDiffusionXLPipeline":
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(), text_encoder=CLIPTextModel(_text_config()), tokenizer=build_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config()), tokenizer_2=build_tokenizer(),
            unet=_unet(2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
                       projection_class_embeddings_input_dim=6 * 8 + WIDTH),
            scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"),
        )  # fmt: skip
    else:
        encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
        pipeline = PixArtSigmaPipeline(
            tokenizer=build_tokenizer(), text_encoder=encoder, vae=_autoencoder(),
            transformer=PixArtTransformer2DModel(
                sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
                caption_channels=WIDTH, cross_attention_dim=16, in_channels=4, out_channels=8,
                use_additional_conditions=False,
            ),
            scheduler=DPMSolverMultistepScheduler(),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
