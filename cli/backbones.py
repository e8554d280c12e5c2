"""``featdiff backbones``."""

from __future__ import annotations

import click

from .main import EXIT_FAILED
from .speech import say, show


@click.command("backbones")
@click.argument("pattern", default="")
def command(pattern: str) -> int:
    """List backbones with pretrained weights whose name fits PATTERN, and where the weights come from.

    \b
    Example: featdiff backbones 'convnext*'
    """
    from featdiff.features.backbones import list_backbones

    backbones = list_backbones(pattern)
    if not backbones:
        say(f"no backbone fits {pattern!r}")
        return EXIT_FAILED

    for name, source in backbones:
        show(f"{name:<60} {source}")
    return 0
