"""``featdiff harden``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .main import EXIT_UNREADABLE, Stopped
from .options import log_to_option, runtime_arguments, runtime_options
from .progress import Bars, list_unreadable
from .speech import is_first_process, say
from .train import check_itself

if TYPE_CHECKING:
    from featdiff.hardening.harden import Hardened

# option -> field of the recipe
_RECIPE = {
    "kd": "distillation",
    "temperature": "temperature",
    "feature_kd": "feature_distillation",
    "micl": "micl",
    "energy": "energy",
    "margin": "margin",
    "epochs": "epochs",
    "train_batch": "batch_size",
    "learning_rate": "learning_rate",
    "patience": "patience",
}


@click.command("harden")
@click.argument("images", nargs=-1, required=True)
@click.option("--student", required=True, metavar="NAME|FOLDER", help="A timm name, or a classifier to begin with.")
@click.option(
    "--teacher", metavar="NAME|FOLDER", help="A timm name, local-dir:FOLDER, or a classifier of these classes [none]."
)
@click.option("--outliers", type=click.Path(path_type=Path), help="What featdiff outliers wrote, for --micl.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for student and guard.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of the student's backbone at the beginning.")
@click.option("--train-from", metavar="LAYER", help="Last frozen layer; '' trains all [the last stage but one].")
@click.option("--layers", help="Layers that the guard looks at, separated by commas [auto].")
@click.option("--kd", type=float, help="Weight of the teacher's logits [4].")
@click.option("--temperature", type=float, help="Their temperature [1].")
@click.option("--feature-kd", type=float, help="Weight of the teacher's pre-logits [2].")
@click.option("--micl", type=float, help="Weight of the bound of information between outliers and features [0.1].")
@click.option("--energy", type=float, help="Weight of an energy margin to outliers beside the student's features [0].")
@click.option("--margin", type=float, help="That margin [5].")
@click.option("--epochs", type=int, help="At most so many [10].")
@click.option("--train-batch", type=int, help="Images of a training step [64].")
@click.option("--learning-rate", type=float, help="The highest, without a teacher [0.02].")
@click.option("--patience", type=int, help="Epochs without a rise of held-out accuracy that end the training [10].")
@click.option("--views", type=click.IntRange(1), default=2, show_default=True, help="2: mirrored, more: cut-outs, too.")
@click.option("--as-published", is_flag=True, help="What the released code of OAL does: all layers, 100 epochs.")
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@click.option("--fpr", type=float, default=0.05, show_default=True, help="False-alarm rate of the guard.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything that is random.")
@click.option("--no-paths", is_flag=True, help="Keep no paths of training images in the guard.")
@log_to_option
@click.option("--force", is_flag=True, help="Replace what is already there.")
@runtime_options
def command(
    images: tuple[str, ...],
    student: str,
    teacher: str | None,
    outliers: Path | None,
    output: Path,
    train_from: str | None,
    layers: str | None,
    views: int,
    as_published: bool,
    no_paths: bool,
    log_to: tuple[str, ...],
    force: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Fine-tune a classifier on IMAGES with a teacher and synthetic outliers, and put a guard on it.

    IMAGES are folders or archives with a folder for each class. Without --teacher this is plain fine-tuning, and what
    comes out can be a teacher. The output folder has two parts: student/ is a timm folder, guard/ belongs to it, and
    "featdiff score -m" takes both.

    \b
    Example: featdiff harden photos/ --student resnet18 --teacher resnet50 -o hardened
    """
    from featdiff.exceptions import UsageError
    from featdiff.hardening.harden import LEFT_OUT, check_hardened_target, harden
    from featdiff.hardening.recipe import HardenRecipe, check_losses
    from featdiff.hardening.run import ALL_LAYERS
    from featdiff.outliers.outlier_file import load_outliers
    from featdiff.runtime.allocator import keep_freed_memory
    from featdiff.runtime.run_log import logged_to

    keep_freed_memory()
    quiet = quiet or not is_first_process()
    check_hardened_target(output, force)

    recipe = HardenRecipe.as_published() if as_published else HardenRecipe()
    settings = {field: options[name] for name, field in _RECIPE.items() if options[name] is not None}
    recipe = replace(recipe, **settings)
    if as_published and (teacher is None or outliers is None):
        raise UsageError("--as-published needs a --teacher and --outliers FILE, which outlier-aware learning is about")
    check_losses(recipe, settings, teacher is not None, outliers is not None)
    if as_published and train_from is None:
        train_from = ALL_LAYERS

    guard: dict[str, Any] = {"keep_paths": not no_paths}
    if layers:
        guard["layers"] = layers
    try:
        told = {"student": student, "teacher": teacher or "", "seed": options["seed"], **asdict(recipe)}
        with Bars(quiet) as bars, logged_to(log_to if is_first_process() else (), told):
            hardened = harden(
                list(images),
                student,
                teacher,
                load_outliers(outliers) if outliers else None,
                recipe=recipe,
                train_from=train_from,
                views=views,
                guard=guard,
                **{name: options[name] for name in ("weights", "fpr", "mixed_precision", "seed")},
                **runtime_arguments(options),
                progress=bars,
            )
    except KeyboardInterrupt:
        raise Stopped("interrupted; features and most of the training are kept, the same command goes on") from None

    if is_first_process():
        hardened.save_pretrained(output)
        _summary(hardened, output, quiet)
    list_unreadable(hardened.unreadable, quiet, output / LEFT_OUT)
    return EXIT_UNREADABLE if hardened.unreadable else 0


def _summary(hardened: Hardened, output: Path, quiet: bool) -> None:
    facts = hardened.facts
    counts = facts["images"]
    say(f"{counts['training']:,} images of {len(facts['classes'])} classes trained {hardened.classifier.name}", quiet)
    if "teacher_accuracy" in facts:
        say(
            f"the teacher {facts['teacher']} is right of {facts['teacher_accuracy']:.1%} of the images held out here",
            quiet,
        )

    epochs = f"{len(facts['epochs'])} epochs, {facts['seconds']:.0f} s"
    right = f"{facts['accuracy']:.1%} right of the {counts['validation']:,} held-out images that chose among epochs"
    say(f"{epochs}; {right}", quiet)

    check_itself(hardened.guard.detector, quiet)
    say(f"student and guard: {output}. Next: featdiff score IMAGES -m {output}", quiet)
