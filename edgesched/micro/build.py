"""The parts of the micro family: tokenizer, judge, autoencoder and denoisers, and how they are saved.

Everything is an ordinary diffusers or transformers class, so that a saved folder loads like any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    PreTrainedTokenizerFast,
)

from edgesched.micro.world import IMAGE_SIZE, vocabulary

MAX_TOKENS = 16
PATCH_SIZE = 8
# The end token must not be 2: transformers then pools at the largest token id instead of at the end.
SPECIAL = {"<pad>": 0, "<start>": 1, "<unknown>": 2, "<end>": 3}
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's vocabulary, padded and cut to :data:`MAX_TOKENS`.

    Example:
        >>> build_tokenizer()("a red circle").input_ids[:5]
        [1, 4, 19, 37, 3]
    """
    words = {**SPECIAL, **{word: len(SPECIAL) + i for i, word in enumerate(vocabulary())}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", SPECIAL["<start>"]), ("<end>", SPECIAL["<end>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
        padding_side="right",
    )


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    """Token ids of captions, shape (prompts, MAX_TOKENS), int64."""
    return build_tokenizer()(
        list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


def build_judge(width: int = 160, layers: int = 4, text_width: int = 128, text_layers: int = 3) -> CLIPModel:
    """A CLIP for 64×64 images and the world's captions, randomly initialised.

    Args:
        width: Width of the vision tower.
        layers: Its layers.
        text_width: Width of the text tower.
        text_layers: Its layers.
    """
    text = {
        "vocab_size": len(SPECIAL) + len(vocabulary()),
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": SPECIAL["<pad>"],
        "bos_token_id": SPECIAL["<start>"],
        "eos_token_id": SPECIAL["<end>"],
        "hidden_act": "gelu",
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def prepare_judge(judge: CLIPModel, pixels: torch.Tensor, noise: float = 0.01) -> None:
    """Give an untrained judge a start from which little data suffices.

    Patches are whitened (the principal components of patches of ``pixels``, turned at random, each at unit
    variance): otherwise colour, which has nearly all of the variance, hides shape and texture. Positions start
    as the sines and cosines of row and column (He et al. 2022).

    Args:
        judge: The judge, changed in place.
        pixels: Images in [−1, 1], shape (N, 3, 64, 64).
        noise: Variance added to every component, so that the weakest are not blown up.
    """
    embeddings = judge.vision_model.embeddings
    width, side = judge.config.vision_config.hidden_size, IMAGE_SIZE // PATCH_SIZE
    patches = torch.nn.functional.unfold(pixels, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    variance, direction = torch.linalg.eigh(torch.cov((patches - mean).T))
    whitening = direction[:, -width:] / (variance[-width:] + noise).sqrt()
    turn, _ = torch.linalg.qr(torch.randn(width, width))
    whitening = turn @ whitening.T
    where = torch.arange(side) * torch.pi / 4
    angles = where[:, None] * 100.0 ** -(torch.arange(width // 4) / (width // 4))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    positions = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)
    with torch.no_grad():
        embeddings.patch_embedding.weight.copy_(whitening.reshape(width, 3, PATCH_SIZE, PATCH_SIZE))
        embeddings.position_embedding.weight[1:] = positions - whitening @ mean
        for table in (judge.text_model.embeddings.token_embedding, judge.text_model.embeddings.position_embedding):
            table.weight.normal_(0, 0.1)


def build_autoencoder(channels: int = 32, latent_channels: int = 16) -> AutoencoderTiny:
    """An autoencoder from 64×64×3 to 8×8×``latent_channels``, randomly initialised.

    Its blocks sit at 32×32 and below: at full resolution they cost most and give least.

    Args:
        channels: Channels of every block.
        latent_channels: Channels of a latent.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 0),
        latent_channels=latent_channels,
    )


def build_denoiser(
    channels: Sequence[int], layers: int, latent_channels: int = 16, text_width: int = 128, head_channels: int = 32
) -> UNet2DConditionModel:
    """A conditional UNet on 8×8 latents with cross-attention at every resolution, randomly initialised.

    Args:
        channels: Channels at every resolution, from 8×8 down.
        layers: Layers of every block.
        latent_channels: Channels of a latent.
        text_width: Width of the text states.
        head_channels: Channels of an attention head.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        mid_block_type=None,
        cross_attention_dim=text_width,
        attention_head_dim=tuple(max(1, c // head_channels) for c in channels),  # diffusers reads it as head counts
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule that the denoisers are trained on: cosine, v-prediction, zero terminal SNR."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def text_encoder(judge: CLIPModel) -> CLIPTextModel:
    """The judge's text tower as the text encoder of a pipeline."""
    encoder = CLIPTextModel(judge.config.text_config)
    source = judge.text_model.state_dict()
    target = encoder.state_dict()
    prefix = "" if next(iter(target)) in source else "text_model."
    encoder.load_state_dict({prefix + name: value for name, value in source.items()})
    return encoder.eval()


def save_judge(judge: CLIPModel, folder: Path) -> None:
    """Save the judge with its processor, weights in fp16, as ``CLIPModel.from_pretrained`` reads it.

    Args:
        judge: The judge; it is rounded to fp16.
        folder: Where it goes.
    """
    judge.to(torch.float16).save_pretrained(folder)
    judge.float()
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    CLIPProcessor(image_processor=image_processor, tokenizer=build_tokenizer()).save_pretrained(folder)


def save_pipeline(autoencoder: AutoencoderTiny, judge: CLIPModel, denoiser: UNet2DConditionModel, folder: Path) -> None:
    """Save one model as a Stable Diffusion pipeline, weights in fp16.

    Args:
        autoencoder: Trained autoencoder, its scaling factor in its configuration.
        judge: Trained judge, whose text tower becomes the text encoder.
        denoiser: Trained denoiser.
        folder: Where it goes; what is there is deleted.
    """
    if folder.exists():
        shutil.rmtree(folder)
    parts: dict[str, Any] = {
        "vae": autoencoder,
        "text_encoder": text_encoder(judge),
        "tokenizer": build_tokenizer(),
        "unet": denoiser,
        "scheduler": build_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder, safe_serialization=True)
    for weights in folder.rglob("*.safetensors"):
        tensors = load_file(weights)
        save_file(
            {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in tensors.items()},
            weights,
            metadata={"format": "pt"},
        )


def parameters_millions(module: nn.Module) -> float:
    """Number of parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6
