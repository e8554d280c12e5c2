"""Loads Stable Diffusion, strictly.

In: a folder, or a name on the hub. Out: a pipeline up to its latents. The image decoder is not read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exceptions import UsageError, WeightsError, first_line
from ..files.hub import find_folder

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

# Files to read from the hub: nothing pickled, no half-precision or averaged copies, no image decoder.
_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model-*.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model-*.safetensors",
    "*/*.safetensors.index.json",
)
# What to do when it cannot be loaded.
_ADVICE = (
    "give a folder in the layout of diffusers with safetensors weights, or a name on the hub "
    "(stable-diffusion-v1-5/stable-diffusion-v1-5; online once), or use the method diffusion, which needs no Stable "
    "Diffusion"
)


def load(name: str) -> StableDiffusionPipeline:
    """Load a pipeline without the parts that only decode or filter images, on the CPU.

    Parameters
    ----------
    name : str
        A folder in the layout of diffusers, or a name on the hub.

    Returns
    -------
    StableDiffusionPipeline

    Raises
    ------
    UsageError
        A package is missing.
    WeightsError
        It is not available or of another kind, or weights are missing or damaged.
    """
    try:
        import accelerate  # noqa: F401 -- diffusers loads weights with it
        import transformers  # noqa: F401
    except ImportError:
        raise UsageError("Stable Diffusion needs packages: pip install 'featdiff[stable]'") from None

    def refuse(why: str) -> WeightsError:
        return _refusal(name, f"cannot be had: {why}")

    # check the kind before gigabytes are downloaded
    folder = find_folder(name, ["model_index.json"], refuse)
    with quiet():
        _check_kind(name, folder)
    folder = find_folder(name, _FILES, refuse)
    with quiet():
        return _assemble(name, folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and log messages of the libraries; afterwards their settings are as before."""
    import huggingface_hub.utils
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    libraries = (diffusers, transformers)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    hub: Any = huggingface_hub.utils  # transformers switches its bars, too
    hub_bars_disabled = hub.are_progress_bars_disabled()
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
        if hub_bars_disabled:
            hub.disable_progress_bars()


def _check_kind(name: str, folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    try:
        kind = StableDiffusionPipeline.load_config(folder, local_files_only=True).get("_class_name")
    except Exception:  # no file, no JSON, no object in it
        raise _refusal(name, "is no pipeline of diffusers: it has no model_index.json that can be read") from None
    if kind != "StableDiffusionPipeline":
        raise _refusal(name, f"is a {kind}, and a StableDiffusionPipeline (1.x or 2.x) is needed")


def _assemble(name: str, folder: Path) -> StableDiffusionPipeline:
    """Load part by part, so that every part is checked and no code from the folder runs."""
    from diffusers import StableDiffusionPipeline

    parts = {}
    for part, read in _READERS.items():
        if not (folder / part).is_dir():  # the libraries would take it for a name on the hub
            raise _refusal(name, f"has no folder {part}")
        try:
            parts[part] = read(folder / part)
        except Exception as error:  # missing or damaged files and wrong shapes all raise errors of their own
            raise _refusal(name, f"has a {part} that cannot be read ({first_line(error)})") from None
    problem = _mismatch(parts["tokenizer"], parts["text_encoder"], parts["unet"])
    if problem:
        raise _refusal(name, f"cannot be used, for its {problem}")
    for part in ("text_encoder", "unet"):
        for weight, value in parts[part].state_dict().items():
            if not value.isfinite().all():
                raise _refusal(name, f"has a damaged {part}, whose {weight} holds NaN or infinite values")
    for part in ("vae", "safety_checker", "feature_extractor", "image_encoder"):
        parts[part] = None
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def _read_scheduler(folder: Path) -> Any:
    import diffusers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    settings = diffusers.DDIMScheduler.load_config(folder, local_files_only=True)
    kind = settings.get("_class_name")
    supported = set(KarrasDiffusionSchedulers.__members__)
    supported.remove("DPMSolverSDEScheduler")  # takes no seeded noise
    if kind not in supported:
        raise ValueError(f"{kind} is none of {', '.join(sorted(supported))}")
    return getattr(diffusers, kind).from_config(settings)


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _read_text_encoder(folder: Path) -> CLIPTextModel:
    from transformers import CLIPTextModel

    model, report = CLIPTextModel.from_pretrained(
        folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        local_files_only=True,
    )
    # files of older pipelines also hold the numbers 0 to 76
    report["unexpected_keys"] = [key for key in report["unexpected_keys"] if not key.endswith("position_ids")]
    _check_report(report)
    return model


def _read_unet(folder: Path) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    model, report = UNet2DConditionModel.from_pretrained(
        folder,
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
    )
    _check_report(report)
    return model


_READERS: dict[str, Callable[[Path], Any]] = {
    "scheduler": _read_scheduler,
    "tokenizer": _read_tokenizer,
    "text_encoder": _read_text_encoder,
    "unet": _read_unet,
}


def _check_report(report: dict[str, Any]) -> None:
    """Refuse weights that are not complete; both libraries initialise missing ones and only log it."""
    for problem, keys in report.items():
        if keys:
            key = sorted(keys)[0]
            name = key if isinstance(key, str) else key[0]  # mismatched ones come with their shapes
            raise ValueError(f"its weights do not fit its config.json: {problem.replace('_', ' ')}: {name}")


def _mismatch(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> str:
    """Why the parts cannot work together, or need more inputs than text and noise; empty if all is well."""
    text = text_encoder.config
    network = unet.config

    size = (len(tokenizer), tokenizer.model_max_length)
    expected = (text.vocab_size, text.max_position_embeddings)
    if size != expected:  # without its files, transformers makes a tokenizer without words
        return f"tokenizer (words, longest text: {size}) is not that of its text encoder {expected}"
    if network.cross_attention_dim != text.hidden_size:
        return f"unet takes texts of width {network.cross_attention_dim}, and its text encoder gives {text.hidden_size}"
    if (network.in_channels, network.out_channels) != (4, 4):
        return f"unet makes {network.out_channels} channels from {network.in_channels}, not 4 from 4"
    if network.class_embed_type or network.num_class_embeds or network.addition_embed_type:
        return "unet is conditioned on more than a text"
    if not network.sample_size:
        return "unet does not say for which size it is"
    return ""


def _refusal(name: str, why: str) -> WeightsError:
    return WeightsError(f"{name} {why}: {_ADVICE}")
