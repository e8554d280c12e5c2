"""Class words in the prompt of Stable Diffusion.

In: a prompt with a ``{}`` and the name of a class. Out: the positions of the name's tokens, and an embedding of the
prompt in which a vector replaces them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..exceptions import UsageError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that has not exactly one ``{}`` (``UsageError``)."""
    if prompt.count("{}") != 1:
        raise UsageError(f"the prompt {prompt!r} must hold {{}} once, where the class word goes", argument="prompt")


def filled(prompt: str, word: str) -> str:
    """The prompt with a class word in place of its ``{}``."""
    return prompt.replace("{}", word)


def word_ids(tokenizer: CLIPTokenizer, word: str) -> list[int]:
    """The tokens of a class word (``UsageError`` if it is empty)."""
    ids: list[int] = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise UsageError(f"the class word {word!r} is empty: each vector needs the name of its class")
    return ids


def token_positions(tokenizer: CLIPTokenizer, prompt: str, word: str) -> slice:
    """Positions of the class word's tokens in the filled prompt; position 0 is the start token.

    Parameters
    ----------
    tokenizer : CLIPTokenizer
    prompt : str
        With ``{}`` where the class word goes.
    word : str

    Returns
    -------
    slice

    Raises
    ------
    UsageError
        The word is empty, merges with its surroundings, or lies beyond the last token that the text encoder reads.
    """
    text = filled(prompt, word)
    ids = word_ids(tokenizer, word)
    ids_before = tokenizer(prompt.partition("{}")[0], add_special_tokens=False).input_ids
    positions = slice(1 + len(ids_before), 1 + len(ids_before) + len(ids))

    prompt_ids = tokenizer(text, truncation=True).input_ids[1:-1]
    if prompt_ids[: positions.stop - 1] != [*ids_before, *ids]:
        raise UsageError(
            f"{word!r} is not in the prompt {text!r} as tokens of its own, within the first "
            f"{tokenizer.model_max_length}: shorten it, or put spaces around the {{}} of the prompt",
            argument="prompt",
        )
    return positions


@contextmanager
def replaced_tokens(embedding: nn.Embedding, vectors: Tensor, positions: Sequence[slice]) -> Iterator[None]:
    """Within the block, the embedding of text i has vector i at its positions.

    Parameters
    ----------
    embedding : nn.Embedding
        Of tokens; its weights are not changed.
    vectors : Tensor of shape (B, width)
    positions : sequence of slice
        One for each vector.

    Examples
    --------
    >>> import torch
    >>> embedding = nn.Embedding(10, 2)
    >>> with replaced_tokens(embedding, torch.tensor([[5.0, 6.0]]), [slice(1, 2)]):
    ...     embedding(torch.tensor([[3, 4, 7]]))[0, 1].tolist()
    [5.0, 6.0]
    """

    def replace_tokens(_: nn.Module, __: object, embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        for i, (vector, text_positions) in enumerate(zip(vectors.to(embedded), positions, strict=True)):
            embedded[i, text_positions] = vector
        return embedded

    handle = embedding.register_forward_hook(replace_tokens)
    try:
        yield
    finally:
        handle.remove()
