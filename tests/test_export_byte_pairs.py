"""llama.cpp must cut and merge bytes as transformers does, with GPT-2's tokenizer and others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import transformers

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.source import Checkpoint, read_json
from edgevlm.export.checkpoint.tokenizer import side_files
from edgevlm.export.checkpoint.tokenizer.vocabulary import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from edgevlm.export.gguf import tools
from edgevlm.export.gguf.decoder import DecoderSource, metadata
from edgevlm.export.parity.corpus import corpus
from edgevlm.export.parity.references import files
from edgevlm.parts.llama import Llama
from edgevlm.prompt import normalized
from edgevlm.specs import PromptSpec
from tests.checkpoints import byte_vocabulary, deepseek_vocabulary, qwen2_vocabulary
from tests.checkpoints.phi_vocabulary import END, write_gpt2_tokenizer
from tests.checkpoints.vocabulary import write_json
from tests.multilingual import PROMPTS

pytestmark = pytest.mark.usefixtures("children_inside")

TEXTS = [*corpus(), *(q for questions in PROMPTS.values() for q in questions), "I'LL we'Ve 12345"]
hf: Any = transformers
# What a decoder's metadata says beside the vocabulary; nothing of it matters to tokens.
DECODER = Llama(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=32,
    vocab_size=32,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


def vocabulary(folder: Path, rows: int) -> Vocabulary:
    configs = {p.name: read_json(p) for p in folder.glob("*.json")}
    model: Any = SimpleNamespace(
        decoder=SimpleNamespace(n_vocab=rows),
        prefix="",
        markers={},
        whole_tokens=(),
        own_tokenizer=False,
    )
    return read_vocabulary(Checkpoint(folder, configs, {}, ()), model)


def ids(table: Vocabulary, texts: list[str], path: Path) -> list[list[int]]:
    """What llama.cpp makes of the texts with a file of nothing but the vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    decoder = replace(DECODER, vocab_size=len(table.tokens))
    metadata(writer, DecoderSource({}, decoder, table, "x"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tools.tokenize(path, texts)


def compare(folder: Path, rows: int, tokenizer: Any, scratch: Path) -> Vocabulary:
    table = vocabulary(folder, rows)
    for text, ours in zip(TEXTS, ids(table, TEXTS, scratch / "x.gguf"), strict=True):
        assert ours == tokenizer(text, add_special_tokens=False)["input_ids"], text
    return table


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as GPT-2's, whose merges make whole words of the texts that are compared: a cut at
    another place shows.
    """
    folder = tmp_path_factory.mktemp("gpt2")
    write_gpt2_tokenizer(folder, tuple(TEXTS) * 2, 4000)
    return folder


@pytest.mark.parametrize("files", ["pair", "json"])
def test_gpt2(files: str, gpt2: Path, tmp_path: Path) -> None:
    tokenizer = hf.GPT2TokenizerFast(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"))
    if files == "json":
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "vocab.json").unlink()
    else:
        shutil.copytree(gpt2, tmp_path, dirs_exist_ok=True)
    n = len(tokenizer)
    table = compare(tmp_path, n + 47, tokenizer, tmp_path)
    assert table.pre == "gpt-2" and len(table.merges) == n - 257  # the bytes, and the end
    end = n - 1
    assert (table.tokens[end].text, table.tokens[end].type) == (END, CONTROL)
    assert table.specials == {"bos": end, "eos": end} | ({"unk": end} if files == "json" else {})


def test_codegen(gpt2: Path, tmp_path: Path) -> None:
    """Microsoft's Phi-2: GPT-2 with runs of spaces and tabs that are one token."""
    tokenizer = hf.CodeGenTokenizerFast(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"))
    n = len(tokenizer)
    tokenizer.add_tokens([" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)])
    tokenizer.save_pretrained(tmp_path)
    table = compare(tmp_path, n + 943, tokenizer, tmp_path)
    assert table.pre == "phi-2"
    assert (table.tokens[n].text, table.tokens[n].type) == (" " * 31, USER_DEFINED)


def test_llama3(tmp_path: Path) -> None:
    byte_vocabulary.write_llama3(tmp_path, added=("<pad>",))
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    n = byte_vocabulary.n_pieces()
    table = compare(tmp_path, n + 7, tokenizer, tmp_path)
    assert table.pre == "llama-bpe"
    types = {t.text: t.type for t in table.tokens}
    assert all(types[text] == CONTROL for text in (*byte_vocabulary.SPECIALS, "<pad>"))
    assert types["Ġthe"] == NORMAL
    special = byte_vocabulary.special_id
    assert table.specials["bos"] == special("<|begin_of_text|>") == tokenizer.bos_token_id
    assert table.specials["eos"] == special("<|eot_id|>") == tokenizer.eos_token_id
    # What a user types is never one of them.
    typed = [f"a{text}b" for text in (*byte_vocabulary.SPECIALS, "<pad>")]
    found = {i for row in ids(table, typed, tmp_path / "y.gguf") for i in row}
    assert {table.tokens[i].type for i in found} == {NORMAL}


def test_merges_that_never_make_a_piece_of_the_vocabulary(tmp_path: Path) -> None:
    """LLaMA-3 takes a piece that is in its vocabulary whole, other files of its kind do not."""
    byte_vocabulary.write_llama3(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["merges"] = data["model"]["merges"][:100]
    for ignore, pre in ((True, "llama-bpe"), (False, "smaug-bpe")):
        data["model"]["ignore_merges"] = ignore
        write_json(tmp_path / "tokenizer.json", data)
        tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
        table = compare(tmp_path, byte_vocabulary.n_pieces(), tokenizer, tmp_path)
        assert table.pre == pre


@pytest.mark.parametrize("files", ["json", "pair"])
def test_qwen2(files: qwen2_vocabulary.Files, tmp_path: Path) -> None:
    """Single digits, folded contractions, and texts in NFC, which llama.cpp is given."""
    accents = ("cafe\u0301 A\u030angstro\u0308m", "\u212b \u1e9b\u0323 \uac01", "I'LL we'Ve")
    texts = (*TEXTS, *accents, "a<tool_call>e\u0301</tool_call>")
    data = qwen2_vocabulary.trained(tuple(map(nfc, texts)), 3000)
    found = qwen2_vocabulary.write_qwen2(tmp_path, ("<img>",), files, data)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    table = vocabulary(tmp_path, len(found) + 7)
    assert table.pre == "qwen2" and table.specials["eos"] == found["<|im_end|>"]
    configs = {p.name: read_json(p) for p in tmp_path.glob("*.json")}
    assert side_files.describe(Checkpoint(tmp_path, configs, {}, ())).normalize == "NFC"
    given = list(map(nfc, texts))
    for text, ours in zip(texts, ids(table, given, tmp_path / "x.gguf"), strict=True):
        assert ours == tokenizer(text)["input_ids"], text
    assert ids(table, list(accents), tmp_path / "x.gguf") != ids(
        table, list(map(nfc, accents)), tmp_path / "y.gguf"
    )


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "LlamaTokenizer", "TokenizersBackend"])
def test_deepseek_llm(kind: str, tmp_path: Path) -> None:
    """Cut again and again; without the bytes that no UTF-8 has, whose signs are tokens."""
    data = deepseek_vocabulary.trained(tuple(TEXTS), 3000)
    found = deepseek_vocabulary.write_deepseek(tmp_path, data, tokenizer_class=kind)
    tokenizer = files.tokenizer(tmp_path)
    table = compare(tmp_path, len(found) + 7, tokenizer, tmp_path)
    assert table.pre == "deepseek-llm"
    assert table.specials["eos"] == found[deepseek_vocabulary.END] == tokenizer.eos_token_id
    configs = {p.name: read_json(p) for p in tmp_path.glob("*.json")}
    described = side_files.describe(Checkpoint(tmp_path, configs, {}, ()))
    assert described.add_bos == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert described.add_bos == (kind != "TokenizersBackend") and described.normalize == ""


def nfc(text: str) -> str:
    return normalized(text, PromptSpec((), normalize="NFC"))


def other_pattern(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += r"|\d"


def other_step(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})


def leading_space(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def lacking_byte(data: dict[str, Any]) -> None:
    del data["model"]["vocab"]["Ā"]


def odd_merge(data: dict[str, Any]) -> None:
    data["model"]["merges"].append("a")


def twins(data: dict[str, Any]) -> None:
    data["added_tokens"][-1]["content"] = data["added_tokens"][-2]["content"]


def joined_digits(data: dict[str, Any]) -> None:
    data["model"]["merges"].append("1 2")


def escaped(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"[\r\n]"


def as_one(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"][5]["individual_digits"] = False


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (other_pattern, "pre-tokenizer that is none of gpt-2, .*, deepseek-llm$"),
        (as_one, "pre-tokenizer that is none of"),
        (joined_digits, "the merge '1 2' joins digits"),
        (lacking_byte, "lacks 1 of the 256 bytes"),
        (escaped, ""),
    ],
)
def test_what_is_not_quite_deepseeks(
    damage: Callable[[dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    found = deepseek_vocabulary.write_deepseek(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    damage(data)
    write_json(tmp_path / "tokenizer.json", data)
    if not says:
        assert compare(tmp_path, len(found), files.tokenizer(tmp_path), tmp_path).pre
        return
    with pytest.raises(SourceError, match=says):
        vocabulary(tmp_path, len(found))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (other_pattern, "pre-tokenizer that is none of gpt-2, llama-bpe"),
        (other_step, "pre-tokenizer that is none of"),
        (leading_space, "pre-tokenizer that is none of"),
        (lambda data: data.update(normalizer={"type": "NFKC"}), "has a normalizer"),
        (lambda data: data["model"].update(end_of_word_suffix="</w>"), "is not a BPE tokenizer of"),
        (lacking_byte, "lacks 1 of the 256 bytes"),
        (odd_merge, "invalid merge 'a'"),
        (twins, "are both '<|reserved_special_token_4|>'"),
    ],
)
def test_what_llama_cpp_would_read_differently_is_refused(
    damage: Callable[[dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    byte_vocabulary.write_llama3(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    damage(data)
    write_json(tmp_path / "tokenizer.json", data)
    with pytest.raises(SourceError) as raised:
        vocabulary(tmp_path, byte_vocabulary.n_pieces())
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_pair_of_files_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "vocab.json", {"a": 0})
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BartTokenizer"})
    with pytest.raises(SourceError, match="belongs to a BartTokenizer"):
        vocabulary(tmp_path, 1)
