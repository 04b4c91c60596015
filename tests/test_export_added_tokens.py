"""Texts on which llama.cpp's tokenizer has ideas of its own: the ids are transformers', or the
export refuses the token by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, GemmaTokenizerFast

import edgevlm
from edgevlm.bundle import Bundle
from edgevlm.errors import ParityError, SourceError
from edgevlm.export import export_bundle
from edgevlm.export.checkpoint.tokenizer import checks, vocabulary
from edgevlm.export.checkpoint.tokenizer.vocabulary import CONTROL, USER_DEFINED
from edgevlm.export.components import Job
from edgevlm.export.gguf.decoder import DecoderSource, write_gguf
from edgevlm.export.options import ReadOptions
from edgevlm.export.parity import compare, references
from edgevlm.export.parity.corpus import around, corpus
from edgevlm.export.pipeline import read
from tests.checkpoints.llava import write_llava
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.vocabulary import n_pieces, write_json
from tests.test_export_byte_pairs import ids

pytestmark = pytest.mark.usefixtures("children_inside")

WRITERS: dict[str, Callable[[Path], Path]] = {
    "gemma": lambda folder: write_paligemma(folder, layers=1),
    "llama": lambda folder: write_llava(folder, layout="hf", layers=1),
    "not-legacy": lambda folder: write_llava(folder, layout="hf", layers=1, legacy=False),
    "bytes": lambda folder: write_llava(
        folder, layout="hf", layers=1, vocabulary="llama3", kv_heads=2
    ),
}


def with_tokens(kind: str, folder: Path, *tokens: str | AddedToken, special: bool = False) -> Path:
    """A checkpoint whose tokenizer was given more tokens, as transformers saves it."""
    source = WRITERS[kind](folder)
    loaded: Any = GemmaTokenizerFast if kind == "gemma" else AutoTokenizer
    made = loaded.from_pretrained(source)
    made.add_tokens(list(tokens), special_tokens=special)
    made.save_pretrained(source)
    return source


def prepared(source: Path, **options: Any) -> Job:
    return read(source, ReadOptions(**options))


def differing(source: Path, texts: list[str], scratch: Path, *, plain: bool = False) -> list[str]:
    """The texts on which llama.cpp differs from transformers."""
    job = prepared(source)
    ours = ids(job.vocabulary, [job.model.prefixed(t) for t in texts], scratch / "x.gguf")
    theirs = references.of(job).token_ids(texts, plain=plain)
    return [t for t, a, b in zip(texts, ours, theirs, strict=True) if a != b]


ODD = [
    (AddedToken("gizmo", single_word=True), "has single_word, which llama.cpp does not know"),
    (AddedToken("gizmo", lstrip=True), "has lstrip, which llama.cpp does not know"),
    (AddedToken("gizmo", rstrip=True), "has rstrip, which llama.cpp does not know"),
    (AddedToken("gizmo", lstrip=True, rstrip=True, normalized=False), "has lstrip"),
]


@pytest.mark.parametrize("verify", [True, False])
def test_a_token_that_must_stand_alone_is_refused(verify: bool, tmp_path: Path) -> None:
    source = with_tokens("gemma", tmp_path / "words", AddedToken("gizmo", single_word=True))
    with pytest.raises(SourceError) as raised:
        export_bundle(source, tmp_path / "out", verify=verify)
    assert str(raised.value) == (
        f"{source}: added token 'gizmo' has single_word, which llama.cpp does not know; "
        "export a checkpoint whose tokenizer lacks it"
    )


@pytest.mark.parametrize(
    ("kind", "token", "says"),
    [*(("gemma", *odd) for odd in ODD), *((kind, *ODD[1]) for kind in WRITERS if kind != "gemma")],
)
def test_attributes_that_llama_cpp_lacks_are_refused(
    kind: str, token: AddedToken, says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as raised:
        prepared(with_tokens(kind, tmp_path / "source", token))
    assert f"added token 'gizmo' {says}" in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "tokens", "says"),
    [
        ("llama", ["gizmo"], "'gizmo' is not special, and this tokenizer puts a space behind it"),
        ("gemma", ["two words"], "'two words' has a space that can be typed in two ways"),
        ("gemma", [AddedToken("\u2581x", normalized=False)], "'\u2581x' has a space that can be"),
        ("not-legacy", ["two words"], "'two words' has a space that can be typed in two ways"),
        ("gemma", ["abcx", "cxyz"], "'abcx' overlaps with 'cxyz'"),
        ("bytes", ["abcx", "bcxyz"], "'abcx' overlaps with 'bcxyz'"),
        (
            "gemma",
            ["gizmos", AddedToken("zm", normalized=False)],
            "'gizmos' holds 'zm', which transformers finds first",
        ),
        (
            "gemma",
            ["abcx", AddedToken("cxy", normalized=False)],
            "'abcx' overlaps with 'cxy'",
        ),
    ],
)
def test_tokens_that_are_found_elsewhere_in_a_text_are_refused(
    kind: str, tokens: list[str | AddedToken], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as raised:
        prepared(with_tokens(kind, tmp_path / "source", *tokens))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "token"),
    [
        *itertools.product(("gemma", "not-legacy", "bytes"), ("gizmo", "<|tool|>", "é\u0301")),
        *(
            (kind, AddedToken(text, normalized=False))
            for kind in ("gemma", "not-legacy", "bytes")
            for text in ("gizmo", "two words")
        ),
        ("gemma", "the"),  # a piece of the vocabulary, which is found in "there" from now on
        ("bytes", "two words"),
    ],
    ids=str,
)
def test_other_tokens_have_the_ids_of_transformers(
    kind: str, token: str | AddedToken, tmp_path: Path
) -> None:
    source = with_tokens(kind, tmp_path / "source", token)
    text = str(token)
    tries = ["a {0}s{0} {0}{0}", "a there {0}there", "a {0}\r\n\t{0}", "a \u2581{0}\u2581 {0}é"]
    texts = [*around([text]), *(t.format(text) for t in tries), *corpus()]
    assert differing(source, texts, tmp_path) == []
    types = {t.text: t.type for t in prepared(source).vocabulary.tokens}
    assert text not in types or types[text] == USER_DEFINED


@pytest.mark.parametrize("kind", WRITERS)
def test_a_special_token_is_text_where_a_user_types_it(kind: str, tmp_path: Path) -> None:
    odd = AddedToken("[SEP]", lstrip=True, single_word=True, special=True)
    source = with_tokens(kind, tmp_path / "source", odd, "SEP", special=True)
    job = prepared(source)
    control = [i for i, t in enumerate(job.vocabulary.tokens) if t.type == CONTROL]
    texts = around(["[SEP]", "SEP", "<image>", "<bos>", "</s>", "<pad>", "<|eot_id|>", "<unk>"])
    assert differing(source, texts, tmp_path, plain=True) == []
    for row in ids(job.vocabulary, texts, tmp_path / "y.gguf"):
        assert not set(row) & set(control)


def test_a_token_of_a_template_that_asks_for_its_surroundings(tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source", layout="hf", vocabulary="phi3", layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        found = json.loads((source / name).read_text(encoding="utf-8"))
        added = found.get("added_tokens") or list(found["added_tokens_decoder"].values())
        next(t for t in added if t["content"] == "<|end|>")["lstrip"] = True
        write_json(source / name, found)
    with pytest.raises(SourceError, match=r"the template has the token '<\|end\|>' with lstrip"):
        prepared(source)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        *(("gemma", [t]) for t, _ in ODD),
        *(("bytes", [t]) for t, _ in ODD[:2]),
        ("llama", ["gizmo"]),
        ("llama", [AddedToken("gizmo", normalized=False)]),
        ("gemma", ["two words"]),
        ("gemma", ["\u2581zq"]),
    ],
    ids=str,
)
def test_the_comparison_finds_them_too(
    kind: str, tokens: list[str | AddedToken], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were one not refused before, a text made of it would show."""
    monkeypatch.setattr(vocabulary, "check_attributes", lambda *_, **__: None)
    job = prepared(with_tokens(kind, tmp_path / "source", *tokens))
    source = DecoderSource(job.parts["decoder"], job.model.text, job.vocabulary, "x")
    write_gguf(source, tmp_path / "x.gguf", "F16", None)
    with pytest.raises(ParityError) as raised:
        compare._tokens(job, tmp_path / "x.gguf", references.of(job))
    assert raised.value.stage == "tokens" and str(tokens[0]) in str(raised.value)


