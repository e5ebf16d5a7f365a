"""Requests are really served in order, shares are realised, and what is wrong is said."""

import pytest
import torch

import edgesched as es
from edgesched.errors import PlanError, RequestError
from edgesched.serving.measure import alone, serve
from edgesched.streams.arrivals import RequestStream, poisson
from edgesched.streams.queues import pollaczek_khinchine
from edgesched.types import PromptSet

PROMPTS = PromptSet(("p0", "p1"), ("a red circle", "a blue square"), ("a", "b"))


class Sleeper:
    """A model whose denoising steps sleep."""

    def __init__(self, step_s):
        self.step_s, self.made = step_s, []

    def forget_prompts(self):
        pass

    def generate(self, texts, steps, seeds, on_step=None):
        import time

        for number in range(steps):
            time.sleep(self.step_s)
            if on_step is not None:
                on_step(number)
        self.made.append((texts[0], seeds[0]))


def plan(p, steps, share):
    return es.Plan([p], [steps], [share])


def test_shares_are_realised_and_latencies_are_near_the_simulators():
    models = {"quick": Sleeper(0.002), "slow": Sleeper(0.004)}
    chosen = plan([[0.5, 0.5], [0.2, 0.8]], [4, 5], [0.4, 0.6])
    stream = poisson([4.0, 4.0], ["a", "b"], requests=60, seed=2)
    found = serve(stream, PROMPTS, models, chosen, seed=1)
    part = found.worked_s / found.worked_s.sum()
    assert part.tolist() == pytest.approx([0.4, 0.6], abs=0.05)
    assert len(models["quick"].made) + len(models["slow"].made) == 60 + 2 * 16
    errors = found.errors()
    assert errors["measured_vs_resimulated_pct"] < 40
    assert bool((found.measured_s > 0.5 * found.simulated_s).all())
    assert torch.allclose(found.inside_s, found.alone_s, rtol=0.5)
    rate = 59 / 60 * torch.bincount(found.model, minlength=2) / (stream.arrival_s[0, -1] - stream.arrival_s[0, 0])
    assert torch.allclose(found.predicted_s, pollaczek_khinchine(rate, found.alone_s / found.share))


def test_what_no_model_was_given_stays_idle():
    stream = RequestStream([[0.0]], [[0]], ("a",))
    half = serve(stream, PROMPTS, {"one": Sleeper(0.01)}, plan([[1.0]], [8], [0.25]))
    assert float(half.measured_s) == pytest.approx(0.32, rel=0.35)
    assert float(half.simulated_s) == pytest.approx(0.32, rel=0.2)


def test_time_alone_is_a_median_after_warming_up():
    seconds = alone([Sleeper(0.003), Sleeper(0.006)], [2, 2], "a red circle", repeats=3)
    assert seconds.tolist() == pytest.approx([0.006, 0.012], rel=0.5)


def test_an_error_in_a_model_ends_the_service_with_it():
    class Broken(Sleeper):
        def generate(self, texts, steps, seeds, on_step=None):
            if on_step is not None:
                raise RuntimeError("no memory")
            super().generate(texts, steps, seeds)

    stream = RequestStream([[0.0, 0.0]], [[0, 1]], ("a", "b"))
    with pytest.raises(RuntimeError, match="no memory"):
        serve(stream, PROMPTS, {"one": Broken(0.001)}, plan([[1.0], [1.0]], [2], [1.0]))


def test_bad_input_is_named():
    stream = poisson([1.0, 1.0], ["a", "b"], requests=4)
    models = {"one": Sleeper(0.001), "two": Sleeper(0.001)}
    with pytest.raises(RequestError, match="category 'b' of the requests has none"):
        serve(stream, PromptSet(("p0",), ("x",), ("a",)), models, plan([[1.0, 0.0]] * 2, [1, 1], [1.0, 0.0]))
    with pytest.raises(PlanError, match="one plan for 1 models"):
        serve(stream, PROMPTS, {"one": Sleeper(0.001)}, plan([[1.0, 0.0]] * 2, [1, 1], [1.0, 0.0]))
    with pytest.raises(PlanError, match="share: a model that serves requests has none"):
        serve(stream, PROMPTS, models, plan([[1.0, 0.0]] * 2, [1, 1], [0.0, 1.0]))
    with pytest.raises(RequestError, match="one replica"):
        serve(
            poisson([1.0, 1.0], ["a", "b"], replicas=2, requests=3),
            PROMPTS,
            models,
            plan([[1.0, 0.0]] * 2, [1, 1], [1.0, 0.0]),
        )


@pytest.mark.weights
def test_real_pipelines_are_interrupted_between_steps_and_make_the_same_image():
    from edgesched.generation.diffusion import DiffusionModel, image_seed

    model = DiffusionModel("package:micro/weights/micro_small", resolution=64)
    stream = RequestStream([[0.0, 0.01, 0.02]], [[0, 1, 0]], ("a", "b"))
    found = serve(stream, PROMPTS, {"small": model}, plan([[1.0], [1.0]], [2], [0.8]))
    assert bool((found.measured_s > 0).all())
    assert bool((found.measured_s.diff() > -0.05).all())
    seen = []
    interrupted = model.generate(["a red circle"], 3, [image_seed("p0", 0)], seen.append)
    assert seen == [0, 1, 2]
    assert (interrupted == model.generate(["a red circle"], 3, [image_seed("p0", 0)])).all()
