"""Run an experiment: `python scripts/run.py +experiment=quickstart [key=value ...]`."""

import os
import re
import sys
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from edgesched.errors import EdgeschedError  # noqa: E402
from edgesched.runs.config import nearest, register_schema  # noqa: E402

register_schema()
SCRIPTS = str(Path(__file__).resolve().parent)
CONFIG_FOLDER = str(Path(__file__).resolve().parents[1] / "conf")


@hydra.main(version_base="1.3", config_path=CONFIG_FOLDER, config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the configured task; returns the value that a sweep maximises."""
    from edgesched.runs.entry import run

    if SCRIPTS not in sys.path:  # a process that a launcher started: components may lie here
        sys.path.insert(0, SCRIPTS)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return job(cfg)
    try:
        return run(cfg)
    except EdgeschedError as exc:
        if cfg.debug:
            raise
        sys.stdout.flush()
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped; what was done is kept, and the same command goes on from there")


def job(cfg: DictConfig) -> float | None:
    """One job of a sweep: not run again if it is finished, marked if it fails, and no obstacle to the others."""
    from edgesched.runs.entry import run
    from edgesched.runs.sweep import FAILED, FINISHED, SKIPPED, earlier, job_digest, mark

    folder = Path(cfg.run_folder)
    digest = job_digest(cfg)
    found = None if cfg.rerun else earlier(folder, digest)
    if found is not None:
        mark(folder, SKIPPED, {"digest": digest, "finished_in": os.path.relpath(found[0], folder), "value": found[1]})
        print(f"Finished before, not run again: {os.path.relpath(found[0])} (rerun=true runs it)", flush=True)
        return found[1]
    try:
        value = run(cfg)
    except Exception as exc:
        told = str(exc) if isinstance(exc, EdgeschedError) else f"{type(exc).__name__}: {exc}"
        mark(folder, FAILED, {"digest": digest, "error": told.splitlines()[0] if told else type(exc).__name__})
        if cfg.debug or not isinstance(exc, EdgeschedError):
            traceback.print_exc()
        else:
            print(f"error: {told}", file=sys.stderr, flush=True)
        return float("nan")
    mark(folder, FINISHED, {"digest": digest, "value": value})
    return value


#: Launchers of sweeps that come with an optional extra: Hydra plugin's package, extra.
LAUNCHERS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_submitit_launcher", "slurm"),
    "submitit_slurm": ("hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_ray_launcher", "ray"),
}


def launcher_is_here(arguments: list[str]) -> None:
    """Stop in one line if a sweep asks for a launcher that is not installed."""
    for argument in arguments:
        name, is_given, chosen = argument.partition("=")
        if name == "hydra/launcher" and is_given and chosen in LAUNCHERS:
            package, extra = LAUNCHERS[chosen]
            if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{package}") is None:
                sys.exit(f"error: hydra/launcher={chosen} is not installed: pip install 'edgesched[{extra}]'")


def composes(arguments: list[str]) -> None:
    """Stop in one line if the configuration does not compose, naming the key and the nearest valid one."""
    if any(argument.startswith("-") for argument in arguments):
        return  # sweeps and Hydra's own flags: Hydra says what is wrong with them
    with hydra.initialize_config_dir(CONFIG_FOLDER, version_base="1.3"):
        try:
            hydra.compose("config", overrides=arguments)
        except Exception as exc:
            text = " ".join(str(exc).split()).split(" Config search path:")[0]
            cause: BaseException = exc
            while cause.__cause__ is not None:
                cause = cause.__cause__
            found = re.search(r"full_key: (\S+)", f"{cause} {text}") or re.search(r"Could not override '([^']+)'", text)
            if found and "not in" in f"{cause} {text}":
                text = unknown_key(found[1], hydra.compose("config"))
            elif cause is not exc:
                text += ": " + str(cause).splitlines()[0]
            sys.exit(f"error: {text}")


def unknown_key(key: str, cfg: DictConfig) -> str:
    """Say which part of a dotted key is unknown, and what is nearest to it."""
    node: Any = cfg
    parts = key.split(".")
    for i, part in enumerate(parts):
        names = [str(name) for name in node] if isinstance(node, DictConfig) else []
        if part not in names:
            return f"{'.'.join(parts[: i + 1])}: unknown key; {nearest(part, names)}"
        node = None if OmegaConf.is_missing(node, part) else node._get_node(part)
    return f"{key}: unknown key"


if __name__ == "__main__":
    launcher_is_here(sys.argv[1:])
    composes(sys.argv[1:])
    main()
