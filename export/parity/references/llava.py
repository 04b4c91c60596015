"""LLaVA's shape: transformers' towers and decoders in float32, and the connector computed plainly.

No release of transformers reads the original layouts, so the parts take the checkpoint's tensors
one by one; nothing here uses the modules that were exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.components import Job
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import Arrays, ParityRequest, files
from edgevlm.export.parity.references.adapters import Added
from edgevlm.export.parity.references.causal import Seen, stages, weights
from edgevlm.family import Config
from edgevlm.parts import Connector, Decoder, VisionTower
from edgevlm.parts.clip import ClipTower
from edgevlm.parts.ldp import Ldp
from edgevlm.parts.ldpv2 import LdpV2
from edgevlm.parts.linear import Linear
from edgevlm.parts.llama import Llama
from edgevlm.parts.mlp import Mlp
from edgevlm.parts.phi3 import Phi3
from edgevlm.parts.qwen2 import Qwen2
from edgevlm.parts.siglip import SiglipTower
from edgevlm.templates import IMAGE

# transformers leaves its classes without types.
_hf: Any = transformers


Names = tuple[tuple[str, str], ...]

# Names of an adapter's modules in LLaVA's own layout and in transformers', by the part here.
_OWN_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision."),
    (r"^model\.mm_projector$", "projector.linear"),
    (r"^model\.mm_projector\.(weight|bias)$", r"projector.linear.\1"),
    (r"^model\.mm_projector\.(?:model\.)?", "projector."),
    (r"^model\.image_newline$", "projector.image_newline"),
    (r"^", "decoder."),
)
_NAMES = (
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision.vision_model."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1", "projector.0"),
    (r"^(?:model\.)?multi_modal_projector\.linear_2", "projector.2"),
    (r"^(?:language_model\.model|model\.language_model)\.", "decoder.model."),
    (r"^(?:language_model\.)?lm_head", "decoder.lm_head"),
)


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        self._job = job
        # Whether the texts on both sides of the picture are tokenized each by itself.
        self._alone = IMAGE not in job.model.markers.values()
        folder = job.checkpoint.folder
        with quiet():
            # The original projects use the slow class where there is one, transformers the fast.
            slow = self._alone and (folder / "tokenizer.model").is_file()
            kind = "LlamaTokenizer" if slow else "AutoTokenizer"
            self._tokenizer = files.tokenizer(folder, kind)

    @property
    def _stated(self) -> Config:
        """The checkpoint's config.json."""
        return self._job.checkpoint.configs["config.json"]

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self._tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        model = self._job.model
        with quiet(), torch.inference_mode():
            added, parts = self._added()
            pixels = self._pixels(request.image)
            features = self._features(pixels, parts["vision"], added)
            projector = _projector(parts["projector"], added)
            squares = self._connected(features, projector)
            rows = self._joined(squares, projector, request.image)
            decoder = _decoder(model.text, parts["decoder"], added, self._stated)
            seen = Seen(pixels, features, rows)
            made = stages(seen, decoder, self._around(request.prompt), tokens)
            return made | {"embeddings": squares.numpy()}

    def _features(self, pixels: Tensor, part: Weights, added: Added | None) -> Tensor:
        """Pixels -> the tower's features [n, rows, width]."""
        return _features(pixels, self._job.model.vision, part, added)

    def _connected(self, features: Tensor, projector: Mapping[str, Tensor]) -> Tensor:
        """Features -> the image embeddings [n, rows, n_embd] of every square."""
        return CONNECTORS[type(self._job.model.projector)](features, projector)

    def _joined(
        self, squares: Tensor, projector: Mapping[str, Tensor], image: NDArray[np.uint8]
    ) -> Tensor:
        """The rows [1, n, n_embd] that the decoder reads of a picture."""
        return squares

    def _added(self) -> tuple[Added | None, Mapping[str, Weights]]:
        """The adapter, and the parts as they are without it."""
        if not self._job.adapter:
            return None, self._job.parts
        return Added(self._job.adapter.folder, self._names()), self._job.tensors.plain

    def _names(self) -> Names:
        """Patterns of an adapter's modules, and the parts' names for them."""
        return _OWN_NAMES if self._alone else _NAMES

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        """The checkpoint's own processor on a picture, padded first where LLaVA's own code does."""
        picture, fit = Image.fromarray(image), self._job.options.image_fit
        processor, options = self._processor(), {}
        ratio = self._stated.get("image_aspect_ratio")
        if fit == "pad" or (fit is None and self._alone and ratio == "pad"):
            background = tuple(int(x * 255) for x in processor.image_mean)
            picture = _expand2square(picture, background)
        elif fit == "crop" and hasattr(processor, "do_pad"):
            options["do_pad"] = False
        pixels: Tensor = processor(picture, return_tensors="pt", **options)["pixel_values"]
        # Bytes where the processor neither rescales nor normalises.
        return pixels.float()

    def _processor(self) -> Any:
        """The processor in the tower's folder or the checkpoint's, or the class as it is."""
        checkpoint = self._job.checkpoint
        if not self._alone:
            places = [checkpoint.folder]
        else:
            # llava/model/multimodal_encoder/clip_encoder.py loads it from the tower's folder.
            places = [p.folder for p in checkpoint.extra.values()] + [checkpoint.folder]
        kind = "CLIPImageProcessor" if self._alone else "AutoImageProcessor"
        for folder in places:
            if files.has_processor(folder):
                return files.picture_processor(folder, kind)
        side = self._job.model.vision.image_size
        return _hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)

    def _around(self, prompt: str) -> tuple[list[int], list[int]]:
        """The ids before and after the picture, from the prompt as one text."""
        text = self._job.model.original.replace("{prompt}", prompt)
        if not self._alone:
            ids = self._tokenizer(text)["input_ids"]
            place = ids.index(self._tokenizer.convert_tokens_to_ids(IMAGE))
            return ids[:place], ids[place + 1 :]
        # llava/mm_utils.py, tokenizer_image_token: every chunk by itself, one begin token in all.
        before, after = (self._tokenizer(chunk)["input_ids"] for chunk in text.split(IMAGE))
        begun = before[:1] == [self._tokenizer.bos_token_id]
        return before, after[int(begun) :]


