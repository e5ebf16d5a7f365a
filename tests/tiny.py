"""Tiny pipelines of the hub's classes, randomly initialised and saved as folders."""

from pathlib import Path

import diffusers
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
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

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


def _tokens(limit: int = MAX_TOKENS):
    made = build_tokenizer()
    made.model_max_length = limit
    return made


def save_other(kind: str, folder: Path) -> Path:
    """Save a random pipeline of a class whose texts are encoded inside its call; its images are 32×32 or 64×64."""
    torch.manual_seed(0)
    autoencoder = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "sample_size": 32,
    }  # fmt: skip
    if kind == "StableDiffusion3Pipeline":
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
        )  # fmt: skip
        t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
        vae = AutoencoderKL(**autoencoder, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
            text_encoder=CLIPTextModelWithProjection(_text_config()), tokenizer=_tokens(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config()), tokenizer_2=_tokens(), text_encoder_3=t5,
            tokenizer_3=_tokens(512),
        )  # fmt: skip
    else:
        unet = UNet2DConditionModel(
            in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim=16, encoder_hid_dim_type="image_proj",
            cross_attention_dim=16, attention_head_dim=4, mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(32, 64),
            layers_per_block=1, resnet_time_scale_shift="scale_shift",
        )  # fmt: skip
        movq = diffusers.VQModel(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, layers_per_block=1,
            norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
        )  # fmt: skip
        prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=16, num_layers=1,
                                           num_embeddings=MAX_TOKENS)  # fmt: skip
        seen = CLIPVisionConfig(hidden_size=16, image_size=28, projection_dim=16, intermediate_size=32, num_attention_heads=2,
                                num_hidden_layers=1, patch_size=14)  # fmt: skip
        drawn = diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        )
        pipeline = diffusers.KandinskyV22CombinedPipeline(
            unet=unet, scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1), movq=movq,
            prior_prior=prior, prior_image_encoder=CLIPVisionModelWithProjection(seen),
            prior_text_encoder=CLIPTextModelWithProjection(_text_config()), prior_tokenizer=_tokens(), prior_scheduler=drawn,
            prior_image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
