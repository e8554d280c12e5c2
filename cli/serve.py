"""``featdiff serve``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from .exported import exported_arguments
from .options import device_option, engine_option, model_option, weights_option
from .progress import saying
from .speech import say


@click.command("serve")
@model_option
@weights_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Name of the model for clients [that of its folder].")
@click.option("--fpr", type=float, help="False-alarm rate [the one given at training].")
@click.option(
    "--processes", type=click.IntRange(1), default=1, show_default=True, help="How many; each holds the model."
)
@click.option("--max-batch", type=click.IntRange(1), default=32, show_default=True, help="Images of one pass.")
@click.option(
    "--max-wait-ms",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="How long a batch waits for images that are being read.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Images that a process holds at once; more are refused with 503.",
)
@click.option("--max-request", type=click.IntRange(1), help="Refuse larger requests unread, in bytes [32,000,000].")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds in which a request must have come, and then must be answered.",
)
@click.option("--api-key", help="What clients must send; better in FEATDIFF_SERVE_API_KEY, which ps does not show.")
@click.option("--workers", type=click.IntRange(1), help="Decoding threads of a process [one per usable CPU].")
@click.option("--max-pixels", type=click.IntRange(1), help="Refuse larger pictures unopened [89,478,485].")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for files of engines [user cache].")
@engine_option
@device_option
@click.option("-q", "--quiet", is_flag=True, help="Nothing but errors.")
def command(model: str, max_wait_ms: float, max_request: int | None, quiet: bool, **options: Any) -> None:
    """Answer over HTTP: POST an image to /v1/score, and get the row that featdiff score writes.

    -m may be a saved model, or what featdiff export wrote. /v1/explain shows why, /metrics is for Prometheus, /docs
    describes all routes, and /v2 is the Open Inference Protocol. SIGTERM ends it when all that was accepted has its
    answer. Anybody who reaches the port may ask: put a proxy with TLS before it, or give --api-key.

    \b
    Example: featdiff serve -m my-model --port 8000
    Example: curl --data-binary @photo.jpg http://127.0.0.1:8000/v1/score
    """
    from featdiff.exported.layout import is_exported
    from featdiff.serving.server import need_packages, run
    from featdiff.serving.settings import MAX_REQUEST, Settings

    need_packages()
    names = ("weights", "device", "engine", "workers", "max_pixels", "cache")
    given = {name: options.pop(name) for name in names}
    arguments = {name: value for name, value in given.items() if value is not None}
    if is_exported(model):
        arguments = exported_arguments(model, arguments)
    settings = Settings(
        model=model,
        options=arguments,
        max_wait=max_wait_ms / 1000,
        max_request=max_request or MAX_REQUEST,
        **{name: value for name, value in options.items() if value is not None},
    )

    with ExitStack() as loading:
        loading.enter_context(saying("loading the model", quiet))

        def ready(address: str) -> None:
            loading.close()
            say(f"serving {settings.public_name} on {address}/v1/score", quiet)

        run(settings, ready)
