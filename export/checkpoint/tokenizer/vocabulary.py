"""A checkpoint's tokenizer as llama.cpp's vocabulary: pieces, their types, scores or merges.

Knows SentencePiece's tokenizer.model and the BPE tokenizer.json that transformers makes of it;
byte-level BPE is byte_pairs.py's business. Does not know what any token is for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.source import FAST, TOKENIZERS, Checkpoint
from edgevlm.export.checkpoint.tokenizer.byte_pairs import BytePairs, is_byte_level, read_byte_pairs
from edgevlm.export.checkpoint.tokenizer.checks import (
    SPACE,
    check_attributes,
    check_merges,
    check_overlaps,
    untyped,
)
from edgevlm.export.checkpoint.tokenizer.side_files import (
    CONFIG,
    ROLES,
    entries,
    role_texts,
    special_texts,
)
from edgevlm.family import Config, Model

# SentencePiece's numbers, which are llama.cpp's as well.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Pieces that InternLM2 keeps for tokens to come, whose texts no text of a user's is merged to.
_SPARE = re.compile(r"\[UNUSED_TOKEN_\d+\]")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp merges the pair of the highest score first; an unused row must never be one.
_UNUSED_SCORE = -1e9
_FIRST_SCORE = 1.0


@dataclass(slots=True)
class Token:
    """One row of the vocabulary."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Vocabulary:
    """All rows by id, and the ids of "bos", "eos", "unk" and "pad" where the tokenizer has them.

    With `merges` ("left right", the first one first) it is a byte-level BPE, cut beforehand as
    llama.cpp does under the name `pre`; without any it is SentencePiece's, merged by scores.
    """

    tokens: tuple[Token, ...]
    specials: Mapping[str, int]
    merges: tuple[str, ...] = ()
    pre: str = "default"


def read_vocabulary(checkpoint: Checkpoint, model: Model) -> Vocabulary:
    """The vocabulary in `model.decoder.n_vocab` rows; raises SourceError."""
    path = _file(checkpoint.folder)
    added = entries(checkpoint)
    own = model.own_tokenizer
    pairs = _byte_pairs(checkpoint, model.prefix, own) if is_byte_level(checkpoint) else None
    if pairs:
        table = {i: Token(text, 0.0, NORMAL) for i, text in pairs.pieces.items()}
    else:
        texts = {e.text for e in added.values()}
        if path.suffix == ".model":
            tokens = _sentencepiece(path, model)
        else:
            tokens = _bpe(path, checkpoint.configs[FAST], model, texts)
        table = dict(enumerate(tokens))
        if sum(token.type == BYTE for token in table.values()) != 256:
            raise SourceError(
                f"{path}: lacks pieces for bytes, without which llama.cpp cannot read every text; "
                "only tokenizers with byte fallback are known"
            )
    for i, e in added.items():
        _add(table, i, e.text, CONTROL if e.special else USER_DEFINED)
    for i, text in model.markers.items():
        _add(table, i, text, CONTROL)
    _mark_specials(table, checkpoint)
    _mark_whole(table, model.whole_tokens, path)
    typed = {i: t.text for i, t in table.items() if t.type == USER_DEFINED}
    where = str(checkpoint.folder)
    spaces = "" if pairs else "again" if model.prefix and not model.prefix_once else "kept"
    if not own:
        check_attributes(added, typed, where, spaces=spaces)
        check_overlaps(added, typed, where)
    rows = model.decoder.n_vocab
    if max(table) >= rows:
        raise SourceError(f"{path}: has {max(table) + 1} tokens, config.json says {rows}")
    filled = [table.get(i) or Token(f"[unused-{i}]", _UNUSED_SCORE, UNUSED) for i in range(rows)]
    filled = [_without_nul(i, token) for i, token in enumerate(filled)]
    _refuse_twins(filled, path)
    specials = _specials(filled, checkpoint, path)
    if pairs:
        hidden = _hidden(filled, path, merges=False)
        return Vocabulary(tuple(hidden), specials, pairs.merges, pairs.pre)
    return Vocabulary(tuple(map(_as_typed, _hidden(filled, path, merges=True))), specials)


