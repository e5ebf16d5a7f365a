"""API pages from the docstrings: `python scripts/api_docs.py [folder]`, outputs/api by default; open index.html there."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import edgesched


def modules() -> list[str]:
    """Every module whose name is public, each by its own name: what ``__all__`` leaves out would have no page."""
    found = [info.name for info in pkgutil.walk_packages(edgesched.__path__, "edgesched.")]
    return ["edgesched", *(name for name in found if not any(part.startswith("_") for part in name.split(".")))]


def write(folder: Path) -> list[str]:
    """Write a page for every module, with an index and a search box, and return the modules' names."""
    names = modules()
    for name in edgesched.__all__:  # pdoc does not ask for what is imported on demand
        vars(edgesched).setdefault(name, getattr(edgesched, name))
    pdoc.render.configure(docformat="google", footer_text=f"edgesched {edgesched.__version__}")
    with warnings.catch_warnings():  # a package brings the modules that its __all__ does not leave out
        warnings.filterwarnings("ignore", message="The module specification .* has already been added")
        pdoc.pdoc(*names, output_directory=folder)
    return names


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "outputs/api"
    print(f"{len(write(out))} modules: {out / 'index.html'}")
