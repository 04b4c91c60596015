"""Refuses vocabularies for which llama.cpp would give other ids than transformers.

llama.cpp takes user-defined tokens out of a text first, the longest first and whatever stands
around them. SentencePiece's pieces it merges whenever two neighbours together are a token of any
kind. What that changes is refused here by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.tokenizer.side_files import Entry

SPACE = "\u2581"
# Nothing that a tokenizer was trained on has this in it, so nothing is merged into it.
_UNTYPED = "\uffff"
_CURE = "export a checkpoint whose tokenizer lacks it"
# Names of models by which llama.cpp gives attributes to tokens on its own account.
_GUESSED = re.compile(r"phi-?3|modern-bert", re.IGNORECASE)
# Texts that LLaMA-3's pattern may leave whole, and "ignore_merges" then looks up.
_WHOLE = re.compile(r"[^\w\s]?[^\W\d_]+|\d{1,3}|\s?[^\w\s]+|\s+")


def check_attributes(
    entries: Mapping[int, Entry], typed: Mapping[int, str], where: str, *, spaces: str
) -> None:
    """Refuses tokens that a text can become and that llama.cpp would find elsewhere in it.

    `typed` are those tokens. `spaces` is "" for a tokenizer that takes texts as they are, "kept"
    for one that only writes spaces with another sign, "again" for one that also puts a space before
    every text between two tokens.
    """
    for i, text in typed.items():
        attributes = entries[i].attributes if i in entries else frozenset()
        odd = [a for a in ("single_word", "lstrip", "rstrip") if a in attributes]
        if odd:
            raise _refusal(where, text, f"has {odd[0]}, which llama.cpp does not know")
        if spaces == "again" and i in entries:
            raise _refusal(where, text, "is not special, and this tokenizer puts a space behind it")
        strange = SPACE in text or (" " in text and "normalized" in attributes)
        if spaces and strange and not _is_run(text):
            raise _refusal(where, text, "has a space that can be typed in two ways")


def check_overlaps(entries: Mapping[int, Entry], typed: Mapping[int, str], where: str) -> None:
    """Refuses two tokens of which one can begin inside the other: transformers takes the one that
    begins first, those that are not normalized before the others, llama.cpp the longer one.
    """
    late = {typed[i] for i in typed if i in entries and "normalized" in entries[i].attributes}
    texts = [text for text in typed.values() if len(text) > 1 and not _is_run(text)]
    heads: dict[str, list[str]] = {}
    for text in texts:
        for n in range(1, len(text)):
            heads.setdefault(text[:n], []).append(text)
    for text in texts:
        for n in range(1, len(text)):
            for other in heads.get(text[-n:], ()):
                if len(other) >= len(text) and other != text or (other in late) != (text in late):
                    raise _refusal(where, text, f"overlaps with {other!r}")
    early = [text for text in texts if text not in late]
    for text in late:
        inside = next((other for other in early if other in text and other != text), None)
        if inside:
            raise _refusal(where, text, f"holds {inside!r}, which transformers finds first")


def check_merges(vocab: Mapping[str, int], merged: Collection[str], where: str) -> None:
    """Refuses pieces of a tokenizer.json that no merge makes and llama.cpp would make."""
    for text, i in vocab.items():
        if text not in merged and (split := _split(text, vocab)):
            raise SourceError(
                f"{where}: no merge makes token {i}, {text!r}, but llama.cpp would make it of "
                f"{split[0]!r} and {split[1]!r}; take the tokenizer's files from the model's page"
            )


def is_misread(name: str) -> bool:
    """True if llama.cpp takes a model's name for that of a tokenizer with rules of its own."""
    return bool(_GUESSED.search(name))


def untyped(text: str, vocab: Collection[str], *, merges: bool) -> str:
    """The text of a control token, in words that no user's text can become.

    It is changed only where SentencePiece's merging, or without `merges` the look-up of whole
    words, would find it in a text.
    """
    found = _split(text, vocab) if merges else _WHOLE.fullmatch(text)
    return _UNTYPED + text if found else text


def plain(text: str) -> str:
    """A token's text as its tokenizer has it, of one that went through `untyped`."""
    return text.removeprefix(_UNTYPED)


def _split(text: str, vocab: Collection[str]) -> tuple[str, str] | None:
    """Two neighbours that llama.cpp would merge into a text."""
    pairs = ((text[:n], text[n:]) for n in range(1, len(text)))
    return next((pair for pair in pairs if all(len(t) == 1 or t in vocab for t in pair)), None)


def _is_run(text: str) -> bool:
    """True for one character again and again, which every way of cutting finds."""
    return len(set(text)) == 1


def _refusal(where: str, text: str, reason: str) -> SourceError:
    return SourceError(f"{where}: added token {text!r} {reason}; {_CURE}")