def _without_nul(i: int, token: Token) -> Token:
    """A token that holds a NUL, as one of InternLM2's does, under a text that llama.cpp can hold;
    no text that is asked may have one.
    """
    return token if "\0" not in token.text else Token(f"[nul-{i}]", _UNUSED_SCORE, UNUSED)


def _file(folder: Path) -> Path:
    """The first tokenizer file of a folder that has one."""
    return next(folder / name for name in TOKENIZERS if (folder / name).is_file())


def _byte_pairs(checkpoint: Checkpoint, prefix: str, own: bool) -> BytePairs:
    kind = str(checkpoint.configs.get(CONFIG, {}).get("tokenizer_class") or "")
    pairs = read_byte_pairs(checkpoint, kind, own=own)
    if prefix:
        raise SourceError(f"{checkpoint.folder}: its tokenizer has bytes where pieces are expected")
    return pairs


def _add(table: dict[int, Token], i: int, text: str, kind: int) -> None:
    """Makes token `i` what the files say of it beyond the tokenizer itself."""
    token = table.get(i)
    if token is None:
        table[i] = Token(text, 0.0, kind)
    elif token.text == text and token.type in (NORMAL, USER_DEFINED):
        token.type = kind
    elif kind == CONTROL and token.type == NORMAL and _SPARE.fullmatch(token.text):
        table[i] = Token(text, 0.0, kind)


def _mark_specials(table: dict[int, Token], checkpoint: Checkpoint) -> None:
    """Marks tokens with a role as special: they are so in transformers, listed or not, and the
    usual signs of roles are no text to SentencePiece.
    """
    special = special_texts(checkpoint).union(*ROLES.values())
    for token in table.values():
        if token.text in special and token.type in (NORMAL, USER_DEFINED):
            token.type = CONTROL


def _refuse_twins(tokens: list[Token], path: Path) -> None:
    """llama.cpp aborts on two rows of one text."""
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if seen.setdefault(token.text, i) != i:
            raise SourceError(f"{path}: tokens {seen[token.text]} and {i} are both {token.text!r}")


def _mark_whole(table: dict[int, Token], texts: tuple[str, ...], path: Path) -> None:
    ids = {t.text: i for i, t in table.items()}
    missing = [t for t in texts if t not in ids]
    if missing and len(missing) < len(texts):
        raise SourceError(f"{path}: lacks {missing[0]} and {len(missing) - 1} more of its tokens")
    for text in texts if not missing else ():
        table[ids[text]].type = USER_DEFINED


def _as_typed(token: Token) -> Token:
    """Runs of spaces are found both ways that transformers finds them: where SentencePiece's sign
    itself is typed, as user-defined tokens, and of spaces as what is merged before all else.
    """
    if token.type == USER_DEFINED and not token.text.strip(SPACE):
        return Token(token.text, _FIRST_SCORE, token.type)
    return token


def _hidden(tokens: list[Token], path: Path, *, merges: bool) -> Iterator[Token]:
    """The tokens, those of control with texts that no user's text can become."""
    texts = {t.text for t in tokens}
    for token in tokens:
        text = token.text
        if token.type in (CONTROL, UNKNOWN, UNUSED):
            text = untyped(text, texts, merges=merges)
        elif token.type == BYTE and untyped(text, texts, merges=merges) != text:
            raise SourceError(f"{path}: llama.cpp would make the byte {text} of text that reads so")
        yield Token(text, token.score, token.type)


