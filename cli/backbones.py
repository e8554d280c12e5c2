"""``featdiff backbones``."""

from __future__ import annotations

import click

from .main import EXIT_FAILED


@click.command("backbones")
@click.argument("pattern", default="")
def command(pattern: str) -> int:
    """List backbones with pretrained weights whose name fits PATTERN, and where the weights come from.

    \b
    Example: featdiff backbones 'convnext*'
    """
    from featdiff.features.backbones import list_backbones

    found = list_backbones(pattern)
    for name, source in found:
        click.echo(f"{name:<60} {source}")
    if not found:
        click.echo(f"no backbone fits {pattern!r}", err=True)
    return 0 if found else EXIT_FAILED
