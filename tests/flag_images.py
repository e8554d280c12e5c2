"""Places flagged images as ``featdiff score`` does. As a script, it is killed before one of its steps on the disk.

A process of its own, and not a fork of the tests': theirs has threads, whose locks a fork would hold for ever.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featdiff.data.references import list_images
from featdiff_cli.flagged import Flagged

STEPS = ("link", "symlink", "unlink", "replace", "mkdir", "fsync")


def place(action: str, folder: Path, *images: object, only: tuple[str, ...] = ()) -> int:
    """As ``score`` does it, with all images flagged, or those whose names end so."""
    refs = list_images([str(image) for image in images])
    flagged = Flagged(action, folder, [str(image) for image in images])
    for number, ref in enumerate(refs):
        is_ood = ref.path.endswith(only) if only else True
        flagged.add_row(
            number, {"path": ref.path, "status": "ok", "ood_score": -1.5, "p_value": 0.01, "is_ood": is_ood}
        )
    return flagged.place(refs, quiet=False)


def kill_before(number: int) -> None:
    """Kill this process before its step of this number, from 1."""
    steps = 0

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        return count

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


if __name__ == "__main__":
    kill_before(int(sys.argv[1]))
    place(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
