"""`python -m edgevlm.benchmarks.peers.mtmd`: one answer by llama.cpp's own multimodal library.

Reads a JSON object from stdin (decoder, mmproj, image, prompt with `<__media__>`, threads,
n_tokens) and prints one: milliseconds of the encoder, to the first token, and of each later token.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from PIL import Image


def answer(given: dict[str, Any]) -> dict[str, float]:
    """Loads everything, asks once to warm up and once to measure."""
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        given["decoder"].encode(), llama.llama_model_default_params()
    )
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch = 2048, 2048
    params.n_threads = params.n_threads_batch = given["threads"]
    context = llama.llama_init_from_model(model, params)
    settings: Any = mtmd.mtmd_context_params_default()
    settings.n_threads, settings.use_gpu, settings.print_timings = given["threads"], False, False
    media = mtmd.mtmd_init_from_file(given["mmproj"].encode(), model, settings)
    if not (model and context and media):
        raise SystemExit("llama.cpp cannot load the model")
    rgb = np.asarray(Image.open(given["image"]).convert("RGB"))
    once = [_ask(context, model, media, rgb, given) for _ in range(2)]
    return once[1]


def _ask(context: Any, model: Any, media: Any, rgb: Any, given: dict[str, Any]) -> dict[str, float]:
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    sampler = llama.llama_sampler_init_greedy()
    start = time.perf_counter()
    chunks = _chunks(media, rgb, given["prompt"].encode())
    past = llama.llama_pos(0)
    none, encode_ms = mtmd.mtmd_helper_post_decode_callback(), 0.0
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk: Any = mtmd.mtmd_input_chunks_get(chunks, i)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            before = time.perf_counter()
            _check(mtmd.mtmd_encode_chunk(media, chunk))
            encode_ms = (time.perf_counter() - before) * 1e3
            rows: Any = mtmd.mtmd_get_output_embd(media)
            _check(
                mtmd.mtmd_helper_decode_image_chunk(
                    media, context, chunk, rows, past, 0, 2048, ctypes.byref(past), none, None
                )
            )
        else:
            _check(
                mtmd.mtmd_helper_eval_chunk_single(
                    media, context, chunk, past, 0, 2048, True, ctypes.byref(past)
                )
            )
    token = llama.llama_sampler_sample(sampler, context, -1)
    first = time.perf_counter()
    for _ in range(given["n_tokens"]):
        step = (llama.llama_token * 1)(token)
        _check(llama.llama_decode(context, llama.llama_batch_get_one(step, 1)))
        token = llama.llama_sampler_sample(sampler, context, -1)
    end = time.perf_counter()
    return {
        "encode_ms": encode_ms,
        "first_token_ms": (first - start) * 1e3,
        "token_ms": (end - first) * 1e3 / given["n_tokens"],
    }


def _chunks(media: Any, rgb: Any, prompt: bytes) -> Any:
    height, width = rgb.shape[:2]
    data = np.ascontiguousarray(rgb).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap: Any = mtmd.mtmd_bitmap_init(width, height, data)
    text: Any = mtmd.mtmd_input_text()
    text.text, text.text_len = prompt, len(prompt)
    text.add_special, text.parse_special = True, False
    chunks: Any = mtmd.mtmd_input_chunks_init()
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    _check(mtmd.mtmd_tokenize(media, chunks, ctypes.byref(text), bitmaps, 1))
    return chunks


def _check(status: int) -> None:
    if status != 0:
        raise SystemExit(f"llama.cpp failed with status {status}")


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.stdin.read()))))
