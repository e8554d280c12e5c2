"""Latents of Stable Diffusion for outliers.

In: outlier vectors, each of which replaces the class word in the embedded prompt. Out: the latents that Stable
Diffusion makes from such prompts.

Source: OAL (Gao and Li, ICMR 2025, arXiv 2406.16525), after Dream-OOD (Du et al., NeurIPS 2023).

Differences from the released code: the vector replaces the class word in the prompt, all its tokens if it has several,
and a word that is not in the prompt is an error. (In that code, the token replaced for CIFAR-10 is not in the prompt,
so the outliers change nothing.) The weights of the text encoder are not changed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.schedules import plain_config
from ..exceptions import UsageError, WeightsError
from ..features.layout import FeatureLayout, Part
from ..features.networks import fingerprint
from ..features.store import FeatureStore
from ..runtime.devices import resolve_device
from ..runtime.progress import Progress
from .class_words import check_prompt, filled, replaced_tokens, token_positions, word_ids
from .outlier_file import Outliers
from .stable_loading import load, quiet

_LATENT_PIXELS = 8  # pixels of the image along a side of one latent
# Raised when the same settings give other latents.
_VERSION = 1
_GPU_BATCH = 8


class StableDiffusion:
    """Stable Diffusion 1.x or 2.x, from its text encoder to its latents.

    Parameters
    ----------
    pretrained : str or path
        A folder in the layout of diffusers, or the name of one on the hub. Read strictly: missing, misfitting or
        damaged weights are an error, and no pickle is opened.
    device : str, default "cpu"
        ``cpu`` (float32), ``cuda`` (float16) ... or ``auto``.
    steps : int, default 50
        Denoising steps of the pipeline's own scheduler, at least 1.
    guidance : float, default 7.5
        Weight of the prompt against the empty prompt, at least 1; 1 leaves the empty prompt out.
    size : int, optional
        Pixels along a side of the image that the latents encode, a multiple of 8. Default: the size that the network
        was trained for.
    prompt : str, default "A high-quality image of the {}"
        With ``{}`` once, where the class word goes.

    Attributes
    ----------
    name : str
        What was given as ``pretrained``.
    width : int
        Of a token embedding: 768 for Stable Diffusion 1.x, 1024 for 2.x.
    at_once : int
        Vectors in a batch; 1 on a CPU. It affects the speed, and the latents only by rounding.

    Raises
    ------
    UsageError
        An argument outside its range, or a missing package.
    WeightsError
        The pipeline is not available or of another kind, or weights are missing or damaged.
    """

    def __init__(
        self,
        pretrained: str | PathLike[str],
        *,
        device: str = "cpu",
        steps: int = 50,
        guidance: float = 7.5,
        size: int | None = None,
        prompt: str = "A high-quality image of the {}",
    ) -> None:
        _check_arguments(steps, guidance, size, prompt)
        self.name = fspath(pretrained)
        self.steps = steps
        self.guidance = guidance
        self.size = size
        self.prompt = prompt

        target = resolve_device(device)
        self._pipe = load(self.name)
        self._pipe.set_progress_bar_config(disable=True)
        with quiet():
            self._pipe.to(target, torch.float16 if target.type == "cuda" else torch.float32)

        noise_steps = self._pipe.scheduler.config.num_train_timesteps
        if steps >= noise_steps:
            raise UsageError(
                f"{self.name} was trained on {noise_steps} steps of noise: ask for fewer than that, not {steps}",
                argument="steps",
            )

        self.width: int = self._token_embedding.embedding_dim
        self.at_once = 1 if target.type == "cpu" else _GPU_BATCH

    @property
    def _token_embedding(self) -> nn.Embedding:
        return self._pipe.text_encoder.get_input_embeddings()

    def anchor(self, word: str) -> float:
        """The length that OAL gives to vectors in place of a class word.

        The norm of the mean, over all tokens and padding, of the text encoder's last hidden state for the word alone.

        Parameters
        ----------
        word : str

        Returns
        -------
        float

        Raises
        ------
        UsageError
            An empty word.
        """
        word_ids(self._pipe.tokenizer, word)
        return float(self._encode([word])[0].float().mean(0).norm())

    def scale(self, vectors: Tensor, words: Sequence[str]) -> Tensor:
        """Scale vectors to the lengths of their class words (:meth:`anchor`).

        Parameters
        ----------
        vectors : Tensor of shape (n, width)
        words : sequence of str
            The class word of each vector.

        Returns
        -------
        Tensor of float32, shape (n, width)
            On the CPU.

        Raises
        ------
        UsageError
            Vectors of another shape, a vector of length 0, or not one word for each.
        """
        vectors = self._checked(vectors, words)
        lengths = vectors.norm(dim=1, keepdim=True)
        if not lengths.all():
            raise UsageError(f"outlier vector {int(lengths.argmin())} is 0 and has no direction: leave it out")

        anchors = {word: self.anchor(word) for word in set(words)}
        return vectors / lengths * torch.tensor([[anchors[word]] for word in words])

    def store(self, cache: Path) -> FeatureStore:
        """The store of latents of this pipeline with these settings, in a cache folder."""
        pipe = self._pipe
        configs = (pipe.unet.config, pipe.scheduler.config, pipe.text_encoder.config.to_dict())
        weights = [fingerprint(pipe.unet), fingerprint(pipe.text_encoder)]
        settings = [_VERSION, str(pipe.dtype), self.steps, self.guidance, self._shape]
        facts = json.dumps([weights, settings, *map(plain_config, configs)], sort_keys=True, default=str)
        key = hashlib.sha256(facts.encode()).hexdigest()[:16]
        return FeatureStore(cache / "latents" / key, math.prod(self._shape))

    @property
    def _shape(self) -> tuple[int, int, int]:
        network = self._pipe.unet.config
        side = self.size // _LATENT_PIXELS if self.size else network.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return (network.in_channels, height, width)

    def latents(
        self,
        vectors: Tensor,
        words: Sequence[str],
        seed: int = 0,
        progress: Progress | None = None,
        store: FeatureStore | None = None,
    ) -> Tensor:
        """Make latents from the prompt, with a vector in place of the class word.

        Parameters
        ----------
        vectors : Tensor of shape (n, width)
            Used as they are; see :meth:`scale`.
        words : sequence of str
            The class word of each vector; the vector replaces all its tokens.
        seed : int, default 0
            Together with the index of a vector, it decides the initial noise of its latent. At least 0.
        progress : callable, optional
            Called with a stage, and how much of it is done and in total.
        store : FeatureStore, optional
            From :meth:`store`. Latents in it are not made again, others are added as they come.

        Returns
        -------
        Tensor of float32, shape (n, 4, h, w)
            On the CPU, in the scale of the network (about unit variance); h and w are an eighth of the image's pixels.

        Raises
        ------
        UsageError
            Vectors of another shape, not one word for each, or a word that is not in the prompt as tokens of its own.
        WeightsError
            A latent is not finite.
        """
        if seed < 0:
            raise UsageError(f"a seed is a whole number from 0 on, not {seed}", argument="seed")
        vectors = self._checked(vectors, words)
        positions = [token_positions(self._pipe.tokenizer, self.prompt, word) for word in words]
        prompts = [filled(self.prompt, word) for word in words]
        digests = [self._digest(vector, prompts[i], positions[i], seed, i) for i, vector in enumerate(vectors)]

        stored = [i for i, digest in enumerate(digests) if store is not None and digest in store]
        missing = sorted({*range(len(vectors))} - {*stored})
        latents = torch.empty(len(vectors), *self._shape)
        if store is not None and stored:
            table = store.table([digests[i] for i in stored])
            latents[stored] = table[np.arange(len(stored))].view(-1, *self._shape)

        try:
            for start in range(0, len(missing), self.at_once):
                batch = missing[start : start + self.at_once]
                with replaced_tokens(self._token_embedding, vectors[batch], [positions[i] for i in batch]):
                    encoded = self._encode([prompts[i] for i in batch])
                latents[batch] = self._denoise(encoded, [_generator(seed, i) for i in batch])
                if store is not None:
                    self._add(store, [digests[i] for i in batch], latents[batch])
                if progress:
                    progress("latents", len(stored) + start + len(batch), len(vectors))
        finally:
            if store is not None:
                store.flush()
        return latents

    def _add(self, store: FeatureStore, digests: Sequence[bytes], latents: Tensor) -> None:
        for digest, latent in zip(digests, latents.flatten(1).numpy(), strict=True):
            store.add(digest, latent)
        if self.at_once == 1:  # half an hour of work on a CPU; a GPU collects many in a file
            store.flush()

    def _digest(self, vector: Tensor, prompt: str, positions: slice, seed: int, index: int) -> bytes:
        """Key of a latent in the store: everything that decides it besides the pipeline and its settings."""
        ids = self._pipe.tokenizer(prompt).input_ids
        request = repr([ids, positions.start, positions.stop, seed, index])
        return hashlib.blake2b(vector.numpy().tobytes() + request.encode(), digest_size=16).digest()

    def check_words(self, words: Sequence[str]) -> None:
        """Refuse class words that are not in the prompt as tokens of their own (``UsageError``)."""
        for word in words:
            token_positions(self._pipe.tokenizer, self.prompt, word)

    def check_width(self, width: int) -> None:
        """Refuse vectors that have not the width of a token embedding (``UsageError``)."""
        if width == self.width:
            return
        examples = ""
        if self.width == 768:
            examples = " (vit_base_patch16_224, convnext_tiny, swin_tiny_patch4_window7_224 ...)"
        raise UsageError(
            f"the outlier vectors have {width} numbers and the text encoder of {self.name} takes {self.width}: use "
            f"a detector on a backbone whose pre-logits have {self.width}{examples}"
        )

    def _checked(self, vectors: Tensor, words: Sequence[str]) -> Tensor:
        vectors = vectors.detach().float().cpu()
        if vectors.ndim != 2 or not len(vectors):
            raise UsageError(f"the outlier vectors must be a table (n, {self.width}), not {tuple(vectors.shape)}")
        self.check_width(vectors.shape[1])

        if len(words) != len(vectors):
            raise UsageError(f"{len(vectors)} outlier vectors and {len(words)} class words: give one word for each")

        finite = vectors.isfinite().all(1)
        if not finite.all():
            raise UsageError(f"outlier vector {int(finite.int().argmin())} holds NaN or infinite values: leave it out")
        return vectors

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Tensor:
        with quiet():
            return self._pipe.encode_prompt(texts, self._pipe.device, 1, False)[0]

    def _denoise(self, encoded: Tensor, generators: list[torch.Generator]) -> Tensor:
        empty_prompt = self._encode([""]).expand_as(encoded)
        with quiet():
            latents: Tensor = self._pipe(
                prompt_embeds=encoded,
                negative_prompt_embeds=empty_prompt,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                height=self.size,
                width=self.size,
                generator=generators,
                output_type="latent",
                return_dict=False,
            )[0]

        if not latents.isfinite().all():
            raise WeightsError(f"{self.name} gives latents that are not finite on {latents.device}: try the device cpu")
        return latents.float().cpu()


def with_latents(
    outliers: Outliers,
    stable: StableDiffusion,
    seed: int = 0,
    progress: Progress | None = None,
    store: FeatureStore | None = None,
) -> Outliers:
    """Add the latents that Stable Diffusion makes with the outliers' pre-logits in place of their class words.

    Parameters
    ----------
    outliers : Outliers
    stable : StableDiffusion
    seed : int, default 0
    progress : callable, optional
    store : FeatureStore, optional
        The last three as for :meth:`StableDiffusion.latents`.

    Returns
    -------
    Outliers

    Raises
    ------
    UsageError
        Outliers without pre-logits, or of another width, or a class name that is not in the prompt.
    """
    words = [outliers.classes[label] for label in outliers.labels]
    vectors = outliers.vectors[:, pre_logits_in(outliers.layout).columns]
    latents = stable.latents(stable.scale(vectors, words), words, seed, progress, store)
    return replace(outliers, latents=latents, method="stable-diffusion")


def pre_logits_in(layout: FeatureLayout) -> Part:
    """The pre-logits of a feature layout.

    Parameters
    ----------
    layout : FeatureLayout

    Returns
    -------
    Part

    Raises
    ------
    UsageError
        There are none.
    """
    part = layout.pre_logits
    if part is None:
        names = ", ".join(part.name for part in layout.parts)
        raise UsageError(
            f"there are no pre_logits among the layers {names}: name them when you train", argument="layers"
        )
    return part


def pooled(latents: Tensor) -> Tensor:
    """Average latents over channels and then over height, as OAL's released code does.

    Parameters
    ----------
    latents : Tensor of shape (n, 4, h, w)

    Returns
    -------
    Tensor of shape (n, w)

    Examples
    --------
    >>> pooled(torch.ones(2, 4, 3, 5)).shape
    torch.Size([2, 5])
    """
    return latents.mean(1).mean(1)


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))


def _check_arguments(steps: int, guidance: float, size: int | None, prompt: str) -> None:
    if steps < 1:
        raise UsageError(f"steps must be a whole number from 1 on, not {steps}", argument="steps")
    if not (math.isfinite(guidance) and guidance >= 1):
        raise UsageError(f"guidance must be a number from 1 (none) on, not {guidance}", argument="guidance")
    if size is not None and (size < _LATENT_PIXELS or size % _LATENT_PIXELS):
        raise UsageError(f"size must be a multiple of {_LATENT_PIXELS} pixels, not {size}", argument="size")
    check_prompt(prompt)
