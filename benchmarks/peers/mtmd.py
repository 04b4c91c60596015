"""llama.cpp's own multimodal library, with its defaults and the tower in half precision."""

from __future__ import annotations

import ctypes
import re
import time
from typing import Any

TITLE = "llama.cpp, multimodal"
PACKAGE = "llama-cpp-python"
INSTALL = "pip install llama-cpp-python"
NEEDS = ("mmproj",)


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Loads everything, asks once to warm up and once to measure."""
    import llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd

    from edgevlm.runtimes.llama import ggml

    ggml.start()
    model = llama.llama_model_load_from_file(
        task["decoder"].encode(), llama.llama_model_default_params()
    )
    params = llama.llama_context_default_params()
    # Its own texts around tiles may be longer than ours.
    positions = len(task["before"]) + task["image_tokens"] + len(task["after"])
    params.n_ctx, params.n_batch = max(2048, positions + task["n_tokens"] + 512), 2048
    params.n_threads = params.n_threads_batch = task["threads"]
    context = llama.llama_init_from_model(model, params)
    settings: Any = mtmd.mtmd_context_params_default()
    settings.n_threads, settings.use_gpu, settings.print_timings = task["threads"], False, False
    media = mtmd.mtmd_init_from_file(task["mmproj"].encode(), model, settings)
    if not (model and context and media):
        raise RuntimeError("llama.cpp cannot load the model")
    task |= {"prompt": _with_tokens(model, task["prompt"])}
    _ask(context, media, task, 1)
    return _ask(context, media, task, task["n_tokens"]) | {"how": "fp16 + same decoder"}


def _with_tokens(model: Any, prompt: str) -> str:
    """The prompt with the own texts of its tokens, of the begin token, too: the file says that no
    tokenizer shall add it.
    """
    import llama_cpp as llama

    vocab = llama.llama_model_get_vocab(model)
    buffer = ctypes.create_string_buffer(64)

    def text(found: re.Match[str]) -> str:
        token = int(found[1]) if found[1] else llama.llama_vocab_bos(vocab)
        n = llama.llama_token_to_piece(vocab, token, buffer, 64, 0, True)
        return buffer.raw[:n].decode()

    return re.sub(r"<__begin__>|\{id:(\d+)\}", text, prompt)


def _ask(context: Any, media: Any, task: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    import llama_cpp as llama

    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    sampler = llama.llama_sampler_init_greedy()
    start = time.perf_counter()
    chunks = _chunks(media, task["image"], task["prompt"].encode())
    read = time.perf_counter()
    encode_ms, past = _read(context, media, chunks)
    token = llama.llama_sampler_sample(sampler, context, -1)
    first = time.perf_counter()
    for _ in range(n_tokens):
        step = (llama.llama_token * 1)(token)
        _check(llama.llama_decode(context, llama.llama_batch_get_one(step, 1)))
        token = llama.llama_sampler_sample(sampler, context, -1)
    end = time.perf_counter()
    return {
        "encode_ms": encode_ms,
        "prefill_ms": (first - read) * 1e3 - encode_ms,
        "first_token_ms": (first - start) * 1e3,
        "token_ms": (end - first) * 1e3 / n_tokens,
        "positions": past,
    }


def _read(context: Any, media: Any, chunks: Any) -> tuple[float, int]:
    """Reads texts and tiles; milliseconds of the encoder, and the number of positions."""
    import llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd

    past, encode_ms = llama.llama_pos(0), 0.0
    none = mtmd.mtmd_helper_post_decode_callback()
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk: Any = mtmd.mtmd_input_chunks_get(chunks, i)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            before = time.perf_counter()
            _check(mtmd.mtmd_encode_chunk(media, chunk))
            encode_ms += (time.perf_counter() - before) * 1e3
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
    return encode_ms, past.value


def _chunks(media: Any, image: str, prompt: bytes) -> Any:
    import llama_cpp.mtmd_cpp as mtmd
    import numpy as np
    from PIL import Image

    rgb = np.ascontiguousarray(Image.open(image).convert("RGB"))
    height, width = rgb.shape[:2]
    data = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap: Any = mtmd.mtmd_bitmap_init(width, height, data)
    text: Any = mtmd.mtmd_input_text()
    text.text, text.text_len = prompt, len(prompt)
    text.add_special, text.parse_special = False, True
    chunks: Any = mtmd.mtmd_input_chunks_init()
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    _check(mtmd.mtmd_tokenize(media, chunks, ctypes.byref(text), bitmaps, 1))
    return chunks


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"llama.cpp failed with status {status}")
