"""llama.cpp's tokenizer: texts -> token ids -> bytes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from edgevlm.errors import BundleCorrupt
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.native import Handle


class LlamaTokenizer:
    """The vocabulary of a model that is loaded."""

    def __init__(self, model: Handle) -> None:
        self._model = model

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

    def tokenize(self, text: str) -> list[int]:
        """See TextDecoder."""
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


def load(path: Path) -> LlamaTokenizer:
    """The tokenizer of a GGUF file alone; raises BundleCorrupt."""
    params = llama.llama_model_default_params()
    params.vocab_only = True

    def read() -> Handle | None:
        pointer = llama.llama_model_load_from_file(str(path).encode(), params)
        return Handle("the decoder", pointer, llama.llama_model_free) if pointer else None

    # Not in the main thread, as the decoder.
    loaded = interruptible(read, lambda: None)
    if not loaded:
        raise BundleCorrupt(path, f"llama.cpp cannot load its tokenizer ({ggml.last_log()})")
    return LlamaTokenizer(loaded)
