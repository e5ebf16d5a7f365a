"""Weights & Biases as a thin shell: offline unless the user is logged in and asks for online."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgesched.errors import ConfigError

if TYPE_CHECKING:
    from edgesched.table import ScoreTable

log = logging.getLogger(__name__)
MODES = ("offline", "online", "disabled")


def _logged_in() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or (wandb.Api.__module__ and wandb.setup().settings.api_key))


class Tracker:
    """One W&B run, finished with the right exit code also when the code inside fails.

    Args:
        folder: Run folder; W&B writes into ``wandb/`` below it.
        config: Configuration of the run, as a plain dictionary.
        name: Name of the run.
        mode: ``"offline"``, ``"online"`` (falls back to offline, with a warning, when nobody is
            logged in; never a prompt) or ``"disabled"``.
        project: W&B project.
        entity: W&B entity, or None for the user's default.
        group: Group of the run.
        job_type: Kind of the run; the name, where it is left out.
        tags: Tags.

    Raises:
        ConfigError: If the mode is unknown.
    """

    def __init__(
        self,
        folder: Path | str,
        config: Mapping[str, Any],
        name: str,
        *,
        mode: str = "offline",
        project: str = "edgesched",
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"logger.mode: {mode!r} is not one of {', '.join(MODES)}")
        self.folder, self.config, self.name, self.mode = Path(folder), dict(config), name, mode
        self.project, self.entity, self.group = project, entity, group
        self.job_type, self.tags = job_type or name, tuple(tags)
        self.run: Any = None

    def __enter__(self) -> Tracker:
        import wandb

        mode = self.mode
        if mode == "online" and not _logged_in():
            log.warning("W&B: nobody is logged in, so this run is kept offline (`wandb login`, then `wandb sync`)")
            mode = "offline"
        self.run = wandb.init(
            dir=self.folder,
            config=self.config,
            name=self.name,
            mode=mode,  # type: ignore[arg-type]
            project=self.project,
            entity=self.entity,
            group=self.group,
            job_type=self.job_type,
            tags=list(self.tags),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", quiet=True),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if kind is None else 1)
            self.run = None

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log nested numbers under names joined by slashes."""
        self.run.log(dict(_flatten(values)), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's summary to nested numbers under names joined by slashes."""
        self.run.summary.update(dict(_flatten(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        import wandb

        self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def score_table(self, table: ScoreTable) -> None:
        """Log a score table as the artifact ``scores-<digest>``: the same table is one artifact, however often used."""
        import wandb

        if self.mode == "disabled":
            return
        digest = table.digest()
        kept = table.save(self.folder / "wandb" / f"scores-{digest}").parent
        facts = {"digest": digest, "rows": len(table), "score": table.score, "device": table.device,
                 "models": list(table.models or ()), "categories": list(table.categories)}  # fmt: skip
        artifact = wandb.Artifact(f"scores-{digest}", type="score-table", metadata=facts)
        for file in sorted(kept.iterdir()):
            artifact.add_file(str(file), policy="immutable")
        self.run.log_artifact(artifact)

    def images(self, files: Mapping[str, Path]) -> None:
        """Log picture files, by name."""
        import wandb

        self.run.log({name: wandb.Image(str(file)) for name, file in files.items()})

    def sample_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table whose last column holds image arrays, shape (H, W, 3), uint8."""
        import wandb

        self.run.log(
            {name: wandb.Table(columns=list(columns), data=[[*row[:-1], wandb.Image(row[-1])] for row in rows])}
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{name}/")
        elif isinstance(value, (bool, int, float, str)):
            flat.append((name, value))
    return flat
