"""Requests are really served in order, shares are realised, and what is wrong is said; time is the tests' own."""

import itertools
import threading

import pytest
import torch

import edgesched as es
from edgesched.errors import ArgumentError, PlanError, RequestError
from edgesched.serving.measure import alone, serve
from edgesched.streams.arrivals import RequestStream, poisson
from edgesched.types import PromptSet

PROMPTS = PromptSet(("p0", "p1"), ("a red circle", "a blue square"), ("a", "b"))


class VirtualClock:
    """A time that passes when somebody sleeps, and by ``tick`` seconds whenever it is asked for."""

    def __init__(self, tick=0.0):
        self.time, self.tick = 0.0, tick

    def now(self):
        self.time += self.tick
        return self.time

    def sleep(self, seconds):
        assert seconds > 0, "a loop that sleeps no time never ends"
        self.time += seconds


class Sleeper:
    """A model whose denoising steps sleep: always the same time, or the next of several images' times."""

    def __init__(self, clock, *step_s):
        self.clock, self.step_s, self.made = clock, itertools.cycle(step_s), []

    def forget_prompts(self):
        pass

    def generate(self, texts, steps, seeds, on_step=None):
        step_s = next(self.step_s)
        for number in range(steps):
            self.clock.sleep(step_s)
            if on_step is not None:
                on_step(number)
        self.made.append((texts[0], seeds[0]))


def plan(p, steps, share):
    return es.Plan([p], [steps], [share])


def waited(arrival, service_s):
    """Seconds from arrival to delivery, one request after the other."""
    free, found = 0.0, []
    for came in arrival:
        free = max(free, came) + service_s
        found.append(free - came)
    return torch.tensor(found, dtype=torch.float64)


def test_shares_are_realised_and_latencies_are_the_simulators_to_a_few_turns():
    clock = VirtualClock()
    turn, steps, share = (0.002, 0.004), (40, 50), (0.4, 0.6)
    models = {"quick": Sleeper(clock, turn[0]), "slow": Sleeper(clock, turn[1])}
    chosen = plan([[0.5, 0.5], [0.2, 0.8]], list(steps), list(share))
    stream = poisson([0.8, 0.8], ["a", "b"], requests=60, seed=2)
    found = serve(stream, PROMPTS, models, chosen, seed=1, clock=clock)
    assert len(models["quick"].made) + len(models["slow"].made) == 60 + 2 * 16
    assert found.alone_s.tolist() == pytest.approx([0.08, 0.2])
    assert found.inside_s.tolist() == pytest.approx([0.08, 0.2])
    # Stride scheduling: what each had of the machine for its share never differs by more than one turn for its share.
    passed = (found.worked_s / found.share).tolist()
    assert abs(passed[0] - passed[1]) <= max(t / f for t, f in zip(turn, share, strict=True)) + 1e-9
    arrival = stream.arrival_s[0] - stream.arrival_s[0, 0]
    for m in (0, 1):
        mine = found.model == m
        exact = waited(arrival[mine].tolist(), turn[m] * steps[m] / share[m])
        assert torch.allclose(found.simulated_s[mine], exact)
        assert torch.allclose(found.resimulated_s[mine], exact)
        # A request waits for the turn that runs, and one idle turn of its own model may have just begun.
        slack = (max(turn) + turn[m]) / share[m] + max(turn)
        assert float((found.measured_s[mine] - exact).abs().max()) <= slack
        rate = int(mine.sum()) / 60 * 59 / float(arrival[-1])
        rho = rate * turn[m] * steps[m] / share[m]
        assert float(found.load[m]) == pytest.approx(rho)
        assert float(found.predicted_s[m]) == pytest.approx(turn[m] * steps[m] / share[m] * (1 + rho / (2 * (1 - rho))))
    errors = found.errors()
    expected = float(found.predicted_s[found.model].mean())
    assert errors["measured_vs_predicted_pct"] == pytest.approx(100 * abs(errors["measured_s"] / expected - 1))
    assert errors["measured_vs_simulated_pct"] == pytest.approx(errors["measured_vs_resimulated_pct"])


def test_what_no_model_was_given_stays_idle():
    stream = RequestStream([[0.0]], [[0]], ("a",))
    for share in (0.5, 0.25):
        clock = VirtualClock()
        found = serve(stream, PROMPTS, {"one": Sleeper(clock, 1 / 64)}, plan([[1.0]], [8], [share]), clock=clock)
        assert float(found.simulated_s) == pytest.approx(8 / 64 / share)
        # The first turn needs no wait: 8 turns stand 1 / share apart, to the one idle turn that a rounding may decide.
        slack = 1e-9 if share == 0.5 else 1 / 64 + 1e-9
        assert float(found.measured_s) == pytest.approx((7 / share + 1) / 64, abs=slack)
        assert float(found.load) == 0
        assert found.errors()["predicted_s"] == pytest.approx(8 / 64 / share)


def test_time_alone_is_a_median_after_warming_up():
    clock = VirtualClock()
    models = [Sleeper(clock, 9.0, 0.003, 5.0, 0.004), Sleeper(clock, 0.006)]
    assert alone(models, [2, 2], "a red circle", repeats=3, clock=clock).tolist() == pytest.approx([0.008, 0.012])
    with pytest.raises(ArgumentError, match="repeats: expected at least 1 image of each model to time, got 0"):
        alone(models, [2, 2], "a red circle", repeats=0, clock=clock)