def _expand2square(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _features(pixels: Tensor, config: VisionTower, part: Weights, added: Added | None) -> Tensor:
    name = _TOWERS[type(config)]
    settings = {k: v for k, v in asdict(config).items() if k not in _NOT_THEIRS}
    tower = getattr(_hf, f"{name}VisionModel")(
        getattr(_hf, f"{name}VisionConfig")(
            **settings, vision_use_head=False, attn_implementation="eager"
        )
    ).eval()
    state = {f"vision_model.{name}": value for name, value in weights(part).items()}
    _load(tower, state, allowed="vision_model.post_layernorm.")
    if added:
        added.attach(tower, "vision.")
    states = tower(pixels, output_hidden_states=True).hidden_states[-1]
    cut = isinstance(config, ClipTower) and not config.class_token
    features: Tensor = states[:, 1:] if cut else states
    return features


_TOWERS: dict[type[VisionTower], str] = {ClipTower: "CLIP", SiglipTower: "Siglip"}
_NOT_THEIRS = ("depth", "class_token", "final_norm")


def _projector(part: Weights, added: Added | None) -> dict[str, Tensor]:
    found = weights(part)
    if added:
        start = "projector."
        whole = added.whole.items()
        found |= {n.removeprefix(start): t for n, t in whole if n.startswith(start)}
        for name in added.modules():
            key = f"{name.removeprefix(start)}.weight"
            if name.startswith(start) and (more := added.added(name)) is not None:
                found[key] = found[key] + more.reshape(found[key].shape)
    return found


def _decoder(config: Decoder, part: Weights, added: Added | None, stated: Config) -> Any:
    """transformers' decoder; what scales its positions is read from the file's own words."""
    assert isinstance(config, Llama)
    text = stated.get("text_config") or stated
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    name = {Llama: "Llama", Phi3: "Phi3", Qwen2: "Qwen2"}[type(config)]
    scaled = {"rope_scaling": scaling} if scaling.get("rope_type") == "llama3" else {}
    if "long_factor" in scaling:
        factors = {key: scaling[key] for key in ("short_factor", "long_factor")}
        original = "original_max_position_embeddings"
        scaled = {
            "rope_scaling": {"type": "longrope", **factors},
            original: text.get(original, scaling.get(original)),
        }
    made = getattr(_hf, f"{name}Config")(
        **asdict(config), **scaled, pad_token_id=None, attn_implementation="eager"
    )
    with torch.device("meta"):
        decoder = getattr(_hf, f"{name}ForCausalLM")(made)
    head = "lm_head.weight"
    state = {n if n == head else f"model.{n}": v for n, v in weights(part).items()}
    for name, tensor in added.whole.items() if added else ():
        if name.startswith("decoder."):
            state[name.removeprefix("decoder.")] = tensor
    if config.tie_word_embeddings:
        state[head] = state["model.embed_tokens.weight"]
    decoder.load_state_dict(state, strict=True, assign=True)
    decoder.model.rotary_emb = type(decoder.model.rotary_emb)(made)
    if added:
        added.attach(decoder, "decoder.")
    return decoder.eval()


def _load(module: torch.nn.Module, state: dict[str, Tensor], allowed: str) -> None:
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    wrong = [*unexpected, *(name for name in missing if not name.startswith(allowed))]
    assert not wrong, wrong


def _linear(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    return F.linear(x, w["linear.weight"], w["linear.bias"])


def _mlp(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    x = F.linear(x, w["0.weight"], w["0.bias"])
    for i in range(2, len(w), 2):
        x = F.linear(F.gelu(x), w[f"{i}.weight"], w[f"{i}.bias"])
    return x


def _ldp(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    x = F.gelu(F.linear(x, w["mlp.1.weight"], w["mlp.1.bias"]))
    x = _grid(F.linear(x, w["mlp.3.weight"], w["mlp.3.bias"]))
    for block, stride in (("mb_block.1.block.", 1), ("mb_block.2.block.", 2)):
        y = F.conv2d(x, w[f"{block}0.0.weight"], None, stride, 1, groups=x.shape[1])
        y = F.hardswish(_norm(y, w[f"{block}0.1.weight"], w[f"{block}0.1.bias"]))
        squeezed = F.adaptive_avg_pool2d(y, 1)
        squeezed = F.relu(F.conv2d(squeezed, w[f"{block}1.fc1.weight"], w[f"{block}1.fc1.bias"]))
        gates = F.conv2d(squeezed, w[f"{block}1.fc2.weight"], w[f"{block}1.fc2.bias"])
        y = F.conv2d(y * F.hardsigmoid(gates), w[f"{block}2.0.weight"])
        y = _norm(y, w[f"{block}2.1.weight"], w[f"{block}2.1.bias"])
        x = x + y if stride == 1 else y
    return x.flatten(2).transpose(1, 2)


def _ldpv2(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    x = F.gelu(F.linear(x, w["mlp.mlp.0.weight"], w["mlp.mlp.0.bias"]))
    x = _grid(F.linear(x, w["mlp.mlp.2.weight"], w["mlp.mlp.2.bias"]))
    x = F.adaptive_avg_pool2d(x, (12, 12))
    x = x + F.conv2d(x, w["peg.peg.0.weight"], w["peg.peg.0.bias"], 1, 1, groups=x.shape[1])
    return x.flatten(2).transpose(1, 2)


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    normed = (x - mean) * torch.rsqrt(variance + 1e-5)
    return normed * weight[:, None, None] + bias[:, None, None]


def _grid(x: Tensor) -> Tensor:
    side = math.isqrt(x.shape[1])
    return x.permute(0, 2, 1).reshape(x.shape[0], x.shape[2], side, side)


CONNECTORS: dict[type[Connector], Callable[[Tensor, Mapping[str, Tensor]], Tensor]] = {
    Linear: _linear,
    Mlp: _mlp,
    Ldp: _ldp,
    LdpV2: _ldpv2,
}
