"""TinyGPT-V's own arithmetic in PyTorch, float32: what there was before a bundle."""

from __future__ import annotations

import time
from typing import Any

TITLE = "PyTorch"
PACKAGE = "torch"
INSTALL = 'pip install "edgevlm[export]"'
NEEDS = ("checkpoint",)


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Everything is in memory, as it is where the original answers; asks once to warm up and once
    to measure.
    """
    if task["family"] != "tinygptv":
        raise NotImplementedError(f"knows TinyGPT-V and no {task['family']}")
    import torch

    from edgevlm.export import pipeline
    from edgevlm.export.parity.quiet import quiet
    from edgevlm.export.parity.references import tinygptv as original
    from edgevlm.export.parity.references.causal import weights

    torch.set_num_threads(task["threads"])
    job = pipeline.read(task["checkpoint"])
    with quiet(), torch.inference_mode():
        tower = weights(job.parts["vision"])
        former = original.queries(job.model.projector, weights(job.parts["projector"]))
        decoder = original.language_model(job.model.text, job.parts["decoder"])

        def embeddings(picture: Any) -> Any:
            pixels = original.preprocessed(picture, job)
            return former(original.tower(pixels, job.model.vision, tower))

        _ask(embeddings, decoder, task, 1)
        measured = _ask(embeddings, decoder, task, task["n_tokens"])
    return measured | {"how": "float32"}


def _ask(embeddings: Any, decoder: Any, task: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache

    from edgevlm.image import read_image

    start = time.perf_counter()
    picture = read_image(task["image"])
    read = time.perf_counter()
    rows = embeddings(picture)
    encoded = time.perf_counter()
    embed = decoder.get_input_embeddings()
    before, after = (embed(torch.tensor([task[side]])) for side in ("before", "after"))
    prompt = torch.cat([before, rows, after], 1)
    state: Any = DynamicCache(config=decoder.config)
    out = decoder(inputs_embeds=prompt, past_key_values=state, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(n_tokens):
        out = decoder(input_ids=token, past_key_values=state, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return {
        "encode_ms": (encoded - read) * 1e3,
        "prefill_ms": (first - encoded) * 1e3,
        "first_token_ms": (first - start) * 1e3,
        "token_ms": (time.perf_counter() - first) * 1e3 / n_tokens,
        "positions": prompt.shape[1],
    }
