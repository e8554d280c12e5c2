"""Where featdiff keeps what it has computed."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """``$FEATDIFF_CACHE``, or featdiff's folder in the user's cache directory."""
    import platformdirs

    return Path(os.environ.get("FEATDIFF_CACHE") or platformdirs.user_cache_dir("featdiff"))
