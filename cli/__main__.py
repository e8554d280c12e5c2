"""``python -m cli`` in a checkout."""

from . import main

main(prog_name="featdiff")
