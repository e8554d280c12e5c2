"""The command line: parse, call one public thing of featdiff, print. Imports here are relative (see pyproject)."""

from .main import main as main
