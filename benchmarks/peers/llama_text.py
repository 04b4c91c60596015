"""Plain llama.cpp: the same decoder file, as many positions of text, no picture.

What a language model of this size costs here without any vision: the floor of decoding.
"""

from __future__ import annotations

import time
from typing import Any

TITLE = "llama.cpp, text alone"
PACKAGE = "llama-cpp-python"
INSTALL = "pip install llama-cpp-python"


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Loads the decoder with llama.cpp's defaults, warms it up and measures once."""
    import llama_cpp as llama

    from edgevlm.runtimes.llama import ggml

    ggml.start()
    model = llama.llama_model_load_from_file(
        task["decoder"].encode(), llama.llama_model_default_params()
    )
    if not model:
        raise RuntimeError("llama.cpp cannot load the decoder")
    n_words = len(task["before"]) + len(task["after"])
    n = task["image_tokens"] + n_words
    # Any token does for a position of the picture.
    tokens = [*task["before"], *[task["after"][0]] * task["image_tokens"], *task["after"]]
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = -(-(n + task["n_tokens"] + 1) // 256) * 256
    params.n_threads = params.n_threads_batch = task["threads"]
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    _ask(context, tokens, 1)
    return _ask(context, tokens, task["n_tokens"]) | {"how": "same decoder", "positions": n}


def _ask(context: Any, tokens: list[int], n_tokens: int) -> dict[str, Any]:
    import llama_cpp as llama

    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    sampler = llama.llama_sampler_init_greedy()
    start = time.perf_counter()
    _decode(context, tokens)
    token = llama.llama_sampler_sample(sampler, context, -1)
    first = time.perf_counter()
    for _ in range(n_tokens):
        _decode(context, [token])
        token = llama.llama_sampler_sample(sampler, context, -1)
    end = time.perf_counter()
    llama.llama_sampler_free(sampler)
    return {"prefill_ms": (first - start) * 1e3, "token_ms": (end - first) * 1e3 / n_tokens}


def _decode(context: Any, tokens: list[int]) -> None:
    import llama_cpp as llama

    values = (llama.llama_token * len(tokens))(*tokens)
    status = llama.llama_decode(context, llama.llama_batch_get_one(values, len(tokens)))
    if status != 0:
        raise RuntimeError(f"llama.cpp failed with status {status}")
