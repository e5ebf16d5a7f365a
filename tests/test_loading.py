"""Pipelines are loaded whole or not at all, and every setting takes effect where images are denoised."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_other, save_tiny

from edgesched.data.paths import resolve
from edgesched.errors import ModelError, StepsRefused
from edgesched.generation import loading
from edgesched.generation.diffusion import DiffusionModel
from edgesched.generation.scores import CLIPScore

SHIPPED = "package:micro/weights/micro_small"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny("StableDiffusionPipeline", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    return save_other("KandinskyV22CombinedPipeline", tmp_path_factory.mktemp("combined"))


def without(folder, file, word, to):
    """A copy of a folder that lacks the weights with a word in their names."""
    shutil.copytree(folder, to)
    weights = load_file(to / file)
    save_file({k: v.clone() for k, v in weights.items() if word not in k}, to / file, metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("part", "word"),
    [
        ("text_encoder/model.safetensors", "layers.1."),
        ("unet/diffusion_pytorch_model.safetensors", "mid_block.resnets.0.conv1"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out"),
    ],
)
def test_a_part_without_all_its_weights_is_refused_by_name(plain, tmp_path, part, word):
    model = DiffusionModel(str(without(plain, part, word, tmp_path / "gone")), resolution=32)
    with pytest.raises(ModelError, match=rf"part '{part.split('/')[0]}': weight .*{word}.* is missing") as told:
        _ = model.pipeline
    assert "\n" not in str(told.value)


def test_a_part_of_a_combined_pipeline_without_all_its_weights_is_refused(combined, tmp_path):
    folder = without(combined, "prior_text_encoder/model.safetensors", "layers.1.", tmp_path / "gone")
    with pytest.raises(ModelError, match="part 'prior_text_encoder': weight .* is missing"):
        _ = DiffusionModel(str(folder), resolution=64).pipeline


@pytest.mark.weights
def test_a_judge_without_all_its_weights_is_refused(tmp_path):
    from pathlib import Path

    folder = without(
        Path(resolve("package:micro/weights/judge")), "model.safetensors", "vision_model.encoder.", tmp_path / "j"
    )
    with pytest.raises(ModelError, match=r"score model .*weight 'vision_model.*is missing, and \d+ more"):
        CLIPScore(str(folder)).score(np.zeros((1, 64, 64, 3), np.uint8), ["a red circle"])


def test_a_variant_is_loaded_and_one_that_is_not_there_is_refused(plain, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(plain).to(torch.float16).save_pretrained(folder, variant="fp16")
    made = DiffusionModel(str(folder), resolution=32, variant="fp16").generate(["a red circle"], 2, [1])
    assert (
        np.abs(made.astype(int) - DiffusionModel(str(plain), resolution=32).generate(["a red circle"], 2, [1])).max()
        < 30
    )
    with pytest.raises(ModelError, match=r"no part has weights of the variant 'ema'.*leave variant out"):
        _ = DiffusionModel(str(folder), resolution=32, variant="ema").pipeline


def test_another_scheduler_takes_effect_where_a_combined_pipeline_denoises(combined):
    saved = DiffusionModel(str(combined), resolution=64)
    other = DiffusionModel(str(combined), resolution=64, scheduler="DDPMScheduler")
    images = [m.generate(["a pink heart"], 3, [7]).astype(int) for m in (saved, other)]
    assert type(other.pipeline.decoder_pipe.scheduler).__name__ == "DDPMScheduler"
    assert type(other.pipeline.prior_pipe.scheduler).__name__ == "UnCLIPScheduler"
    assert np.abs(images[0] - images[1]).max() > 10
    assert other.truncates("a red star " * 200)
    assert not other.truncates("a red star")


def test_an_option_that_the_scheduler_does_not_know_is_refused_with_the_nearest():
    model = DiffusionModel(SHIPPED, resolution=64, scheduler_options={"use_karas_sigmas": True},
                           scheduler="DPMSolverMultistepScheduler")  # fmt: skip
    with pytest.raises(ModelError, match="no option 'use_karas_sigmas'; did you mean 'use_karras_sigmas'"):
        model.generate(["a"], 2, [0])
    with pytest.raises(ModelError, match="no scheduler class 'UNet2DModel'"):
        DiffusionModel(SHIPPED, resolution=64, scheduler="UNet2DModel").generate(["a"], 2, [0])


def test_a_tokenizer_without_a_limit_gets_that_of_its_encoder(plain):
    model = DiffusionModel(str(plain), resolution=32)
    model.pipeline.tokenizer.model_max_length = int(1e30)
    loading.limit_tokenizers(model.pipeline)
    assert model.pipeline.tokenizer.model_max_length == model.pipeline.text_encoder.config.max_position_embeddings
    assert model.truncates("a red star " * 60)
    assert model.generate(["a red star " * 60], 2, [0]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("resolution", [0, [64], [64, 64, 64], [64, -1], [64, 32.5], True])
def test_a_size_that_is_none_is_refused(resolution):
    with pytest.raises(ModelError, match="resolution: expected pixels"):
        DiffusionModel(SHIPPED, resolution=resolution)


@pytest.mark.weights
def test_images_may_be_wider_than_high():
    assert DiffusionModel(SHIPPED, resolution=[64, 128]).generate(["a red circle"], 2, [1]).shape == (1, 64, 128, 3)


@pytest.mark.weights
def test_a_step_count_that_the_pipeline_refuses_is_named_and_the_next_is_made():
    model = DiffusionModel(SHIPPED, resolution=64, scheduler="PNDMScheduler")
    with pytest.raises(StepsRefused, match=f"{SHIPPED} at 2 steps: ValueError") as told:
        model.generate(["a red circle"], 2, [1])
    assert (told.value.model, told.value.steps) == (SHIPPED, 2)
    assert "\n" not in str(told.value)
    assert model.generate(["a red circle"], 6, [1]).shape == (1, 64, 64, 3)


@pytest.mark.weights
def test_an_image_that_is_not_finite_is_refused():
    model = DiffusionModel(SHIPPED, resolution=64, guidance_scale=2.0, scheduler="EulerAncestralDiscreteScheduler")
    with pytest.raises(StepsRefused, match="at 3 steps: an image is not finite"):
        model.generate(["a red circle"], 3, [1])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError("full"), KeyboardInterrupt(), ZeroDivisionError("mine")]
)
def test_what_is_no_refusal_passes(plain, error):
    model = DiffusionModel(str(plain), resolution=32)
    model.generate(["a red circle"], 2, [1])

    def after(number):
        raise error

    with pytest.raises(type(error)):
        model.generate(["a red circle"], 2, [1], after)


def test_memory_that_runs_out_inside_the_pipeline_is_no_refusal(plain, monkeypatch):
    model = DiffusionModel(str(plain), resolution=32)
    model.generate(["a red circle"], 2, [1])
    for raised, told in (
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError),
        (RuntimeError("odd shapes"), StepsRefused),
    ):

        def decode(*_, raised=raised, **__):
            raise raised

        monkeypatch.setattr(model.pipeline.vae, "decode", decode)
        with pytest.raises(told):
            model.generate(["a red circle"], 2, [1])


def test_settings_name_what_images_depend_on_and_nothing_else():
    one = DiffusionModel(SHIPPED, resolution=64, memory_gib=1.0, step_time_s=0.1, device="cpu").settings()
    other = DiffusionModel(SHIPPED, resolution=64, memory_gib=2.0, steps=[1, 2]).settings()
    assert one == other
    assert DiffusionModel(SHIPPED, resolution=64, guidance_scale=1.5).settings() != one
    assert "device" not in one
