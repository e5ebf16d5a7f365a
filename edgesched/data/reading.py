"""Text files with columns are read, not guessed: every record has the fields that the header names."""

from __future__ import annotations

import csv
from pathlib import Path


def check_fields(path: Path | str, separator: str = ",") -> None:
    """Refuse a record with more or fewer fields than the header, naming its line; one empty field at the end is let by.

    A reader that takes the first field of longer records for an index shifts the others by one, silently.

    Args:
        path: Text file with a header.
        separator: What parts the fields.

    Raises:
        ValueError: In one line.
        OSError: If the file cannot be read.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        header = next(rows, None)
        if header is None:
            raise ValueError("the file is empty")
        width = len(header)
        for row in rows:
            if (row and row[width:] not in ([], [""])) or 0 < len(row) < width:
                raise ValueError(f"line {rows.line_num}: {len(row)} fields, the header has {width}; quote the text")
