"""The shipped pipelines and judge, loaded as any other folder."""

import numpy as np
import pytest
import torch

from edgesched.data.paths import resolve
from edgesched.data.table import ScoreTable
from edgesched.errors import ModelError
from edgesched.generation.diffusion import DiffusionModel, image_seed
from edgesched.generation.scores import CLIPScore, Colourfulness
from edgesched.micro.world import caption, render, sample_scene

pytestmark = pytest.mark.weights
MODELS = ("micro_small", "micro_base", "micro_large")


@pytest.fixture(scope="module")
def small():
    return DiffusionModel("package:micro/weights/micro_small", resolution=64, guidance_scale=2.0)


@pytest.fixture(scope="module")
def judge():
    return CLIPScore("package:micro/weights/judge")


@pytest.mark.parametrize("name", MODELS)
def test_folders_load_by_the_libraries_own_calls(name):
    from diffusers import AutoPipelineForText2Image

    pipeline = AutoPipelineForText2Image.from_pretrained(resolve(f"package:micro/weights/{name}"), use_safetensors=True)
    image = pipeline("a large red circle", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


def test_the_family_shares_text_encoder_and_autoencoder_and_grows():
    from pathlib import Path

    root = Path(resolve("package:micro/weights"))
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert len({(root / name / part).read_bytes() for name in MODELS}) == 1
    sizes = [(root / name / "unet/diffusion_pytorch_model.safetensors").stat().st_size for name in MODELS]
    assert sizes[0] * 1.5 < sizes[1]
    assert sizes[1] * 1.5 < sizes[2]
    assert sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) <= 24 * 2**20


def test_an_image_does_not_depend_on_its_batch(small):
    texts = ["a large red circle", "two blue stars above one green ring", "a pink heart"]
    seeds = [image_seed(t, 0) for t in texts]
    together = small.generate(texts, 3, seeds).astype(int)
    alone = np.concatenate([small.generate([t], 3, [s]) for t, s in zip(texts, seeds, strict=True)]).astype(int)
    assert together.shape == (3, 64, 64, 3)
    assert np.abs(together - alone).max() <= 2
    assert np.abs(together - small.generate(texts, 3, [s + 1 for s in seeds])).max() > 20


def test_seed_depends_on_prompt_and_seed_only():
    assert image_seed("a", 0) == image_seed("a", 0)
    assert len({image_seed(p, s) for p in "abc" for s in range(3)}) == 9


def test_errors_are_one_line():
    away = DiffusionModel("nobody/no-such-model", revision="main")
    with pytest.raises(ModelError, match="cannot be loaded: no such local folder.*give its folder") as caught:
        away.generate(["x"], 1, [0])
    assert "\n" not in str(caught.value)
    for call in (away.check, CLIPScore("nobody/no-such-clip").check):
        with pytest.raises(ModelError, match=r"the hub cannot be reached.*\.<name>\.path=<folder>"):
            call()
    with pytest.raises(ModelError, match="no such folder"):
        DiffusionModel("/no/such/folder").check()
    with pytest.raises(ModelError, match="ships no such folder"):
        resolve("package:micro/weights/none")
    turbo = DiffusionModel("package:micro/weights/micro_small", steps=[1, 2, 4])
    with pytest.raises(ModelError, match="3 is not one of its step counts"):
        turbo.generate(["x"], 3, [0])
    with pytest.raises(ModelError, match="float64"):
        DiffusionModel("x", dtype="float64")


def test_score_is_the_cosine_in_points_whatever_the_batch(judge):
    rng = np.random.default_rng(4)
    scenes = [sample_scene(c, rng) for c in ("Basic", "Detail", "Imagination", "Complex")]
    images = np.stack([render(s, rng) for s in scenes])
    texts = [caption(s) for s in scenes]
    scores = judge.score(images, texts)
    assert scores.mean() > 75
    assert torch.allclose(scores[2:3], judge.score(images[2:3], texts[2:3]), atol=1e-3)
    shuffled = judge.score(images, texts[1:] + texts[:1])
    assert (shuffled < scores).all()
    judge.update(images, texts)
    judge.update(images[:1], texts[:1])
    assert judge.compute().shape == (5,)
    judge.reset()
    with pytest.raises(ModelError, match="2 images for 1 prompts"):
        judge.score(images[:2], texts[:1])


def test_prompts_over_the_token_limit_are_flagged(judge, caplog):
    rng = np.random.default_rng(0)
    image = render(sample_scene("Basic", rng), rng)[None]
    long = "a red circle " * 10
    judge.score(image, [long])
    assert judge.truncates(long)
    assert not judge.truncates("a red circle")
    assert caplog.text.count("is cut to 16") == 1


def test_colourfulness_is_zero_for_grey_and_high_for_colour():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    grey, colour = Colourfulness().score(np.stack([levels, noise]), ["a", "b"]).tolist()
    assert grey == pytest.approx(0, abs=1e-4)
    assert colour > 50


def test_judge_prefers_the_true_caption_on_unseen_scenes():
    from transformers import CLIPModel

    from edgesched.micro.family import examine_judge

    found = examine_judge(CLIPModel.from_pretrained(resolve("package:micro/weights/judge"), dtype=torch.float32), 60)
    assert min(found["accuracy"].values()) >= 0.95
    assert min(found["accuracy_by_attribute"].values()) >= 0.9
    assert set(found["accuracy_by_attribute"]) == {
        "colour",
        "shape",
        "texture",
        "count",
        "size",
        "relation",
        "background",
    }
    assert min(found["render"].values()) > 80


def test_the_shipped_scores_show_a_real_trade_off():
    table = ScoreTable.load()
    mean = table.frame.groupby(["model", "category", "steps"])["clip_score"].mean()
    best = mean.groupby(["model", "category"]).max().unstack()
    small, base, large = (best.loc[name] for name in MODELS)
    assert (small < base).all()
    assert (base < large).all()
    hard, lead = small.sort_values().index, large - small
    assert lead[hard[:2]].min() > lead[hard[-1]]
    for name in MODELS:  # quality grows with steps and saturates
        curve = mean[name].groupby("steps").mean()
        assert curve[8] > curve[1]
        assert curve.max() - curve[30] < 1.5
