"""Where featdiff keeps what it has computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..exceptions import FeatdiffError


def default_cache() -> Path:
    """``$FEATDIFF_CACHE``, or featdiff's folder in the user's cache directory."""
    import platformdirs

    return Path(os.environ.get("FEATDIFF_CACHE") or platformdirs.user_cache_dir("featdiff"))


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` of writing into a folder of the cache into a ``FeatdiffError`` that says what to do."""
    try:
        yield
    except OSError as error:
        raise FeatdiffError(
            f"the feature cache {folder} cannot be written: {error.strerror}. Free space or choose another cache; "
            "what was computed so far is kept",
            argument="cache",
        ) from None