SIGNS = [
    *("".join(p) for n in range(1, 5) for p in itertools.product(("\u2581", " ", "a"), repeat=n)),
    *("x\u2581\u2581" + "\u2581" * n + "  \u2581the\u2581" for n in range(0, 40, 3)),
    "<0x41>\u2581<0x0A>",
    "\u2581\n\u2581\u2581\n\n\u2581",
]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_sign_for_a_space_may_be_typed(kind: str, tmp_path: Path) -> None:
    assert differing(WRITERS[kind](tmp_path / "source"), SIGNS, tmp_path) == []


def test_runs_of_spaces_are_spaces_again_in_an_answer(paligemma_bundle: Bundle) -> None:
    with edgevlm.load(paligemma_bundle.folder) as vlm:
        decoder = vlm.engines.decoder
        for text in ("a  b", "   ", "\u2581\u2581x\n  y", "def f():\n    return"):
            said = b"".join(map(decoder.piece, decoder.tokenize(text))).decode()
            assert said == text.replace("\u2581", " ")


def test_a_control_token_that_merging_would_make_of_a_text(tmp_path: Path) -> None:
    """llama.cpp merges two neighbours into any token of the vocabulary, whatever its type."""
    from sentencepiece import sentencepiece_model_pb2

    source = write_paligemma(tmp_path / "source", layers=1)
    pb2: Any = sentencepiece_model_pb2
    model = pb2.ModelProto()
    model.ParseFromString((source / "tokenizer.model").read_bytes())
    lowest = min(p.score for p in model.pieces)
    spare = [p for p in model.pieces if p.piece.startswith("<unused")][:2]
    for piece, text in zip(spare, ("<b", "os>"), strict=True):
        piece.piece, piece.type, piece.score = text, 1, lowest - 1
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    job = prepared(source)
    assert job.vocabulary.tokens[2].text == "\uffff<bos>" and job.vocabulary.specials["bos"] == 2
    (row,) = ids(job.vocabulary, ["<bos>"], tmp_path / "x.gguf")
    assert 2 not in row


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    source = write_llava(tmp_path / "source", layers=1)
    pb2: Any = sentencepiece_model_pb2
    model = pb2.ModelProto()
    model.ParseFromString((source / "tokenizer.model").read_bytes())
    next(p for p in model.pieces if p.piece == "<0xF0>").type = 1
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match="lacks pieces for bytes, without which llama.cpp cannot"):
        prepared(source)


