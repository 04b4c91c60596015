"""The language decoder on llama.cpp: blocks of embeddings and tokens -> logits.

llama.cpp aborts the whole process on a bidirectional block larger than its batch, a full context or
a bad token id; every such request is refused here first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from edgevlm.errors import BundleCorrupt, ContextOverflow, EngineError
from edgevlm.runtimes.engines import Block, Float, Recall, TokenSampler, Told, count_rows
from edgevlm.runtimes.llama import ggml, weights
from edgevlm.runtimes.llama import grammar as grammars
from edgevlm.runtimes.llama import tokenizer as tokenizers
from edgevlm.runtimes.llama.backends import ON_THE_CPU, Offload
from edgevlm.runtimes.llama.bindings import llama
from edgevlm.runtimes.llama.cached_rows import CachedRows
from edgevlm.runtimes.llama.context import SCORE_ROWS, Context, ContextSettings
from edgevlm.runtimes.llama.edits import Hidden
from edgevlm.runtimes.llama.embedding_rows import EmbeddingRows
from edgevlm.runtimes.llama.grammar import GrammarVocabulary
from edgevlm.runtimes.llama.hooks import Importance, graph_hook
from edgevlm.runtimes.llama.output_rows import OutputRows
from edgevlm.runtimes.llama.tokenizer import LlamaTokenizer
from edgevlm.runtimes.native import Handle
from edgevlm.sampling import Sampling
from edgevlm.specs import DecoderSpec, TensorLocation
from edgevlm.texts import json_ids
from edgevlm.types import FlashAttention, RunSettings

# Rows of a causal block that are read at once where nobody chose another number.
CAUSAL_BATCH = 512
# The one way that these are read, whatever is wished.
_FLASH_ATTENTION: dict[str, FlashAttention] = {"f32": "off", "q8_0": "on"}


class LlamaDecoder:
    """TextDecoder on llama.cpp's low-level API.

    `threads` draw tokens and `prefill_threads`, as many where none are named, read the input,
    `batch` rows of a causal block at once. `exact` keeps the KV cache in float32, flash attention
    off and GELU out of its table, for decoders in f32. `kv` is the cache's type where another is
    wanted: "f16", or "q8_0", half as large, which llama.cpp reads with flash attention only.
    `repack` lets llama.cpp re-order quantized weights at load. `offload` says what runs on another
    device than the CPU; `layers` is how many layers of how many really do. `input` is the file with
    the token embeddings, at `location`, and the tokenizer, where the decoder's own has not all of
    them; `tokenizer` is the file that makes ids of texts, where not llama.cpp does. If it is not
    `whole` only the vocabulary is loaded, and the rest with the first prefill
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
        tokenizer: Path | None = None,
    ) -> None:
        ggml.start()
        self._path, self._offload = path, offload
        self._spec, self._repack = spec, repack
        self.layers = (0, spec.n_layer + 1)
        self._model: Handle | None = self._load() if whole else None
        own = self._model if input in (None, path) else None
        ids = json_ids(tokenizer) if tokenizer else None
        self._tokenizer = LlamaTokenizer(own, ids) if own else tokenizers.load(input or path, ids)
        if self._tokenizer.n_tokens != spec.n_vocab:
            raise BundleCorrupt(input or path, f"has {self._tokenizer.n_tokens} tokens")
        self._releases = not whole
        self._output = OutputRows(path, spec)
        self._kv = kv or ("f32" if exact else "f16")
        self._context: Context | None = None
        # Positions that the last prefill asked for.
        self._wanted = 0
        self.adjust(threads, prefill_threads or threads, batch, flash_attention)
        self._exact, self._watches = exact, False
        self._watched = Hidden(spec.n_layer, spec.n_embd)
        self._hook = graph_hook(path, spec, exact=exact)
        self._rows = EmbeddingRows(input or path, location, spec)
        self._cancelled = threading.Event()

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
        self._rows_at_once = batch
        self._settings = ContextSettings(
            threads=threads,
            prefill_threads=prefill_threads,
            kv=self._kv,
            flash_attention=_FLASH_ATTENTION.get(self._kv, flash_attention),
            n_embd=self._spec.n_embd,
            n_outputs=self._spec.outputs,
            mrope=self._spec.positions == "mrope",
        )

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
    def _made(self) -> Context:
        """The context; EngineError before the first prefill, ModelClosed after close."""
        _ = self._tokenizer.n_tokens
        if self._context is None:
            raise EngineError("the decoder has read nothing yet")
        return self._context

    @property
    def _cached(self) -> CachedRows:
        return self._context.cached if self._context else CachedRows()

    @property
    def settings(self) -> RunSettings:
        """See TextDecoder."""
        made, wanted = self._context, self._settings
        return RunSettings(
            threads=wanted.threads,
            prefill_threads=wanted.prefill_threads,
            repacking="on" if self._repack else "off",
            kv=self._kv,
            flash_attention=made.flash_attention if made else wanted.flash_attention,
            batch=made.n_batch if made else 0,
            context=made.n_ctx if made else 0,
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

    def prefill(
        self,
        blocks: Sequence[Block],
        *,
        room: int,
        recall: Recall | None = None,
        told: Told | None = None,
    ) -> int:
        """See TextDecoder. A bidirectional block is one batch: every row sees every other."""
        n = count_rows(blocks, self._spec)
        if n + room > self._spec.context_length:
            raise ContextOverflow(0, n, room, self._spec.context_length)
        # Before weights may be loaded: whoever cancels meanwhile means this prefill.
        self._cancelled.clear()
        self._wanted = n + room
        # The same for every causal prompt: a longer one does not cost the cache of the last.
        kept = self.common(blocks)
        context = self._reserve(*self._sizes(n, blocks), kept)
        kept = self._recall(context, blocks, kept, None if self._is_long(n) else recall)
        with context.abortable():
            read = 0
            for i, block in enumerate(blocks):
                for done in context.read(block, kept - read, self._at_once(block)):
                    if told:
                        told(max(read + done - kept, 0), n - kept)
                read += len(block.rows)
                if read > kept:
                    context.cached.whole(blocks[: i + 1])
            context.cached.prompt(blocks, kept)
        return kept

    def _at_once(self, block: Block) -> int:
        """Number of a block's rows that are read at once."""
        return self._rows_at_once if block.attention == "causal" else len(block.rows)

    def common(self, blocks: Sequence[Block]) -> int:
        """The number of leading rows of a prompt that the KV cache holds and can be cut to."""
        made, total = self._context, sum(len(block.rows) for block in blocks)
        if made is None or self._is_long(made.n_ctx) != self._is_long(total):
            return 0
        n = made.cached.common(blocks, self.embed)
        return n if n >= made.least else 0

    def _is_long(self, n: int) -> bool:
        """True for so many rows, or a context of so many, whose positions are turned by factors for
        long texts. llama.cpp goes by the context, the original by the rows that there are.
        """
        return 0 < self._spec.short_context < n

    def _sizes(self, n: int, blocks: Sequence[Block]) -> tuple[int, int]:
        """The positions of a context that reads blocks up to `n` rows in all, and the rows in one
        batch; no more than are turned alike.
        """
        short = self._spec.short_context
        positions, at_once = max(self._wanted, n), max(map(self._at_once, blocks))
        if not short or self._is_long(n):
            return positions, at_once
        return min(positions, short), min(at_once, short)

    def _enter(self, n: int) -> Context:
        """The context, for `n` rows in all; those that are there are read again where they were
        turned otherwise. Raises Cancelled, and nothing is there then.
        """
        context = self._made
        if self._is_long(n) == self._is_long(context.n_ctx):
            return context
        cached = context.cached
        blocks = cached.everything(self.embed)
        context = self._reserve(*self._sizes(n, blocks), 0)
        context.read_again(blocks, list(map(self._at_once, blocks)), cached)
        return context

    @staticmethod
    def _recall(context: Context, blocks: Sequence[Block], kept: int, recall: Recall | None) -> int:
        """Takes the KV cache of more leading blocks than `kept` rows where somebody kept it;
        returns the number of rows that are there now.
        """
        for n in range(len(blocks) - 1, 0, -1):
            rows = sum(len(block.rows) for block in blocks[:n])
            if recall and rows > kept and (state := recall(n)):
                return rows if context.take(state, CachedRows.of(blocks[:n])) else 0
        return kept

    @property
    def reading(self) -> str:
        """See TextDecoder. Threads split the keys among them, so that sums round otherwise."""
        wanted = self._settings
        settings = (wanted.prefill_threads, self._rows_at_once, wanted.kv, wanted.flash_attention)
        return repr((*settings, self._repack))

    @property
    def blocks(self) -> Sequence[Block]:
        """See TextDecoder."""
        return self._cached.leading

    def state(self) -> memoryview:
        """See TextDecoder."""
        made = self._context
        if made is None or self._is_long(made.n_ctx):
            return memoryview(b"")
        return made.leading_state()

    def hand_over(self, other: LlamaDecoder) -> None:
        """Gives all rows to a decoder of the same file, which goes on from there; this one keeps
        them.
        """
        context, other._wanted = self._made, self._wanted
        state, to = context.state(), other._reserve(context.n_ctx, 0, 0)
        if not to.take(state, context.cached.copy()):
            raise EngineError(f"llama.cpp could not hand over a KV cache of {len(state)} bytes")

    def clear(self) -> None:
        """See TextDecoder."""
        _ = self._tokenizer.n_tokens
        if self._context:
            self._context.clear()

    def extend(self, tokens: Sequence[int]) -> Float:
        """See TextDecoder."""
        out = np.empty((len(tokens), self._spec.n_vocab), np.float32)
        start = 0
        while start < len(tokens):
            n = len(self._made.cached.positions)
            left = self._spec.short_context - n
            # Those that still are turned as what is there, as if they were read one by one.
            part = tokens[start : start + (min(SCORE_ROWS, left) if left > 0 else SCORE_ROWS)]
            self._enter(n + len(part))
            self._decode_tokens(part)
            for i in range(len(part)):
                out[start + i] = self._logits(i)
            start += len(part)
        return out

    def step(self, token: int) -> None:
        """See TextDecoder."""
        self._enter(len(self._made.cached.positions) + 1)
        self._decode_tokens([token])

    def _decode_tokens(self, tokens: Sequence[int]) -> None:
        context = self._made
        n = len(context.cached.positions)
        if n == 0 or n + len(tokens) > context.n_ctx:
            raise EngineError(f"no room for {len(tokens)} tokens after {n} rows")
        if any(not 0 <= t < self._spec.n_vocab for t in tokens):
            raise EngineError(f"a token id lies outside the vocabulary of {self._spec.n_vocab}")
        rows = self._output.rows(tokens)
        # Tokens that a trimmed decoder has no row of are read as a question is.
        context.extend(tokens, rows if len(rows) == len(tokens) else self._rows(tokens))

    def watch(self) -> None:
        """See TextDecoder."""
        if not self._watches:
            self._watches = True
            more = [self._watched]
            self._hook = graph_hook(self._path, self._spec, exact=self._exact, more=more)

    def hidden(self) -> Float:
        """See TextDecoder."""
        if self._watched.row is None:
            raise EngineError("the decoder's last layer was not watched while it read")
        return self._watched.row

    def step_row(self, row: Float) -> None:
        """See TextDecoder."""
        context = self._made
        if len(context.cached.positions) + 1 > context.n_ctx:
            raise EngineError(f"no room for a row after {len(context.cached.positions)}")
        context.push(row)

    def logits(self) -> Float:
        """See TextDecoder."""
        return self._logits(-1)

    def _logits(self, row: int) -> Float:
        return self._output.logits(self._made.logits(row))

    def rule_out(self, tokens: Sequence[int]) -> None:
        """See TextDecoder."""
        self._made.logits(-1)[self._output.rows(tokens)] = -np.inf

    def rollback(self, n: int) -> None:
        """See TextDecoder."""
        self._made.cut(n)

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
        return self._output.token(llama.llama_sampler_sample(chain, self._made.pointer, -1))

    def cancel(self) -> None:
        """See TextDecoder."""
        self._cancelled.set()

    def _reserve(self, n_ctx: int, n_batch: int, kept: int) -> Context:
        """A context of at least this many positions and rows in one batch; of what was read the
        first `kept` rows stay, and nothing else.
        """
        made, state = self._context, None
        if made and kept:
            made.cut(kept)
        elif made:
            made.clear()
        enough = made and n_ctx <= made.n_ctx and n_batch <= made.n_batch
        same = (
            made and made.hook is self._hook and self._is_long(n_ctx) == self._is_long(made.n_ctx)
        )
        if made and enough and same:
            return made
        # A state is of the last row's view: one of more rows might lack what these see.
        cached = self._cached
        if made and kept:
            state = made.state()
        self._free_context()
        self._context = made = Context(
            self._weights,
            self._settings,
            n_ctx=n_ctx,
            n_batch=n_batch,
            hook=self._hook,
            cancelled=self._cancelled,
        )
        if state is not None:
            made.take(state, cached)
        return made

    def _free_context(self) -> None:
        if self._context:
            self._context.close()
        self._context = None

    def release(self) -> None:
        """See TextDecoder. The vocabulary stays: another thread may be tokenizing."""
        if self._releases and self._model:
            self._free_context()
            self._model.close()
            self._model = None

    def close(self) -> None:
        """See TextDecoder."""
        self._free_context()
        self._tokenizer.close()
        if self._model:
            self._model.close()
