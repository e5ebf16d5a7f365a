"""Compare run folders: `python scripts/compare.py outputs/plan [more folders ...] [--out FOLDER]`.

Prints one table, means with 95 % intervals over seeds, and writes comparison.csv, comparison.png and comparison.svg.
"""

import argparse
import logging
import sys
from pathlib import Path

from edgesched.errors import EdgeschedError
from edgesched.report import page, plans, style
from edgesched.runs.compare import MEASURES, compare_runs, read_runs


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--out", default="outputs/comparison", help="where table and figure are written")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        runs = read_runs(given.folders)
        table = compare_runs(runs)
        out = Path(given.out)
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / "comparison.csv", index=False)
        style.save(plans.comparison(table), out / "comparison.png", vector=True)
    except EdgeschedError as exc:
        sys.exit(f"error: {exc}")
    except OSError as exc:
        sys.exit(f"error: {given.out}: cannot be written ({exc.strerror or exc})")

    def shown(row: dict, key: str) -> str:
        half = row[f"{key}_half"]
        return page.show(row[key]) if half != half else f"{page.show(row[key])} ± {page.show(half)}"

    rows = [[r["setting"], r["method"], r["seeds"], *(shown(r, k) for k in MEASURES)] for r in table.to_dict("records")]
    page.print_table(
        f"{len(runs)} runs, mean ± 95 % interval over seeds", ["setting", "method", "seeds", *MEASURES], rows
    )
    print(f"Written: {out / 'comparison.csv'}, {out / 'comparison.png'}")


if __name__ == "__main__":
    main()
