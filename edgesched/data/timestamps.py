"""Times of a column, in one format that all its rows share; what could be read two ways is refused."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from edgesched.data.reading import DECIMAL_COMMA, NUMBER, Records, number_problem
from edgesched.errors import ArgumentError, EdgeschedError

UNITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
DAY_FIRST, MONTH_FIRST = "day_first", "month_first"
_CLOCK = (
    r"(?:(?:[Tt]|\s+)(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:\.(?P<fraction>\d{1,12}))?)?"
    r"(?:\s*(?P<half>[AaPp])[Mm])?\s*(?P<offset>[Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?)?"
)
_YEAR_FIRST = re.compile(r"(?P<year>\d{4})(?P<mark>[-/.])(?P<a>\d{1,2})(?P=mark)(?P<b>\d{1,2})" + _CLOCK, re.ASCII)
_YEAR_LAST = re.compile(r"(?P<a>\d{1,2})(?P<mark>[-/.])(?P<b>\d{1,2})(?P=mark)(?P<year>\d{4})" + _CLOCK, re.ASCII)
_EPOCH = datetime(1970, 1, 1)
_YEARS_10 = 10 * 365.25 * 86_400
_LARGEST_S = 1e11  # as seconds the year 5138, as milliseconds 1973: larger ones are not seconds
_EARLIEST_EPOCH_S = 5e8


@dataclass(frozen=True)
class Times:
    """Times of a column.

    Args:
        seconds: Of every record, from a common start; None where there is no time at all.
        local: Whether they are dates and clock times of an unnamed zone, whose clocks may be set back.
        dated: Whether they say the day.
    """

    seconds: list[Decimal | None]
    local: bool
    dated: bool = True


def read_times(records: Records, column: str, time_format: str | None = None) -> Times:
    """Read a column of times: all seconds, or all dates with a clock time.

    Without a format the rows decide: plain numbers are seconds; dates are ISO 8601 (fractions and offsets allowed, an
    offset in all rows or in none), or have the year last, if only one order of day and month fits the column or both
    give the same times between rows. A field without any digit, such as an empty one, is no time.

    Args:
        records: The records.
        column: The column.
        time_format: None; ``s ms us ns``: numbers in that unit; ``day_first``, ``month_first``: dates with the year last;
            or a format of ``datetime.strptime``.

    Raises:
        ArgumentError: If there is no such format.
        EdgeschedError: Of the records' class, naming the first line whose field is of another kind.
    """
    words = (*UNITS, DAY_FIRST, MONTH_FIRST)
    if time_format is not None and time_format not in words and "%" not in str(time_format):
        raise ArgumentError(f"time_format: expected {', '.join(words)} or a format as %d.%m.%Y, got {time_format!r}")
    fields = [value.strip() for value in records.columns[column]]
    rows = [row for row, field in enumerate(fields) if re.search(r"\d", field) or _non_finite(field)]
    if not rows:
        return Times([None] * len(fields), local=False)
    read = _Column(records, column, fields, rows)
    local, dated = False, True
    if time_format is not None and "%" in time_format:
        found, local = read.by_format(time_format)
        dated = any(mark in time_format for mark in ("%d", "%j", "%x", "%c"))
    elif time_format in UNITS:
        found = read.numbers(str(time_format))
    elif time_format is None and read.kind() == "number":
        found = read.numbers(None)
    else:
        found, local = read.dates(time_format)
    if dated:
        read.refuse_strays(found, numbers=time_format in UNITS or (time_format is None and read.kind() == "number"))
    seconds: list[Decimal | None] = [None] * len(fields)
    for row, value in zip(rows, found, strict=True):
        seconds[row] = value
    return Times(seconds, local, dated)


def _non_finite(field: str) -> bool:
    return field.lower().lstrip("+-") in ("nan", "inf", "infinity")


class _Column:
    """The fields of a column that hold a time, at the given rows."""

    def __init__(self, records: Records, column: str, fields: list[str], rows: list[int]) -> None:
        self.records, self.column, self.fields, self.rows = records, column, fields, rows

    def kind(self) -> str:
        """The kind that most fields are of; the first one decides a tie."""
        return Counter(_kind(self.fields[row]) for row in self.rows).most_common(1)[0][0]

    def numbers(self, unit: str | None) -> list[Decimal]:
        found = []
        for row in self.rows:
            field = self.fields[row]
            problem = number_problem(field)
            if problem:
                other = f"{field!r} in a column of numbers; a column has one format of times"
                raise self._wrong(row, other if _kind(field).startswith("year") else problem)
            found.append(Decimal(field).scaleb(-UNITS[unit or "s"]))
        if unit is None:
            for row, value in zip(self.rows, found, strict=True):
                if abs(value) >= _LARGEST_S:
                    raise self._wrong(row, f"{self.fields[row]}, too large for seconds; say time_format=ms, us or ns")
            if all(_is_day(self.fields[row]) for row in self.rows):
                raise self._wrong(self.rows[0], f"{self.fields[self.rows[0]]}, seconds or a day; "
                                  "say time_format=s or time_format=%Y%m%d")  # fmt: skip
        return found

    def dates(self, order: str | None) -> tuple[list[Decimal], bool]:
        kinds = [_kind(self.fields[row]) for row in self.rows]
        known = Counter(kind for kind in kinds if kind not in ("unknown", "number"))
        shape = known.most_common(1)[0][0] if known else None
        for row, kind in zip(self.rows, kinds, strict=True):
            if kind != (shape or "number"):
                raise self._stray(row, kinds, shape)
        if shape is None:
            raise self._wrong(
                self.rows[0], f"{self.fields[self.rows[0]]!r}; expected dates, as time_format={order} says"
            )
        year_first = str(shape).startswith("year first")
        if year_first and order is not None:
            raise self._wrong(self.rows[0], f"{self.fields[self.rows[0]]!r}, with the year first; "
                              f"time_format={order} is for dates with the year last")  # fmt: skip
        pattern = _YEAR_FIRST if year_first else _YEAR_LAST
        matches = [pattern.fullmatch(self.fields[row]) for row in self.rows]
        orders = (MONTH_FIRST,) if year_first else (order,) if order is not None else (DAY_FIRST, MONTH_FIRST)
        fitting: dict[str, list[Decimal]] = {}
        failed: dict[str, int] = {}
        for each in orders:
            found = []
            for row, match in zip(self.rows, matches, strict=True):
                value = _moment(match, each) if match else None
                if value is None:
                    failed[each] = row
                    break
                found.append(value)
            else:
                fitting[each] = found
        local = "offset" not in str(shape)
        if not fitting:
            row = min(failed.values())
            if len(set(failed.values())) > 1:
                later = max(failed.values())
                raise self._wrong(later, f"{self.fields[later]!r}, which puts day and month in another order than "
                                  f"{self.records.places[row]} ({self.fields[row]!r})")  # fmt: skip
            raise self._wrong(row, f"{self.fields[row]!r}, which is no date and time")
        read = list(fitting.values())
        if len(read) == 2 and any(a - read[0][0] != b - read[1][0] for a, b in zip(*read, strict=True)):
            raise self._wrong(self.rows[0], f"{self.fields[self.rows[0]]!r}, and day and month could be either way "
                              f"round; say time_format={DAY_FIRST} or time_format={MONTH_FIRST}")  # fmt: skip
        return read[0], local

    def by_format(self, time_format: str) -> tuple[list[Decimal], bool]:
        found, local = [], True
        for row in self.rows:
            try:
                moment = datetime.strptime(self.fields[row], time_format)
            except ValueError as exc:
                raise self._wrong(row, f"{self.fields[row]!r}; expected the format {time_format}") from exc
            if moment.tzinfo is not None:
                local, moment = False, moment.astimezone(UTC).replace(tzinfo=None)
            since = moment - _EPOCH
            found.append(Decimal(since.days * 86_400 + since.seconds) + Decimal(since.microseconds).scaleb(-6))
        return found, local

    def refuse_strays(self, found: list[Decimal], *, numbers: bool) -> None:
        """A clock that was never set writes 0 or 1970: a time ten years from the others is none of them."""
        middle = sorted(found)[len(found) // 2]
        if numbers and middle < _EARLIEST_EPOCH_S:
            return
        for row, value in zip(self.rows, found, strict=True):
            if abs(value - middle) > _YEARS_10:
                raise self._wrong(row, f"{self.fields[row]!r}, more than ten years from the other times; mend or "
                                  "remove that row")  # fmt: skip

    def _stray(self, row: int, kinds: list[str], shape: str | None) -> EdgeschedError:
        field = self.fields[row]
        if DECIMAL_COMMA.fullmatch(field) or re.search(r":\d{2},\d+", field):
            return self._wrong(row, f"{field!r}; write it with a decimal point, not a comma")
        if shape is None or (_kind(field) == "unknown"):
            return self._wrong(row, f"{field[:60]!r}, in no format known here; write seconds or ISO 8601, "
                               "or name the format by time_format, as %d.%m.%Y %H:%M")  # fmt: skip
        other = self.rows[kinds.index(shape)]
        return self._wrong(row, f"{field!r}, of another kind than {self.fields[other]!r} "
                           f"({self.records.places[other]}); a column has one format of times")  # fmt: skip

    def _wrong(self, row: int, what: str) -> EdgeschedError:
        return self.records.wrong(row, f"{self.column} is {what}")


def _kind(field: str) -> str:
    """What a field looks like: a number, the marks of a date, or unknown."""
    if NUMBER.fullmatch(field):
        return "number"
    for name, pattern in (("year first", _YEAR_FIRST), ("year last", _YEAR_LAST)):
        match = pattern.fullmatch(field)
        if match:
            parts = [part for part in ("hour", "half", "offset") if match[part] is not None]
            return " ".join((name, match["mark"], *parts))
    return "unknown"


def _moment(match: re.Match[str], order: str) -> Decimal | None:
    """Seconds since 1970 of a date with the month first or the day first; None if there is no such time."""
    month, day = (int(match["a"]), int(match["b"])) if order == MONTH_FIRST else (int(match["b"]), int(match["a"]))
    hour, half = int(match["hour"] or 0), (match["half"] or "").lower()
    if half:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (half == "p")
    offset = (match["offset"] or "").upper()
    away = 0
    if offset.startswith(("+", "-")):
        hours, minutes = int(offset[1:3]), int(offset[3:].lstrip(":") or 0)
        if hours > 14 or minutes > 59:
            return None
        away = (hours * 3600 + minutes * 60) * (-1 if offset[0] == "-" else 1)
    try:
        moment = datetime(int(match["year"]), month, day, hour, int(match["minute"] or 0), int(match["second"] or 0))
    except ValueError:
        return None
    since = moment - _EPOCH
    return Decimal(since.days * 86_400 + since.seconds - away) + Decimal(f"0.{match['fraction'] or 0}")


def _is_day(field: str) -> bool:
    try:
        return re.fullmatch(r"(?:19|20)\d{6}", field) is not None and bool(datetime.strptime(field, "%Y%m%d"))
    except ValueError:
        return False
