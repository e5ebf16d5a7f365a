"""The folder of a campaign: one shard a batch, and with it what the batch was made by; times; refusals.

What a folder is bound to is read off its shards, so that a start without an image binds it to nothing. Starts beside
each other in one folder are safe: a shard is one atomic file of its own, and what is shared is written under a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from edgesched.data.digests import json_text, text_digest
from edgesched.data.table import KEY
from edgesched.data.writing import json_document, write_bytes
from edgesched.errors import CampaignError, reason

log = logging.getLogger(__name__)
SETTINGS, TIMING, SHARDS, REFUSED = "settings.json", "timing.json", "shards", "refused"
TEXT = "text_digest"
_MADE_BY = b"edgesched.made_by"


@dataclass(frozen=True)
class Kept:
    """What lies in the shards of a campaign.

    Attributes:
        frame: A row for every image, with the digest of its text; columns of ``KEY`` and ``text_digest`` are unique.
        models: Model → every setting that its images were made with.
        scores: Every setting of the scores.
    """

    frame: pd.DataFrame | None
    models: dict[str, list[dict[str, Any]]]
    scores: list[dict[str, Any]]

    def images(self) -> set[tuple[str, str, str, int, int]]:
        """Prompt id, digest of the text, model, steps and seed of every image."""
        if self.frame is None:
            return set()
        columns = self.frame[["prompt_id", TEXT, "model", "steps", "seed"]]
        return {(str(p), str(t), str(m), int(k), int(s)) for p, t, m, k, s in columns.itertuples(index=False)}


class CampaignFolder:
    """Shards, times and refusals of a campaign.

    Args:
        out: The folder; made when something is written.
    """

    def __init__(self, out: Path | str) -> None:
        self.out = Path(out)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn a failure to write into one line.

        Raises:
            CampaignError: In place of an OSError.
        """
        try:
            yield
        except OSError as exc:
            raise CampaignError(
                f"{self.out}: cannot be written ({exc.strerror or exc}); what is done is kept, start again once it can"
            ) from exc

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold what several starts beside each other read and then write.

        Raises:
            CampaignError: If the folder cannot be written.
        """
        with self.guarded():
            self.out.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.out / ".lock")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def begin(self) -> None:
        """Make the folder, or say why it cannot be made.

        Raises:
            CampaignError: If it cannot be made.
        """
        with self.guarded():
            (self.out / SHARDS).mkdir(parents=True, exist_ok=True)
            probe = self.out / f".probe.{os.getpid()}"
            write_bytes(probe, b"")
            probe.unlink(missing_ok=True)  # processes of two machines may have one number

    def write(self, rows: Mapping[str, Sequence[Any]], model: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
        """Write one shard.

        Args:
            rows: Columns of ``KEY``, ``text_digest`` and whatever else is kept of an image; of one model.
            model: Settings of the model.
            scores: Settings of every score.

        Raises:
            CampaignError: If it cannot be written.
        """
        frame = pd.DataFrame(rows)
        made_by = json_text({"model": model, "scores": scores})
        keys = frame[[*KEY, TEXT]].to_csv(index=False)
        table = pa.Table.from_pandas(frame, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _MADE_BY: made_by.encode()})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        name = hashlib.sha256((keys + made_by).encode()).hexdigest()[:20]
        with self.guarded():
            write_bytes(self.out / SHARDS / f"{name}.parquet", buffer.getvalue())

    def read(self) -> Kept:
        """Every image of the folder; a torn shard is dropped, and one that says not what it was made by is left.

        Raises:
            CampaignError: If a shard is there and the disk does not give it.
        """
        frames, unknown = [], 0
        models: dict[str, list[dict[str, Any]]] = {}
        scores: list[dict[str, Any]] = []
        for file in sorted((self.out / SHARDS).glob("*.parquet")):
            try:
                data = file.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as exc:  # a disk that does not answer is no reason to throw images away
                raise CampaignError(f"{file}: cannot be read ({exc.strerror or exc}); start again once it can") from exc
            try:
                table = pq.read_table(io.BytesIO(data))
                frame = table.to_pandas()
                told = (table.schema.metadata or {}).get(_MADE_BY)
                made_by = None if told is None or TEXT not in frame else json.loads(told)
            except (pa.ArrowException, OSError, ValueError, KeyError) as exc:
                log.warning("%s cannot be read (%s); its images are made again", file.name, reason(exc))
                file.unlink(missing_ok=True)
                continue
            if made_by is None:
                unknown += len(frame)
                continue
            settings = models.setdefault(str(frame["model"].iloc[0]), [])
            for known, found in ((settings, made_by["model"]), (scores, made_by["scores"])):
                if found not in known:
                    known.append(found)
            frames.append(frame)
        if unknown:
            log.warning(
                "%s: %d images do not say what text and settings made them, and are not used", self.out, unknown
            )
        if not frames:
            return Kept(None, models, scores)
        return Kept(pd.concat(frames, ignore_index=True).drop_duplicates([*KEY, TEXT]), models, scores)

    def check(self, kept: Kept, models: Mapping[str, Mapping[str, Any]], scores: Mapping[str, Any]) -> None:
        """Refuse to go on with images or scores that were made otherwise.

        Args:
            kept: What :meth:`read` found.
            models: Settings of the models now, by name.
            scores: Settings of the scores now, by name.

        Raises:
            CampaignError: Naming the setting, its value in the folder and now.
        """
        for before in kept.scores:
            if set(before) != set(scores):
                was, names = ", ".join(before), ", ".join(scores)
                raise CampaignError(
                    f"{self.out}: was begun with other scores ({was}, now {names}); choose another campaign.out"
                )
            for name, now in scores.items():
                _same(self.out, before[name], now, name)
        for name, ways in kept.models.items():
            for before in ways:
                _same(self.out, before, models.get(name, ways[0]), name)

    def times(self) -> list[dict[str, Any]]:
        """Rows of ``timing.json``; without it, or if it cannot be read, none."""
        try:
            found = json.loads((self.out / TIMING).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as exc:
            log.warning("%s cannot be read (%s); times are measured again", self.out / TIMING, exc)
            return []
        return [row for row in found if "settings" in row]  # without them nothing says what was timed

    def keep_time(self, row: Mapping[str, Any]) -> None:
        """Add a time to ``timing.json``, beside those that other starts have added meanwhile.

        Raises:
            CampaignError: If it cannot be written.
        """

        def key(r: Mapping[str, Any]) -> tuple[Any, ...]:
            return r["model"], r["steps"], r["batch_size"]

        with self.locked(), self.guarded():
            rows = [r for r in self.times() if key(r) != key(row)]
            write_bytes(self.out / TIMING, json_document([*rows, dict(row)]).encode())

    def keep_refusal(self, model: str, steps: int, why: str) -> None:
        """Note why images of a model at a step count cannot be made, for the process that tells it at the end.

        Args:
            model: Name of the model.
            steps: The step count.
            why: The reason, in one line.

        Raises:
            CampaignError: If it cannot be written.
        """
        with self.guarded():
            folder = self.out / REFUSED
            folder.mkdir(exist_ok=True)
            told = {"model": model, "steps": steps, "reason": why}
            write_bytes(folder / f"{text_digest(json_text([model, steps]))}.json", json_text(told).encode())

    def refusals(self) -> dict[tuple[str, int], str]:
        """Model and step count → why."""
        found = {}
        for file in sorted((self.out / REFUSED).glob("*.json")):
            try:
                told = json.loads(file.read_text(encoding="utf-8"))
            except FileNotFoundError:  # another start tries it again
                continue
            found[str(told["model"]), int(told["steps"])] = str(told["reason"])
        return found

    def forget_refusals(self, models: Mapping[str, Any], counts: Sequence[int]) -> None:
        """Let every step count be tried again by this start.

        Args:
            models: Models by name.
            counts: Step counts.

        Raises:
            CampaignError: If a note cannot be deleted.
        """
        with self.guarded():
            for model in models:
                for k in counts:
                    (self.out / REFUSED / f"{text_digest(json_text([model, k]))}.json").unlink(missing_ok=True)

    def order(self, models: Sequence[str], present: Sequence[str]) -> tuple[str, ...]:
        """Models in the order of this start if it names all, else in that of the folder, new ones last.

        Args:
            models: Models of this start.
            present: Models that have images.
        """
        if set(present) <= set(models):
            return tuple(m for m in models if m in set(present))
        try:
            before = list(json.loads((self.out / SETTINGS).read_text(encoding="utf-8"))["models"])
        except (OSError, ValueError, KeyError):
            before = []
        return tuple(m for m in dict.fromkeys([*before, *models, *sorted(present)]) if m in set(present))


def _same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
    """Refuse a setting that is another than before."""
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            raise CampaignError(
                f"{out}: was begun with another {key} of {name} ({before.get(key)}, now {now.get(key)}); "
                "choose another campaign.out"
            )
