"""A run: its folder, its logger, and the last act of every task, done once."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from edgesched.data.writing import left_out, write_json
from edgesched.report.page import Page, Section, print_table, show, write_html
from edgesched.runs.tracking import Tracker


class Run:
    """What a task is handed to leave its results with.

    Args:
        folder: Run folder.
        name: Name of the experiment, the title of its page.
        tracker: The W&B run.
    """

    def __init__(self, folder: Path | str, name: str, tracker: Tracker) -> None:
        self.folder, self.name, self.tracker = Path(folder), name, tracker
        self._started = time.perf_counter()

    @property
    def figures(self) -> Path:
        """Folder of the pictures."""
        return self.folder / "figures"

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._started

    def save(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, with the seconds that the run took so far; a later call replaces it.

        Raises:
            OutputError: If it cannot be written.
        """
        told = {**metrics, "seconds_total": self.seconds}
        write_json(self.folder / "metrics.json", told)
        self.tracker.summary(told)

    def publish(self, page: Page) -> None:
        """Print the sections that have a key, write ``report.html``, and log tables and pictures.

        A page or a picture that fails is left out, in one line: the metrics are there.

        Args:
            page: What is told.
        """
        for name, fact in list(page.facts.items())[:1]:
            print(f"{name}: {fact}", flush=True)
        for section in page.sections:
            if section.key:
                if section.rows:
                    print_table(section.title, section.columns, section.rows)
                for paragraph in section.text:
                    print(paragraph, flush=True)
        facts = {**page.facts, "Run took": f"{self.seconds:.1f} s"}
        again = self._again()
        sections = [*page.sections, *([] if again is None else [again])]
        with left_out("the report"):
            write_html(self.folder / "report.html", f"edgesched: {self.name}", facts, sections)
        for section in page.sections:
            if section.key and section.rows:
                rows = [[show(cell) for cell in row] for row in section.rows]
                self.tracker.table(section.key, list(section.columns), rows)
        self.tracker.images({file.stem: file for section in page.sections for file, _ in section.figures})

    def _again(self) -> Section | None:
        """How to repeat the run: its very command line; None for a folder that Hydra did not make."""
        file = self.folder / ".hydra/overrides.yaml"
        if not file.exists():
            return None
        hydra = file.with_name("hydra.yaml")
        sources = OmegaConf.load(hydra).hydra.runtime.config_sources if hydra.exists() else []
        beside = [os.path.relpath(source.path) for source in sources if source.provider == "command-line"]
        given = [part for folder in beside for part in ("--config-dir", folder)]
        given += [str(text) for text in OmegaConf.load(file)]
        told = f"edgesched {metadata.version('edgesched')}; the whole configuration is in .hydra/config.yaml of the run folder."
        return Section("Run it again", (told,), code=shlex.join(["python", "scripts/run.py", *given]))

    def __str__(self) -> str:
        return os.path.relpath(self.folder)
