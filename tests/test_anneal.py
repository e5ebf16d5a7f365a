"""The annealing engine: the same bits everywhere, stop and resume, schedules, stopping rules."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from factories import draw_plan

import edgesched as es
from edgesched.equations.delay import total_delay
from edgesched.equations.shares import share_for_load
from edgesched.errors import ArgumentError, PlanError, SearchError
from edgesched.search import Cooling, Stopping
from edgesched.search.anneal import checkpoint, kernel, rng
from edgesched.search.anneal.general import queue_shares

anneal = es.search.anneal
engine = sys.modules["edgesched.search.anneal.annealing"]
SMALL = {"chains": 8, "iterations": 240}


def problem(kind):
    """A batch of five scenarios and what is given in it."""
    s = es.Scenario.random(5, steps=12, seed=21, latency="queue" if kind == "queue" else "slot")
    given = {}
    if kind == "given":
        given = {"assignment": draw_plan(s, 2).assignment}
    if kind == "sliced":
        s = dataclasses.replace(s, share_units=7)
    if kind == "limits":
        s = dataclasses.replace(
            s, memory_gib=[[2.0, 3.0, 4.0]] * 5, memory_limit_gib=[6.0] * 5, deadline_s=[60.0] * 5
        )  # fmt: skip
    return s, given


def same(a, b):
    """Equal to the bit."""
    pairs = [(a.utility, b.utility), (a.history, b.history)]
    pairs += [(getattr(a.plan, f), getattr(b.plan, f)) for f in ("assignment", "steps", "share")]
    return all(torch.equal(x, y) for x, y in pairs)


def rows(result, keep):
    """Some scenarios of a result."""
    plan = es.Plan(*(getattr(result.plan, f)[keep] for f in ("assignment", "steps", "share")))
    return dataclasses.replace(result, plan=plan, utility=result.utility[keep], history=result.history[:, keep])


def digest(result):
    tensors = (result.utility, result.history, result.plan.assignment, result.plan.steps, result.plan.share)
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


KINDS = ["given", "joint", "queue", "sliced", "limits"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scenario_gives_the_same_bits_alone_and_in_any_order(kind):
    s, given = problem(kind)
    together = anneal(s, **given, **SMALL)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = s._map(lambda t, name: t if name == "steps" else t[order])
    moved = {k: v[order] for k, v in given.items()}
    assert same(anneal(shuffled, **moved, **SMALL), rows(together, order))
    one = {k: v[2:3] for k, v in given.items()}
    assert same(anneal(s[2], **one, **SMALL), rows(together, slice(2, 3)))
    assert es.evaluate(s, together.plan).utility.equal(together.utility)
    assert (together.utility <= together.bound + 1e-9).all()


@pytest.mark.parametrize(
    "options",
    [
        {"cooling": Cooling(schedule="adaptive")},
        {"cooling": Cooling(tempering=True)},
        {"restarts": 2},
        {"stopping": Stopping(patience=96)},
    ],
)
def test_options_keep_the_bits_and_reach_the_optimum(options):
    s, given = problem("given")
    exact = es.search.exact(s, **given).utility
    found = anneal(s, **given, chains=16, iterations=480, **options)
    assert ((exact - found.utility) / exact.abs()).max() <= 1e-4
    alone = anneal(s[1], assignment=given["assignment"][1:2], chains=16, iterations=480, **options)
    if "stopping" in options:  # the others of the batch go on recording
        assert torch.equal(alone.plan.steps, found.plan.steps[1:2])
        assert torch.equal(alone.utility, found.utility[1:2])
        assert torch.equal(alone.history, found.history[: len(alone.history), 1:2])
        assert (found.history[len(alone.history) :, 1] == alone.history[-1, 0]).all()
    else:
        assert same(alone, rows(found, slice(1, 2)))


def test_chunks_change_nothing(monkeypatch):
    s, _ = problem("joint")
    whole = anneal(s, **SMALL)
    monkeypatch.setattr(engine, "_NUMBERS_AT_ONCE", 2_000)
    assert same(anneal(s, **SMALL), whole)


def test_two_processes_give_the_same_bits():
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_anneal import SMALL, anneal, digest, problem\n"
        "for kind in ('given', 'queue'):\n"
        "    s, given = problem(kind); print(digest(anneal(s, **given, **SMALL)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    ours = [digest(anneal(s, **given, **SMALL)) for s, given in map(problem, ("given", "queue"))]
    assert done.stdout.split() == ours


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("given", {}),
        ("joint", {"restarts": 2}),
        ("queue", {"cooling": Cooling(schedule="adaptive")}),
        ("sliced", {"cooling": Cooling(tempering=True)}),
    ],
)
def test_stop_and_resume_gives_the_same_bits(kind, options, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SAVE_SECONDS", 0.0)
    s, given = problem(kind)
    whole = anneal(s, **given, **SMALL, **options)
    path = tmp_path / "run.pt"
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        anneal(s, **given, **SMALL, **options, checkpoint=path, callback=stop)
    assert path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert same(anneal(s, **given, **SMALL, **options, checkpoint=path), whole)
    again = anneal(s, **given, **SMALL, **options, checkpoint=path)
    assert same(again, whole)
    with pytest.raises(SearchError, match="belongs to another scenario or to other settings"):
        anneal(s, **given, **SMALL, **options, seed=9, checkpoint=path)
    with pytest.raises(SearchError, match="belongs to another"):
        anneal(dataclasses.replace(s, demand=s.demand * 2), **given, **SMALL, **options, checkpoint=path)


def test_a_time_limit_is_made_up_for_by_a_resume(tmp_path):
    s, _ = problem("joint")
    path = tmp_path / "run.pt"
    cut = anneal(s, **SMALL, stopping=Stopping(max_seconds=1e-9), checkpoint=path)
    whole = anneal(s, **SMALL)
    assert cut.proposals < whole.proposals
    assert same(anneal(s, **SMALL, checkpoint=path), whole)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(SearchError, match="cannot be read as a checkpoint"):
        anneal(es.Scenario.random(1), **SMALL, checkpoint=path)
    assert path.read_bytes() == b"nothing"


def test_stopping_rules_do_not_make_scenarios_depend_on_each_other():
    s, _ = problem("joint")
    together = anneal(s, chains=8, iterations=2000, stopping=Stopping(target_gap=0.01))
    for b in (0, 3):
        alone = anneal(s[b], chains=8, iterations=2000, stopping=Stopping(target_gap=0.01))
        assert torch.equal(alone.utility, together.utility[b : b + 1])
        assert torch.equal(alone.plan.steps, together.plan.steps[b : b + 1])
    assert together.proposals <= 8 * 2000 * 5
    short = anneal(s, chains=8, iterations=20_000, stopping=Stopping(patience=480))
    assert short.proposals < 8 * 20_000 * 5


def test_callback_sees_cooling_and_history_stays_short():
    s, given = problem("given")
    seen = []
    result = anneal(s, **given, chains=32, iterations=12_000, callback=seen.append)
    assert len(result.history) <= 201
    assert len(seen) == len(result.history) - 1
    assert seen[-1].iteration == 12_000
    assert (seen[0].temperature > seen[-1].temperature).all()
    assert seen[0].acceptance > seen[-1].acceptance
    assert torch.equal(seen[-1].best, result.history[-1])
    assert (result.history[1:] >= result.history[:-1]).all()
    assert torch.allclose(result.history[-1], result.utility, rtol=1e-6)


def test_compiled_equals_eager_to_the_bit():
    s, given = problem("given")
    a, b = (anneal(s, **given, **SMALL, compile=c) for c in (True, False))
    assert same(a, b)
    assert same(anneal(s[1], assignment=given["assignment"][1:2], **SMALL, compile=True), rows(b, slice(1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["joint", "queue", "sliced", "limits"])
def test_every_compiled_kernel_equals_eager_to_the_bit(kind):
    s, given = problem(kind)
    assert same(anneal(s, **given, **SMALL, compile=True), anneal(s, **given, **SMALL, compile=False))


@pytest.mark.parametrize("kind", ["given", "joint", "queue", "sliced"])
def test_a_warm_start_is_never_lost_and_keeps_the_bits(kind):
    s, given = problem(kind)
    good = anneal(s, **given, chains=32, iterations=1500).plan
    before = es.evaluate(s, good).utility
    few = anneal(s, **given, chains=1, iterations=len(s.steps), start=good)
    assert (few.utility >= before - 1e-6 * before.abs()).all()
    assert (anneal(s, **given, chains=1, iterations=len(s.steps)).utility < before).any()
    alone = anneal(s[1], **{k: v[1:2] for k, v in given.items()}, chains=1, iterations=len(s.steps), start=good[1:2])
    assert torch.equal(alone.utility, few.utility[1:2])
    with pytest.raises(PlanError):
        anneal(s, **given, start=good[:1])


def test_other_sizes_compile_nothing_new():
    from torch._dynamo.utils import counters

    def run(batch, steps, chains):
        s = es.Scenario.random(batch, models=3, steps=steps)
        anneal(s, assignment=draw_plan(s, 1).assignment, chains=chains, iterations=60, compile=True)

    run(3, 9, 16)
    before = counters["stats"]["unique_graphs"]
    for sizes in ((7, 20, 24), (1, 9, 16), (4, 5, 1), (9, 9, 9)):
        run(*sizes)
    assert counters["stats"]["unique_graphs"] == before


def test_small_jobs_are_not_compiled_and_a_missing_compiler_is_said_once(monkeypatch):
    s, given = problem("given")
    monkeypatch.setattr(kernel, "compiled", lambda function: pytest.fail("compiled"))
    anneal(s, **given, **SMALL)
    monkeypatch.setattr(engine, "_REPAID_GIVEN", 5 * 8 * 240)
    with pytest.raises(pytest.fail.Exception):
        anneal(s, **given, **SMALL)
    monkeypatch.undo()
    kernel.compiler.cache_clear()
    monkeypatch.setattr(kernel.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        without = anneal(s, **given, **SMALL, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(anneal(s, **given, **SMALL, compile=True), without)
    monkeypatch.undo()
    kernel.compiler.cache_clear()
    assert same(anneal(s, **given, **SMALL), without)


def test_draws_are_uniform_and_keyed_by_chain_and_iteration():
    device = torch.device("cpu")
    chain = rng.chain_words(256, device)
    first, second = rng.words(chain, rng.iteration_words(5, 0, 256, device))
    assert torch.equal(first[3:5, :16], rng.words(chain[:16], rng.iteration_words(5, 3, 2, device))[0])
    for word in (first, second):
        for shift in (0, 8, 16):
            count = torch.bincount(((word >> shift) & 255).flatten().long(), minlength=256).double()
            assert 160 < ((count - 256).square() / 256).sum() < 360  # chi-square, 255 degrees of freedom
    unit = [w.flatten().double() for w in (first, second)]
    assert torch.corrcoef(torch.stack(unit))[0, 1].abs() < 0.02
    assert (first != rng.words(chain, rng.iteration_words(6, 0, 256, device))[0]).double().mean() > 0.99
    jump, shift, threshold = rng.draws(
        chain, rng.iteration_words(0, 0, 64, device), torch.full((64, 1), 7, dtype=torch.int32),
        torch.full((64, 1), 3, dtype=torch.int32), torch.full((64, 1), 4, dtype=torch.int32), rng.log_table(device),
    )  # fmt: skip
    assert sorted(jump.unique().tolist()) == [-1, 0, 1, 2, 3, 4, 5, 6]
    assert sorted(shift.unique().tolist()) == [-3, -2, -1, 1, 2, 3]
    assert (jump < 0).double().mean() == pytest.approx(0.5, abs=0.02)
    assert -threshold.mean() == pytest.approx(1.0, abs=0.03)


def test_queue_shares_of_the_kernel_are_near_the_best():
    s = es.Scenario.random(40, models=5, seed=4, latency="queue")
    generator = torch.Generator().manual_seed(1)
    load = torch.rand(40, 5, generator=generator, dtype=torch.float64)
    service = torch.rand(40, 5, generator=generator, dtype=torch.float64) + 0.01
    load = load * (torch.linspace(0.05, 0.95, 40) / (load * service).sum(-1))[:, None]
    load[::3, 1] = 0
    load = load * (torch.linspace(0.05, 0.95, 40) / (load * service).sum(-1))[:, None]
    ours = queue_shares((load * service).T[..., None]).squeeze(-1).T
    best = total_delay("queue", load, service, share_for_load(s, load, service))[0]
    found = total_delay("queue", load, service, ours / ours.sum(-1, keepdim=True))[0]
    assert (found / best - 1).max() < 0.02
    assert torch.allclose(ours.sum(-1), torch.ones(40, dtype=torch.float64), atol=1e-3)


def test_one_model_one_step_count_and_no_demand_are_fine():
    for sizes in ((1, 1, 1), (3, 1, 5), (3, 4, 1)):
        s = es.Scenario.random(2, *sizes)
        result = anneal(s, **SMALL)
        assert result.feasible.all()
        assert torch.equal(anneal(s[1], **SMALL).utility, result.utility[1:])
    s = es.Scenario.random(2, seed=3)
    s = dataclasses.replace(s, demand=s.demand * torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert (anneal(s, chains=16, iterations=600).gap < 0.02).all()


def test_annealed_units_are_whole_and_near_the_best_without_polish():
    s, _ = problem("sliced")
    rough = anneal(s, chains=32, iterations=1500, polish=False)
    assert rough.feasible.all()
    assert ((rough.plan.share * 7).round() - rough.plan.share * 7).abs().max() < 1e-9
    assert (anneal(s, chains=32, iterations=1500).utility >= rough.utility - 1e-9).all()


def test_bad_options_are_refused():
    s = es.Scenario.random(1, steps=3)
    for options, message in (
        (lambda: {"cooling": Cooling(schedule="linear")}, "geometric, adaptive"),
        (lambda: {"cooling": Cooling(last=2.0)}, "cooling.last"),
        (lambda: {"restarts": 0}, "restarts"),
        (lambda: {"stopping": Stopping(patience=0)}, "stopping.patience"),
        (lambda: {"stopping": 3}, r"stopping: expected search.Stopping\(...\), got 3"),
    ):
        with pytest.raises(ArgumentError, match=message):
            anneal(s, **options())
