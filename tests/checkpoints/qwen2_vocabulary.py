"""A small byte-level BPE tokenizer with Qwen2's conventions, in the files of published ones."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

from tests.checkpoints.vocabulary import CORPUS, write_json

# transformers 4.57, tokenization_qwen2.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Tokens that are not special in Qwen2.5's files.
TYPED = ("<tool_call>", "</tool_call>")
Files = Literal["json", "pair"]


@functools.cache
def trained(texts: tuple[str, ...] = (), pieces: int = 800) -> str:
    """tokenizer.json without added tokens, trained on the corpus and these texts."""
    import tokenizers

    untyped: Any = tokenizers
    pre = untyped.pre_tokenizers
    tokenizer = untyped.Tokenizer(untyped.models.BPE())
    tokenizer.normalizer = untyped.normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(untyped.Regex(PATTERN), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = untyped.decoders.ByteLevel()
    tokenizer.post_processor = untyped.processors.ByteLevel(trim_offsets=False)
    trainer = untyped.trainers.BpeTrainer(
        vocab_size=pieces,
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS.splitlines(keepends=True), *texts], trainer)
    return str(tokenizer.to_str())


def write_qwen2(
    folder: Path,
    added: tuple[str, ...] = (),
    files: Files = "json",
    data: str | None = None,
    **config: Any,
) -> dict[str, int]:
    """Writes the tokenizer with more special tokens behind Qwen2's own; returns ids by text.

    `files` says whether it lies in tokenizer.json or in vocab.json and merges.txt, `config` what
    tokenizer_config.json says otherwise.
    """
    parsed = json.loads(data or trained())
    vocab: dict[str, int] = parsed["model"]["vocab"]
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    entries = [
        {"id": len(vocab) + i, "content": text, **plain, "special": text not in TYPED}
        for i, text in enumerate((*SPECIALS, *TYPED, *added))
    ]
    if files == "json":
        write_json(folder / "tokenizer.json", parsed | {"added_tokens": entries})
    else:
        write_json(folder / "vocab.json", vocab)
        merges = [m if isinstance(m, str) else " ".join(m) for m in parsed["model"]["merges"]]
        lines = ["#version: 0.2", *merges]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(folder / "added_tokens.json", {e["content"]: e["id"] for e in entries})
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries
            },
            "additional_special_tokens": [*SPECIALS[1:], *added],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 8192,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
            **config,
        },
    )
    return {**vocab, **{str(e["content"]): int(str(e["id"])) for e in entries}}
