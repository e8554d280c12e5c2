"""The group of all commands: it imports a command on first use and turns every error into one line and an exit code."""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import sys
import traceback
import warnings
from typing import Any

import click

from .completion import complete_paths
from .environment import name_variables, warn_of_unknown
from .log import end, log_options, record_traceback
from .speech import plain_warnings, say

# command name -> (module, one line for the overview); the overview must not import torch
COMMANDS = {
    "audit": ("audit", "Find the odd images of a folder; no model is needed."),
    "train": ("train", "Learn what is normal from a folder of ordinary images."),
    "update": ("update", "Add good images to a model without training anew."),
    "score": ("score", "Score images: one row per image, with a p-value and a verdict."),
    "watch": ("watch", "Score files as they arrive, and give an alarm once they have changed."),
    "manifest": ("manifest", "List images in a file that many machines score from."),
    "features": ("features", "Compute training features ahead of train, on many machines."),
    "merge": ("merge", "Check that a manifest is scored whole, and join its blocks."),
    "explain": ("explain", "Show why an image is judged as it is, beside the most similar normal images."),
    "eval": ("evaluate", "Measure how well a model separates an in-domain set from OOD sets."),
    "recalibrate": ("recalibrate", "Give a model new thresholds from normal images of another place."),
    "compare": ("compare", "Compare two models on the same images: AUROC, false alarms, changed verdicts."),
    "serve": ("serve", "Answer over HTTP: scores, explanations, metrics."),
    "export": ("export", "Write a model and its backbone as one ONNX and one torch.export file."),
    "push": ("push", "Put a saved model on the Hugging Face hub, with a model card."),
    "outliers": ("outliers", "Make synthetic outliers just beyond images, in a model's feature space."),
    "harden": ("harden", "Fine-tune a classifier with a teacher and outliers, and put a guard on it."),
    "bench": ("bench", "Compare featdiff, its heads and baselines on a suite of image sets."),
    "demo": ("demo", "Audit, train, score and evaluate on built-in images, with a picture."),
    "info": ("info", "Show what a saved model is."),
    "backbones": ("backbones", "List backbones with pretrained weights."),
    "doctor": ("doctor", "Check this installation."),
}
# argument of the library -> parameter of a command, where the two have other names
PARAMETERS = {
    "batch_size": "train_batch",
    "distillation": "kd",
    "feature_distillation": "feature_kd",
    "folder": "output",
    "keep_paths": "no_paths",
    "keep_thumbnails": "thumbnails",
    "format": "format_",
    "max_wait": "max_wait_ms",
    "random_state": "seed",
    "replace": "force",
}

# Objects after which Python looks for garbage. It would look a thousand times while libraries load, and find none.
_NEW_OBJECTS = 50_000

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3
EXIT_OOD = 4
EXIT_INTERRUPTED = 130


