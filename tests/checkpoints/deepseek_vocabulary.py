"""A small byte-level BPE tokenizer with DeepSeek-LLM's conventions, in files as published."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tests.checkpoints.vocabulary import CORPUS, write_json

# As deepseek-llm-7b-base has them, with their own signs for U+2126, U+212A and others.
LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ"
    r"-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ"
    r"-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
PATTERNS = (
    "[\r\n]",
    LETTERS,
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥\u0800-一가-\ud7ff]+",
)
BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
# Signs of bytes that no UTF-8 has: tokens by themselves that a text can become, not special.
NEVER = tuple("øöúÿõ÷ûýÀùÁþü")
IMAGE = "<image_placeholder>"


@functools.cache
def trained(texts: tuple[str, ...] = (), pieces: int = 800) -> str:
    """tokenizer.json without added tokens, trained on the corpus and these texts."""
    import tokenizers

    untyped: Any = tokenizers
    pre = untyped.pre_tokenizers
    tokenizer = untyped.Tokenizer(untyped.models.BPE())
    tokenizer.normalizer = untyped.normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            *(pre.Split(untyped.Regex(pattern), "isolated") for pattern in PATTERNS),
            pre.Digits(individual_digits=True),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = untyped.decoders.ByteLevel()
    tokenizer.post_processor = untyped.processors.ByteLevel(trim_offsets=False)
    trainer = untyped.trainers.BpeTrainer(
        vocab_size=pieces,
        initial_alphabet=sorted(set(pre.ByteLevel.alphabet()) - set(NEVER)),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS.splitlines(keepends=True), *texts], trainer)
    return str(tokenizer.to_str())


def write_deepseek(folder: Path, data: str | None = None, **config: Any) -> dict[str, int]:
    """Writes the tokenizer; returns ids by text. `config` is what tokenizer_config.json says
    otherwise.
    """
    parsed = json.loads(data or trained())
    vocab: dict[str, int] = parsed["model"]["vocab"]
    attributes = {"lstrip": False, "rstrip": False, "single_word": False}
    entries = [
        {
            "id": len(vocab) + i,
            "content": text,
            **attributes,
            "normalized": text != IMAGE,
            "special": text not in NEVER,
        }
        for i, text in enumerate((BEGIN, END, *NEVER, IMAGE))
    ]
    write_json(folder / "tokenizer.json", parsed | {"added_tokens": entries})
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries
            },
            "additional_special_tokens": [IMAGE],
            "bos_token": BEGIN,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "legacy": True,
            "model_max_length": 16384,
            "pad_token": None,
            "processor_class": "VLChatProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": None,
            "use_default_system_prompt": False,
            **config,
        },
    )
    return {**vocab, **{str(e["content"]): int(str(e["id"])) for e in entries}}
