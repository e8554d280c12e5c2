"""Latents of Stable Diffusion, asked by outlier vectors in place of a class word.

Source: OAL (Gao and Li, ICMR 2025, arXiv 2406.16525), after Dream-OOD (Du et al., NeurIPS 2023).

Where this departs from the released code: the vector goes to the places of the class word in the prompt, to all of them
if the word is several tokens, and a word that is not there is an error. (There, the token replaced for CIFAR-10 is not
in the prompt, so that the outliers change nothing.) The weights of the text encoder stay untouched.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from .outlier_file import Outliers
from .stable_loading import load, quiet

_CELL = 8  # pixels to a side of one latent
# Raised when the same settings give other latents.
_VERSION = 1
_AT_ONCE = 8  # vectors in a batch, where there is a GPU to fill


class StableDiffusion:
    """Stable Diffusion 1.x or 2.x, from its text encoder to its latents.

    Parameters
    ----------
    pretrained : a folder in the layout of diffusers, or the name of one on the hub
        Read strictly: a missing, misfitting or damaged weight is an error, and nothing pickled is opened.
    device : str
        ``cpu`` (float32), ``cuda`` (float16) ... or ``auto``.
    steps : int, at least 1
        Denoising steps of the pipeline's own scheduler.
    guidance : float, at least 1
        Weight of the prompt against the empty prompt; 1 leaves the empty prompt out.
    size : int, optional
        Pixels to a side of the image that the latents stand for, a multiple of 8; by default what the network is for.
    prompt : str
        With ``{}`` once, where the class word goes.

    Attributes
    ----------
    width : int
        Numbers in a token embedding: 768 for Stable Diffusion 1.x, 1024 for 2.x.
    at_once : int
        Vectors in a batch; on a CPU 1. It changes the speed, and the latents by rounding alone.

    Raises
    ------
    UsageError
        An argument that makes no sense, or a missing package.
    WeightsError
        The pipeline cannot be had, is of another kind, or its weights are not whole.
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
        _check(steps, guidance, size, prompt)
        self.name, self.steps, self.guidance, self.size, self.prompt = fspath(pretrained), steps, guidance, size, prompt
        place = resolve_device(device)
        self._pipe = load(self.name)
        self._pipe.set_progress_bar_config(disable=True)
        with quiet():
            self._pipe.to(place, torch.float16 if place.type == "cuda" else torch.float32)
        trained = self._pipe.scheduler.config.num_train_timesteps
        if steps >= trained:
            raise UsageError(
                f"{self.name} was trained on {trained} steps of noise: ask for fewer than that, not {steps}"
            )
        self.width: int = self._tokens.embedding_dim
        self.at_once = 1 if place.type == "cpu" else _AT_ONCE

    @property
    def _tokens(self) -> nn.Embedding:
        return self._pipe.text_encoder.get_input_embeddings()

    def anchor(self, word: str) -> float:
        """Norm of the mean, over all tokens and padding, of the text encoder's last hidden state for the bare word.

        OAL's length of a vector that stands for the word: the order of magnitude of the embeddings, not a direction.

        Raises
        ------
        UsageError
            An empty word.
        """
        self._ids(word)
        return float(self._encode([word])[0].float().mean(0).norm())

    def scale(self, vectors: Tensor, words: Sequence[str]) -> Tensor:
        """Vectors (n, width) at the lengths (:meth:`anchor`) of their class words -> (n, width) float32 on the CPU.

        Raises
        ------
        UsageError
            Not such vectors, one of length 0, or not one word for each.
        """
        vectors = self._checked(vectors, words)
        lengths = vectors.norm(dim=1, keepdim=True)
        if not lengths.all():
            raise UsageError(f"outlier vector {int(lengths.argmin())} is 0 and has no direction: leave it out")
        anchors = {word: self.anchor(word) for word in set(words)}
        return vectors / lengths * torch.tensor([[anchors[word]] for word in words])

    def store(self, cache: Path) -> FeatureStore:
        """Where latents of this pipeline with these settings are kept, below a cache folder."""
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
        side = self.size // _CELL if self.size else network.sample_size
        return (network.in_channels, *([side, side] if isinstance(side, int) else side))

    def latents(
        self,
        vectors: Tensor,
        words: Sequence[str],
        seed: int = 0,
        progress: Progress | None = None,
        kept: FeatureStore | None = None,
    ) -> Tensor:
        """What Stable Diffusion makes of the prompt with a vector in place of its class word.

        Parameters
        ----------
        vectors : (n, width)
            Taken as they are; see :meth:`scale`.
        words : n strings
            The class word of each vector; all its tokens become the vector.
        seed : int, at least 0
            With the place of a vector among the others, the noise that its latent begins as.
        progress : callable (stage, done, total), optional
        kept : FeatureStore, optional
            From :meth:`store`. Latents that are there are not made again, others are added as they come.

        Returns
        -------
        (n, 4, h, w) float32 on the CPU
            Latents in the scale of the network (about unit variance), h and w an eighth of the image's pixels.

        Raises
        ------
        UsageError
            Not such vectors, not one word for each, a word that the prompt does not hold as tokens of its own.
        WeightsError
            A latent is not finite.
        """
        if seed < 0:
            raise UsageError(f"a seed is a whole number from 0 on, not {seed}")
        vectors = self._checked(vectors, words)
        places = [self.places(word) for word in words]
        prompts = [self._filled(word) for word in words]
        digests = [self._digest(vector, prompts[i], places[i], seed, i) for i, vector in enumerate(vectors)]
        known = [i for i, digest in enumerate(digests) if kept is not None and digest in kept]
        missing = sorted({*range(len(vectors))} - {*known})
        found = torch.empty(len(vectors), *self._shape)
        if kept is not None and known:
            found[known] = kept.table([digests[i] for i in known])[np.arange(len(known))].view(-1, *self._shape)
        try:
            for start in range(0, len(missing), self.at_once):
                part = missing[start : start + self.at_once]
                with _placed(self._tokens, vectors[part], [places[i] for i in part]):
                    encoded = self._encode([prompts[i] for i in part])
                found[part] = self._denoise(encoded, [_source(seed, i) for i in part])
                if kept is not None:
                    self._keep(kept, [digests[i] for i in part], found[part])
                if progress:
                    progress("latents", len(known) + start + len(part), len(vectors))
        finally:
            if kept is not None:
                kept.flush()
        return found

    def _keep(self, kept: FeatureStore, digests: Sequence[bytes], latents: Tensor) -> None:
        for digest, latent in zip(digests, latents.flatten(1).numpy(), strict=True):
            kept.add(digest, latent)
        if self.at_once == 1:  # on a CPU it has taken half an hour; a GPU fills a file of many
            kept.flush()

    def _digest(self, vector: Tensor, prompt: str, place: slice, seed: int, number: int) -> bytes:
        """What a latent is kept under: all that decides it besides the pipeline and its settings."""
        asked = repr([self._pipe.tokenizer(prompt).input_ids, place.start, place.stop, seed, number])
        return hashlib.blake2b(vector.numpy().tobytes() + asked.encode(), digest_size=16).digest()

    def places(self, word: str) -> slice:
        """Where the class word's tokens are in the tokens of the filled prompt (the first of which begins the text).

        Raises
        ------
        UsageError
            It is empty, runs into what is around it, or lies beyond the last token that the text encoder reads.
        """
        tokens, text, sought = self._pipe.tokenizer, self._filled(word), self._ids(word)
        before = tokens(self.prompt.partition("{}")[0], add_special_tokens=False).input_ids
        place = slice(1 + len(before), 1 + len(before) + len(sought))
        if tokens(text, truncation=True).input_ids[1:-1][: place.stop - 1] != [*before, *sought]:
            raise UsageError(
                f"{word!r} is not in the prompt {text!r} as tokens of its own, within the first "
                f"{tokens.model_max_length}: shorten it, or put spaces around the {{}} of the prompt"
            )
        return place

    def _filled(self, word: str) -> str:
        return self.prompt.replace("{}", word)

    def _ids(self, word: str) -> list[int]:
        ids: list[int] = self._pipe.tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            raise UsageError(f"the class word {word!r} is empty: each vector needs the name of its class")
        return ids

    def check_words(self, words: Sequence[str]) -> None:
        """Refuse class words for which :meth:`places` finds no place (``UsageError``)."""
        for word in words:
            self.places(word)

    def check_width(self, width: int) -> None:
        """Refuse vectors that cannot take a token's place (``UsageError``)."""
        if width != self.width:
            fitting = "vit_base_patch16_224, convnext_tiny, swin_tiny_patch4_window7_224 ..."
            raise UsageError(
                f"the outlier vectors have {width} numbers and the text encoder of {self.name} takes {self.width}: use "
                f"a detector on a backbone whose pre-logits have {self.width}"
                + (f" ({fitting})" if self.width == 768 else "")
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

    def _denoise(self, encoded: Tensor, sources: list[torch.Generator]) -> Tensor:
        nothing = self._encode([""]).expand_as(encoded)
        with quiet():
            latents: Tensor = self._pipe(
                prompt_embeds=encoded,
                negative_prompt_embeds=nothing,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                height=self.size,
                width=self.size,
                generator=sources,
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
    kept: FeatureStore | None = None,
) -> Outliers:
    """The same outliers, and what Stable Diffusion makes of the pre-logits of each in place of its class word.

    ``progress`` and ``kept`` as for :meth:`StableDiffusion.latents`.

    Raises
    ------
    UsageError
        There are no pre-logits among their columns, of another width, or a class name that is not in the prompt.
    """
    words = [outliers.classes[label] for label in outliers.labels]
    vectors = outliers.vectors[:, pre_logits_in(outliers.layout).columns]
    latents = stable.latents(stable.scale(vectors, words), words, seed, progress, kept)
    return replace(outliers, latents=latents, method="stable-diffusion")


def pre_logits_in(layout: FeatureLayout) -> Part:
    """The pre-logits of a feature layout (``UsageError`` if it has none)."""
    part = layout.pre_logits
    if part is None:
        names = ", ".join(part.name for part in layout.parts)
        raise UsageError(f"there are no pre_logits among the layers {names}: name them when you train")
    return part


def pooled(latents: Tensor) -> Tensor:
    """Latents (n, 4, h, w) -> (n, w): the mean over channels and then over height, as OAL's released code takes it."""
    return latents.mean(1).mean(1)


def _source(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, place)).generate_state(1)[0]))


@contextmanager
def _placed(tokens: nn.Embedding, vectors: Tensor, places: list[slice]) -> Iterator[None]:
    """While it lasts, row i of what the token embedding gives holds vector i at its places."""

    def swap(_: nn.Module, __: object, embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        for row, vector, place in zip(embedded, vectors.to(embedded), places, strict=True):
            row[place] = vector
        return embedded

    hook = tokens.register_forward_hook(swap)
    try:
        yield
    finally:
        hook.remove()


def _check(steps: int, guidance: float, size: int | None, prompt: str) -> None:
    if steps < 1:
        raise UsageError(f"steps must be a whole number from 1 on, not {steps}")
    if not (math.isfinite(guidance) and guidance >= 1):
        raise UsageError(f"guidance must be a number from 1 (none) on, not {guidance}")
    if size is not None and (size < _CELL or size % _CELL):
        raise UsageError(f"size must be a multiple of {_CELL} pixels, not {size}")
    if prompt.count("{}") != 1:
        raise UsageError(f"the prompt {prompt!r} must hold {{}} once, where the class word goes")
