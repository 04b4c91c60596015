"""A small byte-level BPE tokenizer with LLaMA-3's conventions, and texts' bytes for others."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tests.checkpoints.vocabulary import CORPUS, write_json

# meta-llama/llama3 tokenizer.py, as its tokenizer.json has it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
)
PAD = "<pad>"


@functools.cache
def tokenizer_json(ignore_merges: bool = True) -> str:
    """tokenizer.json: trained pieces first, then the special tokens, as in the real file."""
    import tokenizers

    untyped: Any = tokenizers
    pre = untyped.pre_tokenizers
    tokenizer = untyped.Tokenizer(untyped.models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(untyped.Regex(PATTERN), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = untyped.decoders.ByteLevel()
    trainer = untyped.trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    begin = SPECIALS[0]
    tokenizer.post_processor = untyped.processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    return str(tokenizer.to_str())


def n_pieces() -> int:
    """Tokens of the tokenizer with its special ones; also the id of the first one added to them."""
    data = json.loads(tokenizer_json())
    return len(data["model"]["vocab"]) + len(SPECIALS)


def special_id(text: str) -> int:
    """The id of a special token."""
    return n_pieces() - len(SPECIALS) + SPECIALS.index(text)


def write_llama3(folder: Path, *, added: tuple[str, ...] = (), add_bos: bool = True) -> None:
    """Writes tokenizer.json and tokenizer_config.json as published, with more tokens behind them.

    Without `add_bos` nothing puts the begin token before a text, as in the first published files.
    """
    data = json.loads(tokenizer_json())
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    for i, text in enumerate(added):
        token = {"id": n_pieces() + i, "content": text, **plain, "special": True}
        data["added_tokens"].append(token)
    if not add_bos:
        data["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True}
        data["post_processor"] |= {"trim_offsets": False, "use_regex": True}
    write_json(folder / "tokenizer.json", data)
    config = {
        "added_tokens_decoder": {
            str(t["id"]): {"content": t["content"], **plain, "special": True}
            for t in data["added_tokens"]
        },
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    pad = {"pad_token": PAD} if PAD in added else {}
    write_json(folder / "tokenizer_config.json", config | pad)