def test_an_overload_has_no_predicted_mean_and_no_number_that_json_lacks():
    clock = VirtualClock()
    stream = RequestStream([[0.0, 0.1, 0.2, 0.3]], [[0, 0, 0, 1]], ("a", "b"))
    models = {"one": Sleeper(clock, 0.1), "two": Sleeper(clock, 0.001)}
    found = serve(stream, PROMPTS, models, plan([[1.0, 0.0], [0.0, 1.0]], [2, 1], [0.5, 0.5]), clock=clock)
    assert float(found.load[0]) == pytest.approx(3 / 4 * 3 / 0.3 * 0.2 / 0.5)  # n arrivals end n − 1 gaps
    assert float(found.load[1]) < 1
    errors = found.errors()
    assert errors["predicted_s"] is None
    assert errors["measured_vs_predicted_pct"] is None
    assert all(value == value and abs(value) < 100 for value in errors.values() if value is not None)


def test_a_stream_that_asks_more_than_its_plan_was_made_for_is_told_in_words():
    from edgesched.tasks.simulate import _overload_words

    stream = RequestStream([[0.0, 1.0, 2.0, 3.0, 4.0]], [[0] * 5], ("a",))  # 5 requests until second 4
    s = es.Scenario([[0.1]], [[[[10.0]]]], [1], [[1.0]], [[0.0]], [1.0], latency="queue")
    plans = {"half": plan([[1.0]], [1], [0.5]), "tenth": plan([[1.0]], [1], [0.1])}
    said = _overload_words(stream, s, plans, ("m",))
    assert [words.split(" times")[0] for words in said] == [
        "Under half this stream asks m for 2.50",
        "Under tenth this stream asks m for 12.50",
    ]
    calm = RequestStream([[0.0, 40.0]], [[0, 0]], ("a",))
    assert _overload_words(calm, s, {"half": plans["half"]}, ("m",)) == []


def test_seconds_measured_before_are_taken_as_they_are():
    clock = VirtualClock()
    model = Sleeper(clock, 0.5)
    stream = RequestStream([[0.0, 0.0]], [[0, 0]], ("a",))
    known = torch.tensor([1.25])
    found = serve(stream, PROMPTS, {"one": model}, plan([[1.0]], [2], [1.0]), alone_s=known, clock=clock)
    assert len(model.made) == 2
    assert found.alone_s.tolist() == [1.25]
    assert found.inside_s.tolist() == pytest.approx([1.0])
    assert found.measured_s.tolist() == pytest.approx([1.0, 2.0])
    for wrong in ([0.0], [float("nan")], [1.0, 1.0]):
        with pytest.raises(ArgumentError, match="alone_s: expected 1 numbers above 0"):
            serve(stream, PROMPTS, {"one": model}, plan([[1.0]], [2], [1.0]), alone_s=torch.tensor(wrong), clock=clock)


def test_models_are_served_on_one_thread_each_and_others_keep_theirs():
    if torch.get_num_threads() < 2:
        before = torch.get_num_threads()
        torch.set_num_threads(3)
    else:
        before = torch.get_num_threads()
    wanted, seen = torch.get_num_threads(), {"model": set(), "other": set()}
    inside, looked = threading.Event(), threading.Event()

    class Watching(Sleeper):
        def generate(self, texts, steps, seeds, on_step=None):
            seen["model"].add(torch.get_num_threads())
            inside.set()
            assert looked.wait(60)
            super().generate(texts, steps, seeds, on_step)

    def other():
        assert inside.wait(60)
        seen["other"].add(torch.get_num_threads())
        looked.set()

    beside = threading.Thread(target=other)
    beside.start()
    try:
        clock = VirtualClock()
        stream = RequestStream([[0.0]], [[0]], ("a",))
        serve(stream, PROMPTS, {"one": Watching(clock, 0.1)}, plan([[1.0]], [1], [1.0]), clock=clock)
        beside.join()
        assert seen == {"model": {1}, "other": {wanted}}
        assert torch.get_num_threads() == wanted
    finally:
        looked.set()
        torch.set_num_threads(before)


def test_an_error_in_a_model_ends_the_service_with_it():
    class Broken(Sleeper):
        def generate(self, texts, steps, seeds, on_step=None):
            if on_step is not None:
                raise RuntimeError("no memory")
            super().generate(texts, steps, seeds)

    clock = VirtualClock()
    stream = RequestStream([[0.0, 0.0]], [[0, 1]], ("a", "b"))
    with pytest.raises(RuntimeError, match="no memory"):
        serve(stream, PROMPTS, {"one": Broken(clock, 0.001)}, plan([[1.0], [1.0]], [2], [1.0]), clock=clock)


def test_bad_input_is_named():
    stream = poisson([1.0, 1.0], ["a", "b"], requests=4)
    models = {"one": Sleeper(VirtualClock(), 0.001), "two": Sleeper(VirtualClock(), 0.001)}
    with pytest.raises(RequestError, match="category 'b' of the requests has none"):
        serve(stream, PromptSet(("p0",), ("x",), ("a",)), models, plan([[1.0, 0.0]] * 2, [1, 1], [1.0, 0.0]))
    with pytest.raises(PlanError, match="one plan for 1 models"):
        serve(stream, PROMPTS, {"one": models["one"]}, plan([[1.0, 0.0]] * 2, [1, 1], [1.0, 0.0]))
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
    clock = VirtualClock(tick=0.001)
    found = serve(stream, PROMPTS, {"small": model}, plan([[1.0], [1.0]], [2], [0.8]), clock=clock)
    assert bool((found.measured_s > 0).all())
    finish = stream.arrival_s[0] + found.measured_s
    assert bool((finish.diff() > 0).all())  # first come, first served
    seen = []
    interrupted = model.generate(["a red circle"], 3, [image_seed("p0", 0)], seen.append)
    assert seen == [0, 1, 2]
    assert (interrupted == model.generate(["a red circle"], 3, [image_seed("p0", 0)])).all()
