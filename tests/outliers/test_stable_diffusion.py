"""Latents of Stable Diffusion for outlier vectors, with tiny pipelines of the real classes and no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_pipelines import NOISE, SIDE, write_pipeline
from torch import Tensor

from featdiff.exceptions import UsageError, WeightsError
from featdiff.features.layout import PRE_LOGITS, FeatureLayout, Key, Kind
from featdiff.outliers.class_words import token_positions
from featdiff.outliers.outlier_file import Outliers
from featdiff.outliers.stable_diffusion import StableDiffusion, pooled, with_latents

STEPS = 2
#: Class words of one token ("cat") and of several.
WORDS = ("cat", "Cat", "dog", "great white shark", "bow-tie", "n01440764")
TEXT, UNET = "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like Stable Diffusion 1.5 on the hub: PNDM, width 768, old names of weights, and a decoder (a broken one)."""
    from diffusers import AutoencoderKL, PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True, **NOISE)
    folder = write_pipeline(tmp_path_factory.mktemp("sd") / "v1", 768, "<|endoftext|>", scheduler, attention_head_dim=2)
    edit_tensors(folder / TEXT, with_old_names)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"never read")
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    return folder


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like Stable Diffusion 2.1: DDIM, v-prediction, linear projections, another padding; without a decoder."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **NOISE)
    network = dict(attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True)
    return write_pipeline(tmp_path_factory.mktemp("sd") / "v2", 32, "!", scheduler, **network)


@pytest.fixture(scope="session")
def large(first: Path) -> StableDiffusion:
    return StableDiffusion(first, steps=STEPS)


@pytest.fixture(scope="session")
def small(second: Path) -> StableDiffusion:
    return StableDiffusion(second, steps=STEPS)


@pytest.fixture(scope="session", params=["large", "small"])
def stable(request: pytest.FixtureRequest) -> StableDiffusion:
    return request.getfixturevalue(request.param)


