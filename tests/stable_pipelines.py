"""Tiny pipelines of Stable Diffusion's real classes, with seeded weights and a real tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

#: Side of their latents.
SIDE = 8
#: Settings that the schedulers of all versions have.
NOISE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
#: Words that are one token; others are spelt.
LEARNED = ("cat", "image", "quality")


def write_tokenizer(folder: Path, pad: str) -> int:
    """The files of a CLIP tokenizer as they are on the hub, with all letters and three words; how many tokens."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in LEARNED:
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            merges.append(f"{left} {letter}{'</w>' if i == len(word) else ''}")
            left = merges[-1].replace(" ", "")
            tokens.append(left)
    tokens += ["<|startoftext|>", "<|endoftext|>"]

    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {
        **special,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)


def write_pipeline(folder: Path, width: int, pad: str, scheduler: Any, **network: Any) -> Path:
    """A pipeline with seeded weights, saved by diffusers, without an image decoder."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    size = write_tokenizer(folder / "words", pad)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        max_position_embeddings=77,
    )
    options = {
        "sample_size": SIDE,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": width,
    }
    unet = UNet2DConditionModel(**{**options, **network})
    with torch.no_grad():  # with initial weights, a network hardly depends on the text
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:
                weight.mul_(4)

    encoder = CLIPTextModel(text)
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "words").rename(folder / "tokenizer")
    return folder
