"""Byte-level BPE as GPT-2 has it: tokenizer.json, or vocab.json beside merges.txt.

Knows the pre-tokenizers that llama.cpp has under a name of its own and refuses the others. Does not
know what any token is for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.source import FAST, Checkpoint, read_json
from edgevlm.family import Config

_DIGIT = r"\p{N}"
# How a text is cut before any merge (openai/gpt-2 encoder.py; meta-llama/llama3 tokenizer.py;
# transformers 4.57, tokenization_qwen2.py).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# DeepSeek-LLM's tokenizer.json cuts again and again: line breaks, letters of scripts with cases,
# signs, spaces at the end, Chinese and Korean, digits (llama.cpp, llama-vocab.cpp). Escaped is what
# an editor may write otherwise.
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-"
    "ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉ"
    "ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK = (
    "[\r\n]",
    _DEEPSEEK_LETTERS,
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥\u0800-一가-\ud7ff]+",
    _DIGIT,
)
# (patterns in turn, whether a piece that is in the vocabulary is taken whole) -> llama.cpp's name.
_PRE = {
    ((_GPT2,), False): "gpt-2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    (_DEEPSEEK, False): "deepseek-llm",
    ((r"[\r\n]", *_DEEPSEEK[1:]), False): "deepseek-llm",
}
# Names under which llama.cpp keeps digits together that _DIGIT cuts apart.
_TOGETHER = ("deepseek-llm",)
_JOINED = re.compile("[0-9] [0-9]")
_NFC = {"type": "NFC"}
_NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})
# What no text in UTF-8 has in it.
_NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))
# llama.cpp's names for tokenizers that share GPT-2's pattern, by transformers' class, and for what
# a pair of files means to a class.
_CLASSES = {"GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "phi-2"}
_PAIRS = {**_CLASSES, "Qwen2Tokenizer": "qwen2"}


@dataclass(frozen=True)
class BytePairs:
    """Pieces by id in GPT-2's alphabet of bytes, merges "left right" in their order.

    `pre` is llama.cpp's name of what cuts a text before them.
    """

    pieces: Mapping[int, str]
    merges: tuple[str, ...]
    pre: str


def is_byte_level(checkpoint: Checkpoint) -> bool:
    """True if a checkpoint's tokenizer is a byte-level one."""
    if (checkpoint.folder / "tokenizer.model").is_file():
        return False
    fast = checkpoint.configs.get(FAST)
    return fast is None or not fast.get("model", {}).get("byte_fallback")


def normalization(checkpoint: Checkpoint, kind: str) -> Literal["", "NFC"]:
    """The form of Unicode that a text is brought to before anything else, "" for none; `kind` as
    for `read_byte_pairs`.
    """
    if FAST in checkpoint.configs:
        return "NFC" if checkpoint.configs[FAST].get("normalizer") == _NFC else ""
    return "NFC" if kind.removesuffix("Fast") == "Qwen2Tokenizer" else ""


def read_byte_pairs(checkpoint: Checkpoint, kind: str, *, own: bool = False) -> BytePairs:
    """Reads the tokenizer; `kind` is the `tokenizer_class` that its config states, "" for none.
    With `own` its tokenizer.json goes into the bundle, and cuts texts as it likes.

    Raises SourceError.
    """
    folder, kind = checkpoint.folder, kind.removesuffix("Fast")
    if FAST in checkpoint.configs:
        path = folder / FAST
        found = _from_json(path, checkpoint.configs[FAST], kind, own)
    else:
        path = folder / "vocab.json"
        found = _from_pair(path, folder / "merges.txt", kind or "GPT2Tokenizer")
    missing = set(_alphabet()) - set(found.pieces.values()) - set(map(chr, _NEVER))
    if missing:
        raise SourceError(f"{path}: lacks {len(missing)} of the 256 bytes; download it again")
    for merge in found.merges:
        if merge.count(" ") != 1:
            raise SourceError(f"{path}: invalid merge {merge!r}; download it again")
        if found.pre in _TOGETHER and _JOINED.search(merge):
            raise SourceError(f"{path}: the merge {merge!r} joins digits, which are cut before it")
    return found


def _from_json(path: Path, data: Config, kind: str, own: bool) -> BytePairs:
    model = data.get("model", {})
    odd = [k for k in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if model.get("type") != "BPE" or odd:
        raise SourceError(
            f"{path}: is not a BPE tokenizer of bytes or of pieces with byte fallback"
        )
    if not own and data.get("normalizer") not in (*_NO_NORMALIZER, _NFC):
        raise SourceError(f"{path}: has a normalizer that is not known; add tokenizer.model")
    pre = _PRE.get((_patterns(data.get("pre_tokenizer")), bool(model.get("ignore_merges"))))
    if pre is None and own:
        pre = "gpt-2"  # llama.cpp spells tokens by it, and is given no texts
    if pre is None:
        raise SourceError(
            f"{path}: has a pre-tokenizer that is none of {', '.join(dict.fromkeys(_PRE.values()))}"
        )
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    pieces = {i: text for text, i in model["vocab"].items()}
    return BytePairs(pieces, merges, _CLASSES.get(kind, pre) if pre == "gpt-2" else pre)


def _patterns(pre_tokenizer: Any) -> tuple[str, ...]:
    """The patterns by which a pre-tokenizer cuts in turn, () for one that does anything else."""
    step = pre_tokenizer or {}
    *splits, last = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return ()
    found = []
    for split in splits:
        plain = split.get("behavior") == "Isolated" and not split.get("invert")
        if split.get("type") == "Digits" and split.get("individual_digits"):
            found.append(_DIGIT)
        elif split.get("type") == "Split" and plain:
            found.append(str(split["pattern"].get("Regex", "")))
        else:
            return ()
    return (*found, _GPT2) if last.get("use_regex", True) else tuple(found)


def _from_pair(path: Path, merges: Path, kind: str) -> BytePairs:
    if kind not in _PAIRS:
        known = ", ".join(_PAIRS)
        raise SourceError(f"{path}: belongs to a {kind}, none of {known}; add tokenizer.json")
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as e:
        raise SourceError(f"{merges}: cannot be read ({e}); download it again") from None
    ranks = tuple(line for line in lines if line and not line.startswith("#version"))
    return BytePairs({i: text for text, i in read_json(path).items()}, ranks, _PAIRS[kind])


def _alphabet() -> list[str]:
    """GPT-2's 256 characters for bytes: printable ones stand for themselves, the rest follow."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in sorted(printable)] + [chr(0x100 + i) for i in range(len(others))]
