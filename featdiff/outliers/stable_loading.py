"""A folder or a name on the hub -> Stable Diffusion as far as its latents, strictly; what decodes them is not read."""

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

#: Names on the hub of what is read: nothing pickled, no reduced or averaged copies, no image decoder.
_FILES = (
    *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/*.json", "tokenizer/*.txt"),
    *("text_encoder/config.json", "text_encoder/model.safetensors", "unet/config.json"),
    *("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model-*.safetensors"),
    *("text_encoder/model-*.safetensors", "*/*.safetensors.index.json"),
)
_WAYS = (
    "give a folder in the layout of diffusers with safetensors weights, or a name on the hub "
    "(stable-diffusion-v1-5/stable-diffusion-v1-5; online once), or use --method diffusion, which needs no Stable "
    "Diffusion"
)


def load(name: str) -> StableDiffusionPipeline:
    """The pipeline in a folder or on the hub, without the parts that only make pictures, on the CPU.

    Raises
    ------
    UsageError
        A package is missing.
    WeightsError
        It cannot be had, is of another kind, or its weights are not whole.
    """
    try:
        import accelerate  # noqa: F401 -- diffusers reads weights with it, straight to their places
        import transformers  # noqa: F401
    except ImportError:
        raise UsageError("Stable Diffusion needs packages: pip install 'featdiff[stable]'") from None

    def refuse(why: str) -> WeightsError:
        return _refusal(name, f"cannot be had: {why}")

    folder = find_folder(name, ["model_index.json"], refuse)  # and its kind, before gigabytes come from the hub
    with quiet():
        _check_kind(name, folder)
    folder = find_folder(name, _FILES, refuse)
    with quiet():
        return _assemble(name, folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither bars nor notices of the libraries, whose settings are as before when it ends."""
    import huggingface_hub.utils
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    tools = (diffusers, transformers)
    before = [(tool, tool.get_verbosity(), tool.is_progress_bar_enabled()) for tool in tools]
    hub: Any = huggingface_hub.utils  # its bars are switched together with those of transformers
    no_downloads = hub.are_progress_bars_disabled()
    for tool in tools:
        tool.set_verbosity(tool.CRITICAL)
        tool.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for tool, verbosity, bars in before:
            tool.set_verbosity(verbosity)
            if bars:
                tool.enable_progress_bar()
        if no_downloads:
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
    """Part by part: only so is every part checked, and no code run that lies in the folder."""
    from diffusers import StableDiffusionPipeline

    parts = {}
    for part, read in _READERS.items():
        if not (folder / part).is_dir():  # which the libraries, too, would take for names on the hub
            raise _refusal(name, f"has no folder {part}")
        try:
            parts[part] = read(folder / part)
        except Exception as error:  # no file, a damaged one, weights of other shapes: each its own error
            raise _refusal(name, f"has a {part} that cannot be read ({first_line(error)})") from None
    if problem := _unfit(parts["tokenizer"], parts["text_encoder"], parts["unet"]):
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
    known = set(KarrasDiffusionSchedulers.__members__) - {"DPMSolverSDEScheduler"}  # whose noise is not ours to seed
    if kind not in known:
        raise ValueError(f"{kind} is none of {', '.join(sorted(known))}")
    return getattr(diffusers, kind).from_config(settings)


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _read_text_encoder(folder: Path) -> CLIPTextModel:
    from transformers import CLIPTextModel

    model, report = CLIPTextModel.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, local_files_only=True
    )
    # counted from 0 to 76, and in the files of older pipelines only
    report["unexpected_keys"] = [key for key in report["unexpected_keys"] if not key.endswith("position_ids")]
    _check_report(report)
    return model


def _read_unet(folder: Path) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    model, report = UNet2DConditionModel.from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, local_files_only=True
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
    """Both libraries fill in what is missing, and only log it."""
    for what, keys in report.items():
        if keys:
            key = sorted(keys)[0]
            name = key if isinstance(key, str) else key[0]  # mismatched ones come with their shapes
            raise ValueError(f"its weights do not fit its config.json: {what.replace('_', ' ')}: {name}")


def _unfit(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> str:
    """What keeps the parts from working together, or from vectors and noise alone; empty if nothing does."""
    text, network = text_encoder.config, unet.config
    have, wanted = (len(tokenizer), tokenizer.model_max_length), (text.vocab_size, text.max_position_embeddings)
    if have != wanted:  # from a folder without its files, transformers makes a tokenizer of no words
        return f"tokenizer (words, longest text: {have}) is not that of its text encoder {wanted}"
    if network.cross_attention_dim != text.hidden_size:
        return f"unet takes texts of width {network.cross_attention_dim}, and its text encoder gives {text.hidden_size}"
    if (network.in_channels, network.out_channels) != (4, 4):
        return f"unet makes {network.out_channels} channels from {network.in_channels}, not 4 from 4"
    if network.class_embed_type or network.num_class_embeds or network.addition_embed_type:
        return "unet wants to be told more than a text"
    if not network.sample_size:
        return "unet does not say for which size it is"
    return ""


def _refusal(name: str, why: str) -> WeightsError:
    return WeightsError(f"{name} {why}: {_WAYS}")
