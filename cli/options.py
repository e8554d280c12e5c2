"""Options that several commands share, and what they mean for a detector."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from .output import output_file
from .progress import starting

if TYPE_CHECKING:
    from featdiff import Guard
    from featdiff.detectors import ImageDetector

F = TypeVar("F", bound=Callable[..., Any])

MODEL_FOLDER = "featdiff-model"
# As in featdiff.features, which takes seconds to import.
_ENGINES = ("auto", "torch", "openvino", "onnxruntime", "compile")
_PRECISIONS = ("auto", "fp32", "bf16")


def model_option(function: F) -> F:
    """``-m``: the folder of a saved model."""
    return click.option(
        "-m",
        "--model",
        default=MODEL_FOLDER,
        show_default=True,
        metavar="DIR",
        help="Folder of a saved model, or org/name.",
    )(function)


def log_to_option(function: F) -> F:
    """``--log-to``: where the curves of trainings go."""
    return click.option(
        "--log-to",
        multiple=True,
        metavar="KIND:PLACE",
        help="Losses to tensorboard:FOLDER or mlflow:URI; repeat for more.",
    )(function)


class Model(NamedTuple):
    """What is in a folder: a detector, and where it belongs to a hardened student, the guard and its classes."""

    detector: ImageDetector
    guard: Guard | None = None
    classes: tuple[str, ...] = ()


def load_model(name: str, options: dict[str, Any]) -> Model:
    """A saved model, or a hardened student with its guard."""
    from featdiff.detectors import load_detector
    from featdiff.hardening.layout import find_model, is_hardened

    arguments = model_arguments(options)
    folder = find_model(name)
    if is_hardened(folder):
        from featdiff.exceptions import UsageError
        from featdiff.hardening.harden import load_hardened

        if "weights" in arguments:
            raise UsageError(f"--weights belong to a model on a backbone; the student in {name} has its own")
        classifier, guard = load_hardened(folder, **arguments)
        return Model(guard.detector, guard, classifier.classes)
    return Model(load_detector(folder, **arguments))


def identity(model: str) -> object:
    """What tells this model from all others: of a saved one the digest in its config."""
    from featdiff.exported.layout import is_exported, onnx_file

    if is_exported(model):
        with onnx_file(model).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    from featdiff.files.model_folder import DIGEST, read_config
    from featdiff.hardening.layout import GUARD, find_model, is_hardened

    folder = Path(find_model(model))
    return read_config(folder / GUARD if is_hardened(folder) else folder)[DIGEST]


def weights_option(function: F) -> F:
    """``--weights``: a local weights file of the backbone."""
    return click.option(
        "--weights",
        type=click.Path(path_type=Path),
        help="Weights of the backbone (pixel mode: of what lpips looks through), a safetensors or state-dict file; of "
        "several backbones one for each, separated by commas.",
    )(function)


def backbone_options(function: F) -> F:
    """What a new detector looks at: backbone, weights, view, size, layers, precision."""
    for option in (
        click.option("--precision", type=click.Choice(_PRECISIONS), help="What the backbone computes in [auto]."),
        click.option("--layers", help="auto, or names or indices separated by commas [auto]."),
        click.option("--size", type=click.IntRange(1), help="Look at about SIZE x SIZE pixels [the backbone's own]."),
        click.option("--view", help="whole: the whole picture; crop: what is left of the backbone's own crop [whole]."),
        weights_option,
        click.option(
            "--backbone",
            help="A timm name, hf-hub:ORG/NAME or local-dir:PATH [tf_efficientnet_lite0]; train joins several, A,B.",
        ),
    ):
        function = option(function)
    return function


def seed_option(function: F) -> F:
    """``--seed``: what a training draws."""
    return click.option("--seed", type=int, help="Decides split, weights and noise [0].")(function)


def detector_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as arguments of a new detector."""
    names = ("backbone", "weights", "view", "size", "layers", "precision", "seed", "fpr")
    given = {name: options[name] for name in names if options.get(name) is not None}
    return given | runtime_arguments(options)


def model_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as arguments of a saved detector that is loaded."""
    given = options["weights"]
    return ({"weights": weights_in(given)} if given else {}) | runtime_arguments(options)


def weights_in(given: Path) -> Path | list[Path | None]:
    """What ``--weights`` names: a file, or one for each of several backbones, separated by commas."""
    names = str(given).split(",")
    if len(names) == 1 or given.exists():
        return given
    return [Path(name) if name else None for name in names]


def file_option(help: str) -> Callable[[F], F]:
    """``-o``: a file; ``-`` is standard output, as when the option is left out."""

    def without_dash(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
        return None if file == Path("-") else file

    return click.option("-o", "--output", type=click.Path(path_type=Path), callback=without_dash, help=help)


class _Output(click.Path):
    """A file or a URL for rows; None for ``-``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return output_file(value)


raw_csv_option = click.option(
    "--raw-csv", is_flag=True, help="Text into CSV as it is, also what a spreadsheet takes for a formula."
)


def output_options(function: F) -> F:
    """Format and file of the rows."""
    for option in (
        raw_csv_option,
        click.option("-o", "--output", type=_Output(), help="File or URL for the rows, - for standard output [-]."),
        click.option(
            "--format",
            "format_",
            type=click.Choice(["table", "csv", "jsonl", "parquet"]),
            help="[by the ending of -o; without -o, table on a terminal, else csv]",
        ),
    ):
        function = option(function)
    return function


quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")


def groups_option(default: str) -> Callable[[F], F]:
    """``--groups``: which images belong together; ``default`` says what happens without it."""
    return click.option(
        "--groups",
        metavar="HOW",
        help="Which images belong together, as in bursts: auto (near-copies), none, folder, gap:N (a gap in the last "
        f"number of the name), a regular expression with brackets, or a .csv of path,group [{default}].",
    )


engine_option = click.option("--engine", type=click.Choice(_ENGINES), help="What runs the backbone on a CPU [auto].")
device_option = click.option("--device", help="auto, cpu, cuda, cuda:1, mps [auto].")


def runtime_options(function: F) -> F:
    """How to run: device, batch size, threads, limits, cache, quiet. While the command starts, a word says so."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with starting(kwargs["quiet"]):
            return function(*args, **kwargs)

    wrapped: Any = run
    for option in (
        quiet_option,
        click.option("--cache", type=click.Path(path_type=Path), help="Folder for extracted features [user cache]."),
        click.option("--max-bytes", type=click.IntRange(1), help="Refuse larger files unread [512,000,000]."),
        click.option("--max-pixels", type=click.IntRange(1), help="Refuse larger pictures unopened [89,478,485]."),
        click.option("--workers", type=click.IntRange(1), help="Decoding threads [one per usable CPU]."),
        click.option("--batch-size", "image_batch", type=click.IntRange(1), help="Images at once [32; pixel mode 8]."),
        engine_option,
        device_option,
    ):
        wrapped = option(wrapped)
    return wrapped


def runtime_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The runtime options that were given, as arguments of a detector."""
    from featdiff.detectors.run_config import RUNTIME

    return {name: options[name] for name in RUNTIME if options.get(name) is not None}
