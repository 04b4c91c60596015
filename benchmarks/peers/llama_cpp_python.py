"""llama-cpp-python as its documentation uses it: Llama and the chat handler for LLaVA-1.5."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

TITLE = "llama-cpp-python"
PACKAGE = "llama-cpp-python"
INSTALL = "pip install llama-cpp-python"
NEEDS = ("mmproj",)


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Loads everything, asks once to warm up and once to measure."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    handler = Llava15ChatHandler(clip_model_path=task["mmproj"], verbose=False)
    llm = Llama(
        model_path=task["decoder"],
        chat_handler=handler,
        n_ctx=2048,
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        verbose=False,
    )
    _ask(llm, task, 1)
    return _ask(llm, task, task["n_tokens"]) | {"how": "fp16 + same decoder"}


def _ask(llm: Any, task: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    from llama_cpp import LogitsProcessorList

    times: list[float] = []
    positions: list[int] = []

    def watch(ids: Any, scores: Any) -> Any:
        # Called when the logits of the next token are there.
        times.append(time.perf_counter())
        positions.append(len(ids))
        scores[llm.token_eos()] = -float("inf")
        return scores

    start = time.perf_counter()
    llm.create_chat_completion(
        messages=[{"role": "user", "content": _content(task)}],
        max_tokens=n_tokens + 1,
        temperature=0.0,
        repeat_penalty=1.0,
        logits_processor=LogitsProcessorList([watch]),
    )
    if len(times) <= n_tokens:
        raise RuntimeError(f"ended after {len(times)} of {n_tokens + 1} tokens")
    return {
        "first_token_ms": (times[0] - start) * 1e3,
        "token_ms": (times[n_tokens] - times[0]) * 1e3 / n_tokens,
        "positions": positions[0],
    }


def _content(task: dict[str, Any]) -> list[dict[str, Any]]:
    data = base64.b64encode(Path(task["image"]).read_bytes()).decode()
    url = f"data:image/png;base64,{data}"
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": task["words"]},
    ]