def _sentencepiece(path: Path, model: Model) -> list[Token]:
    from sentencepiece import sentencepiece_model_pb2

    # Its classes are made when the module runs; type checkers see none of them.
    pb2: Any = sentencepiece_model_pb2
    proto = pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as e:
        # protobuf's DecodeError has no common place in its releases.
        raise SourceError(
            f"{path}: is not a SentencePiece model ({e}); download it again"
        ) from None
    if not all(isinstance(p.piece, str) and math.isfinite(p.score) for p in proto.pieces):
        raise SourceError(f"{path}: has pieces that are not text; download it again")
    if not proto.pieces:
        raise SourceError(f"{path}: is not a SentencePiece model (it is empty); download it again")
    if proto.trainer_spec.model_type != 2:
        raise SourceError(f"{path}: is not a BPE model, the only kind this exporter knows")
    spec = proto.normalizer_spec
    adds_space = bool(spec.add_dummy_prefix)
    odd = spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces
    odd = odd or proto.trainer_spec.treat_whitespace_as_suffix
    if odd or adds_space != (model.prefix == " "):
        raise SourceError(f"{path}: normalises its text, which llama.cpp cannot do for this model")
    return [Token(p.piece, p.score, p.type) for p in proto.pieces]


def _bpe(path: Path, data: Config, model: Model, added: Collection[str]) -> list[Token]:
    bpe = data.get("model", {})
    if bpe.get("type") != "BPE":
        raise SourceError(f"{path}: is not a BPE tokenizer; add tokenizer.model")
    if not _replaces_spaces(data, model):
        raise SourceError(f"{path}: has a normalizer that is not known; add tokenizer.model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if bpe.get(key):
            raise SourceError(
                f"{path}: its {key} is {bpe[key]!r}; only tokenizers without it are known"
            )
    vocab = bpe["vocab"]
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise SourceError(f"{path}: its token ids have gaps or repeat; add tokenizer.model")
    scores = _merge_scores(bpe["merges"])
    apart = {*added, *model.whole_tokens, bpe.get("unk_token")}
    check_merges({t: i for t, i in vocab.items() if t not in apart}, scores, str(path))
    # Any merged piece outranks one that no merge makes.
    floor = -float(len(bpe["merges"]))
    tokens = [
        Token(text, scores.get(text, floor - i), BYTE if _BYTE.fullmatch(text) else NORMAL)
        for text, i in sorted(vocab.items(), key=lambda item: item[1])
    ]
    for text, i in vocab.items():
        # transformers renames the byte of the tab so that runs of tabs can be merged.
        if text == "\t" and "<0x09>" not in vocab:
            tokens[i] = Token("<0x09>", tokens[i].score, BYTE)
        elif text == bpe.get("unk_token"):
            tokens[i].type = UNKNOWN
    return tokens


def _replaces_spaces(data: Config, model: Model) -> bool:
    """True if spaces become the space piece, with one before texts where `model` says so."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, cut = data.get("normalizer"), data.get("pre_tokenizer")
    never = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
    if not model.prefix and cut == never:
        return normalizer is None
    if not model.prefix:
        # No space is left to cut at.
        behind = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
        return bool(normalizer == replace) and cut in (None, behind | {"invert": False})
    if model.prefix_once:
        first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first"}
        return normalizer is None and bool(cut == first | {"split": False})
    return cut is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}


def _merge_scores(merges: list[Any]) -> dict[str, float]:
    """Piece -> minus the rank of the first merge that makes it: llama.cpp's order of merging."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault("".join(pair), -float(rank))
    return scores


def _specials(tokens: list[Token], checkpoint: Checkpoint, path: Path) -> dict[str, int]:
    ids = {t.text: i for i, t in enumerate(tokens) if t.type in (CONTROL, UNKNOWN)}
    found: dict[str, int] = {}
    for role in ROLES:
        for text in role_texts(checkpoint, role):
            if text in ids:
                found.setdefault(role, ids[text])
    for name in ("bos", "eos"):
        if name not in found:
            raise SourceError(f"{path}: has no <{name}> token; add tokenizer_config.json")
    return found
