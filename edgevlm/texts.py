"""Texts -> token ids, by the tokenizer that lies in the bundle of a dual encoder, or of a model
whose way to cut texts llama.cpp does not have.

The packages tokenizers and sentencepiece do the work; each is loaded with the first tokenizer of
its kind.
"""

from __future__ import annotations

import html
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleCorrupt, PromptError
from edgevlm.specs import Clean, TextSpec

Ids = npt.NDArray[np.int64]

_SIGN = "\u2581"
_SIGNS = re.compile(f"({_SIGN}{{2,31}})")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What SiglipTokenizer puts before a text, so that SentencePiece leaves the space that follows it.
_BEFORE = "<unk>"


class TextTokens:
    """The tokenizer of a bundle: texts -> ids int64 [n, tokens].

    Raises BundleCorrupt for a file that is not a tokenizer. A text never becomes a special token.
    """

    def __init__(self, path: Path, spec: TextSpec) -> None:
        self.spec = spec
        self._ids = json_ids(path) if path.suffix == ".json" else _spiece(path, spec.clean)

    def __call__(self, texts: Sequence[str]) -> Ids:
        """The ids of texts; those of a tower that reads as far as there is text are as long as the
        longest of them, filled up with zeros, which it does not see. Raises PromptError.
        """
        spec = self.spec
        rows = [self._row(text) for text in texts]
        longest = max(map(len, rows), default=0)
        fill = 0 if spec.pad is None else spec.pad
        ids = np.full((len(rows), longest if spec.pad is None else spec.tokens), fill, np.int64)
        for row, given in zip(ids, rows, strict=True):
            start = len(row) - len(given) if spec.pad_side == "left" else 0
            row[start : start + len(given)] = given
        return ids

    def _row(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise PromptError(f"a {type(text).__name__} is not a text; pass str")
        spec = self.spec
        try:
            ids = self._ids(cleaned(text, spec.clean))
        except UnicodeEncodeError:
            raise PromptError(f"{text!r}: is not Unicode text; decode it first") from None
        room = spec.tokens - len(spec.begin) - len(spec.end)
        return [*spec.begin, *ids[:room], *spec.end]


def cleaned(text: str, how: Clean) -> str:
    """A text as a tokenizer is given it.

    >>> cleaned("A Dog, running_fast!", "siglip")
    'a dog runningfast'
    >>> cleaned("A Dog, running_fast!", "canonicalize")
    'a dog running fast'
    """
    if how == "lower":
        return text.lower()
    if how == "siglip":
        # The sign stands before the text while it is cleaned: a blank at the start stays.
        marked = _SIGN + text.replace(_SIGN, " ").lower().translate(_PUNCTUATION)
        return re.sub(r"\s+", " ", marked).strip()[1:]
    if how == "canonicalize":
        plain = html.unescape(html.unescape(text)).strip().replace("_", " ")
        return re.sub(r"\s+", " ", plain.translate(_PUNCTUATION).lower()).strip()
    return text


def json_ids(path: Path) -> Callable[[str], list[int]]:
    """A tokenizer.json as a function, text -> ids without any around them; raises BundleCorrupt."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(path))
    except Exception as e:  # the package raises Exception itself
        raise BundleCorrupt(path, f"is not a tokenizer ({e})") from None
    found.no_padding()
    found.no_truncation()
    found.encode_special_tokens = True

    def ids(text: str) -> list[int]:
        text.encode()  # of half a surrogate pair the package says nothing that helps
        return list(found.encode(text, add_special_tokens=False).ids)

    return ids


def _spiece(path: Path, clean: Clean) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    found: Any = SentencePieceProcessor()
    try:
        found.Load(str(path))
    except (OSError, RuntimeError) as e:
        raise BundleCorrupt(path, f"is not a tokenizer ({e})") from None
    if clean != "siglip":
        return lambda text: [
            i
            for part in _SIGNS.split(text)
            # Signs that were typed are tokens of their own to the fast tokenizer.
            for i in ([found.PieceToId(part)] if _SIGNS.match(part) else found.EncodeAsIds(part))
        ]
    n_before = len(found.EncodeAsIds(_BEFORE))

    def ids(text: str) -> list[int]:
        return list(found.EncodeAsIds(_BEFORE + _SIGN + text))[n_before:]

    return ids
