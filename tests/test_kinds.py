"""A value of the wrong kind is refused where the configuration is checked, and a wrong argument ends the run."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from edgesched.errors import ArgumentError, SearchError
from edgesched.runs.config import build, check
from edgesched.runs.kinds import is_of_kind, kind_in_words
from edgesched.tasks.schedule import plan_all
from edgesched.types import Scenario

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("value", "kind", "right"),
    [
        (3, int, True), (3.0, int, False), (True, int, False), ("3", int, False), (3, float, True), ("inf", float, False),
        (True, float, False), (None, int | None, True), (None, int, False), ("a", str, True), (3, str, False),
        ([1, 2], Sequence[int], True), ([1, "a"], Sequence[int], False), ("ab", Sequence[str], False), ([], Sequence[int], True),
        ((1, 2), tuple[int, int], True), ([1], tuple[int, int], False), ([1, 2, 3], tuple[int, ...], True), (3, int | Sequence[int], True),
        ({"a": 1}, Mapping[str, int], True), ({"a": "b"}, Mapping[str, int], False), ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False), (object(), Any, True), ({"x": 1}, Scenario, True), ("some/where", Path, True), (1, bool, False),
    ],
)  # fmt: skip
def test_kinds_of_plain_values(value, kind, right):
    assert is_of_kind(value, kind) is right


def test_kinds_are_said_in_words():
    assert kind_in_words(Sequence[float] | None) == "a list or null"
    assert kind_in_words(int | float) == "a whole number or a number"


@pytest.mark.parametrize(
    ("target", "key", "value", "message"),
    [
        ("edgesched.search.anneal", "iterations", "zero", "x.iterations: expected a whole number, got 'zero'"),
        ("edgesched.search.anneal", "iterations", 2.5, "x.iterations: expected a whole number, got 2.5"),
        ("edgesched.assign.Trained", "learning_rate", "fast", "x.learning_rate: expected a number, got 'fast'"),
        ("edgesched.generation.diffusion.DiffusionModel", "path", 3, "x.path: expected a text, got 3"),
    ],
)
def test_a_value_of_another_kind_is_named_by_its_key(target, key, value, message):
    node = OmegaConf.create({"_target_": target, "_partial_": True, key: value})
    with pytest.raises(ArgumentError) as told:
        check(node, "x")
    assert str(told.value) == message


def test_a_reference_to_another_key_is_followed():
    cfg = OmegaConf.create(
        {"seed": "seven", "search": {"_target_": "edgesched.search.anneal", "_partial_": True, "seed": "${seed}"}}
    )
    with pytest.raises(ArgumentError, match="^seed: expected a whole number, got 'seven'"):
        check(cfg)
    cfg.seed = 7
    assert build(cfg.search, "search").keywords["seed"] == 7


def test_only_a_method_that_cannot_solve_this_problem_is_left_out():
    scenario = Scenario.random(1, seed=0)

    def policy(scenario, scores):
        return None

    def wrong(scenario):
        raise ArgumentError("iterations: expected a positive integer, got 0")

    def unable(scenario):
        raise SearchError("slots only")

    def broken(scenario):
        raise TypeError("a bug")

    from edgesched.search import coordinate

    def method(assignment, search):
        return {"assignment": assignment, "search": search}

    assert list(plan_all({"a": method(policy, unable), "b": method(policy, coordinate)}, scenario, None)) == ["b"]
    with pytest.raises(ArgumentError, match=r"^method\.a: iterations: expected a positive integer, got 0$"):
        plan_all({"a": method(policy, wrong), "b": method(policy, coordinate)}, scenario, None)
    with pytest.raises(TypeError):
        plan_all({"a": method(policy, broken), "b": method(policy, coordinate)}, scenario, None)
    with pytest.raises(SearchError, match="no method could plan for this scenario; slots only"):
        plan_all({"a": method(policy, unable)}, scenario, None)


def test_a_wrong_value_ends_the_run_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/run.py", "+experiment=quickstart", "search.iterations=zero", f"hydra.run.dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["error: search.iterations: expected a whole number, got 'zero'"]
    assert not (tmp_path / "metrics.json").exists()


def test_every_shipped_value_is_of_its_kind():
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        node = OmegaConf.load(file)
        if "_target_" in node:
            check(node, file.stem)
