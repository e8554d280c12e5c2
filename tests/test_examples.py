"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from helpers import ROOT

import featdiff

LIBRARY = ROOT / "featdiff"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


WITH_EXAMPLES = [module_name(file) for file in sorted(LIBRARY.rglob("*.py")) if ">>> " in file.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(module, optionflags=options)
    assert tried
    assert not failed


@pytest.mark.parametrize("name", [name for name in featdiff.__all__ if isinstance(getattr(featdiff, name), type)])
def test_public_classes_have_an_example(name: str) -> None:
    if issubclass(getattr(featdiff, name), Exception):
        return
    assert ">>> " in (getattr(featdiff, name).__doc__ or ""), name
