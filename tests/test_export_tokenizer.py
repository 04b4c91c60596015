"""llama.cpp must give every text the ids that transformers gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.tokenizer.vocabulary import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from edgevlm.export.gguf import tools
from edgevlm.export.gguf.decoder import DecoderSource, write_gguf
from edgevlm.export.parity.corpus import corpus
from edgevlm.export.pipeline import read
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.vocabulary import n_pieces, write_json


def vocabulary(folder: Path) -> Vocabulary:
    job = read(folder)
    return read_vocabulary(job.checkpoint, job.model)


def ids_of_bundle(folder: Path, gguf: Path) -> list[list[int]]:
    job = read(folder)
    table = read_vocabulary(job.checkpoint, job.model)
    write_gguf(DecoderSource(job.parts["decoder"], job.model.text, table, "x"), gguf, "F32", None)
    return tools.tokenize(gguf, corpus())


def ids_of_transformers(folder: Path) -> list[list[int]]:
    from edgevlm.export.parity.references import files, paligemma

    tokenizer = paligemma.load_processor(folder).tokenizer
    return files.token_ids(tokenizer, corpus(), plain=False)


@pytest.mark.parametrize("kind", ["model", "json", "both"])
def test_ids_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", tokenizer=kind)
    ours, theirs = ids_of_bundle(folder, tmp_path / "x.gguf"), ids_of_transformers(folder)
    for text, a, b in zip(corpus(), ours, theirs, strict=True):
        assert a == b, text


def test_both_tokenizer_files_give_the_same_ids(tmp_path: Path) -> None:
    a = write_paligemma(tmp_path / "a", tokenizer="model")
    b = write_paligemma(tmp_path / "b", tokenizer="json")
    assert ids_of_bundle(a, tmp_path / "a.gguf") == ids_of_bundle(b, tmp_path / "b.gguf")


def test_types_of_tokens(paligemma_checkpoint: Path) -> None:
    table = vocabulary(paligemma_checkpoint)
    types = {token.text: token.type for token in table.tokens}
    assert len(table.tokens) == len(types) == n_pieces() + 64
    assert types["<image>"] == types["<bos>"] == CONTROL
    assert table.tokens[n_pieces()].text == "<image>"
    assert (
        types["<loc0000>"]
        == types["<seg127>"]
        == types["\n"]
        == types["\u2581" * 3]
        == USER_DEFINED
    )
    assert {t.type for t in table.tokens[n_pieces() + 1 :]} == {UNUSED}
    assert table.specials == {"bos": 2, "eos": 1, "unk": 3, "pad": 0}


def test_locations_are_whole_tokens_even_if_stored_as_ordinary_pieces(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    folder = write_paligemma(tmp_path / "checkpoint")
    pb2: Any = sentencepiece_model_pb2
    model = pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    for piece in model.pieces:
        if piece.piece.startswith(("<loc", "<seg")):
            piece.type, piece.score = 1, -1e4
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    assert ids_of_bundle(folder, tmp_path / "x.gguf") == ids_of_transformers(folder)


def test_user_text_never_becomes_a_marker(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    job = read(paligemma_checkpoint)
    table = read_vocabulary(job.checkpoint, job.model)
    gguf = tmp_path / "x.gguf"
    write_gguf(DecoderSource(job.parts["decoder"], job.model.text, table, "x"), gguf, "F32", None)
    markers = {0, 1, 2, 3, n_pieces()}
    for ids in tools.tokenize(gguf, ["<image>", "<bos>", "a<eos>b", "<pad><unk>"]):
        assert ids and not markers & set(ids)


def test_not_a_sentencepiece_model(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(SourceError, match=r"tokenizer\.model: is not a SentencePiece model"):
        vocabulary(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"type": "WordPiece"}}, "is not a BPE tokenizer"),
        ({"normalizer": {"type": "NFKC"}}, "has a normalizer that is not known"),
    ],
)
def test_unknown_tokenizer_json(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = write_paligemma(tmp_path, tokenizer="json")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer.json", data | change)
    with pytest.raises(SourceError, match=says):
        vocabulary(folder)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path, spare_rows=-3)
    with pytest.raises(SourceError, match="config.json says"):
        vocabulary(folder)
