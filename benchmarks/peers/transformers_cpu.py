"""transformers on the CPU in float32, PyTorch's fastest type where a CPU has no bfloat16."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

TITLE = "transformers"
PACKAGE = "transformers"
INSTALL = 'pip install "transformers<5" torch'
NEEDS = ("config",)
_PROCESSORS = {
    "siglip_vision_model": "SiglipImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
}
# What a model's own processor tells that of its pictures, and what a model reads of them.
_TILED = {"internvl": {"crop_to_patches": True}}
_PICTURES = ("pixel_values", "image_sizes", "image_grid_thw")
# Kinds that are told which tokens are a picture's: its rows see one another.
_MARKED = ("gemma3",)
# Modules as families call them: the tower, the connector.
_TOWERS = ("vision_tower", "vision_model", "visual")
_CONNECTORS = ("multi_modal_projector", "connector", "merger")


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Loads the checkpoint, or fills its shapes with random weights where there is none; asks once
    to warm up and once to measure.
    """
    import torch

    torch.set_num_threads(task["threads"])
    model = _model(task)
    processor = _processor(task, model.config)
    with torch.inference_mode():
        _ask(model, processor, task, 1)
        measured = _ask(model, processor, task, task["n_tokens"])
    return measured | {"how": "float32"}


def _model(task: dict[str, Any]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    kind = task["config"]["model_type"]
    if kind not in CONFIG_MAPPING:
        raise NotImplementedError(f"has no model of the kind {kind}")
    if task["checkpoint"]:
        return auto.from_pretrained(task["checkpoint"], dtype=torch.float32).eval()
    given = dict(task["config"])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    # A published config names the type of its weights; masks would be made in it.
    for part in (config, config.get_text_config(), config.vision_config):
        part.dtype = torch.float32
    with torch.device("meta"):
        model = auto.from_config(config)
    model = model.to_empty(device="cpu").float().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        # Pages that nothing was written to are no memory at all.
        torch.nn.init.uniform_(parameter, -0.03, 0.03)
    _fill_buffers(model)
    return model


def _fill_buffers(model: Any) -> None:
    """Buffers that a meta device left empty: positions, and the frequencies of rotary ones."""
    import torch

    for module in model.modules():
        if hasattr(module, "position_ids"):
            n = module.position_ids.shape[-1]
            module.position_ids.copy_(torch.arange(n).expand((1, -1)))
        if hasattr(module, "rope_init_fn"):
            inv_freq, module.attention_scaling = module.rope_init_fn(module.config, "cpu")
            module.inv_freq.copy_(inv_freq)
        elif hasattr(module, "inv_freq"):  # of Qwen2-VL's tower
            n = len(module.inv_freq)
            module.inv_freq.copy_(10000.0 ** -(torch.arange(n) / n))


def _processor(task: dict[str, Any], config: Any) -> Any:
    import transformers

    untyped: Any = transformers
    folder = task["checkpoint"]
    if folder and (Path(folder) / "preprocessor_config.json").is_file():
        return untyped.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    if pictures := task["pictures"]:
        return getattr(untyped, pictures["image_processor_type"]).from_dict(pictures)
    vision = config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    return getattr(untyped, _PROCESSORS[vision.model_type])(size=side, crop_size=side)


def _ask(model: Any, processor: Any, task: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    import torch
    from PIL import Image
    from transformers import StoppingCriteriaList

    ids = [*task["before"], *[model.config.image_token_id] * task["image_tokens"], *task["after"]]
    times: dict[str, float] = {}
    handles = _watch_encoder(model, times)
    drawn: list[float] = []

    def clock(*_: Any, **__: Any) -> Any:
        drawn.append(time.perf_counter())
        return torch.zeros(1, dtype=torch.bool)

    start = time.perf_counter()
    picture = Image.open(task["image"]).convert("RGB")
    made = processor(images=picture, return_tensors="pt", **_TILED.get(model.config.model_type, {}))
    pictures = {key: made[key] for key in _PICTURES if key in made}
    tokens = torch.tensor([ids])
    if model.config.model_type in _MARKED:
        pictures["token_type_ids"] = (tokens == model.config.image_token_id).long()
    model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        **pictures,
        do_sample=False,
        min_new_tokens=n_tokens + 1,
        max_new_tokens=n_tokens + 1,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    for handle in handles:
        handle.remove()
    return {
        "encode_ms": (times["end"] - times["start"]) * 1e3,
        "prefill_ms": (drawn[0] - times["end"]) * 1e3,
        "first_token_ms": (drawn[0] - start) * 1e3,
        "token_ms": (drawn[n_tokens] - drawn[0]) * 1e3 / n_tokens,
        "positions": len(ids),
    }


def _watch_encoder(model: Any, times: dict[str, float]) -> list[Any]:
    """Notes when the tower starts and the projector ends."""

    def part(names: tuple[str, ...]) -> Any:
        named = model.named_modules()
        return next(module for name, module in named if name.rsplit(".", 1)[-1] in names)

    def note(name: str) -> Any:
        return lambda *_: times.update({name: time.perf_counter()})

    return [
        part(_TOWERS).register_forward_pre_hook(note("start")),
        part(_CONNECTORS).register_forward_hook(note("end")),
    ]
