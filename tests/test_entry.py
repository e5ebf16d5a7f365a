"""The way in: keys that a task does not use are refused, tiny sizes leave what was given."""

import pytest
from composing import CONF, composed
from omegaconf import OmegaConf

from edgesched.errors import ConfigError
from edgesched.runs.entry import plain, refuse_unused, tiny


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (("+experiment=policies", "search=relax"), "search"),
        (("+experiment=policies", "assign=direct"), "assign"),
        (("+experiment=quickstart", "search=relax"), "search"),
        (("+experiment=paper", "workload.share_units=7"), "workload.share_units"),
        (("+experiment=paper", "workload.memory_limit_gib=4"), "workload.memory_limit_gib"),
        (("+experiment=difficulty", "workload.deadline_s=1"), "workload.deadline_s"),
        (("+experiment=difficulty", "estimate=lower_bound"), "estimate"),
        (("+experiment=fit", "estimate=lower_bound"), "estimate"),
        (("+experiment=fit", "workload.demand=3"), "workload.demand"),
        (("+experiment=campaign", "data.path=x"), "data.path"),
        (("+experiment=train_micro", "quality=student_t"), "quality"),
        (("+experiment=serve", "method=[direct]"), "method"),
    ],
)
def test_a_key_that_the_task_does_not_use_is_refused(given, key):
    cfg = composed(*given)
    with pytest.raises(ConfigError, match=rf"^{key}: {cfg.name} does not use it; leave it out$"):
        refuse_unused(cfg, given)


@pytest.mark.parametrize(
    "given",
    [
        ("+experiment=quickstart", "search.iterations=10", "workload=bursty", "replay.draws=5", "seed=3", "logger.mode=disabled"),
        ("+experiment=plan", "search=relax", "assign=direct", "workload.share_units=7", "estimate=lower_bound"),
        ("+experiment=policies", "policies.compare.trained.starts=2", "workload.deadline_s=2", "estimate=lower_bound"),
        ("+experiment=paper", "paper.loads=[1]", "stream.requests=3", "policies.judge_s=1", "model=[micro_small]"),
        ("+experiment=simulate", "workload.arrivals.requests=5", "stream.deadline_s=1"),
        ("+experiment=serve", "stream.steps=3", "prompts=micro", "quality=quantiles", "data.path=null"),
        ("+experiment=campaign", "campaign.seeds=1", "prompts.seed=3", "score=[micro]"),
        ("+experiment=difficulty", "difficulty=words", "workload.latency_weight=3", "difficulty.levels=2"),
        ("+experiment=fit", "fit.families.gaussian.max_epochs=3", "~fit.families.student_t"),
    ],
)  # fmt: skip
def test_a_key_that_the_task_uses_passes(given):
    refuse_unused(composed(*given), given)


def test_tiny_sizes_reach_what_is_there_and_leave_what_was_given():
    given = ("+experiment=campaign", "campaign.seeds=3")
    cfg = tiny(composed(*given), given, CONF / "debug.yaml")
    assert (cfg.campaign.seeds, cfg.campaign.prompts_per_category, list(cfg.campaign.steps)) == (3, 2, [1, 2])
    assert cfg.quality.max_epochs == 5
    assert "fit" not in cfg or not cfg.fit
    given = ("+experiment=fit",)
    small = tiny(composed(*given), given, CONF / "debug.yaml")
    assert {family.max_epochs for family in small.fit.families.values()} == {2}
    assert composed(*given).fit.folds == 5


def test_tiny_sizes_that_are_not_there_are_one_line():
    with pytest.raises(ConfigError, match=r"debug: no debug.yaml beside the configuration"):
        tiny(composed(), ())


def test_a_value_that_refers_to_a_missing_one_is_told_by_the_missing_key():
    with pytest.raises(ConfigError, match=r"^path: has no value; give one, as path=\.\.\.$"):
        plain(OmegaConf.create({"path": "???", "other": "${path}"}))
