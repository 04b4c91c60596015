"""Small tokenizers with the conventions of LLaMA, Phi-3 and LLaMA-3, as checkpoints carry them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoints import byte_vocabulary
from tests.checkpoints.vocabulary import count_pieces, llama_model, write_json

_PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
# Phi-3-mini's tokens behind LLaMA's pieces, in order; all but the first swallow what follows them.
PHI3 = (
    "<|endoftext|>",
    "<|assistant|>",
    *(f"<|placeholder{i}|>" for i in range(1, 5)),
    "<|system|>",
    "<|end|>",
    *(f"<|placeholder{i}|>" for i in (5, 6)),
    "<|user|>",
)
# What LLaVA's first models put around a picture (llava/constants.py).
LLAVA1 = ("<im_patch>", "<im_start>", "<im_end>")
# What transformers' layout adds behind a tokenizer's own tokens.
ADDED = ("<image>", "<pad>")


class Tokens:
    """A tokenizer by its kind: "llama", "llava1" (LLaVA's first models), "phi3" or "llama3"; `own`
    for the original projects' files.

    `model` is another tokenizer.model than the small one; where `legacy` is not set, transformers
    puts its space before a whole text only, not behind every special token.
    """

    def __init__(
        self, kind: str, own: bool, model: Path | None = None, legacy: bool = True
    ) -> None:
        self.kind, self.own, self.legacy = kind, own, legacy and kind != "phi3"
        self._model = model.read_bytes() if model else llama_model()

    @property
    def image(self) -> int:
        """The id of `<image>` in transformers' layout."""
        if self.kind == "llama3":
            return byte_vocabulary.n_pieces()
        added = {"phi3": PHI3, "llava1": LLAVA1}.get(self.kind, ())
        return count_pieces(self._model) + len(added)

    @property
    def rows(self) -> int:
        """Rows of the embedding: real checkpoints pad theirs, except LLaMA's in its own layout."""
        if self.own and self.kind != "phi3":
            return self.image + (1 if self.kind == "llama3" else 0)
        return self.image + 64

    @property
    def ids(self) -> dict[str, Any]:
        """What config.json says of the tokens; a generation_config.json may name more ends."""
        if self.kind in ("llama", "llava1"):
            return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if self.kind == "phi3":
            end = count_pieces(self._model)
            return {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": end}
        begin, end = map(byte_vocabulary.special_id, byte_vocabulary.SPECIALS[:2])
        return {"bos_token_id": begin, "eos_token_id": end}

    def write(self, folder: Path) -> None:
        """Writes the tokenizer's files."""
        if self.kind == "llama3":
            byte_vocabulary.write_llama3(folder, added=("<pad>",) if self.own else ADDED)
            return
        (folder / "tokenizer.model").write_bytes(self._model)
        config: dict[str, Any] = {
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": self.legacy,
            "model_max_length": 2048,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        }
        write_json(folder / "tokenizer_config.json", config | self._names() | self._added())
        if self.kind == "llava1":
            n = count_pieces(self._model)
            write_json(folder / "added_tokens.json", {t: n + i for i, t in enumerate(LLAVA1)})
        if not self.own:
            _write_tokenizer_json(folder)

    def _names(self) -> dict[str, Any]:
        eos = PHI3[0] if self.kind == "phi3" else "</s>"
        names = {"bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>"}
        if self.kind != "phi3" and self.own:
            return {k: {"__type": "AddedToken", "content": v, **_PLAIN} for k, v in names.items()}
        return names

    def _added(self) -> dict[str, Any]:
        """`added_tokens_decoder`, which transformers did not write when LLaVA's own came out."""
        if self.kind != "phi3" and self.own:
            return {}
        n = count_pieces(self._model)
        special = {**_PLAIN, "special": True}
        entries = {i: {"content": t, **special} for i, t in enumerate(("<unk>", "<s>", "</s>"))}
        if self.kind == "phi3":
            entries[2] |= {"rstrip": True, "special": False}
            entries |= {n + i: {"content": t, **special} for i, t in enumerate(PHI3)}
            entries |= {n + i: entries[n + i] | {"rstrip": True} for i in range(1, len(PHI3))}
        if not self.own:
            entries |= {self.image + i: {"content": t, **special} for i, t in enumerate(ADDED)}
        more = {} if self.own else {"pad_token": "<pad>", "trust_remote_code": False}
        return {"added_tokens_decoder": {str(i): e for i, e in entries.items()}, **more}


def _write_tokenizer_json(folder: Path) -> None:
    """The same tokenizer as transformers converts it, with `<image>` and `<pad>`."""
    from transformers import AutoTokenizer

    untyped: Any = AutoTokenizer
    untyped.from_pretrained(folder, use_fast=True).save_pretrained(folder)
