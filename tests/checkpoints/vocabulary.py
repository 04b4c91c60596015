"""A small Gemma-like SentencePiece tokenizer, in the files and with the quirks of the real one."""

from __future__ import annotations

import functools
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Rows that a grown tokenizer leaves for tokens that are added to it.
_ADDED_ROWS = 64
# As byte-level pieces write two newlines; llama.cpp aborts on an Idefics3 without that token.
_BLANK_LINE = "\u010a\u010a"
# Enough text for a few hundred merges in several scripts.
CORPUS = """\
answer en what is in the picture? caption en describe this image in detail
detect circle ; red circle ; blue square ; the cat ; a dog ; three people on a beach
what colour is the circle? what shape is red? how many squares are there? is there a cow?
there is a picture of the red square and the green triangle on a white background
the quick brown fox jumps over the lazy dog, and the dog does not mind at all.
a man is riding a wave on top of a surfboard while the sun is setting behind him
where is the cat standing? the cat is standing in the snow, next to the old tree.
reading the words on the sign: open, closed, sale, exit, no parking, 24 hours
numbers 0 1 2 3 4 5 6 7 8 9 10 11 12 2024 1999 3.14159 1,000,000 (50%) [x] {y} <z>
antwort de welche farbe hat der kreis? beschreibe das bild in einem satz, bitte
la légende en français : où est le chat ? le garçon mange une pomme près de la fenêtre
el niño pequeño está jugando con el balón en la playa mañana por la tarde
opiši sliku; co je na obrázku? který čtverec je červený? zażółć gęślą jaźń
что на картинке? красный круг и синий квадрат на белом фоне, кошка и собака
图片 里 有 什么 ？ 红色 的 圆形 和 蓝色 的 正方形 在 白色 背景 上
画像には何がありますか？ 赤い丸と青い四角があります。 猫は雪の中にいます。
ما هو لون الدائرة؟ هناك قطة في الصورة על השולחן יש תפוח אדום
import numpy as np ; def main(argv): return [x for x in range(10) if x % 2 == 0]
"""
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
TAGS = tuple(
    f"<{slash}{tag}>"
    for slash in ("", "/")
    for tag in ("table", "tr", "td", "h1", "h2", "strong", "em", "b", "i", "u", "code")
)
USER_DEFINED = (
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{i}>" for i in range(6)),
    *("\n" * n for n in range(1, 32)),
    *("\u2581" * n for n in range(2, 32)),
    *TAGS,
)
LOCATIONS = tuple(f"<loc{i:04}>" for i in range(1024))
SEGMENTS = tuple(f"<seg{i:03}>" for i in range(128))
IMAGE = "<image>"
_GEMMA: dict[str, Any] = {
    **{f"{name}_id": i for i, name in enumerate(("pad", "eos", "bos", "unk"))},
    **{f"{text[1:-1]}_piece": text for text in SPECIALS},
}
# A type of SentencePiece's proto; Gemma's own pieces use all but UNUSED.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6


@functools.cache
def sentencepiece_model() -> bytes:
    """The serialized tokenizer.model: specials, tags and whitespace, bytes, merges, loc, seg."""
    model = model_proto(_trained(add_dummy_prefix=False, **_GEMMA))
    trained = [(p.piece, p.score, p.type) for p in model.pieces]
    merges = [p for p in trained if p[2] == _NORMAL and p[0] not in USER_DEFINED]
    lowest = min(p[1] for p in merges)
    # Like Gemma: runs of tabs are pieces though the tab itself is only a byte.
    tabs = [("\t" * n, lowest - 1 - n, _NORMAL) for n in (4, 3, 2)]
    pieces = [
        *trained[:4],
        *((t, 0.0, _USER) for t in USER_DEFINED),
        *(p for p in trained if p[2] == _BYTE),
        *merges,
        *tabs,
        *((t, 0.0, _USER) for t in (*LOCATIONS, *SEGMENTS)),
    ]
    del model.pieces[:]
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.user_defined_symbols.extend(USER_DEFINED)
    return bytes(model.SerializeToString())


