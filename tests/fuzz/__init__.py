"""Fuzzing, kills, full disks and soak tests; ``tests/README.md`` says how to run them."""
