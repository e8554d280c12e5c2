"""``python -m cli`` in a checkout."""

from . import run

run()