@functools.cache
def llama_model(texts: tuple[str, ...] = (), size: int = 900) -> bytes:
    """A small tokenizer.model with LLaMA's conventions: a space before every text, bytes.

    It is trained on the corpus and on `texts`, up to `size` pieces.
    """
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    return _trained(texts, size, add_dummy_prefix=True, **ids)


@functools.cache
def internlm2_model() -> bytes:
    """A small tokenizer.model with InternLM2's conventions: no space before a text, a piece that is
    a NUL, and pieces for tokens to come behind all others.
    """
    ids: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    model = model_proto(_trained(add_dummy_prefix=False, **ids))
    lowest = min(p.score for p in model.pieces)
    spare = [f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)]
    for i, piece in enumerate(("\0", *spare)):
        model.pieces.add(piece=piece, score=lowest - 1 - i, type=_NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return bytes(model.SerializeToString())


def _trained(texts: tuple[str, ...] = (), size: int = 900, **conventions: Any) -> bytes:
    """A BPE model of the corpus and more with byte fallback, nothing normalised."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((*CORPUS.splitlines(), *texts)),
        model_writer=out,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        character_coverage=0.99,
        minloglevel=2,
        **conventions,
    )
    return out.getvalue()


@functools.cache
def n_pieces() -> int:
    """Pieces of the SentencePiece model; also the id of `<image>`, which follows them."""
    return count_pieces(sentencepiece_model())


def count_pieces(model: bytes) -> int:
    """Pieces of a serialized SentencePiece model."""
    return len(model_proto(model).pieces)


def model_proto(data: bytes) -> Any:
    """A serialized SentencePiece model as its message."""
    from sentencepiece import sentencepiece_model_pb2

    pb2: Any = sentencepiece_model_pb2  # its classes are made when the module runs
    model = pb2.ModelProto()
    model.ParseFromString(data)
    return model


@functools.cache
def tokenizer_json() -> str:
    """The same tokenizer as tokenizer.json, converted by transformers."""
    import tempfile

    import transformers
    from transformers.models.gemma import GemmaTokenizerFast

    untyped: Any = transformers
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), "model")
        tokenizer = GemmaTokenizerFast.from_pretrained(folder)
        images = untyped.SiglipImageProcessor()
        images.image_seq_length = 4
        untyped.PaliGemmaProcessor(images, tokenizer)
        tokenizer.save_pretrained(folder)
        return (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")


def write_tokenizer(folder: Path, kind: str = "model") -> None:
    """Writes a tokenizer as published; `kind` is "model", "json" or "both"."""
    if kind in ("model", "both"):
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    if kind in ("json", "both"):
        (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {i: t for i, t in enumerate(SPECIALS)} | {n_pieces(): IMAGE}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {"content": t, **special, "special": True} for i, t in added.items()
        },
        "additional_special_tokens": [IMAGE],
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "processor_class": "PaliGemmaProcessor",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    names = {f"{n}_token": {"content": f"<{n}>", **special} for n in ("bos", "eos", "pad", "unk")}
    write_json(folder / "tokenizer_config.json", config)
    write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": [{"content": IMAGE, **special}], **names},
    )
    write_json(folder / "added_tokens.json", {IMAGE: n_pieces()})


def grown(tokenizer: str, n_rows: int) -> str:
    """A byte-level tokenizer.json with pieces for a table of `n_rows`, at least its own: behind
    these such as merging can reach, and rows left for added tokens.
    """
    data = json.loads(tokenizer)
    pieces, merges = data["model"]["vocab"], data["model"]["merges"]
    missing = max(0, n_rows - _ADDED_ROWS - len(pieces))
    fresh = (w for w in itertools.chain([_BLANK_LINE], words()) if w not in pieces)
    for word in itertools.islice(fresh, missing):
        pieces[word] = len(pieces)
        merges.append([word[:-1], word[-1]])
    return json.dumps(data)


def words() -> Iterator[str]:
    """Letters in every order, from pairs on: each word is an earlier one and a letter."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    stems = letters
    while True:
        stems = [stem + letter for stem in stems for letter in letters]
        yield from stems


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON as the hub's files are."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_tokenizer(folder: Path) -> None:
    """Removes every tokenizer file of a checkpoint."""
    for path in folder.glob("*token*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
