"""A dual encoder's tokenizer, from the files of its checkpoint to the one file of a bundle.

Knows tokenizer.json, CLIP's vocab.json with merges.txt, and SentencePiece's models; says which
tokens stand around a text and behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.bundle import SPIECE, TOKENIZER
from edgevlm.dual import TOKENIZER_CONFIG
from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.source import FAST, read_json
from edgevlm.family import Config
from edgevlm.specs import TextSpec

SPECIAL = "special_tokens_map.json"
_SPIECES = ("spiece.model", "tokenizer.model")
_VOCAB, _MERGES = "vocab.json", "merges.txt"
# CLIP's own split and number of merges (simple_tokenizer.py).
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MOST_MERGES = 49152 - 256 - 2
_WORD_END = "</w>"


@dataclass(frozen=True)
class TextFile:
    """A tokenizer as a bundle has it: its file's name and bytes, the spec of its texts, the size of
    its vocabulary, and the checkpoint's files that say so.
    """

    name: str
    data: bytes
    spec: TextSpec
    size: int
    files: tuple[Path, ...]

    def write(self, folder: Path) -> Path:
        """Writes the file into a bundle's folder."""
        path = folder / self.name
        path.write_bytes(self.data)
        return path


def read_texts(folder: Path, configs: Mapping[str, Config], spec: TextSpec) -> TextFile:
    """The tokenizer of a checkpoint for texts of `spec`, which gets the tokens around a text; the
    tower of a SigLIP reads padding. Raises SourceError.
    """
    side = {**configs.get(SPECIAL, {}), **configs.get(TOKENIZER_CONFIG, {})}
    said = tuple(folder / n for n in (TOKENIZER_CONFIG, SPECIAL) if n in configs)
    order = (*_SPIECES, FAST) if spec.clean == "siglip" else (FAST, *_SPIECES)
    for name in order:
        path = folder / name
        if path.is_file():
            read = _read_json if name == FAST else _read_spiece
            return _whole(read(path, side, spec), path, said)
    if all((folder / name).is_file() for name in (_VOCAB, _MERGES)):
        made = json.dumps(_clip(folder, side), ensure_ascii=False).encode()
        found = _from_json(folder / _VOCAB, made, side, spec)
        return _whole(found, folder / _VOCAB, (folder / _MERGES, *said))
    raise SourceError(
        f"{folder}: has no {FAST}, no {_SPIECES[0]} and no {_VOCAB} with {_MERGES}; copy the "
        "tokenizer from the model's page"
    )


def _whole(found: TextFile, path: Path, said: tuple[Path, ...]) -> TextFile:
    around = len(found.spec.begin) + len(found.spec.end)
    if around >= found.spec.tokens:
        raise SourceError(f"{path}: puts {around} tokens around a text of {found.spec.tokens}")
    return replace(found, files=(path, *said))


def _read_json(path: Path, side: Config, spec: TextSpec) -> TextFile:
    return _from_json(path, path.read_bytes(), side, spec)


def _from_json(path: Path, data: bytes, side: Config, spec: TextSpec) -> TextFile:
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(data.decode())
    except Exception as e:  # the package raises Exception itself
        raise SourceError(f"{path}: is not a tokenizer ({e}); download it again") from None
    found.no_padding()
    found.no_truncation()
    if _is_gemma(side):
        begin, end = _gemma(side, path, found.token_to_id)
    else:
        begin, end = around(found)
    spec = _padded(replace(spec, begin=begin, end=end), side, path, found.token_to_id)
    return TextFile(TOKENIZER, data, spec, found.get_vocab_size(), ())


def around(found: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a tokenizer puts before and behind a text."""
    plain = found.encode("a", add_special_tokens=False).ids
    whole = found.encode("a").ids
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            return tuple(whole[:i]), tuple(whole[i + len(plain) :])
    return (), ()


def _gemma(side: Config, path: Path, id_of: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Gemma's tokenizers go by their settings, whatever the file says (GemmaTokenizerFast)."""
    begin = (
        (_id(side, "bos_token", "<bos>", path, id_of),) if side.get("add_bos_token", True) else ()
    )
    end = (_id(side, "eos_token", "<eos>", path, id_of),) if side.get("add_eos_token") else ()
    return begin, end


def _padded(spec: TextSpec, side: Config, path: Path, id_of: Any) -> TextSpec:
    """The spec with the token that fills a text up, for a tower that sees it, and on which side."""
    if not spec.sigmoid:
        return spec
    # What the classes do where their files do not say: SiglipTokenizer, GemmaTokenizerFast.
    default = "left" if _is_gemma(side) else "right"
    where = side.get("padding_side", default)
    if where not in ("left", "right"):
        raise SourceError(f"{path.parent / TOKENIZER_CONFIG}: padding_side is {where!r}")
    if side.get("pad_token") is None and spec.clean == "siglip" and spec.end:
        return replace(spec, pad=spec.end[-1], pad_side=where)
    return replace(spec, pad=_id(side, "pad_token", "<pad>", path, id_of), pad_side=where)


def _is_gemma(side: Config) -> bool:
    return str(side.get("tokenizer_class") or "").startswith("Gemma")


def _id(side: Config, role: str, default: str, path: Path, id_of: Any) -> int:
    said = side.get(role)
    text = said.get("content") if isinstance(said, Mapping) else said
    found = id_of(text or default)
    if found is None:
        raise SourceError(f"{path}: lacks {text or default}, the {role}; download it again")
    return int(found)


def _read_spiece(path: Path, side: Config, spec: TextSpec) -> TextFile:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's kinds differ between its versions
        raise SourceError(f"{path}: is not a SentencePiece model; download it again") from None
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    begin: tuple[int, ...] = ()
    end: tuple[int, ...]
    if spec.clean == "siglip":
        model.normalizer_spec.add_dummy_prefix = False
        end = (_id(side, "eos_token", "</s>", path, ids.get),)
    else:
        begin, end = _gemma(side, path, ids.get)
    spec = _padded(replace(spec, begin=begin, end=end), side, path, ids.get)
    return TextFile(SPIECE, model.SerializeToString(), spec, len(model.pieces), ())


def _clip(folder: Path, side: Config) -> dict[str, Any]:
    """CLIP's vocabulary and merges as a tokenizer.json, as CLIPTokenizerFast reads them."""
    vocab = read_json(folder / _VOCAB)
    # The first line is a version.
    lines = (folder / _MERGES).read_text(encoding="utf-8").strip().split("\n")[1:]
    merges = [line.split() for line in lines[:_MOST_MERGES]]
    if wrong := next((m for m in merges if len(m) != 2), None):
        raise SourceError(
            f"{folder / _MERGES}: invalid merge {' '.join(wrong)!r}; download it again"
        )
    begin = _text(side, "bos_token", "<|startoftext|>")
    end = _text(side, "eos_token", "<|endoftext|>")
    for text in (begin, end):
        if text not in vocab:
            raise SourceError(f"{folder / _VOCAB}: lacks {text}; download it again")
    special = {"special": True, "lstrip": False, "rstrip": False, "single_word": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocab[text], "content": text, "normalized": False, **special}
            for text in dict.fromkeys((begin, end))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _SPLIT},
                    "behavior": "Removed",
                    "invert": True,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [end, vocab[end]],
            "cls": [begin, vocab[begin]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _text(side, "unk_token", "<|endoftext|>"),
            "continuing_subword_prefix": "",
            "end_of_word_suffix": _WORD_END,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }  # fmt: skip


def _text(side: Config, role: str, default: str) -> str:
    said = side.get(role)
    text = said.get("content") if isinstance(said, Mapping) else said
    return str(text or default)
