"""OpenVINO GenAI on optimum-intel's export, weights in 4 bits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

TITLE = "OpenVINO GenAI"
PACKAGE = "openvino-genai"
INSTALL = (
    'pip install openvino-genai "optimum-intel[openvino]" "transformers<5" torch torchvision '
    "sentencepiece protobuf"
)
NEEDS = ("config", "checkpoint")
# OpenVINO's own name of the first picture in a prompt.
_PICTURE = "<ov_genai_image_0>"
# More than any prompt has, so that each is read in one piece.
_ALL_TOKENS = 1 << 20


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Exports the checkpoint once, asks once to warm up and once to measure."""
    import openvino_genai

    folder = Path(task["work"]) / "openvino"
    if not folder.is_dir():
        _export(task, folder)
    # As it schedules one question alone, but for the blocks that it keeps of the question before.
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, _ALL_TOKENS
    settings = {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": task["threads"]}
    try:
        pipe = openvino_genai.VLMPipeline(folder, "CPU", **settings)
    except RuntimeError as e:
        if "VLM model type" in str(e):
            raise NotImplementedError(
                f"has no model of the kind {task['config']['model_type']}"
            ) from e
        raise
    _ask(pipe, task, 1)
    return _ask(pipe, task, task["n_tokens"]) | {"how": "int8 + int4"}


def _export(task: dict[str, Any], folder: Path) -> None:
    """Raises NotImplementedError, or optimum-intel's own errors."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig, OVWeightQuantizationConfig
    from transformers import CONFIG_MAPPING, AutoTokenizer

    kind = task["config"]["model_type"]
    if kind not in CONFIG_MAPPING:
        raise NotImplementedError(f"has no model of the kind {kind}")

    part = folder.with_name("openvino.part")
    bits = OVWeightQuantizationConfig(bits=4, sym=False, group_size=64)
    try:
        main_export(
            task["checkpoint"],
            part,
            task="image-text-to-text",
            ov_config=OVConfig(quantization_config=bits),
        )
    except ValueError as e:
        if "unsupported architecture" in str(e):
            raise NotImplementedError(f"exports no model of the kind {kind}") from e
        raise
    names = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
    untyped: Any = AutoTokenizer
    tokenizer = untyped.from_pretrained(part)
    for model, name in zip(convert_tokenizer(tokenizer, with_detokenizer=True), names, strict=True):
        openvino.save_model(model, part / name)
    part.rename(folder)


def _ask(pipe: Any, task: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    import numpy as np
    import openvino
    import openvino_genai
    from PIL import Image

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = n_tokens + 1
    config.ignore_eos, config.do_sample = True, False
    # The task's prompt is whole, and not every checkpoint has a template.
    config.apply_chat_template = False
    prompt = task["prompt"].replace("<__begin__>", "").replace("<__media__>", _PICTURE)
    start = time.perf_counter()
    picture = openvino.Tensor(np.asarray(Image.open(task["image"]).convert("RGB"))[None])
    read_ms = (time.perf_counter() - start) * 1e3
    metrics = pipe.generate(prompt, images=[picture], generation_config=config).perf_metrics
    encode_ms = metrics.get_prepare_embeddings_duration().mean
    first_ms = metrics.get_ttft().mean
    return {
        "encode_ms": encode_ms,
        "prefill_ms": first_ms - encode_ms,
        "first_token_ms": read_ms + first_ms,
        "token_ms": metrics.get_tpot().mean,
        "positions": metrics.get_num_input_tokens(),
    }
