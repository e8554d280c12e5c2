"""Build the pages of the library from its docstrings, one for each module.

    python tests/api_pages.py FOLDER

It is pdoc with numpy docstrings. pdoc alone would miss most: of a package with ``__all__`` it shows those names only,
and not the ones that are imported on first use. A warning, for example of a broken annotation, is an error.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.render

import featdiff


def modules(package: ModuleType) -> Iterator[str]:
    """What pdoc must be told to document ``package`` with all modules below it."""
    yield package.__name__
    names = getattr(package, "__all__", None)
    if names is None:
        return  # pdoc finds all that is below
    for name in names:
        setattr(package, name, getattr(package, name))
    for below in pkgutil.iter_modules(getattr(package, "__path__", []), f"{package.__name__}."):
        yield from modules(importlib.import_module(below.name))


def build(folder: Path) -> None:
    """Write the pages; ``folder/featdiff.html`` is the first."""
    everything = list(modules(featdiff))
    pdoc.render.configure(docformat="numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*everything, output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
