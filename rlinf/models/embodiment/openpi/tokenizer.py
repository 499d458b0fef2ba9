r"""Prompts as π0 and π0.5 read them: text → token numbers.

    π0           <bos> text "\n"                                  the state comes as numbers
    π0.5         <bos> "Task: text, State: 12 200 …;\nAction: "   the state as 256 bins over [−1, 1]

A π0.5 that was trained without the state (openpi's `discrete_state_input=False`, as for LIBERO) reads π0's format.

    B batch, L tokens of the longest prompt, S state size
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlinf.core.errors import DataError, MissingDependency

NUM_BINS = 256
PAD = 0
PAD_TO_MULTIPLE_OF = 8
"""Batches are padded to the longest prompt, rounded up so that few lengths occur."""

WHERE = (
    "it is PaliGemma's tokenizer: gs://big_vision/paligemma_tokenizer.model, or tokenizer.model of a PaliGemma "
    "repository (`hf download google/paligemma-3b-pt-224 tokenizer.model`)"
)


_WORDS = re.compile(r"\w+|[^\w ]")


class Tokenizer(Protocol):
    """Text to token numbers.

    Attributes:
        vocab_size: one more than the largest number.
        bos: the number that begins a prompt.
    """

    vocab_size: int
    bos: int

    def encode(self, text: str) -> list[int]:
        """Numbers of a text, without beginning or end."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model in a file.

    Raises:
        DataError: the file is missing or no sentencepiece model.
        MissingDependency: the package sentencepiece is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"there is no tokenizer at {self.path}; {WHERE}")
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise MissingDependency(
                "prompts need the package sentencepiece: bash requirements/install.sh embodied --model openpi"
            ) from error
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path} is no sentencepiece model; {WHERE}") from error
        self.vocab_size, self.bos = self._processor.vocab_size(), self._processor.bos_id()
        if self.bos < 0:
            raise DataError(f"{self.path} has no token that begins a prompt; {WHERE}")

    def encode(self, text: str) -> list[int]:
        """Numbers of a text, without beginning or end."""
        return self._processor.EncodeAsIds(text)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return SentencePieceTokenizer, (self.path,)


class ByteTokenizer:
    """Bytes of UTF-8 after four reserved numbers: for models that are trained here and need no file."""

    vocab_size = 260
    bos = 2

    def encode(self, text: str) -> list[int]:
        """Numbers of a text, without beginning or end."""
        return [4 + byte for byte in text.encode()]


class WordTokenizer:
    """Words and signs, each as a number that its letters make, after four reserved ones.

    As `ByteTokenizer`, but a prompt is a fifth as long. Now and then two words have the same number.
    """

    vocab_size = 512
    bos = 2

    def encode(self, text: str) -> list[int]:
        """Numbers of a text, without beginning or end."""
        return [4 + zlib.crc32(word.encode()) % (self.vocab_size - 4) for word in _WORDS.findall(text)]


def clean(prompt: str) -> str:
    """Without white space around it, underscores and line breaks as blanks."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: Tensor) -> Tensor:
    """Normalised state → int64 of the same shape: k where it lies in [−1 + k/128, −1 + (k+1)/128); −1 below −1."""
    edges = torch.linspace(-1, 1, NUM_BINS + 1, dtype=torch.float64, device=state.device)[:-1]
    return torch.bucketize(state.double(), edges, right=True) - 1


def prompt_tokens(tokenizer: Tokenizer, prompt: str, state: Tensor | None = None) -> list[int]:
    """Token numbers of one prompt.

    Args:
        tokenizer: PaliGemma's, for published weights.
        prompt: the instruction.
        state: normalised [S], for π0.5's format; None for π0's.
    """
    text = clean(prompt)
    if state is None:
        # The line break apart: as part of the text, a tokenizer could merge it with what stands before.
        return [tokenizer.bos, *tokenizer.encode(text), *tokenizer.encode("\n")]
    bins = " ".join(map(str, state_bins(state).tolist()))
    return [tokenizer.bos, *tokenizer.encode(f"Task: {text}, State: {bins};\nAction: ")]


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], state: Tensor | None = None, *, max_len: int
) -> tuple[Tensor, Tensor]:
    """Token numbers int64 [B, L] and bool [B, L], false for padding; on the CPU.

    Args:
        tokenizer: see `prompt_tokens`.
        prompts: B instructions.
        state: normalised [B, S], for π0.5's format; None for π0's.
        max_len: longest L; the end of longer prompts is lost, as in openpi.
    """
    if state is None:
        known = {prompt: prompt_tokens(tokenizer, prompt) for prompt in set(prompts)}
        rows = [known[prompt] for prompt in prompts]
    else:
        rows = [prompt_tokens(tokenizer, *pair) for pair in zip(prompts, state.cpu(), strict=True)]
    longest = max(map(len, rows))
    length = min(max_len, -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF)
    tokens = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, numbers in enumerate(rows):
        kept = numbers[:length]
        tokens[row, : len(kept)] = torch.tensor(kept)
        mask[row, : len(kept)] = True
    return tokens, mask
