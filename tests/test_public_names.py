"""What ``import featdiff`` offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import featdiff


def test_dir_is_the_public_names() -> None:
    assert dir(featdiff) == sorted(featdiff.__all__)
    assert len(set(featdiff.__all__)) == len(featdiff.__all__)


@pytest.mark.parametrize("name", featdiff.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(featdiff, name).__name__ == name
    assert getattr(featdiff, name).__doc__


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="module 'featdiff' has no attribute 'Detectr'"):
        _ = featdiff.Detectr


def test_a_bare_import_is_light() -> None:
    code = "import sys, featdiff; dir(featdiff); print([name for name in ('torch', 'timm') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
