"""The score table: one row per generated image, the hinge between generating and planning."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesched.data.reading import Records, read_records
from edgesched.data.writing import json_document, replacing, write_bytes
from edgesched.errors import ScoreTableError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
KEY = ("prompt_id", "model", "steps", "seed")
_TYPES: dict[str, str] = {
    "prompt_id": "str",
    "category": "str",
    "model": "str",
    "steps": "int32",
    "seed": "int64",
    "latency_s": "float32",
    "batch_size": "int32",
}
_OPTIONAL: dict[str, str] = {"truncated": "bool"}
FILE, MANIFEST = "scores.parquet", "manifest.json"
MIN_PROMPTS = 20


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Measured scores, validated: types, no NaN, unique keys, enough prompts a category.

    Args:
        frame: Columns ``prompt_id category model steps seed latency_s batch_size`` and one float column
            for every score. A column ``truncated`` marks rows whose prompt is longer than a token limit.
        manifest: Where the rows come from: device, library versions, models, date and so on.
        score: Name of the score column to plan with.
        models: If given, the model names that are allowed.
        min_prompts: Categories with fewer prompts are left out, with a message.
        order: Order of the categories, kept by every part of the table; None takes the manifest's
            ``category_order``, as ``models`` takes its ``model_order``, and without it the names are sorted.

    The rows are kept in the order of their keys, so that nothing computed from them depends on the order given.

    Raises:
        ScoreTableError: Naming the row, the column, the value and what was expected.
    """

    frame: pd.DataFrame
    manifest: Mapping[str, Any] = field(default_factory=dict)
    score: str = "clip_score"
    models: tuple[str, ...] | None = None
    min_prompts: int = MIN_PROMPTS
    order: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        frame = _validated(self.frame, self.score, self.models)
        frame = _large_enough(frame, self.min_prompts)
        object.__setattr__(self, "frame", frame.sort_values(list(KEY), ignore_index=True))
        for name, key, column in (("models", "model_order", "model"), ("order", "category_order", "category")):
            given = getattr(self, name)
            told = _names(self.manifest, key) if given is None else given
            object.__setattr__(self, name, _ordered(told, frame[column].unique().tolist()))

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories in their order, which every part of a table keeps."""
        return self.order or ()

    @property
    def draw_order(self) -> tuple[str, ...]:
        """Categories by their smallest prompt id: the order of random draws, whatever the order of the categories."""
        return tuple(self.frame["category"].unique().tolist())

    @property
    def steps(self) -> tuple[int, ...]:
        """Every measured step count, increasing."""
        return tuple(int(k) for k in sorted(self.frame["steps"].unique()))

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the score columns."""
        return tuple(str(c) for c in self.frame.columns if c not in _TYPES and c not in _OPTIONAL)

    @property
    def device(self) -> str:
        """The device that the scores come from."""
        return str(self.manifest.get("device", "unknown device"))

    def digest(self) -> str:
        """SHA-256 of the rows in key order, 16 hexadecimal digits."""
        ordered = self.frame.sort_values(list(KEY)).to_csv(index=False).encode()
        return hashlib.sha256(ordered).hexdigest()[:16]

    def replaced(
        self, frame: pd.DataFrame, min_prompts: int = 1, *, order: tuple[str, ...] | None = None
    ) -> ScoreTable:
        """The same table with other rows, and with another order of categories if one is given.

        Args:
            frame: The rows.
            min_prompts: Categories with fewer prompts are left out.
            order: Order of the categories, or None for the table's own.

        Raises:
            ScoreTableError: If the rows are not valid.
        """
        return ScoreTable(frame, self.manifest, self.score, self.models, min_prompts, order or self.order)

    def split(self, salt: int | None = None) -> tuple[ScoreTable, ScoreTable]:
        """Fit and replay halves by a hash of the prompt's id: no prompt is in both, and it never changes.

        Args:
            salt: A number for other halves, as random as the hash; None for the usual ones.

        Raises:
            ScoreTableError: If a category has prompts in one half only.
        """
        prefix = "" if salt is None else f"{salt}/"
        ids = {
            pid: hashlib.sha256((prefix + pid).encode()).digest()[0] % 2 == 0
            for pid in self.frame["prompt_id"].unique()
        }
        fit = self.frame["prompt_id"].map(ids).astype(bool)
        for category in self.categories:
            mine = self.frame["category"] == category
            if fit[mine].all() or not fit[mine].any():
                count = self.frame.loc[mine, "prompt_id"].nunique()
                raise ScoreTableError(
                    f"category {category!r}: its {count} prompts fall into one half; give more prompts"
                )
        return self.replaced(self.frame[fit]), self.replaced(self.frame[~fit])

    def save(self, folder: Path | str) -> Path:
        """Write ``scores.parquet`` and ``manifest.json`` into a folder, each in one atomic step.

        The manifest tells the order of categories and models.

        Raises:
            ScoreTableError: If the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / FILE) as file:
                self.frame.to_parquet(file, compression="zstd", index=False)
            orders = {"category_order": list(self.categories), "model_order": list(self.models or ())}
            write_bytes(folder / MANIFEST, json_document(dict(self.manifest) | orders).encode())
        except OSError as exc:
            raise ScoreTableError(f"{folder}: cannot be written ({exc.strerror or exc})") from exc
        return folder / FILE

    @classmethod
    def load(
        cls,
        path: Path | str | None = None,
        *,
        score: str = "clip_score",
        models: Sequence[str] | None = None,
        min_prompts: int = MIN_PROMPTS,
    ) -> ScoreTable:
        """Read a table: the shipped one, a folder that holds ``scores.parquet``, or a Parquet file.

        Args:
            path: Folder or file; None for the table that ships with the package.
            score: Name of the score column to plan with.
            models: If given, the model names that are allowed.
            min_prompts: Categories with fewer prompts are left out.

        Raises:
            ScoreTableError: If nothing is there, or it cannot be read, or it breaks the contract.

        Example:
            >>> len(ScoreTable.load().categories)
            4
        """
        import pandas as pd

        file = Path(str(resources.files("edgesched") / "data")) if path is None else Path(path)
        if file.is_dir():
            file = file / FILE
        if not file.is_file():
            raise ScoreTableError(f"{file}: no such score table")
        try:
            frame = pd.read_parquet(file)
        except Exception as exc:
            reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            raise ScoreTableError(f"{file}: not a readable Parquet file ({reason})") from exc
        beside = file.with_name(MANIFEST)
        try:
            manifest = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        except ValueError as exc:
            raise ScoreTableError(f"{beside}: not valid JSON ({exc})") from exc
        if not isinstance(manifest, dict):
            raise ScoreTableError(f"{beside}: expected a JSON object, got {type(manifest).__name__}")
        try:
            return cls(frame, manifest, score, None if models is None else tuple(models), min_prompts)
        except ScoreTableError as exc:
            raise ScoreTableError(f"{file}: {exc}") from exc

    @classmethod
    def from_csv(
        cls,
        path: Path | str,
        *,
        score: str = "clip_score",
        columns: Mapping[str, str] | None = None,
        seconds: Mapping[str, float] | None = None,
        device: str = "unknown device",
        min_prompts: int = MIN_PROMPTS,
    ) -> ScoreTable:
        """Read scores from elsewhere; what is missing is filled in: steps 1, seed 0, batch size 1.

        Names are text as it stands: ``0000``, ``2.10``, ``NA``. Rows without a category are left out and counted.
        Other columns are kept if they end in ``_score`` and hold a number in every row.

        Args:
            path: CSV file, or a folder of its parts.
            score: Name of the score column to plan with, whatever it is.
            columns: Column of the file → column of the table, where names differ.
            seconds: Model → seconds per image, for files without ``latency_s``.
            device: Device of the scores, for the manifest.
            min_prompts: Categories with fewer prompts are left out.

        Raises:
            ScoreTableError: If the file cannot be read, a column is missing that has no default, or a field is no
                value of its column, naming its line.
        """
        import pandas as pd

        if score in _TYPES or score in _OPTIONAL:
            raise ScoreTableError(f"score: {score!r} is no score; expected the name of a score column")
        wrong = [f"{model} ({value})" for model, value in (seconds or {}).items() if not 0 < value < float("inf")]
        if wrong:
            raise ScoreTableError(f"data.seconds: expected more than 0 seconds, got {', '.join(wrong)}")
        needed = ("prompt_id", "category", "model", score)
        records = read_records(path, needed, error=ScoreTableError, rename=columns)
        labelled = [bool(category) for category in records.names("category", empty=True)]
        if not all(labelled):
            log.warning("%s: %d of %d rows have no category and are left out", Path(path).name,
                        labelled.count(False), len(records))  # fmt: skip
            records = records.where(labelled)
        if not len(records):
            raise ScoreTableError(f"{path}: no row has a category")
        frame = pd.DataFrame(_columns(records, score))
        for column, default in (("steps", 1), ("seed", 0), ("batch_size", 1)):
            if column not in frame:
                frame[column] = default
        if "latency_s" not in frame:
            for model in frame["model"].unique():
                if model not in (seconds or {}):
                    raise ScoreTableError(
                        f"latency_s: the file has none, and data.seconds names none for model {model!r}"
                    )
            frame["latency_s"] = frame["model"].map(dict(seconds or {}))
        elif seconds:
            log.warning("%s has latency_s of its own; data.seconds is not used", Path(path).name)
        try:
            return cls(frame, {"device": device, "source": str(path)}, score, min_prompts=min_prompts)
        except ScoreTableError as exc:
            raise ScoreTableError(f"{path}: {exc}") from exc


def _columns(records: Records, score: str) -> dict[str, list[Any]]:
    """The columns of a table that a file has, each of its type."""
    found: dict[str, list[Any]] = {}
    for column in records.columns:
        kind = (_TYPES | _OPTIONAL).get(column)
        if kind == "str":
            found[column] = records.names(column)
        elif kind == "bool":
            found[column] = records.booleans(column)
        elif kind is not None and kind.startswith("int"):
            found[column] = records.integers(column, least=None if column == "seed" else 1)
        elif kind is not None:
            found[column] = records.numbers(column, least=0.0)
        elif column == score:
            found[column] = records.numbers(column)
        elif column.endswith("_score"):
            try:
                found[column] = records.numbers(column)
            except ScoreTableError as exc:
                log.warning("column %r is left out: %s", column, exc)
    return found


def _names(manifest: Mapping[str, Any], key: str) -> Sequence[str]:
    """An order that the manifest tells, or none.

    Raises:
        ScoreTableError: If it is no list of different names.
    """
    told = manifest.get(key, ())
    if not isinstance(told, (list, tuple)) or not all(isinstance(n, str) for n in told) or len(set(told)) < len(told):
        raise ScoreTableError(f"manifest: {key} is {told!r}; expected a list of different names")
    return told


def _ordered(told: Sequence[str], present: Sequence[str]) -> tuple[str, ...]:
    """Names that are present in the order told, others behind them by name."""
    known = [name for name in dict.fromkeys(told) if name in present]
    return (*known, *sorted(set(present) - set(known)))


def _validated(frame: pd.DataFrame, score: str, models: tuple[str, ...] | None) -> pd.DataFrame:
    missing = [c for c in (*_TYPES, score) if c not in frame.columns]
    if missing:
        raise ScoreTableError(f"columns missing: {', '.join(missing)}; present: {', '.join(map(str, frame.columns))}")
    if len(frame) == 0:
        raise ScoreTableError("the table is empty; expected at least one row")
    frame = frame.reset_index(drop=True).copy()
    for column in frame.columns:
        empty = frame[column].isna().to_numpy()
        if empty.any():
            raise ScoreTableError(f"row {int(empty.argmax())}: {column} is missing or NaN; expected a value")
        kind = (_TYPES | _OPTIONAL).get(str(column), "float32")
        try:
            if kind == "str":
                frame[column] = frame[column].astype(str).astype(object)
            else:
                frame[column] = _cast(frame[column], str(column), kind)
        except (TypeError, ValueError) as exc:
            raise ScoreTableError(f"{column}: expected {kind} ({exc})") from exc
        if kind.startswith("float"):
            bad = ~np.isfinite(frame[column].to_numpy())
            if bad.any():
                row = int(bad.argmax())
                raise ScoreTableError(f"row {row}: {column} is {frame[column].iloc[row]}; expected a finite number")
    for column, allowed in (("steps", 1), ("batch_size", 1), ("latency_s", 0)):
        low = (frame[column] < allowed).to_numpy()
        if low.any():
            row = int(low.argmax())
            value = frame[column].iloc[row]
            raise ScoreTableError(f"row {row}: {column} is {value}; expected at least {allowed}")
    if models is not None:
        unknown = ~frame["model"].isin(models).to_numpy()
        if unknown.any():
            row = int(unknown.argmax())
            raise ScoreTableError(f"row {row}: model {frame['model'].iloc[row]!r} is not one of {', '.join(models)}")
    twice = frame.duplicated(list(KEY)).to_numpy()
    if twice.any():
        row = int(twice.argmax())
        key = tuple(frame.loc[row, list(KEY)])
        raise ScoreTableError(f"row {row}: the key {KEY} = {key} appears twice; keys must be unique")
    several = frame.groupby("prompt_id", sort=False)["category"].nunique()
    if (several > 1).any():
        raise ScoreTableError(f"prompt {several.idxmax()!r} stands in more than one category")
    return frame


def _cast(values: pd.Series, column: str, kind: str) -> pd.Series:
    """Values of another type, if that changes none of them.

    Raises:
        ScoreTableError: Naming the first row whose value would become another.
    """
    cast = values.astype(kind)
    if kind == "bool":
        changed = ~values.isin([True, False]).to_numpy()
    elif kind.startswith("int"):
        changed = (values.astype("float64") != cast.astype("float64")).to_numpy()
    else:
        return cast
    if changed.any():
        row = int(changed.argmax())
        raise ScoreTableError(f"row {row}: {column} is {values.iloc[row]!r}; expected {kind}")
    return cast


def _large_enough(frame: pd.DataFrame, least: int) -> pd.DataFrame:
    counts = frame.groupby("category", sort=False)["prompt_id"].nunique()
    small = counts[counts < least]
    if len(small) == len(counts):
        listed = ", ".join(f"{c} ({n})" for c, n in small.items())
        raise ScoreTableError(f"every category has fewer than {least} prompts: {listed}")
    for category, count in small.items():
        log.warning("category %r is left out: %d prompts, at least %d are needed", category, count, least)
    return frame[~frame["category"].isin(small.index)].reset_index(drop=True) if len(small) else frame