def test_pieces_that_no_merge_makes_are_refused(tmp_path: Path) -> None:
    """As transformers 5 converts a tokenizer.model without a tokenizer.json beside it."""
    source = write_paligemma(tmp_path / "source", tokenizer="json", layers=1)
    found = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    merges = found["model"]["merges"]
    found["model"]["merges"] = [m for m in merges if "\t" not in "".join(m)]
    write_json(source / "tokenizer.json", found)
    with pytest.raises(SourceError) as raised:
        prepared(source)
    assert "tokenizer.json: no merge makes token" in str(raised.value)
    assert r"'\t'" in str(raised.value)


def cut_at_digits(data: dict[str, Any]) -> None:
    data["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut_at_digits, "has a normalizer that is not known"),
        (lambda d: d["model"].update(dropout=0.1), "its dropout is 0.1"),
        (lambda d: d["model"].update(ignore_merges=True), "its ignore_merges is True"),
    ],
)
def test_ways_of_cutting_that_llama_cpp_does_not_have(
    change: Callable[[dict[str, Any]], object], says: str, tmp_path: Path
) -> None:
    source = write_paligemma(tmp_path / "source", tokenizer="json", layers=1)
    found = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    change(found)
    write_json(source / "tokenizer.json", found)
    with pytest.raises(SourceError, match=says):
        prepared(source)


@pytest.mark.parametrize("name", ["my-Phi-3", "phi3", "modern-bert"])
def test_a_name_changes_no_token(name: str, tmp_path: Path) -> None:
    """llama.cpp gives tokens attributes of its own, or fails, where a model is called so."""
    source = write_paligemma(tmp_path / "source", layers=1)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", verify=False, name=name)
    assert bundle.manifest.name == name and checks.is_misread(name)
    with edgevlm.load(bundle.folder) as vlm:
        first = n_pieces() - 1152
        assert vlm.engines.decoder.tokenize("a<loc0000>  b")[1:3] == [first, 44]


def test_where_spaces_go_is_read_where_the_tokenizer_is(tmp_path: Path) -> None:
    """tokenizer.json decides for transformers, whatever `legacy` says beside it."""
    source = write_llava(tmp_path / "source", layout="hf", layers=1)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(source / "tokenizer_config.json", config | {"legacy": False})
    job = prepared(source)
    assert job.model.prompt.template[-1].startswith(" \n") and not job.model.prefix_once
    assert differing(source, corpus(), tmp_path) == []
