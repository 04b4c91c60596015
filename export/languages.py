"""The tokens that texts in some languages need.

Words and their frequencies are wordfreq's (https://github.com/rspeer/wordfreq), of subtitles,
Wikipedia, news, books and the web before machines wrote there. The model's own tokenizer cuts them
in the ways in which words stand in a text. docs/languages.md has the rules and what they cost.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgevlm.bundle import INPUT, record
from edgevlm.errors import EngineMissing, ExportError
from edgevlm.export.checkpoint.tokenizer.vocabulary import NORMAL, UNUSED
from edgevlm.export.gguf import tools
from edgevlm.export.gguf.decoder import FILE, embedding_location
from edgevlm.export.gguf.trim import Ids, trim
from edgevlm.gguf_file import opened
from edgevlm.manifest import Manifest
from edgevlm.progress import Report, Stage

# A token stays that is expected once in so many tokens of a language, or more often.
_ONCE_IN = 10_000_000
# What stands before a word, its letters, and in which share of all places it does. Estimates: the
# shares only matter to words near the bound above.
_FORMS: tuple[tuple[str, Callable[[str], str], float], ...] = (
    (" ", str, 0.8),
    (" ", str.capitalize, 0.06),
    (" ", str.upper, 0.005),
    ("", str, 0.06),
    ("", str.capitalize, 0.03),
    ("", str.upper, 0.005),
    # Many a byte-level tokenizer joins a sign to the word behind it.
    *((sign, str, 0.004) for sign in "\"'(-_/.["),
    *((sign, str.capitalize, 0.002) for sign in "\"'(-_/.["),
)
# Languages whose words follow each other without a space.
_JOINED = ("ja", "zh")
# Letters of a language have this share of its letters; pieces of so many letters of one stay, so
# that names and rare words are no longer than they have to be.
_LETTER_SHARE = 1e-4
_SHORT = 3


def checked(names: str | Sequence[str]) -> tuple[str, ...]:
    """Codes of languages, "en,fr" or one by one; each once, in their order.

    Raises ExportError for one that is not known, EngineMissing without wordfreq.
    """
    if not names:
        return ()
    given = names.split(",") if isinstance(names, str) else names
    codes = tuple(dict.fromkeys(name.strip().lower() for name in given))
    if not find_spec("wordfreq"):
        raise EngineMissing(
            "the words of languages are wordfreq's, which is missing",
            'pip install "edgevlm[languages]" or export without --languages',
        )
    import wordfreq

    known = sorted(wordfreq.available_languages())
    for code in codes:
        if code not in known:
            raise ExportError(f"unknown language {code!r}; choose from {', '.join(known)}")
    return codes


# Why a model cannot be trimmed whose tokenizer llama.cpp does not run.
OWN_TOKENIZER = (
    "{}: texts are counted by llama.cpp's tokenizer, and this model has its own; leave out "
    "--languages"
)


def kept(
    gguf: Path, languages: Sequence[str], needed: Iterable[int], report: Report | None = None
) -> Ids:
    """Ids of the tokens that texts in these languages need, ascending, and of the `needed` ones.

    `gguf` has the model's tokenizer; `languages` are codes that were checked. Always there are
    tokens that are no piece of text (control, bytes, locations, user-defined ones), those without a
    letter, and single characters of ASCII.
    """
    with opened(gguf) as file:
        types = file.integers("tokenizer.ggml.token_type")
    assert types is not None
    stage = Stage(report, "words", len(languages), "languages")
    texts, usage = tools.pieces(gguf), np.zeros(len(types))
    alphabets = []
    for language in languages:
        words = _words(language)
        counts = tools.usage(gguf, dict(_written(words, joined=language in _JOINED)))
        usage = np.maximum(usage, counts / counts.sum())
        alphabets.append(_Alphabet(words))
        stage.advance(1)
    keep = (types != NORMAL) & (types != UNUSED) | (usage * _ONCE_IN >= 1)
    keep[[*needed]] = True
    for i, text in enumerate(texts):
        if text and not keep[i]:  # those of no token have none
            keep[i] = _always(text) or any(alphabet.spells(text) for alphabet in alphabets)
    return np.flatnonzero(keep)


def trimmed(
    manifest: Manifest, folder: Path, languages: Sequence[str], report: Report | None
) -> Manifest:
    """The manifest of a bundle in `folder` whose decoder is trimmed to these languages."""
    answer = manifest.answer
    needed = (*answer.stop_tokens, *answer.penalized)
    ids = kept(folder / FILE, languages, needed, report)
    decoder = replace(manifest.decoder, languages=tuple(languages))
    return cut(replace(manifest, decoder=decoder), folder, ids, report)


def cut(manifest: Manifest, folder: Path, ids: Ids, report: Report | None) -> Manifest:
    """The manifest of a bundle in `folder` whose decoder is trimmed to the tokens of those ids."""
    n = trim(folder, ids, report)
    files = tuple(record(folder / name) for name in (FILE, INPUT))
    part = replace(manifest.components["decoder"], files=files)
    return replace(
        manifest,
        components={**manifest.components, "decoder": part},
        decoder=replace(manifest.decoder, n_output=n),
        token_embedding=embedding_location(folder / INPUT),
    )


def _words(language: str) -> Mapping[str, float]:
    import wordfreq

    return wordfreq.get_frequency_dict(language, "best")


def _written(words: Mapping[str, float], *, joined: bool) -> Iterator[tuple[str, float]]:
    """Words as they stand in texts, and how often."""
    found: defaultdict[str, float] = defaultdict(float)
    for before, letters, share in _FORMS:
        if joined:
            before = {" ": "", "": " "}.get(before, before)
        for word, often in words.items():
            if often * share * _ONCE_IN >= 1:  # rarer ones change little and take long
                found[before + letters(word)] += often * share
    yield from found.items()


def _always(text: str) -> bool:
    return len(text.removeprefix(" ")) == 1 and text.isascii() or not any(map(_letter, text))


def _letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"


class _Alphabet:
    """The letters of a language's words."""

    def __init__(self, words: Mapping[str, float]) -> None:
        counts: defaultdict[str, float] = defaultdict(float)
        for word, often in words.items():
            for character in filter(_letter, word):
                counts[character] += often
        self._all = set(counts)
        least = _LETTER_SHARE * sum(counts.values())
        self._common = {character for character, often in counts.items() if often >= least}

    def spells(self, text: str) -> bool:
        """True for a letter of the language, and for a few of its common ones."""
        letters = text.removeprefix(" ").lower()
        if len(letters) == 1:
            return letters in self._all
        return len(letters) <= _SHORT and self._common.issuperset(letters)
