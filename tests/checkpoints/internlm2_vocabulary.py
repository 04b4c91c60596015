"""A small tokenizer with InternLM2's conventions, in its own files and in transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoints.vocabulary import count_pieces, internlm2_model, write_json

# As InternLM2's tokenizer has them, in place of its last pieces, and those behind them.
_SPARE = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>")
_OWN = (*_SPARE, "<|im_end|>", "<|im_start|>")


def write_internlm2(folder: Path, added: tuple[str, ...]) -> dict[str, int]:
    """Writes InternLM2's tokenizer with more tokens behind it; returns the ids of all by text, of
    pieces by their number.
    """
    (folder / "tokenizer.model").write_bytes(internlm2_model())
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    first = count_pieces(internlm2_model()) - 6
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, **{t: first + i for i, t in enumerate((*_OWN, *added))}}
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(i): {"content": t, **plain, "special": True} for t, i in ids.items()
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *_SPARE, *added],
            "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "model_max_length": 8192,
            "pad_token": "</s>",
            "tokenizer_class": "InternLM2Tokenizer",
            "unk_token": "<unk>",
        },
    )
    generation = {"_from_model_config": True, "eos_token_id": [ids["<|im_end|>"], 2]}
    write_json(folder / "generation_config.json", generation)
    return {**ids, **{f"piece {i}": i for i in range(3, first)}}


def write_internlm2_as_llama(folder: Path, added: tuple[str, ...], **config: Any) -> dict[str, int]:
    """Writes InternLM2's tokenizer as transformers' layout has it, a LLaMA's tokenizer.json that
    puts a space before no text; returns the ids of its tokens by text.
    """
    import transformers
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    ids = write_internlm2(folder, added)
    hf: Any = transformers
    path = folder / "tokenizer.model"
    untyped: Any = convert_slow_tokenizer
    made = json.loads(untyped(hf.LlamaTokenizer(str(path), legacy=False)).to_str())
    path.unlink()
    vocab: dict[str, int] = made["model"]["vocab"]
    texts = {i: text for text, i in vocab.items()}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    entries = []
    for text, i in ids.items():
        if not text.startswith("piece "):
            entries.append({"id": i, "content": text, **plain, "special": True})
            if i in texts:
                vocab[text] = vocab.pop(texts[i])
    made |= {"added_tokens": entries}
    made["pre_tokenizer"]["prepend_scheme"] = "never"
    write_json(folder / "tokenizer.json", made)
    stated = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del stated["auto_map"]
    stated["added_tokens_decoder"] = {str(e.pop("id")): e for e in entries}
    stated |= {"add_bos_token": True, "legacy": False, "tokenizer_class": "LlamaTokenizer"}
    write_json(folder / "tokenizer_config.json", stated | config)
    return ids
