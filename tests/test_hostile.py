"""Inputs that the fuzzer found, or that it is to find: each is refused in one line, or answered."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm.errors import (
    BundleCorrupt,
    ContextOverflow,
    EdgeVLMError,
    ImageError,
    PromptError,
    SourceError,
)
from edgevlm.export.checkpoint import json_shapes
from edgevlm.export.checkpoint.source import read_file, read_json
from edgevlm.gguf_decoder import check_decoder
from edgevlm.gguf_header import read_header
from edgevlm.image import read_image
from edgevlm.manifest import MANIFEST
from edgevlm.models import built_in
from edgevlm.runtimes import checks
from edgevlm.runtimes.llama import tokenizer
from edgevlm.runtimes.session import VLM
from edgevlm.self_check import cosine
from workshop.fuzz.gguf_layout import Entry, Layout, Reader
from workshop.fuzz.samples import replaced

PICTURE = Image.new("RGB", (8, 8))
DEEP = "[" * 100_000
DECODER = (built_in() / "decoder.gguf").read_bytes()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(built_in(), tmp_path / "mine"))


@pytest.fixture(scope="module")
def vlm() -> Any:
    with edgevlm.load(cache=False) as made:
        yield made


def refused(call: Callable[[], object], kind: type[EdgeVLMError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 2000


def put(key: str, kind: int, value: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.entries = [e for e in layout.entries if e.key.decode() != key]
        layout.entries.append(Entry(key.encode(), kind, value))
        layout.n_entries = len(layout.entries)

    return change


def array(key: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Layout], None]:
    def changed(layout: Layout) -> None:
        entry = next(e for e in layout.entries if e.key.decode() == f"tokenizer.ggml.{key}")
        entry.value = change(entry.value)
        entry.count = len(entry.value)

    return changed


def tensor(**values: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        for name, value in values.items():
            setattr(layout.tensors[1], name, value)

    return change


# Each of the first eight ended the process in llama.cpp.
GGUF: dict[str, tuple[Callable[[Layout], None], str]] = {
    "experts": (put("gemma.expert_count", 4, 2**31), "'gemma.expert_count' is not known"),
    "experts used": (put("gemma.expert_used_count", 4, 1), "expert_used_count' is not known"),
    "layers to come": (put("gemma.nextn_predict_layers", 4, 9), "nextn_predict_layers' is not"),
    "an unknown scaling": (put("gemma.rope.scaling.type", 8, b"x"), "rope.scaling.type' is b'x'"),
    "a negative epsilon": (
        put("gemma.attention.layer_norm_rms_epsilon", 6, -1.0), "rms_epsilon' is -1.0"),
    "a token twice": (array("tokens", lambda t: [t[0], t[0], *t[2:]]), "have the same text"),
    "a token twice, up to a NUL": (
        array("tokens", lambda t: [b"x\0y", b"x\0z", *t[2:]]), "have the same text"),
    "a layer beyond": (tensor(name=b"blk.99.attn_q.weight"), "blk.99|llama.cpp"),
    "no layers": (put("gemma.block_count", 4, 0), "'gemma.block_count' is 0"),
    "600 layers": (put("gemma.block_count", 4, 600), "'gemma.block_count' is 600"),
    "no heads": (put("gemma.attention.head_count", 4, 0), "head_count' is 0"),
    "heads that are no groups": (put("gemma.attention.head_count_kv", 4, 2), "2 groups"),
    "a size of another type": (put("gemma.context_length", 10, 512), "context_length' is 512"),
    "too few types": (array("token_type", lambda t: t[:5]), "token_type are 5 for"),
    "types beyond": (array("token_type", lambda t: [7, *t[1:]]), "types 1 to 6"),
    "too few scores": (array("scores", lambda t: t[:5]), "scores are 5 for"),
    "scores that are none": (
        array("scores", lambda t: [float("nan"), *t[1:]]), "scores' is an array"),
    "no pieces for bytes": (array("token_type", lambda t: [1] * len(t)), "pieces for bytes"),
    "a piece for a byte that is none": (
        array("token_type", lambda t: [6, *t[1:]]), "pieces for bytes"),
    "another way to cut": (put("tokenizer.ggml.pre", 8, b"deepseek-coder"), "ggml.pre' is"),
    "another tokenizer": (put("tokenizer.ggml.model", 8, b"bert"), "ggml.model' is b'bert'"),
    "a split file": (put("split.count", 2, 7), "'split.count' is not known"),
    "an alignment": (put("general.alignment", 4, 64), "an alignment that is not 32"),
    "an alignment of another type": (put("general.alignment", 10, 32), "an alignment"),
    "dimensions beyond the file": (tensor(dimensions=[256, 2**33]), "outside of the file"),
    "dimensions beyond numbers": (tensor(dimensions=[2**40, 2**40]), "of the shape"),
    "no dimensions": (tensor(dimensions=[]), "of 0 dimensions"),
    "a type that is none": (tensor(type=99), "of the type 99"),
    "integers": (tensor(type=24), "lies outside|is of the type I8"),
    "an offset": (tensor(offset=2**63), "lies outside"),
    "a name twice": (tensor(name=b"output_norm.weight"), "is there twice"),
    "a name of bytes": (tensor(name=b"\xff"), "a tensor's name"),
    "more keys than there are": (lambda f: setattr(f, "n_entries", 2**60), "keys"),
    "more tensors than there are": (lambda f: setattr(f, "n_tensors", 9999), "trunc|a t"),
    "an old version": (lambda f: setattr(f, "version", 1), "version 1"),
}  # fmt: skip


@pytest.mark.fault(
    "Bundles", "a decoder on which llama.cpp would end the process", "refused by what is wrong"
)
@pytest.mark.parametrize("name", GGUF)
def test_a_decoder_that_llama_cpp_would_abort_on(bundle: Path, name: str) -> None:
    layout, (change, says) = Reader(DECODER).layout, GGUF[name]
    change(layout)
    replaced(bundle, "decoder.gguf", layout.packed())
    refused(lambda: edgevlm.load(bundle, cache=False), BundleCorrupt, says)
    # What it needs is looked up in the file first.
    refused(lambda: edgevlm.load(bundle, cache=False, max_memory="1GB"), BundleCorrupt, says)


def test_a_decoder_is_put_together_as_it_was(tmp_path: Path) -> None:
    assert Reader(DECODER).layout.packed() == DECODER
    header = read_header(built_in() / "decoder.gguf")
    layout = Reader(DECODER).layout
    assert [e.key.decode() for e in layout.entries] == [*header.values]
    assert [tuple(t.dimensions) for t in layout.tensors] == [
        t.shape for t in header.tensors.values()
    ]


def test_a_decoder_is_looked_at_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    looked: list[Path] = []

    def counted(path: Path, *, tokenizer: bool) -> None:
        looked.append(path)
        check_decoder(path, tokenizer=tokenizer)

    monkeypatch.setattr(checks, "check_decoder", counted)
    path = tmp_path / "decoder.gguf"
    path.write_bytes(DECODER)
    for _ in range(3):
        checks.decoder(path)
    assert len(looked) == 1
    checks.decoder(path, tokenizer=False)
    assert len(looked) == 2
    before = path.stat()
    path.write_bytes(DECODER[:5000].ljust(len(DECODER), b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        refused(lambda: checks.decoder(path), BundleCorrupt, "truncated|a text|texts|load")
    path.unlink()
    refused(lambda: checks.decoder(path), BundleCorrupt, "cannot be read")


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 50_000, '{"format": 1e999}', "\ufeff{}"])
def test_manifests(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text, encoding="utf-8")
    refused(lambda: edgevlm.load(bundle), BundleCorrupt, MANIFEST)


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), "x" * 10_000, [0] * 9999])
def test_values_of_a_manifest_are_shown_short(bundle: Path, value: Any) -> None:
    path = bundle / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    data["image"]["mean"][0] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    refused(lambda: edgevlm.load(bundle), BundleCorrupt, r"'image.mean\[0\]' has the wrong value")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("image", "size", 10**6),
        ("image", "size", 0),
        ("image", "tokens", -1),
        ("image", "std", [0.5, 0, 0.5]),
        ("image", "fill", [0, 0, 256]),
        ("decoder", "context_length", 10**400),
        ("decoder", "n_vocab", 0),
    ],
)
def test_sizes_that_no_model_has(bundle: Path, section: str, key: str, value: Any) -> None:
    path = bundle / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    data[section][key] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    refused(lambda: edgevlm.load(bundle), BundleCorrupt, rf"'{section}\.{key}'")


@pytest.mark.parametrize(("key", "value"), [("width", 1256), ("rows", 7), ("offset", -32)])
def test_token_embeddings_of_another_decoder(bundle: Path, key: str, value: int) -> None:
    path = bundle / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    data["token_embedding"][key] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    refused(lambda: edgevlm.load(bundle), BundleCorrupt, "token embeddings .* of a decoder of")


@pytest.mark.parametrize("n", [0, 7, 8, 16])
def test_a_self_check_of_other_numbers(n: int) -> None:
    assert (
        cosine(np.ones(16), np.ones(n)) == cosine(np.ones(n), np.ones(16)) == (1 if n == 16 else -1)
    )
    assert cosine(np.ones(7), np.ones(7)) == cosine([], []) == -1


@pytest.mark.parametrize(
    "schema",
    [
        {"type": kind, "format": value}
        for kind in ("string", "integer", "number")
        for value in (["x"], 1)
    ],
)
def test_schemas(vlm: VLM, schema: Any) -> None:
    refused(lambda: vlm.ask("ocr", schema=schema), PromptError, "format must be a string")


@pytest.mark.parametrize("text", ["\N{GRINNING FACE}" * 300_000, "a " * 2**19, "a" * 2**20])
def test_prompts_of_a_mebibyte(vlm: VLM, text: str) -> None:
    refused(lambda: vlm.ask(text, PICTURE), ContextOverflow, "image 64, text")


@pytest.mark.fault(
    "Python", "a text that overflows the stack of llama.cpp's tokenizer", "refused in one line"
)
@pytest.mark.parametrize("one", ["a", " ", "7", "-", "中", "_-"])
def test_runs_that_a_recursive_tokenizer_cannot_take(one: str) -> None:
    tokenizer._check_runs(f"{one * (2000 // len(one))}{'.' if one.isalpha() else 'x'}")
    refused(lambda: tokenizer._check_runs(one * 2001), PromptError, "of one kind in a row")


def safetensors(path: Path, header: Any) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    return path


@pytest.mark.parametrize(
    "header",
    [
        DEEP.encode(),
        *(
            {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
            for shape, offsets in [
                ([2.0], [0, 8]), ([-1, -2], [0, 8]), ([1] * 65 + [2], [0, 8]), ([0, 2**62], [0, 0]),
                ([2, True], [0, 8]), ([2], [8, 0]), ([2], [-8, 0]), ("2", [0, 8]), ([2], [0, "8"]),
            ]
        ),
        {"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}},
    ],
)  # fmt: skip
def test_headers_of_safetensors(tmp_path: Path, header: Any) -> None:
    path = safetensors(tmp_path / "x.safetensors", header)
    refused(lambda: read_file(path), SourceError, "header is damaged|longer than")


JSON_FILES: dict[str, list[Any]] = {
    "tokenizer.json": [
        {"model": {"type": "BPE", "merges": [], "vocab": {"a": []}}},
        {"model": {"type": "BPE", "merges": [], "vocab": {"a": -1}}},
        {"model": {"type": "BPE", "vocab": {}, "merges": [1]}},
        {"model": {"type": "BPE", "vocab": {}, "merges": 5}},
        {"model": {"type": "BPE", "merges": [], "vocab": {}}, "added_tokens": [{"id": 1}]},
        {
            "model": {"type": "BPE", "merges": [], "vocab": {}},
            "added_tokens": [{"id": 1, "content": True}],
        },
        {
            "model": {"type": "BPE", "merges": [], "vocab": {}},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [1]},
        },
        {"model": {"type": "BPE"}},
        {"model": []},
    ],
    "tokenizer_config.json": [
        {"added_tokens_decoder": {"type": {"content": "x"}}},
        {"added_tokens_decoder": {"1": {}}},
        {"added_tokens_decoder": "x"},
        {"additional_special_tokens": 7},
        {"additional_special_tokens": [7]},
        {"bos_token": {"x": 1}},
        {"tokenizer_class": []},
    ],
    "vocab.json": [{"a": "b"}, {"a": 2**64}],
    "added_tokens.json": [{"a": None}],
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files_of_tokenizers(tmp_path: Path, name: str) -> None:
    for data in JSON_FILES[name]:
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
        refused(lambda: read_json(tmp_path / name), SourceError, "wrong value|is not an id")
    (tmp_path / name).write_text(DEEP, encoding="utf-8")
    refused(lambda: read_json(tmp_path / name), SourceError, "nested too deeply")
    assert name in json_shapes.SHAPES


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript; render it"),
        (b"\xd7\xcd\xc6\x9a" + bytes(60), "a drawing of Windows"),
        (b"/* XPM */\nstatic char *x[] = {", "X11"),
        (b"SIMPLE  =                    T" + bytes(80), "scientific data"),
        (b"GRIB" + bytes(60), "scientific data"),
    ],
)
def test_readers_that_are_off(data: bytes, says: str) -> None:
    refused(lambda: read_image(data), ImageError, says)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "TGA", "ICO"])
def test_readers_that_are_on(form: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (250, 0, 0)).save(out, form)
    assert np.abs(read_image(out.getvalue())[3, 3].astype(int) - (250, 0, 0)).max() < 8
