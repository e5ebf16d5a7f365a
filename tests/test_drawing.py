"""An image depends on its prompt, steps and seed alone, whatever its pipeline draws, encodes or shares a batch with."""

import numpy as np
import pytest
import torch
from tiny import save_other, save_tiny

from edgesched.errors import ModelError
from edgesched.generation import drawing
from edgesched.generation.diffusion import DiffusionModel

TEXTS = ["a pink heart", "a red star " * 5, "two blue stars"]


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return save_other("StableDiffusion3Pipeline", tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny("StableDiffusionPipeline", tmp_path_factory.mktemp("plain"))


def alike(model, steps=3):
    """Largest difference of images made together, alone, twice, and with a callback, under other global states."""
    torch.manual_seed(1)
    together = model.generate(TEXTS, steps, [7, 8, 9]).astype(int)
    torch.manual_seed(2)
    alone = np.concatenate([model.generate([t], steps, [s]) for t, s in zip(TEXTS, (7, 8, 9), strict=True)]).astype(int)
    torch.manual_seed(3)
    told = model.generate(TEXTS, steps, [7, 8, 9], lambda _: None).astype(int)
    assert np.abs(together - model.generate(TEXTS, steps, [17, 18, 19])).max() > 10
    return max(np.abs(together - alone).max(), np.abs(together - told).max())


@pytest.mark.parametrize(
    "how", [{}, {"scheduler_options": {"stochastic_sampling": True}}, {"scheduler": "FlowMatchLCMScheduler"}]
)
def test_flow_samplers_that_draw_from_the_global_state_are_seeded(flow, how):
    assert alike(DiffusionModel(str(flow), resolution=32, guidance_scale=4.0, **how)) <= 2


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_samplers_that_take_generators_make_batches(plain, scheduler):
    model = DiffusionModel(str(plain), resolution=32, scheduler=scheduler)
    assert alike(model) <= 2
    assert not model._one_by_one(3)


def test_the_state_of_others_stays_as_it_was(flow):
    model = DiffusionModel(str(flow), resolution=32, scheduler_options={"stochastic_sampling": True})
    model.generate(TEXTS[:1], 2, [1])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.generate(TEXTS[:1], 2, [1])
    model.generate(TEXTS[:1], 2, [1], lambda _: None)
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_be_made_twice_is_refused():
    rng = np.random.default_rng(0)

    def make(texts, steps, seeds, on_step):
        return rng.integers(0, 255, (len(texts), 4, 4, 3)).astype(np.uint8)

    with pytest.raises(ModelError, match="x: the same prompt, steps and seed give images that differ by"):
        drawing.must_be_alone(make, 2, 2, torch.device("cpu"), True, "x")


def test_a_batch_that_tells_is_found_out():
    def make(texts, steps, seeds, on_step):
        longest = max(map(len, texts))
        return np.stack([np.full((4, 4, 3), longest + seed, np.uint8) for seed in seeds])

    assert drawing.must_be_alone(make, 2, 2, torch.device("cpu"), True, "x")
    assert not drawing.must_be_alone(
        lambda texts, *_: np.zeros((len(texts), 4, 4, 3), np.uint8), 2, 2, torch.device("cpu"), True, "x"
    )
