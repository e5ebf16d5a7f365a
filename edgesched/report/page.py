"""What a run leaves for people: one table in the terminal, one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | float | int | None
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--paper:#fff;--rule:#d8dce3;--soft:#f4f6f9;--accent:#0072b2}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--paper:#15181d;--rule:#343a45;--soft:#1d2229;--accent:#56b4e9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1.25rem;font:16px/1.55 system-ui,sans-serif;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
p.lead{font-size:1.05rem}
figure{margin:1rem 0}figure img{width:100%;height:auto;background:#fff;border-radius:4px}
figcaption{font-size:.9rem;opacity:.85}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid var(--rule)}
pre{background:var(--soft);padding:.75rem;overflow-x:auto;border-radius:4px;font-size:.85rem}
"""


@dataclass(frozen=True)
class Section:
    """One part of a report: text, then a table, then pictures, then preformatted text; each may be missing.

    Args:
        title: Heading.
        text: Plain paragraphs.
        columns: Column heads of the table.
        rows: Rows of the table.
        figures: Picture files with their captions.
        code: Preformatted text.
        key: Name of the section in logs; what has one is printed to the terminal too.
    """

    title: str
    text: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()
    figures: Sequence[tuple[Path, str]] = ()
    code: str = ""
    key: str = ""


@dataclass(frozen=True)
class Page:
    """What a task leaves for people.

    Args:
        facts: What was run and on what, as names and values at the head of the page.
        sections: Parts in their order.
    """

    facts: Mapping[str, str]
    sections: Sequence[Section]


def show(value: Cell) -> str:
    """A cell as text: four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return "–" if value != value else ("∞" if value > 0 else "−∞")
        if value == 0:
            return "0"
        return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"
    return str(value)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], console: Console | None = None
) -> None:
    """Print a table to the terminal, at least 120 columns wide where the output is not a terminal.

    Args:
        title: Title.
        columns: Heads of the columns.
        rows: Cells, row by row.
        console: Where it goes; None is the terminal.
    """
    table = Table(title=Text(title), title_justify="left", header_style="bold")  # Text: no brackets taken for markup
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(show(cell)) for cell in row))
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=max(120, console.width))
    console.print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(show(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def write_html(path: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> Path:
    """Write one self-contained HTML page: pictures inside, no scripts, nothing fetched.

    Args:
        path: File to write.
        title: Title of the page.
        facts: What was run and on what, as names and values at the head of the page.
        sections: Parts in their order.

    Returns:
        ``path``.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(("", ""), list(facts.items())).replace("<thead>", "<thead hidden>"),
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
        if section.rows:
            parts.append(_table(section.columns, section.rows))
        parts += [_picture(file, caption) for file, caption in section.figures]
        if section.code:
            parts.append(f"<pre>{html.escape(section.code)}</pre>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    path.write_text(page, encoding="utf-8")
    return path
