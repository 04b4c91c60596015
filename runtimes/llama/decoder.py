"""The language decoder on llama.cpp: blocks of embeddings and tokens -> logits.

llama.cpp aborts the whole process on a bidirectional block larger than its batch, a full context or
a bad token id; every such request is refused here first.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import BundleCorrupt, ContextOverflow, EngineError
from edgevlm.runtimes.engines import (
    Block,
    Cancelled,
    Float,
    Recall,
    TokenSampler,
    count_rows,
)
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.llama import ggml, weights
from edgevlm.runtimes.llama import grammar as grammars
from edgevlm.runtimes.llama import tokenizer as tokenizers
from edgevlm.runtimes.llama.backends import ON_THE_CPU, Offload
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.llama.cached_rows import CachedRows
from edgevlm.runtimes.llama.embedding_rows import EmbeddingRows
from edgevlm.runtimes.llama.grammar import GrammarVocabulary
from edgevlm.runtimes.llama.hooks import Importance, graph_hook
from edgevlm.runtimes.llama.output_rows import OutputRows
from edgevlm.runtimes.llama.tokenizer import LlamaTokenizer
from edgevlm.runtimes.native import Handle
from edgevlm.sampling import Sampling
from edgevlm.specs import DecoderSpec, TensorLocation
from edgevlm.types import FlashAttention, RunSettings

# Rows of logits that `extend` computes at once; each costs 4 bytes times the vocabulary.
_SCORE_ROWS = 16
# Contexts grow in these steps, so that a slightly longer question does not make a new one.
_CTX_STEP = 256
_BATCH_STEP = 64
# Rows of a causal block that are read at once where nobody chose another number.
CAUSAL_BATCH = 512
# ggml's type of the KV cache by name. Float32 is for exact decoders alone.
_KV_TYPES = {
    "f32": llama.GGML_TYPE_F32,
    "f16": llama.GGML_TYPE_F16,
    "q8_0": llama.GGML_TYPE_Q8_0,
}
# The one way that these are read, whatever is wished.
_FLASH_ATTENTION: dict[str, FlashAttention] = {"f32": "off", "q8_0": "on"}
_FLASH_ATTENTION_TYPES = {
    "auto": llama.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "off": llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "on": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}


class LlamaDecoder:
    """TextDecoder on llama.cpp's low-level API.

    `threads` draw tokens and `prefill_threads`, as many where none are named, read the input,
    `batch` rows of a causal block at once. `exact` keeps the KV cache in float32, flash attention
    off and GELU out of its table, for decoders in f32. `kv` is the cache's type where another is
    wanted: "f16", or "q8_0", half as large, which llama.cpp reads with flash attention only.
    `repack` lets llama.cpp re-order quantized weights at load. `offload` says what runs on another
    device than the CPU; `layers` is how many layers of how many really do. `input` is the file with
    the token embeddings, at `location`, and the tokenizer, where the decoder's own has not all of
    them. If it is not `whole` only the vocabulary is loaded, and the rest with the first prefill
    after it or a `release`. Raises BundleCorrupt if the files do not hold the decoder of `spec`,
    EngineError if the device does not take its layers.
    """

    def __init__(
        self,
        path: Path,
        spec: DecoderSpec,
        location: TensorLocation,
        *,
        threads: int,
        prefill_threads: int | None = None,
        batch: int = CAUSAL_BATCH,
        exact: bool = False,
        kv: str | None = None,
        flash_attention: FlashAttention = "auto",
        repack: bool = True,
        offload: Offload = ON_THE_CPU,
        input: Path | None = None,
        whole: bool = True,
    ) -> None:
        llama.llama_backend_init()
        self._path, self._offload = path, offload
        self._spec, self._repack = spec, repack
        self.layers = (0, spec.n_layer + 1)
        self._model: Handle | None = self._load() if whole else None
        own = self._model if input in (None, path) else None
        self._tokenizer = LlamaTokenizer(own) if own else tokenizers.load(input or path)
        if self._tokenizer.n_tokens != spec.n_vocab:
            raise BundleCorrupt(input or path, f"has {self._tokenizer.n_tokens} tokens")
        self._releases = not whole
        self._output = OutputRows(path, spec)
        self._kv = kv or ("f32" if exact else "f16")
        self._context: Handle | None = None
        self._batch: Handle | None = None
        self.adjust(threads, prefill_threads or threads, batch, flash_attention)
        self._hook = graph_hook(path, spec, exact=exact)
        self._rows = EmbeddingRows(input or path, location)
        self._cancelled = cancelled = threading.Event()
        self._abort = llama.ggml_abort_callback(lambda _: cancelled.is_set())

    def _load(self) -> Handle:
        """The file's model."""
        model, self.layers = weights.load(
            self._path, self._spec, self._offload, repack=self._repack
        )
        return model

    def adjust(
        self, threads: int, prefill_threads: int, batch: int, flash_attention: FlashAttention
    ) -> None:
        """Takes other settings, see the class; everything that was read is forgotten."""
        self._free_context()
        self._threads, self._prefill_threads, self._rows_at_once = threads, prefill_threads, batch
        self._wanted_attention = _FLASH_ATTENTION.get(self._kv, flash_attention)
        self._flash_attention = self._wanted_attention
        self._n_ctx = self._n_batch = 0
        self._cached = CachedRows()

    def listen(self) -> Importance:
        """Sums up what flows into the layers' matrices from now on."""
        self._free_context()
        self._hook = heard = Importance(self._hook)
        return heard

    @property
    def _weights(self) -> Handle:
        """The whole model, loaded where it is not; ModelClosed after close."""
        _ = self._tokenizer.n_tokens
        if self._model is None:
            self._model = self._load()
        return self._model

    @property
    def _ctx(self) -> Any:
        """llama.cpp's context; ModelClosed after close."""
        _ = self._tokenizer.n_tokens
        if self._context is None:
            raise EngineError("the decoder has read nothing yet")
        return self._context.pointer

    @property
    def settings(self) -> RunSettings:
        """See TextDecoder."""
        return RunSettings(
            threads=self._threads,
            prefill_threads=self._prefill_threads,
            repacking="on" if self._repack else "off",
            kv=self._kv,
            flash_attention=self._flash_attention,
            batch=self._n_batch,
            context=self._n_ctx,
        )

    @property
    def bos(self) -> int:
        """See TextDecoder."""
        return self._tokenizer.bos

    def tokenize(self, text: str) -> list[int]:
        """See TextDecoder."""
        return self._tokenizer.tokenize(text)

    def piece(self, token: int) -> bytes:
        """See TextDecoder."""
        return self._tokenizer.piece(token)

    def writes(self, token: int) -> bool:
        """See TextDecoder."""
        return self._output.row(token) is not None

    def rows(self, tokens: Sequence[int]) -> list[int]:
        """Rows of the output matrix of those tokens that have one."""
        return self._output.rows(tokens)

    def embed(self, tokens: Sequence[int]) -> Float:
        """See TextDecoder."""
        if any(not 0 <= t < self._spec.n_vocab for t in tokens):
            raise EngineError(f"a token id lies outside the vocabulary of {self._spec.n_vocab}")
        return self._rows(tokens)

    def prefill(self, blocks: Sequence[Block], *, room: int, recall: Recall | None = None) -> int:
        """See TextDecoder. A bidirectional block is one batch: every row sees every other."""
        n = count_rows(blocks, self._spec.n_embd)
        if n + room > self._spec.context_length:
            raise ContextOverflow(0, n, room, self._spec.context_length)
        # Before weights may be loaded: whoever cancels meanwhile means this prefill.
        self._cancelled.clear()
        # The same for every causal prompt: a longer one does not cost the cache of the last.
        self._reserve(n + room, max(map(self._at_once, blocks)))
        kept = self._recall(blocks, self._keep(blocks), recall)
        llama.llama_set_abort_callback(self._ctx, self._abort, None)
        try:
            read = 0
            for i, block in enumerate(blocks):
                self._read(block, kept - read)
                read += len(block.rows)
                if read > kept:
                    self._cached.whole(blocks[: i + 1])
            self._cached.prompt(blocks, kept)
        finally:
            # A Python callback at every graph node would slow the single steps of decoding.
            llama.llama_set_abort_callback(self._ctx, llama.ggml_abort_callback(), None)
            llama.llama_set_causal_attn(self._ctx, True)
        return kept

    def _read(self, block: Block, kept: int) -> None:
        """Reads a block but for its first rows, which are there. It ends a batch also where nothing
        of it is read, so that what follows it is computed in the same batches.
        """
        llama.llama_set_causal_attn(self._ctx, block.attention == "causal")
        at_once = self._at_once(block)
        for start in range(max(kept, 0), len(block.rows), at_once):
            positions = block.positions[start : start + at_once].tolist()
            self._decode_rows(block.rows[start : start + at_once], positions)
            self._cached.read(positions)

    def _at_once(self, block: Block) -> int:
        """Number of a block's rows that are read at once."""
        return self._rows_at_once if block.attention == "causal" else len(block.rows)

    def common(self, blocks: Sequence[Block]) -> int:
        """The number of leading rows of a prompt that the KV cache holds."""
        return self._cached.common(blocks, self.embed)

    def _keep(self, blocks: Sequence[Block]) -> int:
        """Forgets everything but the leading rows of a prompt that are there; returns their
        number.
        """
        n = self.common(blocks)
        if n:
            self.rollback(n)
        else:
            self.clear()
        return n

    def _recall(self, blocks: Sequence[Block], kept: int, recall: Recall | None) -> int:
        """Takes the KV cache of more leading blocks than `kept` rows where somebody kept it;
        returns the number of rows that are there now.
        """
        for n in range(len(blocks) - 1, 0, -1):
            rows = sum(len(block.rows) for block in blocks[:n])
            if recall and rows > kept and (state := recall(n)):
                return rows if self._restore(blocks[:n], state) else 0
        return kept

    def _restore(self, blocks: Sequence[Block], state: memoryview) -> bool:
        """Takes a KV cache back in place of everything; False, and nothing is there, where
        llama.cpp does not want it.
        """
        if not self._take(state):
            return False
        self._cached.put_back(blocks)
        return True

    def _take(self, state: memoryview) -> bool:
        self.clear()
        if weights.put_back(self._ctx, state):
            return True
        self.clear()
        return False

    @property
    def reading(self) -> str:
        """See TextDecoder. Threads split the keys among them, so that sums round otherwise."""
        threads, batch = self._prefill_threads, self._rows_at_once
        return repr((threads, batch, self._kv, self._wanted_attention, self._repack))

    @property
    def blocks(self) -> Sequence[Block]:
        """See TextDecoder."""
        return self._cached.leading

    def state(self) -> memoryview:
        """See TextDecoder."""
        n = sum(len(block.rows) for block in self.blocks)
        if not n:
            return memoryview(b"")
        # llama.cpp gives all rows or none, so that those after them go and come back.
        cached, everything = self._cached.copy(), weights.state(self._ctx)
        self.rollback(n)
        found = weights.state(self._ctx)
        if self._take(everything):
            self._cached = cached
        return found

    def hand_over(self, other: LlamaDecoder) -> None:
        """Gives all rows to a decoder of the same file, which goes on from there; this one keeps
        them.
        """
        state = weights.state(self._ctx)
        other._reserve(self._n_ctx, 0)
        if not other._take(state):
            raise EngineError(f"llama.cpp could not hand over a KV cache of {len(state)} bytes")
        other._cached = self._cached.copy()

    def clear(self) -> None:
        """See TextDecoder."""
        _ = self._tokenizer.n_tokens
        if self._context is not None:
            llama.llama_memory_clear(llama.llama_get_memory(self._ctx), True)
        self._cached = CachedRows()

    def _decode_rows(
        self, rows: Float, positions: Sequence[int], first_logits: int | None = None
    ) -> None:
        """Decodes rows with logits from one on, or of the last alone."""
        data = np.ascontiguousarray(rows, np.float32)
        batch = llama.llama_batch_init(len(data), self._spec.n_embd, 1)
        try:
            ctypes.memmove(batch.embd, data.ctypes.data, data.nbytes)
            self._decode(batch, positions, len(data) - 1 if first_logits is None else first_logits)
        finally:
            llama.llama_batch_free(batch)

    def extend(self, tokens: Sequence[int]) -> Float:
        """See TextDecoder."""
        out = np.empty((len(tokens), self._spec.n_vocab), np.float32)
        chunk = min(_SCORE_ROWS, self._n_batch)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            self._decode_tokens(part)
            for i in range(len(part)):
                out[start + i] = self._logits(i)
        return out

    def step(self, token: int) -> None:
        """See TextDecoder."""
        self._decode_tokens([token])

    def _decode_tokens(self, tokens: Sequence[int]) -> None:
        _ = self._ctx
        n = len(self._cached.positions)
        if n == 0 or n + len(tokens) > self._n_ctx:
            raise EngineError(f"no room for {len(tokens)} tokens after {n} rows")
        if any(not 0 <= t < self._spec.n_vocab for t in tokens):
            raise EngineError(f"a token id lies outside the vocabulary of {self._spec.n_vocab}")
        following = self._cached.positions[-1] + 1
        positions = range(following, following + len(tokens))
        rows = self._output.rows(tokens)
        if len(rows) < len(tokens):
            # Tokens that a trimmed decoder has no row of; it reads them as it reads a question.
            self._decode_rows(self._rows(tokens), positions, 0)
        else:
            assert self._batch
            batch = self._batch.pointer
            for i, row in enumerate(rows):
                batch.token[i] = row
            self._decode(batch, positions, 0)
        self._cached.drew(tokens, positions)

    def _decode(self, batch: Any, positions: Sequence[int], first_logits: int) -> None:
        """Decodes filled entries at these positions, with logits from `first_logits` on."""
        batch.n_tokens = len(positions)
        for i, position in enumerate(positions):
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= first_logits
        ggml.log.clear()
        if self._hook:
            self._hook.start()
        context = self._ctx
        status = interruptible(lambda: llama.llama_decode(context, batch), self.cancel)
        if status == 2:
            raise Cancelled
        if status != 0:
            raise EngineError(f"llama.cpp could not decode, status {status} ({ggml.last_log()})")
        if self._hook:
            try:
                self._hook.check()
            except EngineError:
                # The cache of these rows is not what was asked for; nothing may build on it.
                self.clear()
                raise

    def logits(self) -> Float:
        """See TextDecoder."""
        return self._logits(-1)

    def _logits(self, row: int) -> Float:
        pointer = llama.llama_get_logits_ith(self._ctx, row)
        return self._output.logits(np.ctypeslib.as_array(pointer, (self._spec.outputs,)))

    def rollback(self, n: int) -> None:
        """See TextDecoder."""
        memory, past = llama.llama_get_memory(self._ctx), len(self._cached.positions)
        if not 0 < n <= past:
            raise EngineError(f"cannot go back to {n} of {past} rows")
        # Also what a batch that was cancelled may have left behind the last row.
        first = self._cached.positions[n - 1] + 1
        if not llama.llama_memory_seq_rm(memory, 0, first, -1):
            raise EngineError(f"llama.cpp could not go back to {n} of {past} rows")
        self._cached.cut(n)

    @cached_property
    def vocabulary(self) -> GrammarVocabulary:
        """Its vocabulary as grammars see it."""
        own, whole = self._tokenizer, partial(self._tokenizer.piece, special=True)
        return GrammarVocabulary(own.vocabulary, self._spec.n_vocab, own.piece, whole)

    def sampler(
        self,
        sampling: Sampling,
        penalized: Sequence[int] = (),
        *,
        grammar: str = "",
        stop: Sequence[int] = (),
    ) -> TokenSampler:
        """See TextDecoder."""
        return grammars.sampler(self, sampling, self._spec, penalized, grammar, stop)

    def sample(self, chain: llama.llama_sampler_p) -> int:
        """Draws a token from the last logits with a llama.cpp sampler chain, which counts rows."""
        return self._output.token(llama.llama_sampler_sample(chain, self._ctx, -1))

    def cancel(self) -> None:
        """See TextDecoder."""
        self._cancelled.set()

    def _reserve(self, n_ctx: int, n_batch: int) -> None:
        """Makes a context of at least this many positions and rows in one batch; what was read
        stays.
        """
        if self._context is not None and n_ctx <= self._n_ctx and n_batch <= self._n_batch:
            return
        cached, state = self._cached, None
        if self._context is not None and cached.positions:
            state = weights.state(self._ctx)
        self._free_context()
        n_batch = -(-max(n_batch, _SCORE_ROWS) // _BATCH_STEP) * _BATCH_STEP
        params = llama.llama_context_default_params()
        params.n_ctx = -(-max(n_ctx, n_batch) // _CTX_STEP) * _CTX_STEP
        params.n_batch = params.n_ubatch = n_batch
        params.n_outputs_max = _SCORE_ROWS
        params.n_threads, params.n_threads_batch = self._threads, self._prefill_threads
        params.no_perf = True
        if self._hook:
            params.cb_eval = self._hook.callback
        params.type_k = params.type_v = _KV_TYPES[self._kv]
        params.flash_attn_type = _FLASH_ATTENTION_TYPES[self._wanted_attention]
        ggml.log.clear()
        context = llama.llama_init_from_model(self._weights.pointer, params)
        if not context:
            raise EngineError(
                f"llama.cpp cannot make a context of {params.n_ctx} positions ({ggml.last_log()}); "
                "free some memory or shorten the request"
            )
        self._context = Handle("the decoder", context, llama.llama_free, self._weights)
        if self._wanted_attention == "auto":
            self._flash_attention = ggml.flash_attention()
        self._n_ctx, self._n_batch = params.n_ctx, n_batch
        there = state is not None and weights.put_back(context, state)
        self._cached = cached if there else CachedRows()
        batch = llama.llama_batch_init(_SCORE_ROWS, 0, 1)
        self._batch = Handle("the decoder", batch, llama.llama_batch_free)

    def _free_context(self) -> None:
        for handle in (self._batch, self._context):
            if handle:
                handle.close()
        self._context = self._batch = None

    def release(self) -> None:
        """See TextDecoder. The vocabulary stays: another thread may be tokenizing."""
        if self._releases and self._model:
            self._free_context()
            self._n_ctx = self._n_batch = 0
            self._cached = CachedRows()
            self._model.close()
            self._model = None

    def close(self) -> None:
        """See TextDecoder."""
        self._free_context()
        self._tokenizer.close()
        if self._model:
            self._model.close()
