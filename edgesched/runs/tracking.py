"""Weights & Biases as a thin shell: offline unless the user is logged in and asks for online."""

from __future__ import annotations

import logging
import netrc
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edgesched.data.writing import left_out
from edgesched.errors import ConfigError, reason

if TYPE_CHECKING:
    from edgesched.data.table import ScoreTable

log = logging.getLogger(__name__)
MODES = ("offline", "online", "disabled")
ANSWER_S, BEGIN_S = 5.0, 15.0  # how long a server may take to answer at all, and to begin a run
_OWN_NAMES = {"run_tags": "tags", "run_group": "group", "run_job_type": "job_type", "run_name": "name"}


def _logged_in(base_url: str) -> bool:
    """Whether a key for the server is in the environment, in W&B's settings or in the user's netrc."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or wandb.setup().settings.api_key:
        return True
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in (Path(name).expanduser() for name in files):
        try:
            if file.is_file() and netrc.netrc(file).authenticators(urlsplit(base_url).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError) as exc:
            log.warning("W&B: %s cannot be read (%s)", file, exc)
    return False


def _answers(base_url: str) -> bool:
    """Whether the server says anything, be it an error, within seconds."""
    import requests

    heard = threading.Event()

    def ask() -> None:
        try:
            requests.head(base_url, timeout=ANSWER_S)
            heard.set()
        except requests.RequestException as exc:
            log.debug("W&B: %s", exc)

    asking = threading.Thread(target=ask, daemon=True)  # a name that is looked up keeps no time limit of its own
    asking.start()
    asking.join(2 * ANSWER_S)
    return heard.is_set()


class Tracker:
    """One W&B run, finished with the right exit code also when the code inside fails; it never costs a result.

    Args:
        folder: Run folder; W&B writes into ``wandb/`` below it.
        config: Configuration of the run, as a plain dictionary.
        name: Name of the run.
        mode: ``"offline"``, ``"online"`` (falls back to offline, with a warning, when nobody is logged in or the
            server does not answer or refuses; never a prompt) or ``"disabled"``.
        project: W&B project.
        entity: W&B entity, or None for the user's default.
        group: Group of the run.
        job_type: Kind of the run; the name, where it is left out.
        tags: Tags.

    Raises:
        ConfigError: If the mode is unknown, or W&B would refuse a tag or a name.
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
        if isinstance(tags, str):
            raise ConfigError(f"logger.tags: expected a list of texts, got {tags!r}")
        self.folder, self.config, self.name, self.mode = Path(folder), dict(config), name, mode
        self.project, self.entity, self.group = project, entity, group
        self.job_type, self.tags = job_type or name, tuple(str(tag) for tag in tags)
        self.run: Any = None
        self._check_names()

    def _check_names(self) -> None:
        """Refuse what W&B refuses, before anything is begun."""
        import pydantic
        import wandb

        try:
            wandb.Settings(
                project=self.project, entity=self.entity, run_group=self.group, run_job_type=self.job_type,
                run_name=self.name, run_tags=self.tags,
            )  # fmt: skip
        except pydantic.ValidationError as exc:
            first = exc.errors()[0]
            field = str(first["loc"][0]) if first["loc"] else "settings"
            told = str(first["msg"]).removeprefix("Value error, ")
            raise ConfigError(f"logger.{_OWN_NAMES.get(field, field)}: {told}") from exc
        except wandb.errors.Error as exc:
            raise ConfigError(f"logger.project: {reason(exc).removeprefix('UsageError: ')}") from exc

    def __enter__(self) -> Tracker:
        mode = self._possible_mode()
        try:
            self.run = self._begun(mode)
        except Exception as exc:
            if mode == "online":
                log.warning("W&B: %s; this run is kept offline (`wandb sync` sends it later)", reason(exc))
                mode = "offline"
                with left_out("W&B"):
                    self.run = self._begun(mode)
            else:
                log.warning("W&B: %s; this run is not logged", reason(exc))
        if self.run is None:
            self.mode = "disabled"
            self.run = self._begun("disabled")
        return self

    def _possible_mode(self) -> str:
        """The mode that was asked for, or offline where online cannot be."""
        if self.mode != "online":
            return self.mode
        import wandb

        base_url = wandb.setup().settings.base_url
        if not _logged_in(base_url):
            log.warning("W&B: nobody is logged in, so this run is kept offline (`wandb login`, then `wandb sync`)")
        elif not _answers(base_url):
            log.warning("W&B: %s does not answer, so this run is kept offline (`wandb sync` sends it later)", base_url)
        else:
            return "online"
        return "offline"

    def _begun(self, mode: str) -> Any:
        import wandb

        return wandb.init(
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
            settings=wandb.Settings(silent=True, console="off", quiet=True, init_timeout=BEGIN_S),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run is not None:
            with left_out("W&B"):
                self.run.finish(exit_code=0 if kind is None else 1)
            self.run = None

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log nested numbers under names joined by slashes.

        Args:
            values: Names → numbers, or such mappings again.
            step: W&B step; None is the next.
        """
        with left_out("W&B"):
            self.run.log(dict(_flatten(values)), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's summary to nested numbers under names joined by slashes."""
        with left_out("W&B"):
            self.run.summary.update(dict(_flatten(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table.

        Args:
            name: Name in the run.
            columns: Heads of the columns.
            rows: Cells, row by row.
        """
        import wandb

        with left_out("W&B"):
            self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def score_table(self, table: ScoreTable) -> None:
        """Log a score table as the artifact ``scores-<digest>``: the same table is one artifact, however often used."""
        import wandb

        if self.mode == "disabled":
            return
        digest = table.digest()
        facts = {"digest": digest, "rows": len(table), "score": table.score, "device": table.device,
                 "models": list(table.models or ()), "categories": list(table.categories)}  # fmt: skip
        with left_out("W&B: the score table"):
            kept = table.save(self.folder / "wandb" / f"scores-{digest}").parent
            artifact = wandb.Artifact(f"scores-{digest}", type="score-table", metadata=facts)
            for file in sorted(kept.iterdir()):
                artifact.add_file(str(file), policy="immutable")
            self.run.log_artifact(artifact)

    def images(self, files: Mapping[str, Path]) -> None:
        """Log picture files, by name."""
        import wandb

        with left_out("W&B: pictures"):
            self.run.log({name: wandb.Image(str(file)) for name, file in files.items()})

    def sample_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table whose last column holds image arrays, shape (H, W, 3), uint8.

        Args:
            name: Name in the run.
            columns: Heads of the columns.
            rows: Cells, row by row; the last is the image.
        """
        import wandb

        with left_out("W&B: sample images"):
            data = [[*row[:-1], wandb.Image(row[-1])] for row in rows]
            self.run.log({name: wandb.Table(columns=list(columns), data=data)})


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{name}/")
        elif isinstance(value, (bool, int, float, str)):
            flat.append((name, value))
    return flat
