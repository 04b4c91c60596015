"""A stand-in tokenizer: every word of a model's own prompts is one token.

The real one is not ours to ship. A word that is not here takes one token for each letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from edgevlm.export.checkpoint.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Token,
    Vocabulary,
)
from edgevlm.family import Model

_SPACE = "\u2581"
# llama.cpp's multimodal library puts that token behind the tiles of an Idefics3 and aborts where
# there is none.
_BLANK_LINE = "\n\n"
_SPECIALS = ("pad", "eos", "bos", "unk")
# What people ask a model of pictures.
_COMMON = """a about an and are at can color colour describe do does doing for from has have how in
is it many me not of on or picture photo see show text that the there this to two what when where
which who why with write you answer caption detect en ocr segment person people cat dog car"""


def vocabulary(model: Model, added: Mapping[str, int]) -> Vocabulary:
    """A vocabulary of the decoder's size: special tokens, all bytes, letters, words, fillers; and
    the tokens that the original adds, by text, where it has them.
    """
    rows = model.decoder.n_vocab
    placed = {
        i: Token(f"<{name}>", 0.0, UNKNOWN if name == "unk" else CONTROL)
        for i, name in enumerate(_SPECIALS)
    }
    placed |= {i: Token(text, 0.0, CONTROL) for text, i in added.items() if i not in placed}
    free = [i for i in range(rows) if i not in placed]
    tokens = [Token(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]
    letters = (_SPACE, *map(chr, range(33, 127)), _BLANK_LINE)
    tokens += [Token(text, -1.0, NORMAL) for text in letters]
    # Merging can only reach a word whose every beginning is a token, too; longer ones come first.
    words = sorted(set(_COMMON.split()) | set(_words(model)))
    known = {token.text for token in (*placed.values(), *tokens)}
    for text in dict.fromkeys(p for word in words for p in _beginnings(word)):
        if text not in known and len(tokens) < len(free):
            tokens.append(Token(text, float(len(text)), NORMAL))
    tokens += [Token(f"{_SPACE}filler{i}", -1e9, NORMAL) for i in range(len(free) - len(tokens))]
    placed |= zip(free, tokens, strict=True)
    return Vocabulary(
        tuple(placed[i] for i in range(rows)), {name: i for i, name in enumerate(_SPECIALS)}
    )


def _words(model: Model) -> Iterator[str]:
    prompt = model.prompt
    for text in (*prompt.template, *prompt.text_template, *prompt.turn, *prompt.tasks.values()):
        yield from re.findall(r"[A-Za-z]+", re.sub(r"\{.*?\}", " ", text))


def _beginnings(word: str) -> Iterator[str]:
    """With the space in front and without it, for the first word of a text."""
    for whole in (_SPACE + word, word):
        yield from (whole[:n] for n in range(2, len(whole) + 1))
