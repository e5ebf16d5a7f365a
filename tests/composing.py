"""Compose the configuration, and run a task of it in this process."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from edgesched.runs.config import build, check, register_schema
from edgesched.runs.entry import refuse_unused, tiny
from edgesched.runs.run import Run
from edgesched.runs.tracking import Tracker

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def composed(*overrides):
    """The configuration with these overrides."""
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*overrides, "run_folder=."])


def run_task(folder, *overrides, **changes):
    """Run a task with the overrides in a folder, unlogged, and return its value; changes replace its arguments."""
    cfg = composed(*overrides)
    if cfg.debug:
        cfg = tiny(cfg, overrides, CONF / "debug.yaml")
    refuse_unused(cfg, overrides)
    check(cfg)
    with Tracker(folder, {}, str(cfg.name), mode="disabled") as tracker:
        return build(cfg.task, "task")(Run(folder, str(cfg.name), tracker), **changes)
