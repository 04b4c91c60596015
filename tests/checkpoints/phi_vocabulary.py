"""A small tokenizer of GPT-2's kind, in the files and with the quirks of Phi-2's."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from tests.checkpoints.vocabulary import CORPUS, write_json

END = "<|endoftext|>"
# CodeGen's tokens for runs of spaces and tabs, in the order of their ids.
RUNS = (*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1)))
# Prompts of TinyGPT-V, so that its separator is one token as in the real vocabulary.
_PROMPTS = """\
###Human: <Img><ImageHere></Img> what is in the picture?###Assistant: a red circle.###
Give the following image: <Img>ImageContent</Img>. Please answer my questions.###Human: why?###
<s>[INST] <Img></Img> [vqa] where is the cat? [/INST] {<12><34><56><78>}<delim> <p>the cat</p>###
"""


@functools.cache
def bytelevel(texts: tuple[str, ...] = (), size: int = 700) -> tuple[dict[str, int], str]:
    """vocab.json's content with END as the last token, and merges.txt's.

    The tokenizer is trained on a corpus and on `texts`, up to `size` tokens.
    """
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    lines = [*CORPUS.splitlines(), *(20 * _PROMPTS.splitlines()), *texts]
    trainer.train_from_iterator(lines, vocab_size=size, min_frequency=2, show_progress=False)
    model = json.loads(trainer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    vocab: dict[str, int] = model["vocab"]
    return {**vocab, END: len(vocab)}, "\n".join(["#version: 0.2", *merges, ""])


def write_gpt2_tokenizer(folder: Path, *trained: Any) -> dict[str, int]:
    """Writes GPT-2's two files, vocab.json and merges.txt, and returns the vocabulary; `trained`
    are arguments of `bytelevel`.
    """
    vocab, merges = bytelevel(*trained)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return vocab


def write_phi_tokenizer(folder: Path, real: Path | None = None, kind: str = "slow") -> int:
    """Writes the files of Phi-2's tokenizer and returns the number of its tokens.

    `real` names a folder with GPT-2's own vocab.json and merges.txt. `kind` is "slow" for those
    two, "fast" for the tokenizer.json that transformers makes of them, or "both".
    """
    if real:
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(real / name, folder / name)
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    else:
        vocab = write_gpt2_tokenizer(folder)
    added = {text: len(vocab) + i for i, text in enumerate(RUNS)}
    write_json(folder / "added_tokens.json", added)
    entries = {vocab[END]: (END, True)} | {i: (text, False) for text, i in added.items()}
    write_json(folder / "tokenizer_config.json", _config(entries))
    if kind != "slow":
        _write_fast(folder)
    if kind == "fast":
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):
            (folder / name).unlink()
    return len(vocab) + len(added)


def _config(entries: dict[int, tuple[str, bool]]) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {
                "content": text,
                "lstrip": False,
                "normalized": not special,
                "rstrip": False,
                "single_word": False,
                "special": special,
            }
            for i, (text, special) in entries.items()
        },
        "bos_token": END,
        "clean_up_tokenization_spaces": True,
        "eos_token": END,
        "model_max_length": 2048,
        "tokenizer_class": "CodeGenTokenizer",
        "unk_token": END,
    }


def _write_fast(folder: Path) -> None:
    from transformers import AutoTokenizer

    untyped: Any = AutoTokenizer
    tokenizer = untyped.from_pretrained(folder, use_fast=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