class Stopped(Exception):
    """Ctrl-C; the message says what is kept. (click would print an empty line of its own for KeyboardInterrupt.)"""

    def __init__(self, message: str = "interrupted", code: int = EXIT_INTERRUPTED) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Commands(click.Group):
    """A group that imports commands on demand and prints errors as single lines."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".{COMMANDS[name][0]}", __package__).command
        if not any(option.name == "debug" for option in command.params):
            command.params += [_debug_option(), *log_options()]  # after the name of the command, too
            complete_paths(command)
            name_variables(name, command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS and not ctx.resilient_parsing:
            from featdiff.exceptions import did_you_mean

            ctx.fail(f"no such command {name!r}{did_you_mean(name, list(COMMANDS))}")
        found = super().resolve_command(ctx, args)
        if found[1] is not None and not ctx.resilient_parsing:
            warn_of_unknown(str(found[0]), found[1], COMMANDS)
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])  # click would raise the help as an error

    def invoke(self, ctx: click.Context) -> Any:
        from featdiff.exceptions import FeatdiffError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped from None
        except FeatdiffError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            return _report(error, command)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program. Once its command has ended Ctrl-C changes nothing: the work is done, Python only tidies up."""
        try:
            return self.main(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    @plain_warnings()
    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and leave with its exit code; ``--debug`` or ``FEATDIFF_DEBUG`` shows tracebacks."""
        from featdiff.runtime.cpus import prepare_threads

        warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # such images get a row of their own
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries would bury the one line that helps
        os.environ["MPLBACKEND"] = "agg"  # pictures are files: no display is needed, whatever the environment names
        prepare_threads()  # before torch is imported
        gc.set_threshold(_NEW_OBJECTS)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            _print_error(f"{error.format_message()}{hint}")
            code = error.exit_code
        except Stopped as stopped:
            say(stopped.message)
            code = stopped.code
        except (click.Abort, KeyboardInterrupt):
            say("interrupted")
            code = EXIT_INTERRUPTED
        except BrokenPipeError:  # the reader (head, less) has seen enough
            _discard_output()
            code = EXIT_FAILED
        except Exception as error:
            code = _report(error)
            if isinstance(error, OSError):
                _discard_output()
        code = code if isinstance(code, int) else 0
        end(code)
        sys.exit(code)


def _discard_output() -> None:
    """Send what could not be written nowhere: Python would try once more at exit, and fail in its own words."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def option_of(command: click.Command | None, argument: str) -> str:
    """The option of a command that sets an argument of the library, like ``--fpr``; empty if there is none."""
    names = (argument, PARAMETERS.get(argument))
    for parameter in command.params if command else ():
        if isinstance(parameter, click.Option) and parameter.name in names:
            return max(parameter.opts, key=len)
    return ""


def _report(error: Exception, command: click.Command | None = None) -> int:
    """Print an error as one line on standard error; returns the exit code."""
    from featdiff.exceptions import FeatdiffError, UsageError

    if os.environ.get("FEATDIFF_DEBUG") and not record_traceback():
        for line in traceback.format_exc().splitlines():
            say(line)

    message = str(error)
    if isinstance(error, FeatdiffError):
        message = _with_options(message, command, error.argument)
    elif isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, OSError):
        message = f"{type(error).__name__}: {message} (a bug: please report it; featdiff --debug shows where)"

    _print_error(message)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def _print_error(message: str) -> None:
    """One line on standard error, whatever the message holds."""
    say(f"Error: {' '.join(message.split())}")


def _with_options(message: str, command: click.Command | None, argument: str) -> str:
    """A message of the library with the command's options in place of its arguments.

    ``fpr 0.001 needs ...`` -> ``--fpr 0.001 needs ...``; in front of any other message ``--fpr: ``. Advice like
    ``backbone=resnet50`` becomes ``--backbone resnet50``.
    """

    def as_option(match: re.Match[str]) -> str:
        option = option_of(command, match[1])
        return f"{option} " if option else match[0]

    message = re.sub(r"(?<![\w/.-])([a-z_]+)=(?=\S)", as_option, message)  # not within a path
    option = option_of(command, argument)
    if not option or option in message:
        return message
    if message.startswith(f"{argument} "):
        return option + message.removeprefix(argument)
    return f"{option}: {message}"


def _debug_option() -> click.Option:
    def switch_on(context: click.Context, option: click.Parameter, debug: bool) -> None:
        if debug:
            os.environ["FEATDIFF_DEBUG"] = "1"

    help = "Show a traceback with every error."
    return click.Option(["--debug"], is_flag=True, expose_value=False, callback=switch_on, help=help)


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "FEATDIFF",
        "max_content_width": 100,
    },
    epilog="Exit codes: 0 fine, 1 failed, 2 usage, 3 images without a score, 4 OOD found (--fail-on-ood), 130 Ctrl-C.",
)
@click.version_option(package_name="featdiff", allow_from_autoenv=False)  # images often set FEATDIFF_VERSION
@click.option("--debug", is_flag=True, help="Show a traceback with every error.")
def main(debug: bool) -> None:
    """Tell when an image is something your model was never made for.

    \b
    featdiff audit photos/          which of these are odd?
    featdiff train photos/          learn what is normal
    featdiff score new_images/      one row per image, with a p-value
    """
    os.environ["FEATDIFF_DEBUG"] = "1" if debug else ""