@pytest.fixture
def copied(second: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(second, tmp_path / "sd")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


def with_old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
    return {**named, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def vectors(stable: StableDiffusion, n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, stable.width, generator=torch.Generator().manual_seed(seed))


def plain(folder: Path) -> Any:
    """The whole pipeline as diffusers loads it by itself, less the decoder."""
    from diffusers import StableDiffusionPipeline

    unused = dict(vae=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline.from_pretrained(folder, **unused)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def overwritten(stable: StableDiffusion, vector: Tensor, word: str) -> Any:
    """The plain pipeline after the released code's way: rows of the embedding table itself are the vector."""
    pipe = plain(Path(stable.name))
    table = pipe.text_encoder.get_input_embeddings().weight.data
    table[pipe.tokenizer(word, add_special_tokens=False).input_ids] = vector
    return pipe


def sources(n: int, seed: int) -> list[torch.Generator]:
    return [
        torch.Generator().manual_seed(int(np.random.SeedSequence((seed, i)).generate_state(1)[0])) for i in range(n)
    ]


def as_text(word: str) -> str:
    return f"A high-quality image of the {word}"


# ---- what comes out ----


def test_both_kinds_give_latents_of_their_size(large: StableDiffusion, small: StableDiffusion) -> None:
    for stable, width in ((large, 768), (small, 32)):
        latents = stable.latents(vectors(stable, 2), ["cat", "dog"])
        assert stable.width == width
        assert latents.shape == (2, 4, SIDE, SIDE)
        assert (latents.dtype, latents.device.type, latents.requires_grad) == (torch.float32, "cpu", False)
        assert latents.isfinite().all() and latents.std() > 0.1


def test_latents_are_those_of_the_pipeline_with_an_overwritten_embedding_table(stable: StableDiffusion) -> None:
    """The released code's way, by classes of diffusers alone; no letter of these words is a token of the prompt."""
    given = vectors(stable, 2)
    latents = stable.latents(given, ["cat", "bbs"], seed=5)
    for i, word in enumerate(("cat", "bbs")):
        pipe = overwritten(stable, given[i], word)
        wanted = pipe(as_text(word), num_inference_steps=STEPS, generator=sources(2, 5)[i], output_type="latent").images
        torch.testing.assert_close(latents[i], wanted[0], atol=1e-5, rtol=1e-4)


def test_a_word_in_its_own_place_is_the_plain_prompt(stable: StableDiffusion) -> None:
    pipe = plain(Path(stable.name))
    (token,) = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    given = pipe.text_encoder.get_input_embeddings().weight[token][None]
    wanted = pipe(as_text("cat"), num_inference_steps=STEPS, generator=sources(1, 0), output_type="latent").images
    torch.testing.assert_close(stable.latents(given, ["cat"]), wanted)
    assert not torch.allclose(stable.latents(-given, ["cat"]), wanted, atol=0.01)


def test_the_network_is_told_the_hidden_states_and_those_of_the_empty_prompt(stable: StableDiffusion) -> None:
    told: list[Tensor] = []
    hook = stable._pipe.unet.register_forward_pre_hook(
        lambda _, __, given: told.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    given = vectors(stable, 1)
    stable.latents(given, ["cat"])
    hook.remove()
    pipe = overwritten(stable, given[0], "cat")
    ids = pipe.tokenizer([as_text("cat"), ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted, empty = pipe.text_encoder(ids).last_hidden_state
        usual = plain(Path(stable.name)).text_encoder(ids).last_hidden_state[0]
    place = token_positions(stable._pipe.tokenizer, stable.prompt, "cat")
    for states in told:
        assert states.shape == (2, 77, stable.width)
        torch.testing.assert_close(states[0], empty)
        torch.testing.assert_close(states[1], wanted)
        assert torch.equal(states[1, : place.start], usual[: place.start])  # what comes before cannot know of it
        assert not torch.allclose(states[1, place], usual[place], atol=0.01)
    assert len(told) >= STEPS


def test_vector_word_and_seed_decide_and_nothing_else(small: StableDiffusion) -> None:
    given = vectors(small, 3)
    latents = small.latents(given, ["cat"] * 3, seed=1)
    assert torch.equal(small.latents(given, ["cat"] * 3, seed=1), latents)
    assert torch.equal(small.latents(given[:2], ["cat"] * 2, seed=1), latents[:2])
    other = vectors(small, 3, seed=9)
    other[0] = given[0]
    changed = small.latents(other, ["cat"] * 3, seed=1)
    assert torch.equal(changed[0], latents[0])
    for different in (
        changed[1:],
        small.latents(given, ["dog"] * 3, seed=1)[1:],
        small.latents(given, ["cat"] * 3)[1:],
    ):
        assert (different - latents[1:]).abs().amax((1, 2, 3)).min() > 0.01
    same = small.latents(given[:1].expand(2, -1), ["cat"] * 2, seed=1)
    assert (same[0] - same[1]).abs().max() > 0.1  # each place has its own noise


@pytest.mark.parametrize("kind", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_batches_change_nothing_with_schedulers_of_all_sorts(copied: Path, kind: str) -> None:
    edit_json(copied / "scheduler" / "scheduler_config.json", _class_name=kind, skip_prk_steps=True)
    stable = StableDiffusion(copied, steps=STEPS)
    words, seen = ["cat", "great white shark", "dog", "cat", "bow-tie"], []
    given = vectors(stable, 5)
    assert stable.at_once == 1
    alone = stable.latents(given, words, 3, lambda *told: seen.append(told))
    assert seen == [("latents", done, 5) for done in (1, 2, 3, 4, 5)]
    seen.clear()
    stable.at_once = 2
    torch.testing.assert_close(
        stable.latents(given, words, 3, lambda *told: seen.append(told)), alone, atol=1e-4, rtol=0
    )
    assert seen == [("latents", 2, 5), ("latents", 4, 5), ("latents", 5, 5)]


def test_steps_guidance_size_and_prompt_are_heeded(second: Path) -> None:
    pipe, word = plain(second), "cat"
    given = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer(word).input_ids[1]][None]
    stable = StableDiffusion(second, steps=2, guidance=1, size=128, prompt="{} image")
    wanted = pipe(
        *("cat image", 128, 128), num_inference_steps=2, guidance_scale=1, generator=sources(1, 0), output_type="latent"
    ).images
    assert wanted.shape == (1, 4, 16, 16)
    torch.testing.assert_close(stable.latents(given, [word]), wanted)


def test_pooled_is_the_mean_over_channels_and_height() -> None:
    latents = torch.arange(2 * 4 * 3 * 5.0).reshape(2, 4, 3, 5)
    np.testing.assert_allclose(pooled(latents), latents.numpy().mean((1, 2)), rtol=1e-6)
    assert pooled(latents).tolist()[0] == [27.5, 28.5, 29.5, 30.5, 31.5]  # (0 + 5 + 10) / 3 + (0 + 15 + 30 + 45) / 4


# ---- the class word ----


@pytest.mark.parametrize(
    "prompt", ["A high-quality image of the {}", "{}", "{} in the wild", 'A "{}".', "cat, cat {} cat"]
)
@pytest.mark.parametrize("word", WORDS)
def test_the_places_hold_the_word(
    small: StableDiffusion, word: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "prompt", prompt)
    tokens = small._pipe.tokenizer
    place = token_positions(tokens, prompt, word)
    ids = tokens(prompt.replace("{}", word)).input_ids
    together = "".join(tokens.convert_ids_to_tokens(ids[place])).replace("</w>", "")
    assert together == word.lower().replace(" ", "")
    assert ids[place] == tokens(word, add_special_tokens=False).input_ids
    around = [*ids[1 : place.start], *ids[place.stop : -1]]
    assert around == tokens(prompt.replace("{}", " "), add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("prompt", "word", "why"),
    [
        ("A photo of a {}", "", "is empty"),
        ("A photo of a {}", "  ", "is empty"),
        ("A photo of {}s", "cat", "'cat' is not in the prompt 'A photo of cats' as tokens of its own"),
        ("A cow{}", "cat", "'cat' is not in the prompt 'A cowcat' as tokens"),
        ("A photo of a {}", "cat " * 80, "within the first 77: shorten it"),
        ("photo " * 20 + "{}", "cat", "within the first 77: shorten it"),
    ],
)
def test_a_word_that_is_not_in_the_prompt_is_refused(
    small: StableDiffusion, prompt: str, word: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "prompt", prompt)
    with pytest.raises(UsageError, match=why):
        small.latents(vectors(small, 2), ["bird" if prompt.startswith("A photo of a") else word, word])


def test_anchor_is_the_norm_of_the_mean_hidden_state(stable: StableDiffusion) -> None:
    pipe = plain(Path(stable.name))
    for word in ("cat", "great white shark"):
        ids = pipe.tokenizer(word, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipe.text_encoder(ids).last_hidden_state[0]
        assert states.shape == (77, stable.width)
        assert stable.anchor(word) == pytest.approx(float(np.linalg.norm(states.numpy().mean(0))), rel=1e-5)
    assert stable.anchor("cat") != pytest.approx(stable.anchor("dog"), rel=1e-4)
    with pytest.raises(UsageError, match="empty"):
        stable.anchor(" ")


def test_scale_keeps_directions_and_gives_the_lengths_of_the_anchors(small: StableDiffusion) -> None:
    given, words = vectors(small, 3), ["cat", "dog", "cat"]
    scaled = small.scale(given, words)
    np.testing.assert_allclose(scaled.norm(dim=1), [small.anchor(word) for word in words], rtol=1e-5)
    np.testing.assert_allclose(torch.cosine_similarity(scaled, given), 1, rtol=1e-5)
    torch.testing.assert_close(small.scale(7 * given, words), scaled)
    given[1] = 0
    with pytest.raises(UsageError, match="outlier vector 1 is 0"):
        small.scale(given, words)


# ---- nothing is left behind ----


def test_weights_hooks_and_random_state_are_left_alone(small: StableDiffusion) -> None:
    parts = [small._pipe.text_encoder, small._pipe.unet]
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    state = torch.get_rng_state()
    small.latents(vectors(small, 2), ["cat", "dog"])
    small.scale(vectors(small, 2), ["cat", "dog"])
    assert torch.equal(torch.get_rng_state(), state)
    for part, weights in zip(parts, before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in part.state_dict().items())
        assert not any(module._forward_hooks for module in part.modules())


def test_the_hook_goes_even_when_the_text_encoder_fails(second: Path) -> None:
    stable = StableDiffusion(second, steps=STEPS)
    tokens = stable._pipe.text_encoder.get_input_embeddings()
    tokens.weight = None
    with pytest.raises(TypeError):
        stable.latents(vectors(stable, 1), ["cat"])
    assert not tokens._forward_hooks


@pytest.fixture
def settings() -> Iterator[Callable[[], list[object]]]:
    """The settings of the libraries that print, which are set to what is not their default."""
    from diffusers.utils import logging as diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers

    def read() -> list[object]:
        tools = (diffusers, transformers)
        states = [(tool.get_verbosity(), tool.is_progress_bar_enabled()) for tool in tools]
        return [*states, are_progress_bars_disabled()]

    before = [tool.get_verbosity() for tool in (diffusers, transformers)]
    diffusers.set_verbosity_info()
    transformers.set_verbosity_warning()
    diffusers.disable_progress_bar()
    disable_progress_bars()
    yield read
    diffusers.set_verbosity(before[0])
    transformers.set_verbosity(before[1])
    diffusers.enable_progress_bar()
    enable_progress_bars()


def test_it_is_quiet_and_restores_the_settings_of_the_libraries(
    first: Path,
    settings: Callable[[], list[object]],
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    before = settings()
    stable = StableDiffusion(first, steps=STEPS)
    stable.latents(stable.scale(vectors(stable, 1), ["cat"]), ["cat"])
    with pytest.raises(WeightsError):
        StableDiffusion(first.parent / "missing")
    assert settings() == before
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "diffusers" in warning.filename or "transformers" in warning.filename]


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 on, not 0"),
        ({"steps": 1000}, "trained on 1000 steps of noise: ask for fewer than that, not 1000"),
        ({"guidance": 0.5}, "guidance must be a number from 1"),
        ({"guidance": float("nan")}, "guidance must be a number from 1"),
        ({"size": 100}, "size must be a multiple of 8 pixels, not 100"),
        ({"size": 0}, "size must be a multiple of 8 pixels, not 0"),
        ({"prompt": "A photo"}, "'A photo' must hold {} once"),
        ({"prompt": "{} or {}"}, "must hold {} once"),
        ({"device": "abacus"}, "no device 'abacus'"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(second: Path, arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        StableDiffusion(second, **arguments)


@pytest.mark.parametrize(
    ("given", "words", "why"),
    [
        (
            torch.zeros(2, 1280),
            2,
            r"have 1280 numbers and the text encoder of .* takes 768: use a detector on a backbone whose "
            r"pre-logits have 768 \(vit_base_patch16_224, convnext_tiny, swin_tiny_patch4_window7_224 \.\.\.\)$",
        ),
        (torch.zeros(768), 1, r"must be a table \(n, 768\), not \(768,\)"),
        (torch.zeros(0, 768), 0, r"must be a table \(n, 768\), not \(0, 768\)"),
        (torch.ones(2, 768), 1, "2 outlier vectors and 1 class words"),
        (torch.stack([torch.ones(768), torch.full((768,), torch.nan)]), 2, "outlier vector 1 holds NaN"),
        (torch.stack([torch.full((768,), -torch.inf), torch.ones(768)]), 2, "outlier vector 0 holds NaN or infinite"),
    ],
    ids=["wide", "flat", "none", "words", "nan", "inf"],
)
@pytest.mark.parametrize("method", ["latents", "scale"])
def test_vectors_that_do_not_fit(large: StableDiffusion, method: str, given: Tensor, words: int, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        getattr(large, method)(given, ["cat"] * words)
    assert "\n" not in str(caught.value)


def test_other_widths_name_no_backbones_and_seeds_are_whole_numbers(small: StableDiffusion) -> None:
    with pytest.raises(UsageError, match="pre-logits have 32$"):
        small.latents(torch.ones(1, 768), ["cat"])
    with pytest.raises(UsageError, match="seed .* not -1"):
        small.latents(vectors(small, 1), ["cat"], seed=-1)


def test_latents_that_overflow_are_refused(copied: Path) -> None:
    edit_tensors(copied / UNET, lambda tensors: {**tensors, "conv_out.bias": torch.full((4,), 1e38)})
    stable = StableDiffusion(copied, steps=STEPS)
    with pytest.raises(WeightsError, match="latents that are not finite on cpu"):
        stable.latents(vectors(stable, 1), ["cat"])


@pytest.mark.parametrize("package", ["accelerate", "transformers"])
def test_packages_of_the_extra(second: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"^Stable Diffusion needs packages: pip install 'featdiff\[stable\]'$"):
        StableDiffusion(second)


# ---- pipelines that cannot be used ----


def refused(folder: str | Path, why: str) -> None:
    """Refused in one line that names what was asked for, the reason, and three ways out."""
    with pytest.raises(WeightsError, match=why) as caught:
        StableDiffusion(folder)
    line = str(caught.value)
    assert line.startswith(str(folder)) and "\n" not in line
    assert all(way in line for way in ("give a folder", "stable-diffusion-v1-5/", "the method diffusion"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the hub library, which stays offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_read_from_its_cache(hub_cache: Path, second: Path, small: StableDiffusion) -> None:
    root, commit = hub_cache / "models--someone--paints", "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    shutil.copytree(second, root / "snapshots" / commit)
    stable = StableDiffusion("someone/paints", steps=STEPS)
    given = vectors(small, 1)
    assert torch.equal(stable.latents(given, ["cat"]), small.latents(given, ["cat"]))
    (root / "snapshots" / commit / UNET).unlink()  # a download that was cut short
    refused("someone/paints", r"has a unet that cannot be read \(")


@pytest.mark.parametrize("name", ["missing", "./missing/sd", "/missing/sd", "~/sd", "a/b/c"])
def test_a_missing_folder_is_not_asked_of_the_hub(hub_cache: Path, name: str) -> None:
    refused(name, "cannot be had: there is no such folder: ")
    assert not hub_cache.exists()


def test_a_name_that_cannot_be_had_from_the_hub(hub_cache: Path) -> None:
    refused("someone/unknown", "cannot be had: there is no such folder, and it could not be had from the hub: ")


def test_pipelines_of_other_kinds(tmp_path: Path, copied: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    shape = dict(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(UNet2DModel(norm_num_groups=4, **shape), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    refused(tmp_path / "ddpm", "is a DDPMPipeline, and a StableDiffusionPipeline")
    edit_json(copied / "model_index.json", _class_name="StableDiffusionXLPipeline")
    refused(copied, "is a StableDiffusionXLPipeline, and a StableDiffusionPipeline")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no model_index.json that can be read")
    for broken in ("{", "[]"):
        (copied / "model_index.json").write_text(broken)
        refused(copied, "no model_index.json that can be read")


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "text_encoder", "unet"])
def test_a_missing_part(copied: Path, part: str) -> None:
    shutil.rmtree(copied / part)
    refused(copied, f"has no folder {part}:")
    (copied / part).mkdir()
    tokens = r"its tokenizer \(words, longest text: .* is not that of its text encoder \(\d+, 77\)"
    refused(copied, tokens if part == "tokenizer" else rf"has a {part} that cannot be read \(.*no file")


def without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    (name, *_) = [name for name in tensors if name.endswith(("to_q.weight", "q_proj.weight"))]
    return {other: value for other, value in tensors.items() if other != name}


def with_one_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "extra.weight": torch.zeros(2)}


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    next(iter(tensors.values())).view(-1)[-1] = torch.nan
    return tensors


def with_another_shape(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = max(tensors, key=lambda name: tensors[name].numel())
    return {**tensors, name: tensors[name][:-1].contiguous()}


@pytest.mark.parametrize("file", [TEXT, UNET])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_one, r"missing keys: [\w.]*\.(to_q|q_proj)\.weight\)"),
        (with_one_more, r"unexpected keys: extra\.weight\)"),
        (with_nan, r"has a damaged (text_encoder|unet), whose [\w.]+ holds NaN"),
        (with_another_shape, r"mismatched keys: [\w.]+\.weight\)|[\w.]+ expected shape"),
    ],
)
def test_weights_that_are_not_whole(
    copied: Path, file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], why: str
) -> None:
    edit_tensors(copied / file, change)
    refused(copied, why)


@pytest.mark.parametrize("file", [TEXT, UNET])
def test_files_cut_short_or_pickled(copied: Path, file: str) -> None:
    part, whole = file.partition("/")[0], (copied / file).read_bytes()
    (copied / file).write_bytes(whole[: len(whole) // 2])
    refused(copied, f"has a {part} that cannot be read")
    (copied / file).write_bytes(whole)
    pickled = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(copied / file), copied / part / pickled)
    StableDiffusion(copied)
    (copied / file).unlink()
    refused(copied, f"has a {part} that cannot be read .*safetensors")


def test_parts_that_do_not_belong_together(copied: Path, first: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "text_encoder")
    shutil.copytree(first / "text_encoder", copied / "text_encoder")
    refused(copied, "its unet takes texts of width 32, and its text encoder gives 768")
    (copied / "tokenizer" / "tokenizer_config.json").unlink()  # without it, texts are as long as one likes
    refused(copied, r"its tokenizer .* is not that of its text encoder \(\d+, 77\)")


@pytest.mark.parametrize(
    ("file", "changes", "why"),
    [
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "scheduler .*FlowMatchEulerDiscreteScheduler is none of DDIM",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DPMSolverSDEScheduler"},
            "scheduler .*DPMSolverSDEScheduler is none of DDIM",
        ),
        ("unet/config.json", {"num_class_embeds": 3}, "unet"),
        ("unet/config.json", {"sample_size": None}, "its unet does not say for which size"),
    ],
    ids=["flow", "sde", "classes", "size"],
)
def test_settings_that_cannot_be_used(copied: Path, file: str, changes: dict[str, Any], why: str) -> None:
    edit_json(copied / file, **changes)
    refused(copied, why)


@pytest.mark.parametrize(
    ("network", "why"),
    [
        ({"in_channels": 9}, "its unet makes 4 channels from 9"),
        ({"num_class_embeds": 3}, "its unet is conditioned on more than a text"),
    ],
    ids=["inpainting", "classes"],
)
def test_networks_of_other_kinds(tmp_path: Path, network: dict[str, Any], why: str) -> None:
    from diffusers import DDIMScheduler

    refused(
        write_pipeline(
            tmp_path / "sd", 32, "!", DDIMScheduler(**NOISE, clip_sample=False), attention_head_dim=2, **network
        ),
        why,
    )


# ---- joined with outliers ----


def beyond(width: int, second: Key = (PRE_LOGITS, Kind.PRE_LOGITS)) -> Outliers:
    vectors = torch.randn(3, 4 + width, generator=torch.Generator().manual_seed(0))
    layout = FeatureLayout.of({("stage", Kind.MEAN): 4, second: width})
    return Outliers(vectors, torch.tensor([0, 1, 0]), ["cat", "dog"], layout, "boundary", "0" * 64, ["stage"])


def test_outliers_are_asked_for_by_their_pre_logits_at_the_length_of_their_class(small: StableDiffusion) -> None:
    given = beyond(small.width)
    found = with_latents(given, small, seed=4)
    words = ["cat", "dog", "cat"]
    wanted = small.latents(small.scale(given.vectors[:, 4:], words), words, seed=4)
    assert found.latents is not None and torch.equal(found.latents, wanted)
    assert torch.equal(found.vectors, given.vectors) and given.latents is None


def test_latents_that_are_kept_are_not_made_again(
    small: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the second of three, the same call makes one more; another seed or word makes others."""
    given, words, made = vectors(small, 3), ["cat", "dog", "cat"], []

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.latents(given, words, 4, stop, small.store(tmp_path))
    whole, told = StableDiffusion._denoise, []
    monkeypatch.setattr(StableDiffusion, "_denoise", lambda self, *a: made.append(len(a[1])) or whole(self, *a))
    kept = small.latents(given, words, 4, lambda *step: told.append(step), small.store(tmp_path))
    assert made == [1] and told == [("latents", 3, 3)]
    assert torch.equal(kept, small.latents(given, words, 4))
    made.clear()
    small.latents(given, words, 5, store=small.store(tmp_path))
    small.latents(given, ["dog", "dog", "cat"], 4, store=small.store(tmp_path))
    assert made == [1] * (3 + 1)
    assert len(small.store(tmp_path)) == 7


KEY = """
import sys
from pathlib import Path
from featdiff.outliers.stable_diffusion import StableDiffusion
print(StableDiffusion(sys.argv[1], steps=5).store(Path(sys.argv[2])).folder.name)
"""


def test_kept_latents_are_found_by_the_next_process(copied: Path, tmp_path: Path) -> None:
    """diffusers notes which settings a file lacks, in another order in each process."""
    file = copied / "scheduler" / "scheduler_config.json"
    lacking = {"prediction_type", "timestep_spacing", "rescale_betas_zero_snr", "thresholding"}
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in lacking}))
    keys = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", KEY, str(copied), str(tmp_path)]
        keys.add(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    assert len(keys) == 1


@pytest.mark.parametrize("changed", [{"steps": STEPS + 1}, {"guidance": 2.0}, {"size": 16}])
def test_settings_have_latents_of_their_own(
    small: StableDiffusion, second: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    other = StableDiffusion(second, **{"steps": STEPS, **changed})
    assert other.store(tmp_path).folder != small.store(tmp_path).folder


@pytest.mark.parametrize(
    ("file", "change"),
    [("unet/config.json", {"attention_head_dim": 4}), ("text_encoder/config.json", {"hidden_act": "gelu"})],
)
def test_configs_have_latents_of_their_own(
    small: StableDiffusion, copied: Path, tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    edit_json(copied / file, **change)
    assert StableDiffusion(copied, steps=STEPS).store(tmp_path).folder != small.store(tmp_path).folder


def test_outliers_without_pre_logits_or_of_another_width(small: StableDiffusion) -> None:
    with pytest.raises(UsageError, match="no pre_logits among the layers stage, other"):
        with_latents(beyond(small.width, ("other", Kind.MEAN)), small)
    with pytest.raises(UsageError, match="have 12 numbers and the text encoder of .* takes 32"):
        with_latents(beyond(12), small)
