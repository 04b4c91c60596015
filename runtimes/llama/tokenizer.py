"""llama.cpp's tokenizer: texts -> token ids -> bytes; the way to ids may be another's."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from edgevlm.errors import BundleCorrupt, PromptError
from edgevlm.runtimes import checks
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.native import Handle

# What llama.cpp cuts by std::regex, which goes a level deeper with every character of a run: where
# the stack is 1 MiB it takes 2000, and the process ends at 4000.
_RECURSIVE = ("deepseek-llm",)
_LONGEST_RUN = 2000
_RUNS = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")


class LlamaTokenizer:
    """The vocabulary of a model that is loaded; `ids` makes ids of a text, where not llama.cpp
    does.
    """

    def __init__(self, model: Handle, ids: Callable[[str], list[int]] | None = None) -> None:
        self._model, self._ids = model, ids

    @property
    def vocabulary(self) -> Any:
        """llama.cpp's own object of the vocabulary."""
        return llama.llama_model_get_vocab(self._model.pointer)

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary."""
        return int(llama.llama_vocab_n_tokens(self.vocabulary))

    @property
    def bos(self) -> int:
        """See TextDecoder."""
        return int(llama.llama_vocab_bos(self.vocabulary))

    @cached_property
    def _pre(self) -> str:
        """llama.cpp's name of what cuts a text before any merge."""
        buffer, key = ctypes.create_string_buffer(64), b"tokenizer.ggml.pre"
        llama.llama_model_meta_val_str(self._model.pointer, key, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def tokenize(self, text: str) -> list[int]:
        """See TextDecoder."""
        if self._ids:
            return self._ids(text)
        if len(text) > _LONGEST_RUN and self._pre in _RECURSIVE:
            _check_runs(text)
        data = text.encode()
        if not data:
            return []
        size = len(data) + 8
        while True:
            tokens = (llama.llama_token * size)()
            n = llama.llama_tokenize(self.vocabulary, data, len(data), tokens, size, False, False)
            if n >= 0:
                return list(tokens[:n])
            size = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """See TextDecoder; with `special` as llama.cpp has it, control tokens too."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, special)
            if n >= 0:
                break
            size = -n
        pieces = llama.llama_vocab_type(self.vocabulary) == llama.LLAMA_VOCAB_TYPE_SPM
        # llama.cpp leaves SentencePiece's sign for a space in user-defined tokens.
        spaced = pieces and not special
        return buffer.raw[:n].replace("\u2581".encode(), b" ") if spaced else buffer.raw[:n]

    def close(self) -> None:
        """Frees the model."""
        self._model.close()


def _check_runs(text: str) -> None:
    for run in _RUNS.finditer(text):
        if run.end() - run.start() > _LONGEST_RUN:
            raise PromptError(
                f"the text has {run.end() - run.start()} characters of one kind in a row, from "
                f"{run[0][:10]!r} on; this model's tokenizer takes {_LONGEST_RUN}, break them up"
            )


def load(path: Path, ids: Callable[[str], list[int]] | None = None) -> LlamaTokenizer:
    """The tokenizer of a GGUF file alone, see the class; raises BundleCorrupt."""
    checks.decoder(path)
    params = llama.llama_model_default_params()
    params.vocab_only = True

    def read() -> Handle | None:
        pointer = llama.llama_model_load_from_file(str(path).encode(), params)
        return Handle("the decoder", pointer, llama.llama_model_free) if pointer else None

    # Not in the main thread, as the decoder.
    loaded = interruptible(read, lambda: None)
    if not loaded:
        raise BundleCorrupt(path, f"llama.cpp cannot load its tokenizer ({ggml.last_log()})")
    return LlamaTokenizer(loaded, ids)
