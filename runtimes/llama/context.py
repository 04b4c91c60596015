"""llama.cpp's context of a model: a KV cache, what it holds, and the batches that fill it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevlm.errors import EngineError
from edgevlm.runtimes.engines import Block, Cancelled, Float, Int32, following
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.llama.cached_rows import CachedRows
from edgevlm.runtimes.llama.hooks import GraphHook
from edgevlm.runtimes.native import Handle
from edgevlm.types import FlashAttention

# Rows of logits that are computed at once; each costs 4 bytes times the vocabulary.
SCORE_ROWS = 16
# Contexts grow in these steps, so that a slightly longer question does not make a new one.
_POSITION_STEP = 256
_BATCH_STEP = 64
# ggml's type of the KV cache by name. Float32 is for exact decoders alone.
_KV_TYPES = {
    "f32": llama.GGML_TYPE_F32,
    "f16": llama.GGML_TYPE_F16,
    "q8_0": llama.GGML_TYPE_Q8_0,
}
_FLASH_ATTENTION_TYPES = {
    "auto": llama.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "off": llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "on": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}


@dataclass(frozen=True)
class ContextSettings:
    """Settings that every context of a decoder is made with, of whatever size.

    threads: draw tokens, prefill_threads: read the input. kv: type of the KV cache, "f32", "f16" or
    "q8_0". flash_attention: "auto" leaves it to llama.cpp. n_embd: width of an input row.
    n_outputs: logits per row. mrope: whether a position is a time, a row and a column.
    """

    threads: int
    prefill_threads: int
    kv: str
    flash_attention: FlashAttention
    n_embd: int
    n_outputs: int
    mrope: bool = False


class Context:
    """A KV cache of `n_ctx` positions at least, of one sequence, that takes up to `n_batch` rows at
    once.

    cached: the rows that it holds. least: it can be cut to so many of them and no fewer. n_ctx,
    n_batch: what it really has room for. hook: what edits its graphs. flash_attention: whether the
    attention is fused. Graphs are edited by `hook`; setting `cancelled` ends a decode inside
    `abortable`. Raises EngineError without memory for it.
    """

    def __init__(
        self,
        model: Handle,
        settings: ContextSettings,
        *,
        n_ctx: int,
        n_batch: int,
        hook: GraphHook | None,
        cancelled: threading.Event,
    ) -> None:
        self.n_batch = -(-max(n_batch, SCORE_ROWS) // _BATCH_STEP) * _BATCH_STEP
        self.n_ctx = -(-max(n_ctx, self.n_batch) // _POSITION_STEP) * _POSITION_STEP
        self.cached, self.least = CachedRows(), 0
        # The positions that a layer sees in models where some see no more; 0 in all others.
        self._window = llama.llama_model_n_swa(model.pointer)
        self._settings, self.hook, self._cancelled = settings, hook, cancelled
        self._abort = llama.ggml_abort_callback(lambda _: cancelled.is_set())
        ggml.log.clear()
        pointer = llama.llama_init_from_model(model.pointer, self._params())
        if not pointer:
            raise EngineError(
                f"llama.cpp cannot make a context of {self.n_ctx} positions ({ggml.last_log()}); "
                "free some memory or shorten the request"
            )
        self._handle = Handle("the decoder", pointer, llama.llama_free, model)
        self.flash_attention = settings.flash_attention
        if settings.flash_attention == "auto":
            self.flash_attention = ggml.flash_attention()
        batch = llama.llama_batch_init(SCORE_ROWS, 0, 1)
        self._tokens = Handle("the decoder", batch, llama.llama_batch_free)

    def _params(self) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_outputs_max, params.no_perf = self.n_ctx, SCORE_ROWS, True
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_threads = self._settings.threads
        params.n_threads_batch = self._settings.prefill_threads
        params.type_k = params.type_v = _KV_TYPES[self._settings.kv]
        params.flash_attn_type = _FLASH_ATTENTION_TYPES[self._settings.flash_attention]
        if self.hook:
            params.cb_eval = self.hook.callback
        return params

    @property
    def pointer(self) -> Any:
        """llama.cpp's own handle; ModelClosed after close."""
        return self._handle.pointer

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """A span in which decoding ends early once it is cancelled."""
        llama.llama_set_abort_callback(self.pointer, self._abort, None)
        try:
            yield
        finally:
            # A Python callback at every graph node would slow the single steps of decoding.
            llama.llama_set_abort_callback(self.pointer, llama.ggml_abort_callback(), None)
            llama.llama_set_causal_attn(self.pointer, True)

    def read(self, block: Block, kept: int, at_once: int) -> Iterator[int]:
        """Reads a block, `at_once` rows in a batch, but for its first `kept` rows, which are there;
        yields the number of its rows that are, at first and after each batch.

        It ends a batch also where nothing of it is read, so that what follows it is computed in the
        same batches. Raises Cancelled or EngineError.
        """
        yield max(kept, 0)
        llama.llama_set_causal_attn(self.pointer, block.attention == "causal")
        for start in range(max(kept, 0), len(block.rows), at_once):
            positions = block.positions[start : start + at_once]
            self._decode_rows(block.rows[start : start + at_once], positions, len(positions) - 1)
            self.cached.read(positions)
            yield min(start + at_once, len(block.rows))

    def read_again(
        self, blocks: Sequence[Block], at_once: Sequence[int], cached: CachedRows
    ) -> None:
        """Reads blocks, each `at_once` rows in a batch, that are the rows of `cached`. Raises
        Cancelled or EngineError, and nothing is there then.
        """
        try:
            with self.abortable():
                for block, n in zip(blocks, at_once, strict=True):
                    for _ in self.read(block, 0, n):
                        pass
        except BaseException:
            self.clear()
            raise
        self.cached = cached

    def extend(self, tokens: Sequence[int], entries: Sequence[int] | Float) -> None:
        """Reads tokens after all that was read, with logits for each: by their rows of the output
        matrix, or by their embeddings. Raises Cancelled or EngineError.
        """
        start, mrope = self.cached.following, self._settings.mrope
        positions = following(start, len(tokens), mrope=mrope)
        if isinstance(entries, np.ndarray):
            self._decode_rows(entries, positions, 0)
        else:
            batch = self._tokens.pointer
            for i, entry in enumerate(entries):
                batch.token[i] = entry
            # llama.cpp makes all of M-RoPE's of a token's one.
            self._decode(batch, positions[:, 0] if mrope else positions, 0)
        self.cached.drew(tokens, positions)

    def push(self, row: Float) -> None:
        """Reads a row [n_embd] after all that was read, with logits; no prompt goes on from it.
        Raises Cancelled or EngineError.
        """
        positions = following(self.cached.following, 1, mrope=self._settings.mrope)
        self._decode_rows(row[None], positions, 0)
        self.cached.read(positions)

    def _decode_rows(self, rows: Float, positions: Int32, first_logits: int) -> None:
        data = np.ascontiguousarray(rows, np.float32)
        batch = llama.llama_batch_init(len(data), self._settings.n_embd, 1)
        try:
            ctypes.memmove(batch.embd, data.ctypes.data, data.nbytes)
            self._decode(batch, positions, first_logits)
        finally:
            llama.llama_batch_free(batch)

    def _decode(self, batch: Any, positions: Int32, first_logits: int) -> None:
        """Decodes filled entries at these positions, with logits from `first_logits` on."""
        batch.n_tokens = len(positions)
        # A batch has room for one a row, M-RoPE has four, one axis after the other.
        by_axis = np.ascontiguousarray(positions.T, np.int32)
        # A copy: the pointer that ctypes gives is the batch's field itself.
        own = type(batch.pos).from_buffer_copy(batch.pos)
        batch.pos = by_axis.ctypes.data_as(type(own))
        try:
            self._decode_placed(batch, first_logits)
        finally:
            batch.pos = own

    def _decode_placed(self, batch: Any, first_logits: int) -> None:
        for i in range(batch.n_tokens):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= first_logits
        ggml.log.clear()
        if self.hook:
            self.hook.start()
        pointer = self.pointer
        status = interruptible(lambda: llama.llama_decode(pointer, batch), self._cancelled.set)
        if status == 2:
            raise Cancelled
        if status != 0:
            raise EngineError(f"llama.cpp could not decode, status {status} ({ggml.last_log()})")
        if self.hook:
            try:
                self.hook.check()
            except EngineError:
                # The cache of these rows is not what was asked for; nothing may build on it.
                self.clear()
                raise

    def logits(self, row: int) -> Float:
        """The logits of a row of the last batch, [n_outputs]; a view until the next one."""
        pointer = llama.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(pointer, (self._settings.n_outputs,))

    def cut(self, n: int) -> None:
        """Forgets all but the first n rows; raises EngineError where they are not there."""
        memory, past = llama.llama_get_memory(self.pointer), len(self.cached.positions)
        if not 0 < n <= past or n < self.least or not self.cached.divides(n):
            raise EngineError(f"cannot go back to {n} of {past} rows")
        # Also what a batch that was cancelled may have left behind the last row.
        first = self.cached.positions[n - 1] + 1
        if not llama.llama_memory_seq_rm(memory, 0, first, -1):
            raise EngineError(f"llama.cpp could not go back to {n} of {past} rows")
        self.cached.cut(n)

    def clear(self) -> None:
        """Forgets all rows."""
        llama.llama_memory_clear(llama.llama_get_memory(self.pointer), True)
        self.cached, self.least = CachedRows(), 0

    def state(self) -> memoryview:
        """The KV cache of all rows, without those that layers with a window see no more."""

        def get() -> memoryview:
            data = np.empty(llama.llama_state_seq_get_size(self.pointer, 0), np.uint8)
            to = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            return data[: llama.llama_state_seq_get_data(self.pointer, to, len(data), 0)].data

        return interruptible(get, lambda: None)

    def leading_state(self) -> memoryview:
        """The KV cache of the leading blocks, empty where there are none or where it cannot be cut
        to them.
        """
        n = sum(len(block.rows) for block in self.cached.leading)
        if not n or n < self.least:
            return memoryview(b"")
        # llama.cpp gives all rows or none, so that those after them go and come back.
        cached, everything = self.cached.copy(), self.state()
        self.cut(n)
        found = self.state()
        self.take(everything, cached)
        return found

    def take(self, state: memoryview, cached: CachedRows) -> bool:
        """Takes a KV cache, which holds these rows, in place of everything; False, and nothing is
        there, where llama.cpp does not want it.
        """
        self.clear()
        given = np.frombuffer(state, np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama.llama_state_seq_set_data(self.pointer, given, len(state), 0) == len(state):
            n = len(cached.positions)
            self.cached = cached
            # The row before the last sees one row that the state does not have.
            self.least = n - 1 if 0 < self._window < n else 0
            return True
        self.clear()
        return False

    def close(self) -> None:
        """Frees it; a second call does nothing."""
        self._tokens.close()
        self._handle.close()
