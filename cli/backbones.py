"""``featdiff backbones``."""

from __future__ import annotations

import click

from .main import EXIT_FAILED
from .speech import say, show


@click.command("backbones")
@click.argument("pattern", default="")
@click.option("--recommended", is_flag=True, help="Only a few to choose from, with size, cost and licence.")
def command(pattern: str, recommended: bool) -> int:
    """List backbones with pretrained weights whose name fits PATTERN, and where the weights come from.

    \b
    Example: featdiff backbones 'convnext*'
    """
    from featdiff.features.backbones import list_backbones
    from featdiff.features.recommended import RECOMMENDED

    backbones = list_backbones(pattern)
    if recommended:
        sources = dict(backbones)
        backbones = [(name, sources[name]) for name in RECOMMENDED if name in sources]
    if not backbones:
        say(f"no backbone fits {pattern!r}")
        return EXIT_FAILED

    if recommended:
        _show_facts(backbones)
        return 0
    for name, source in backbones:
        show(f"{name:<60} {source}")
    return 0


def _show_facts(backbones: list[tuple[str, str]]) -> None:
    from featdiff.features.recommended import facts_of
    from featdiff.features.weights import DEFAULT_BACKBONE

    usual = facts_of(DEFAULT_BACKBONE).gmacs
    show(f"{'name':<40} {'weights':<9} {'params':>8} {'size':>8} {'input':>7} {'GMACs':>7} {'cost':>6}  licence")
    for name, source in backbones:
        facts = facts_of(name)
        numbers = f"{facts.parameters:>6.1f} M {facts.megabytes:>5.0f} MB {facts.size:>4} px {facts.gmacs:>7.2f}"
        show(f"{name:<40} {source:<9} {numbers} {facts.gmacs / usual:>5.0f}x  {facts.license}")
