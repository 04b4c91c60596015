"""The words' half: rows and tokens -> logits -> tokens. The only user of llama_cpp.

llama.cpp aborts the whole process on a prefix larger than its batch, a full context or a bad token
id; every such request is refused here first.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

from edgevlm.errors import BundleCorrupt, ContextOverflow, EngineError
from edgevlm.runtimes.engines import Cancelled, Float
from edgevlm.runtimes.interrupt import interruptible
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.backends import ON_THE_CPU, Offload
from edgevlm.runtimes.llama.embedding_rows import EmbeddingRows
from edgevlm.runtimes.llama.hooks import GraphHook, Importance, graph_hook
from edgevlm.runtimes.native import Handle
from edgevlm.sampling import Sampling
from edgevlm.specs import DecoderSpec, TensorPlace

# Rows of logits that `extend` computes at once; each costs 4 bytes times the vocabulary.
_SCORE_ROWS = 16
# Contexts grow in these steps, so that a slightly longer question does not make a new one.
_CTX_STEP = 256
_BATCH_STEP = 64
_CAUSAL_BATCH = 512
# ggml's type of the state kept of each position, by name. Float32 is for exact decoders alone.
_KV_TYPES = {
    "f32": llama.GGML_TYPE_F32,
    "f16": llama.GGML_TYPE_F16,
    "q8_0": llama.GGML_TYPE_Q8_0,
}


class LlamaDecoder:
    """TextDecoder on llama.cpp's low-level API.

    `exact` keeps the KV cache in float32, flash attention off and GELU out of its table, for
    decoders in f32. `kv` is the cache's type where another is wanted: "f16", or "q8_0", half as
    large, which llama.cpp reads with flash attention only. `repack` lets llama.cpp re-order
    quantized weights at load. `offload` says what runs on another device than the CPU; `layers` is
    how many layers of how many really do. Raises BundleCorrupt if the file does not hold the
    decoder of `spec`, EngineError if the device does not take its layers.
    """

    def __init__(
        self,
        path: Path,
        spec: DecoderSpec,
        place: TensorPlace,
        *,
        threads: int,
        exact: bool = False,
        kv: str | None = None,
        repack: bool = True,
        offload: Offload = ON_THE_CPU,
    ) -> None:
        ggml.quiet()
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = offload.layers
        # An empty list is the CPU alone; without one llama.cpp takes every device it finds.
        handles = [offload.device.handle] if offload.device else []
        devices = (ctypes.c_void_p * (len(handles) + 1))(*handles)
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        params.use_extra_bufts = repack

        def load() -> Handle | None:
            pointer = llama.llama_model_load_from_file(str(path).encode(), params)
            return Handle("the decoder", pointer, llama.llama_model_free) if pointer else None

        # Not in the main thread: a Ctrl-C would be raised in the Python that llama.cpp calls with
        # its messages, and ctypes would drop it.
        loaded = interruptible(load, lambda: None)
        if not loaded and offload.device:
            raise EngineError(f"{offload.device.name} cannot load the decoder ({ggml.last_log()})")
        if not loaded:
            raise BundleCorrupt(path, f"llama.cpp cannot load it ({ggml.last_log()})")
        self._model, model = loaded, loaded.pointer
        self.layers = ggml.offloaded()
        vocabulary = llama.llama_vocab_n_tokens(self._vocab)
        found = (llama.llama_model_n_embd(model), llama.llama_model_n_layer(model), vocabulary)
        if found != (spec.n_embd, spec.n_layer, spec.n_vocab):
            raise BundleCorrupt(path, f"is another decoder (width, layers, vocabulary {found})")
        self._spec, self._threads = spec, threads
        self._kv = kv or ("f32" if exact else "f16")
        self._hook = graph_hook(path, spec, exact=exact)
        self._shared = np.empty((0, spec.n_embd), np.float32)
        self._ends: tuple[int, ...] = ()
        self._rows = EmbeddingRows(path, place)
        self._context: Handle | None = None
        self._batch: Handle | None = None
        self._n_ctx = self._n_batch = self._past = 0
        self._cancelled = cancelled = threading.Event()
        self._abort = llama.ggml_abort_callback(lambda _: cancelled.is_set())

    def listen(self) -> Importance:
        """From now on, sums up what flows into the layers' matrices."""
        self._free_context()
        self._hook = heard = Importance(self._hook)
        return heard

    @property
    def _vocab(self) -> Any:
        return llama.llama_model_get_vocab(self._model.pointer)

    @property
    def _ctx(self) -> Any:
        """llama.cpp's context; ModelClosed after close."""
        _ = self._model.pointer
        if self._context is None:
            raise EngineError("the decoder has read nothing yet")
        return self._context.pointer

    @property
    def bos(self) -> int:
        """See TextDecoder."""
        return int(llama.llama_vocab_bos(self._vocab))

    def tokenize(self, text: str) -> list[int]:
        """See TextDecoder."""
        data = text.encode()
        if not data:
            return []
        size = len(data) + 8
        while True:
            tokens = (llama.llama_token * size)()
            n = llama.llama_tokenize(self._vocab, data, len(data), tokens, size, False, False)
            if n >= 0:
                return list(tokens[:n])
            size = -n

    def piece(self, token: int) -> bytes:
        """See TextDecoder."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                break
            size = -n
        pieces = llama.llama_vocab_type(self._vocab) == llama.LLAMA_VOCAB_TYPE_SPM
        # llama.cpp leaves SentencePiece's sign for a space in user-defined tokens.
        return buffer.raw[:n].replace("\u2581".encode(), b" ") if pieces else buffer.raw[:n]

    def embed(self, tokens: Sequence[int]) -> Float:
        """See TextDecoder."""
        if any(not 0 <= t < self._spec.n_vocab for t in tokens):
            raise EngineError(f"a token id lies outside the vocabulary of {self._spec.n_vocab}")
        return self._rows(tokens)

    def prefill(
        self, rows: Float, *, bidirectional: bool, room: int, shared: Sequence[int] = ()
    ) -> int:
        """See TextDecoder. A bidirectional prefix is one batch: every row sees every other."""
        n = len(rows)
        if n < 1 or rows.shape[1:] != (self._spec.n_embd,):
            raise EngineError(f"rows {rows.shape} are not [n, {self._spec.n_embd}]")
        if n + room > self._spec.context_length:
            raise ContextOverflow(0, n, room, self._spec.context_length)
        # The same for every causal prompt: a longer one does not cost the state of the last.
        self._reserve(n + room, n if bidirectional else _CAUSAL_BATCH)
        self._cancelled.clear()
        kept = self._keep(rows, tuple(shared))
        llama.llama_set_causal_attn(self._ctx, not bidirectional)
        llama.llama_set_abort_callback(self._ctx, self._abort, None)
        try:
            # Shared rows end a batch whether they are kept or not, so that what follows them is
            # computed in the same batches, to the same bits.
            for begin, end in pairwise((kept, *(end for end in shared if end > kept), n)):
                for start in range(begin, end, self._n_batch):
                    self._decode_rows(rows[start : min(start + self._n_batch, end)])
            self._shared, self._ends = rows[: max(shared, default=0)].copy(), tuple(shared)
        finally:
            # A Python callback at every graph node would slow the single steps of decoding.
            llama.llama_set_abort_callback(self._ctx, llama.ggml_abort_callback(), None)
            llama.llama_set_causal_attn(self._ctx, True)
        return kept

    def _keep(self, rows: Float, ends: tuple[int, ...]) -> int:
        """Forgets everything but the state of the most shared rows that are there; returns their
        number. Blocks with other ends were read in other batches.
        """
        for n in range(len(ends), 0, -1):
            end, known = ends[n - 1], self._shared[: ends[n - 1]]
            same = ends[:n] == self._ends[:n] and np.array_equal(rows[:end], known)
            if same and 0 < end <= self._past:
                self.rollback(end)
                # What is read from now on may end half-way.
                self._shared, self._ends = known, ends[:n]
                return end
        self.clear()
        return 0

    def clear(self) -> None:
        """See TextDecoder."""
        _ = self._model.pointer
        if self._context is not None:
            llama.llama_memory_clear(llama.llama_get_memory(self._ctx), True)
        self._past = 0
        self._shared, self._ends = self._shared[:0], ()

    def _decode_rows(self, rows: Float) -> None:
        data = np.ascontiguousarray(rows, np.float32)
        batch = llama.llama_batch_init(len(data), self._spec.n_embd, 1)
        try:
            ctypes.memmove(batch.embd, data.ctypes.data, data.nbytes)
            self._decode(batch, len(data), len(data) - 1)
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
        if self._past == 0 or self._past + len(tokens) > self._n_ctx:
            raise EngineError(f"no room for {len(tokens)} tokens after {self._past} positions")
        if any(not 0 <= t < self._spec.n_vocab for t in tokens):
            raise EngineError(f"a token id lies outside the vocabulary of {self._spec.n_vocab}")
        assert self._batch
        batch = self._batch.pointer
        for i, token in enumerate(tokens):
            batch.token[i] = token
        self._decode(batch, len(tokens), 0)

    def _decode(self, batch: Any, n: int, first_logits: int) -> None:
        """Decodes n filled entries at the next positions, with logits from `first_logits` on."""
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i] = self._past + i
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
            self._check(self._hook)
        self._past += n

    def _check(self, hook: GraphHook) -> None:
        try:
            hook.check()
        except EngineError:
            # The state of these positions is not what was asked for; nothing may build on it.
            self.clear()
            raise

    def logits(self) -> Float:
        """See TextDecoder."""
        return self._logits(-1)

    def _logits(self, row: int) -> Float:
        pointer = llama.llama_get_logits_ith(self._ctx, row)
        return np.ctypeslib.as_array(pointer, (self._spec.n_vocab,)).copy()

    def rollback(self, n: int) -> None:
        """See TextDecoder."""
        memory = llama.llama_get_memory(self._ctx)
        if not 0 < n <= self._past:
            raise EngineError(f"cannot go back to {n} of {self._past} positions")
        if not llama.llama_memory_seq_rm(memory, 0, n, -1):
            raise EngineError(f"llama.cpp could not go back to {n} of {self._past} positions")
        self._past = n

    def sampler(self, sampling: Sampling, penalized: Sequence[int] = ()) -> LlamaSampler:
        """See TextDecoder."""
        return LlamaSampler(self, sampling, self._spec, penalized)

    def sample(self, chain: llama.llama_sampler_p) -> int:
        """Draws from the last logits with a llama.cpp sampler chain."""
        return int(llama.llama_sampler_sample(chain, self._ctx, -1))

    def cancel(self) -> None:
        """See TextDecoder."""
        self._cancelled.set()

    def _reserve(self, n_ctx: int, n_batch: int) -> None:
        """Makes a context of at least this many positions and rows in one batch."""
        if self._context is not None and n_ctx <= self._n_ctx and n_batch <= self._n_batch:
            return
        self._free_context()
        n_batch = -(-max(n_batch, _SCORE_ROWS) // _BATCH_STEP) * _BATCH_STEP
        params = llama.llama_context_default_params()
        params.n_ctx = -(-max(n_ctx, n_batch) // _CTX_STEP) * _CTX_STEP
        params.n_batch = params.n_ubatch = n_batch
        params.n_outputs_max = _SCORE_ROWS
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = True
        if self._hook:
            params.cb_eval = self._hook.callback
        params.type_k = params.type_v = _KV_TYPES[self._kv]
        if self._kv == "f32":
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        elif self._kv == "q8_0":
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        ggml.log.clear()
        context = llama.llama_init_from_model(self._model.pointer, params)
        if not context:
            raise EngineError(
                f"llama.cpp cannot make a context of {params.n_ctx} positions ({ggml.last_log()}); "
                "free some memory or shorten the request"
            )
        self._context = Handle("the decoder", context, llama.llama_free, self._model)
        self._n_ctx, self._n_batch, self._past = params.n_ctx, n_batch, 0
        batch = llama.llama_batch_init(_SCORE_ROWS, 0, 1)
        self._batch = Handle("the decoder", batch, llama.llama_batch_free)

    def _free_context(self) -> None:
        for handle in (self._batch, self._context):
            if handle:
                handle.close()
        self._context = self._batch = None

    def close(self) -> None:
        """See TextDecoder."""
        self._free_context()
        self._model.close()


class LlamaSampler:
    """llama.cpp's sampler chain: penalty, top-k, top-p, min-p, temperature, draw; or greedy."""

    def __init__(
        self,
        decoder: LlamaDecoder,
        sampling: Sampling,
        spec: DecoderSpec,
        penalized: Sequence[int] = (),
    ) -> None:
        self._decoder = decoder
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self._chain = Handle("the sampler", chain, llama.llama_sampler_free)
        for sampler in _chain(sampling, spec.n_vocab, spec.context_length):
            llama.llama_sampler_chain_add(chain, sampler)
        for token in penalized:
            llama.llama_sampler_accept(chain, token)

    def sample(self) -> int:
        """See TokenSampler."""
        return self._decoder.sample(self._chain.pointer)

    def close(self) -> None:
        """See TokenSampler."""
        self._chain.close()


def _chain(s: Sampling, n_vocab: int, window: int) -> list[llama.llama_sampler_p]:
    chain = []
    if s.repetition_penalty != 1.0:
        # Over the whole answer, and not the prompt, as transformers counts with inputs_embeds.
        penalty = s.repetition_penalty
        chain.append(llama.llama_sampler_init_penalties(n_vocab, window, penalty, 0.0, 0.0))
    if s.temperature == 0.0:
        return [*chain, llama.llama_sampler_init_greedy()]
    seed = llama.LLAMA_DEFAULT_SEED if s.seed is None else s.seed
    return [
        *chain,
        llama.llama_sampler_init_top_k(s.top_k),
        llama.llama_sampler_init_top_p(s.top_p, 1),
        llama.llama_sampler_init_min_p(s.min_p, 1),
        llama.llama_sampler_init_temp(s.temperature),
        llama.llama_sampler_init_dist(seed),
    ]


def cpu_features() -> list[str]:
    """What this build of llama.cpp uses of the processor, such as AVX2."""
    ggml.quiet()
    found: list[bytes] = re.findall(rb"(\w+) = 1", llama.llama_print_system_info())
    return [name.decode() for name in found]
