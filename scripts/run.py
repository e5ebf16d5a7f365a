"""Run an experiment: `python scripts/run.py +experiment=quickstart [key=value ...]`."""

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from edgesched.config import register_schema  # noqa: E402
from edgesched.errors import EdgeschedError  # noqa: E402

register_schema()
CONFIG_FOLDER = str(Path(__file__).resolve().parents[1] / "conf")


@hydra.main(version_base="1.3", config_path=CONFIG_FOLDER, config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the configured task; returns the value that a sweep maximises."""
    from edgesched.pipeline import run

    try:
        return run(cfg)
    except EdgeschedError as exc:
        if cfg.debug:
            raise
        sys.stdout.flush()
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped; what was done is kept, and the same command goes on from there")


if __name__ == "__main__":
    main()
