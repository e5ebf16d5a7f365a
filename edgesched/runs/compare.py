"""Runs side by side without W&B: run folders into one table and one figure, means with intervals over seeds."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesched.errors import ConfigError
from edgesched.runs.sweep import SKIPPED

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
MEASURES = ("utility", "quality", "latency_s", "gap", "seconds")
_NOT_A_SETTING = ("seed", "logger", "rerun", "debug", "run_folder", "hydra")


@dataclass(frozen=True)
class RunRecord:
    """One finished run.

    Attributes:
        folder: Its folder.
        name: Name of the experiment.
        overrides: Keys given on the command line, seed and logging apart, and the digest of the scores as ``source``.
        seed: Its seed.
        methods: Method → ``utility quality latency_s gap seconds``; replayed on held-out prompts where the run did
            that.
    """

    folder: Path
    name: str
    overrides: dict[str, str]
    seed: int
    methods: dict[str, dict[str, float]]


def read_runs(folders: Sequence[Path | str]) -> list[RunRecord]:
    """Every finished run below the given folders that compares methods.

    Jobs of a sweep that were finished before count where they were run. Runs that were cut off, failed, or hold nothing
    to compare are counted in a warning.

    Raises:
        ConfigError: If a folder does not exist, or no run is left.
    """
    runs, cut_off, other, seen = [], 0, 0, set()
    for given in map(Path, folders):
        if not given.is_dir():
            raise ConfigError(f"{given}: no such folder")
        for hydra in sorted(given.rglob(".hydra")):
            folder = hydra.parent.resolve()
            if folder in seen or not hydra.is_dir() or (folder / SKIPPED).exists():
                continue
            seen.add(folder)
            try:
                metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
                record = _record(folder, metrics)
            except (OSError, ValueError, KeyError):
                cut_off += 1
                continue
            if record is None:
                other += 1
            else:
                runs.append(record)
    if cut_off:
        log.warning("%d runs are unfinished or unreadable and left out", cut_off)
    if other:
        log.warning("%d runs compare no methods and are left out", other)
    if not runs:
        raise ConfigError(f"{', '.join(map(str, folders))}: no finished run that compares methods")
    return runs


def _record(folder: Path, metrics: dict[str, Any]) -> RunRecord | None:
    from omegaconf import OmegaConf

    if not isinstance(metrics.get("methods"), dict):
        return None
    config = OmegaConf.load(folder / ".hydra/config.yaml")
    given = [str(text) for text in OmegaConf.load(folder / ".hydra/overrides.yaml")]
    pairs = dict(text.lstrip("+~").partition("=")[::2] for text in given)
    overrides = {k: v for k, v in pairs.items() if k.split(".")[0] not in (*_NOT_A_SETTING, "experiment")}
    source = metrics.get("source")
    if isinstance(source, dict) and "digest" in source:
        overrides["source"] = str(source["digest"])[:8]  # one path may have held other scores in another run
    methods = {}
    for name, row in metrics["methods"].items():
        replayed = row.get("replay", {})
        latency = replayed.get("latency_s", row.get("latency_s", row.get("mean_s")))
        values = {"utility": replayed.get("utility", row.get("utility")), "latency_s": latency,
                  "quality": replayed.get("quality", row.get("quality")), "gap": row.get("gap"),
                  "seconds": row.get("seconds")}  # fmt: skip
        methods[str(name)] = {key: float("nan") if value is None else float(value) for key, value in values.items()}
    return RunRecord(folder, str(config.name), overrides, int(config.seed), methods)


def compare_runs(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """Mean and 95 % interval over seeds, a row for every setting and method.

    Settings are told apart by the experiment and by the overrides that are not the same in all runs. A setting run
    several times with one seed counts its latest run only. Intervals are Student's, and missing for one seed.

    Returns:
        Columns ``setting method seeds`` and, for every measure, itself and ``<measure>_half``, the half width.
    """
    import pandas as pd
    from scipy.stats import t

    keys = sorted({key for run in runs for key in run.overrides})
    differ = [k for k in keys if len({run.overrides.get(k) for run in runs}) > 1]
    names = {run.name for run in runs}
    latest: dict[tuple[str, int], RunRecord] = {}
    for run in sorted(runs, key=lambda run: str(run.folder)):
        parts = [run.name] * (len(names) > 1) + [f"{k}={run.overrides.get(k, 'default')}" for k in differ]
        latest[" ".join(parts) or run.name, run.seed] = run
    rows = []
    for setting in dict.fromkeys(setting for setting, _ in latest):
        mine = [run for (other, _), run in latest.items() if other == setting]
        for method in dict.fromkeys(m for run in mine for m in run.methods):
            values = np.array([[run.methods[method][key] for key in MEASURES] for run in mine if method in run.methods])
            row: dict[str, Any] = {"setting": setting, "method": method, "seeds": len(values)}
            for i, key in enumerate(MEASURES):
                row[key] = float(values[:, i].mean())
                half = float("nan")
                if len(values) > 1:
                    half = float(t.ppf(0.975, len(values) - 1) * values[:, i].std(ddof=1) / len(values) ** 0.5)
                row[f"{key}_half"] = half
            rows.append(row)
    return pd.DataFrame(rows)
