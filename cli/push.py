"""``featdiff push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .speech import say, show


@click.command("push")
@click.argument("model")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a private repository; a public one is refused.")
@click.option("--revision", metavar="BRANCH", help="Branch, made when it is missing [main].")
@click.option("--license", metavar="NAME", help="Of the model, as the hub calls it (apache-2.0 ...) [none is named].")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What featdiff eval --json wrote, for the card.",
)
@click.option("--message", default="featdiff model", show_default=True, help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Print the card, and send nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors on standard error.")
def command(model: str, repository: str, results: Path | None, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Put the saved MODEL on the Hugging Face hub as ORG/NAME, with a model card, in one commit.

    MODEL may also be what featdiff harden wrote. The token is HF_TOKEN, or that of hf auth login. A README.md in the
    folder of the model is sent as it is; without one, the card is written from what is known. All commands take
    -m ORG/NAME or ORG/NAME@REVISION.

    \b
    Example: featdiff push my-model org/name --private
    Example: featdiff push my-model org/name --dry-run > my-model/README.md
    """
    from featdiff.detectors.model_card import model_card
    from featdiff.detectors.pushing import CARD, kept_images, push_model
    from featdiff.detectors.saved import check_config, saved_mode
    from featdiff.files.model_folder import load
    from featdiff.hardening.layout import GUARD, is_hardened
    from featdiff.hardening.pushing import card_of_hardened, push_hardened

    hardened = is_hardened(model)
    folder = Path(model) / GUARD if hardened else Path(model)
    config, tensors = load(folder)
    check_config(config, folder, saved_mode(config, folder))
    known = {"license": options["license"], "results": _read(results) if results else None}

    held = kept_images(tensors)
    if held:
        say(f"the files hold {held} of training images: who can read the repository can read those", quiet)
    for what in _named_files(model, config, hardened):
        say(f"config.json names a file of this computer: {what}", quiet)
    if dry_run:
        if hardened:
            card = card_of_hardened(model, repository, **known)
        else:
            card = model_card(config, repository, held=held, **known)
        own = Path(model) / CARD
        for line in (own.read_text(encoding="utf-8") if own.is_file() else card).splitlines():
            show(line)
        return

    push = push_hardened if hardened else push_model
    options["private"] = options["private"] or None
    say(f"on the hub: {push(model, repository, **(options | known))}", quiet)


def _named_files(model: str, config: dict[str, Any], hardened: bool) -> list[str]:
    """Files and folders of this computer that go with a model by their names."""
    from featdiff.hardening.students import training_facts

    named = [config["settings"].get("weights")]
    if hardened:
        facts = training_facts(model)
        named += [facts.get(name) for name in ("student", "teacher")]
    return [str(name) for name in named if name and (name == named[0] or Path(str(name)).exists())]


def _read(file: Path) -> dict[str, Any]:
    """What ``featdiff eval --json`` wrote (``UsageError`` if it is something else)."""
    from featdiff.exceptions import UsageError
    from featdiff.files.strict_json import parse_json

    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}", argument="results") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not the evaluation of one model", argument="results")
    return content
