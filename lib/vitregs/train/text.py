"""Captions as numbers: a word-level vocabulary that is made from the sentences it must know."""

from collections.abc import Iterable

import torch
from torch import Tensor

from vitregs.data.scenes import BACKGROUNDS, COLOUR_NAMES, SHAPE_NAMES, TEXTURES
from vitregs.errors import InputError

PAD, START, UNKNOWN = 0, 1, 2
SCENE_VOCABULARY = (
    *COLOUR_NAMES,
    *SHAPE_NAMES,
    *TEXTURES,
    *BACKGROUNDS,
    "cloudy",
    "checkered",
    "graded",
    "in",
    "front",
    "of",
)


class Vocabulary:
    """Words with numbers; the sign for the end has the largest, which is where open_clip's text tower reads."""

    def __init__(self, sentences: Iterable[str], context: int = 48) -> None:
        """Collect the words of sentences, and those that scenes use: sentences, longest sentence in tokens."""
        words = sorted({w for s in sentences for w in s.lower().split()} | {*SCENE_VOCABULARY, "a", "background"})
        self.number = {word: i for i, word in enumerate(words, start=UNKNOWN + 1)}
        self.end = UNKNOWN + 1 + len(words)
        self.context = context

    def __len__(self) -> int:
        return self.end + 1

    def encode(self, sentences: list[str]) -> Tensor:
        """Number the words: n sentences → (n, context) int64, cut and padded. Raises InputError for an empty sentence."""
        out = torch.full((len(sentences), self.context), PAD)
        for row, sentence in zip(out, sentences, strict=True):
            words = [self.number.get(w, UNKNOWN) for w in sentence.lower().split()]
            if not words:
                raise InputError("captions are missing: clip needs a sentence for every image")
            line = [START, *words[: self.context - 2], self.end]
            row[: len(line)] = torch.tensor(line)
        return out
