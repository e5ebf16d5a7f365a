"""Malformed scenarios, plans and prompts are refused with the field, the entry and what is allowed."""

import pytest
import torch

import edgesched as es
from edgesched.errors import PlanError, PromptError, ScenarioError

GOOD = {
    "demand": [[1.0, 2.0]],
    "quality": [[[[1.0, 2.0]], [[3.0, 4.0]]]],
    "steps": [1, 4],
    "step_time_s": [[0.1]],
    "overhead_s": [[0.0]],
    "latency_weight": [0.1],
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("demand", [[1.0, -2.0]], r"demand\[0, 1\] = -2"),
        ("demand", [[0.0, 0.0]], "total demand"),
        ("demand", [[1.0, float("nan")]], "demand.*nan"),
        ("demand", [1.0, 2.0], "demand: expected shape"),
        ("quality", [[[[1.0, float("nan")]], [[3.0, 4.0]]]], r"quality\[0, 0, 0, 1\] = nan"),
        ("quality", [[[[1.0, float("inf")]], [[3.0, 4.0]]]], r"\+inf is refused"),
        ("quality", [[[[1.0]], [[3.0]]]], "quality: expected shape"),
        ("steps", [4, 1], "strictly increasing"),
        ("steps", [1, 1], "strictly increasing"),
        ("steps", [0, 1], "at least one denoising step"),
        ("steps", [1.5, 2.0], "whole numbers"),
        ("step_time_s", [[0.0]], "step_time_s"),
        ("overhead_s", [[-1.0]], "overhead_s"),
        ("latency_weight", [-1.0], "latency_weight"),
        ("latency", "fast", "'fast' is not one of slot, queue"),
        ("share_units", 0, "share_units"),
        ("memory_gib", [[1.0]], "give both or neither"),
        ("deadline_s", [0.0], "deadline_s"),
        ("demand", "many", "demand: expected numbers"),
    ],
)
def test_scenario_refuses(field, value, message):
    with pytest.raises(ScenarioError, match=message):
        es.Scenario(**{**GOOD, field: value})


def test_scenario_takes_masked_options_and_expands_missing_dimensions():
    s = es.Scenario(
        **{**GOOD, "quality": [[[1.0, -torch.inf]], [[3.0, 4.0]]], "latency_weight": 0.1, "step_time_s": 0.2}
    )
    assert s.shape == (1, 2, 1, 2)
    assert s.latency_weight.shape == (1,)
    assert s.step_time_s.shape == (1, 1)


def test_scenario_is_frozen_and_slices_keep_the_batch():
    s = es.Scenario.random(5, seed=2)
    with pytest.raises(AttributeError):
        s.demand = None
    assert len(s[1:3]) == 2
    assert torch.equal(s[-1].quality, s.quality[4:])
    assert s.to("cpu").shape == s.shape


def test_random_scenarios_repeat_and_queue_load_is_in_range():
    one, two = es.Scenario.random(50, latency="queue", seed=1), es.Scenario.random(50, latency="queue", seed=1)
    assert torch.equal(one.quality, two.quality)
    service = one.overhead_s + 25 * one.step_time_s
    load = one.demand.sum(-1) * service.amin(-1)
    assert ((load > 0.19) & (load < 0.81)).all()


@pytest.mark.parametrize(
    ("assignment", "steps", "share", "message"),
    [
        ([[[0.5, 0.4]]], [[1, 1]], [[0.5, 0.5]], "row sum.*0.9"),
        ([[[1.5, -0.5]]], [[1, 1]], [[0.5, 0.5]], "at least 0"),
        ([[[0.5, 0.5]]], [[1, 1]], [[0.9, 0.5]], "share sum"),
        ([[[0.5, 0.5]]], [[1, 1]], [[1.1, -0.1]], r"share\[0, 1\]"),
        ([[[0.5, 0.5]]], [[1]], [[0.5, 0.5]], "steps: expected shape"),
        ([[[0.5, float("nan")]]], [[1, 1]], [[0.5, 0.5]], "assignment"),
        ([[[0.5, 0.5]]], [[1.5, 1]], [[0.5, 0.5]], "whole numbers"),
    ],
)
def test_plan_refuses(assignment, steps, share, message):
    with pytest.raises(PlanError, match=message):
        es.Plan(assignment, steps, share)


def test_prompt_set_refuses_duplicates_and_empty_texts():
    with pytest.raises(PromptError, match="appears twice"):
        es.PromptSet(("a", "a"), ("x", "y"), ("c", "c"))
    with pytest.raises(PromptError, match="row 1: text"):
        es.PromptSet(("a", "b"), ("x", " "), ("c", "c"))
    with pytest.raises(PromptError, match="at least one"):
        es.PromptSet((), (), ())
