"""Text files with columns are read, not guessed: every field is text until a number is asked for, and fits its header."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgesched.errors import EdgeschedError

NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?[\d.]*\d,\d+(?:[.,]\d+)*(?:[eE][+-]?\d+)?", re.ASCII)
_DIGITS = re.compile(r"[+-]?\d+", re.ASCII)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_TEXT_PART = re.compile(r"part-(?:[mr]-)?(\d+)[^/]*?(?:\.(?:csv|tsv|txt))?(?:\.(?:gz|bz2|xz))?")
_BINARY = (".parquet", ".orc", ".avro", ".json", ".arrow", ".feather")


@dataclass(frozen=True, eq=False)
class Records:
    """Columns of text, of one length, and where in the file each record begins.

    Args:
        path: The file, or the folder of its parts.
        columns: Name → fields of that column as they stand, one a record.
        places: Where each record begins: ``"line 7"``, with the part's name in a folder.
        error: Class of the errors raised about the file.
    """

    path: Path
    columns: dict[str, list[str]]
    places: list[str]
    error: type[EdgeschedError]

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def wrong(self, row: int, what: str) -> EdgeschedError:
        """The error that says what is wrong with a record, by its place in the file.

        Args:
            row: Position of the record.
            what: What is wrong with it.
        """
        return self.error(f"{self.path}: {self.places[row]}: {what}")

    def where(self, keep: Sequence[bool]) -> Records:
        """The records that are to be kept."""
        rows = [row for row, kept in enumerate(keep) if kept]
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Records(self.path, columns, [self.places[row] for row in rows], self.error)

    def names(self, column: str, *, empty: bool = False) -> list[str]:
        """Names, without the space around them; "NA", "None" and "007" are names like any other.

        Args:
            column: The column.
            empty: Let empty ones stand.

        Raises:
            EdgeschedError: If one is empty.
        """
        found = [value.strip() for value in self.columns[column]]
        if not empty and "" in found:
            raise self.wrong(found.index(""), f"{column} is empty; expected a name")
        return found

    def numbers(self, column: str, *, least: float | None = None, empty: bool = False) -> list[float]:
        """Finite numbers with a decimal point; an empty field is NaN where that is allowed.

        Args:
            column: The column.
            least: Smallest number allowed.
            empty: Let empty fields stand, as NaN.

        Raises:
            EdgeschedError: At the first field that is no such number.
        """
        found = []
        for row, value in enumerate(self.columns[column]):
            if empty and not value.strip():
                found.append(math.nan)
                continue
            problem = number_problem(value)
            if problem:
                raise self.wrong(row, f"{column} is {problem}")
            number = float(value)
            if least is not None and number < least:
                raise self.wrong(row, f"{column} is {value.strip()}; expected at least {least:g}")
            found.append(number)
        return found

    def integers(self, column: str, *, least: int | None = None) -> list[int]:
        """Whole numbers of at most 64 bits: ``4`` and ``4.0``, not ``4.9``.

        Args:
            column: The column.
            least: Smallest number allowed.

        Raises:
            EdgeschedError: At the first field that is no such number.
        """
        found = []
        for row, (value, number) in enumerate(zip(self.columns[column], self.numbers(column), strict=True)):
            # A float holds whole numbers up to 2^53 only, so digits alone are read as they stand.
            exact = int(value) if _DIGITS.fullmatch(value.strip()) else int(number)
            if (exact != number and not _DIGITS.fullmatch(value.strip())) or not -(2**63) <= exact < 2**63:
                raise self.wrong(row, f"{column} is {value.strip()}; expected a whole number of at most 64 bits")
            if least is not None and exact < least:
                raise self.wrong(row, f"{column} is {value.strip()}; expected at least {least}")
            found.append(exact)
        return found

    def booleans(self, column: str) -> list[bool]:
        """``true``, ``false``, ``1`` or ``0``, in any case.

        Raises:
            EdgeschedError: At the first field that is none of these.
        """
        found = []
        for row, value in enumerate(self.columns[column]):
            if value.strip().lower() not in _BOOLEANS:
                raise self.wrong(row, f"{column} is {value!r}; expected true, false, 1 or 0")
            found.append(_BOOLEANS[value.strip().lower()])
        return found


def number_problem(value: str) -> str | None:
    """Why a field is no finite number, in words that follow "is"; None if it is one."""
    stripped = value.strip()
    if not stripped:
        return "empty; expected a number"
    if NUMBER.fullmatch(stripped):
        return None if math.isfinite(float(stripped)) else f"{stripped!r}; expected a finite number"
    if DECIMAL_COMMA.fullmatch(stripped):
        return f"{stripped!r}; write it with a decimal point, and no separator of thousands"
    if stripped.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return f"{stripped!r}; expected a finite number"
    return f"{stripped[:60]!r}; expected a number"


def read_records(
    path: Path | str | None,
    needed: Sequence[str] = (),
    *,
    error: type[EdgeschedError],
    separator: str = ",",
    quoted: bool = True,
    rename: Mapping[str, str] | None = None,
) -> Records:
    """Read a text file with a header, or a folder of parts as Spark and Hadoop write them, in the order of their numbers.

    UTF-8, with or without a byte order mark; ``.gz``, ``.bz2`` and ``.xz`` are unpacked. Quoted fields may hold line
    breaks. Blank lines are skipped. A record has the fields that the header names, and at most one empty one more at
    its end.

    Args:
        path: The file or folder.
        needed: Columns that must be there, by their new names.
        error: Class of the errors raised about the file.
        separator: What parts the fields.
        quoted: Fields may stand in quotes; if not, quotes are text, and a field that is in quotes as a whole is refused.
        rename: Column of the file → its new name; it replaces another column of that name.

    Raises:
        EdgeschedError: Of the given class, in one line with the number of the line in the file.
    """
    if path is None:
        raise error("path: expected a file, got none")
    path = Path(path)
    header: list[str] | None = None
    rows: list[list[str]] = []
    places: list[str] = []
    for part in _parts(path, error):
        inside = "" if part == path else f"{part.name}: "
        told = f"{path}: {inside}"
        records = _split(part, separator, quoted, told, error)
        line, first = next(records, (0, None))
        if first is None:
            continue
        names = _header(first, f"{told}line {line}", error)
        if header is None:
            header = names
            _require(header, needed, dict(rename or {}), separator, told, error)
        elif names != header:
            raise error(f"{told}its header differs from that of the first part; every part needs the same one")
        width = len(header)
        for line, row in records:
            if len(row) < width or row[width:] not in ([], [""]):
                raise error(f"{told}line {line}: {len(row)} fields, the header has {width}; quote the text")
            rows.append(row[:width])
            places.append(f"{inside}line {line}")
    if header is None:
        raise error(f"{path}: the file is empty; expected a header and records")
    if not rows:
        raise error(f"{path}: there is a header and no record")
    columns = dict(zip(header, (list(column) for column in zip(*rows, strict=True)), strict=True))
    new = dict(rename or {})
    kept = {name: name for name in header if name not in new and name not in new.values()} | new
    return Records(path, {kept[name]: columns[name] for name in header if name in kept}, places, error)


def _header(row: list[str], told: str, error: type[EdgeschedError]) -> list[str]:
    names = [name.strip() for name in row]
    if len(names) > 1 and not names[-1]:
        names = names[:-1]  # the separator at the end of every line of some programs; records are held to it
    if "" in names:
        raise error(f"{told}: column {names.index('') + 1} of the header has no name")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise error(f"{told}: the header names the column {twice!r} twice")
    return names


def _require(header: list[str], needed: Sequence[str], rename: dict[str, str], separator: str, told: str,
             error: type[EdgeschedError]) -> None:  # fmt: skip
    targets = list(rename.values())
    twice = next((name for i, name in enumerate(targets) if name in targets[:i]), None)
    if twice is not None:
        raise error(f"columns: two columns are to be named {twice!r}; expected one")
    stay = [name for name in header if name not in rename]
    missing = [name for name in rename if name not in header]
    missing += [name for name in dict.fromkeys(needed) if name not in stay and name not in targets]
    if missing:
        also = f", and {', '.join(map(repr, missing[1:]))}" if missing[1:] else ""
        other = next((s for s in (";", "\t", "|", ",") if s != separator and len(header) == 1 and s in header[0]), None)
        hint = f"; the fields seem to be parted by {other!r}, expected {separator!r}" if other else ""
        raise error(f"{told}column {missing[0]!r} is missing{also}; present: {', '.join(header)}{hint}")


def _split(file: Path, separator: str, quoted: bool, told: str, error: type[EdgeschedError]
           ) -> Iterator[tuple[int, list[str]]]:  # fmt: skip
    """Records of one file, each with the line at which it begins."""
    try:
        with _COMPRESSED.get(file.suffix.lower(), open)(file, "rb") as handle:
            data: bytes = handle.read()
    except _UNREADABLE as exc:
        raise error(f"{told}cannot be read ({getattr(exc, 'strerror', None) or exc})") from exc
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = 1 + _breaks(bytes(exc.object[: exc.start]))
        raise error(f"{told}line {line}: byte 0x{exc.object[exc.start]:02x} is not UTF-8; save it as UTF-8") from exc
    if "\0" in text:
        line = 1 + _breaks(text[: text.index("\0")].encode())
        raise error(f"{told}line {line}: a zero byte; this is no text in UTF-8")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    records = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    while True:
        line = records.line_num + 1
        try:
            row = next(records, None)
        except csv.Error as exc:
            raise error(f"{told}line {line}: {_quoting(str(exc))}") from exc
        if row is None:
            return
        # A field of nothing but space is a blank line; an empty one alone was quoted, and is a record.
        if row and not (len(row) == 1 and row[0] and not row[0].strip()):
            whole = None if quoted else next((f for f in row if re.fullmatch(r'"(?:[^"]|"")*"', f)), None)
            if whole is not None:
                raise error(f"{told}line {line}: {whole[:60]} stands in quotes, which are text in this kind of file; "
                            "write it without")  # fmt: skip
            yield line, row


def _breaks(data: bytes) -> int:
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def _quoting(told: str) -> str:
    if "unexpected end" in told:
        return "a quote is opened and never closed"
    if "expected after" in told:
        return "text after a closing quote; write a quote inside a quoted field twice"
    return f"{told}; is a quote left open?"


def _parts(path: Path, error: type[EdgeschedError]) -> list[Path]:
    """The file itself, or the parts of a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise error(f"{path}: cannot be read (it is no file)")
    try:
        inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
        done = (path / "_SUCCESS").exists()
    except OSError as exc:
        raise error(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    for entry in inside:
        if not entry.is_file() or entry.name.lower().endswith(_BINARY) or not _TEXT_PART.fullmatch(entry.name):
            raise error(f"{path}: a folder with {entry.name!r} in it; expected a file, or a folder of text parts "
                        "(part-00000*.csv)")  # fmt: skip
    if not inside:
        raise error(f"{path}: a folder without parts; expected a file, or a folder of text parts (part-00000*.csv)")
    if not done:
        raise error(f"{path}: a folder of parts without _SUCCESS; the job that wrote it has not finished")
    return sorted(inside, key=lambda entry: (_part_number(entry.name), entry.name))


def _part_number(name: str) -> int:
    found = _TEXT_PART.fullmatch(name)
    return int(found[1]) if found else 0
