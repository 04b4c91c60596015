"""OpenVINO GenAI on optimum-intel's export, weights in 4 bits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

TITLE = "OpenVINO GenAI"
PACKAGE = "openvino-genai"
INSTALL = 'pip install openvino-genai "optimum-intel[openvino]" torch'
NEEDS = ("checkpoint",)


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Exports the checkpoint once, asks once to warm up and once to measure."""
    import openvino_genai

    folder = Path(task["work"]) / "openvino"
    if not folder.is_dir():
        _export(task, folder)
    pipe = openvino_genai.VLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=task["threads"])
    _ask(pipe, task, 1)
    return _ask(pipe, task, task["n_tokens"]) | {"how": "int8 + int4"}


def _export(task: dict[str, Any], folder: Path) -> None:
    """Raises optimum-intel's own errors."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig, OVWeightQuantizationConfig

    part = folder.with_name("openvino.part")
    bits = OVWeightQuantizationConfig(bits=4, sym=False, group_size=64)
    main_export(
        task["checkpoint"],
        part,
        task="image-text-to-text",
        ov_config=OVConfig(quantization_config=bits),
    )
    part.rename(folder)


def _ask(pipe: Any, task: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    import numpy as np
    import openvino
    import openvino_genai
    from PIL import Image

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = n_tokens + 1
    config.ignore_eos, config.do_sample = True, False
    start = time.perf_counter()
    picture = openvino.Tensor(np.asarray(Image.open(task["image"]).convert("RGB"))[None])
    read_ms = (time.perf_counter() - start) * 1e3
    metrics = pipe.generate(task["words"], images=[picture], generation_config=config).perf_metrics
    encode_ms = metrics.get_prepare_embeddings_duration().mean
    first_ms = metrics.get_ttft().mean
    return {
        "encode_ms": encode_ms,
        "prefill_ms": first_ms - encode_ms,
        "first_token_ms": read_ms + first_ms,
        "token_ms": metrics.get_tpot().mean,
        "positions": metrics.get_num_input_tokens(),
    }
