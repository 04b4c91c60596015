"""DeepSeek-VL run in float32 with eager attention: transformers' layout by transformers; of the
original one the tower and the aligner as a few plain operations on the checkpoint's own tensors,
the decoder as transformers', written from deepseek-ai/DeepSeek-VL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm.errors import EngineMissing
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.components import Job
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import Arrays, ParityRequest, SourceModel

try:
    import torch
    import torch.nn.functional as F
    import transformers
    from torch import Tensor

    from edgevlm.export.parity.references import causal, files
except ImportError as e:
    raise EngineMissing(
        f"verification needs torch and transformers ({e.name or e} is not there)",
        'pip install "edgevlm[export]"',
    ) from None

# transformers leaves its classes without types.
_hf: Any = transformers
IMAGE = "<image_placeholder>"
_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_SEPARATORS = ("\n\n", "<\uff5cend\u2581of\u2581sentence\uff5c>")
# Tower names of files that transformers 5 saved -> 4's.
_NAMES = {r"^model\.vision_model\.(?:vision_model\.)?": "model.vision_model.vision_model."}


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        checkpoint = job.checkpoint
        own = checkpoint.configs["config.json"]["model_type"] == "multi_modality"
        self._model: SourceModel = (
            OriginalModel(checkpoint.folder, checkpoint.tensors)
            if own
            else TransformersModel(checkpoint.folder)
        )

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return self._model.token_ids(texts, plain=plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        return self._model.run(request, tokens)


def conversation(said: Sequence[str], system: str | None = None) -> str:
    """The prompt of questions with answers between them, each with the signs of its pictures, after
    the original's system message or another (deepseek_vl/utils/conversation.py,
    models/processing_vlm.py).
    """
    text = (_SYSTEM if system is None else system) + _SEPARATORS[0]
    for i, words in enumerate(said):
        text += f"{('User', 'Assistant')[i % 2]}: {words.strip()}{_SEPARATORS[i % 2]}"
    return f"{text}Assistant:"


def _around(ids: Sequence[int], image: int) -> tuple[list[int], list[int]]:
    """Token ids on both sides of a picture."""
    places = [i for i, token in enumerate(ids) if token == image]
    return list(ids[: places[0]]), list(ids[places[-1] + 1 :])


class TransformersModel:
    """The model of a folder in transformers' layout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with quiet():
            self.processor = load_processor(folder)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self.processor.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), torch.inference_mode():
            model = load(self._folder)
            inputs = self.processor(
                images=[request.image], text=self.prompt(request.prompt), return_tensors="pt"
            )
            pixels, ids = inputs["pixel_values"], inputs["input_ids"][0].tolist()
            features = model.model.vision_model(pixels).last_hidden_state
            seen = causal.Seen(pixels, features, model.model.aligner(features))
            return causal.stages(seen, model, _around(ids, model.config.image_token_id), tokens)

    def prompt(self, question: str) -> str:
        """A question about a picture as the folder's chat template writes it, as the published one
        where there is none.
        """
        if self.processor.chat_template is None:
            return conversation([IMAGE + question])
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))


def load_processor(folder: Path) -> Any:
    """transformers' processor with its slow class for pictures."""
    text = files.tokenizer(folder)
    # Lists of extra tokens, as 5 writes them, have no name for it.
    text.image_token = IMAGE
    path = folder / "chat_template.jinja"
    return _hf.DeepseekVLProcessor(
        files.picture_processor(folder, "DeepseekVLImageProcessor"),
        text,
        chat_template=path.read_text("utf-8") if path.is_file() else text.chat_template,
        num_image_tokens=files.processor_settings(folder).get("num_image_tokens", 576),
    )


def load(folder: Path) -> Any:
    """The model, whichever release wrote its files."""
    config = _hf.AutoConfig.from_pretrained(folder)
    files.set_rotary(config.text_config)
    kind = "DeepseekVLForConditionalGeneration"
    model = files.model(kind, folder, config, key_mapping=_NAMES)
    return model


class OriginalModel:
    """The model of a folder in the original layout; `weights` are its tensors by their names there.

    transformers has no such class.
    """

    def __init__(self, folder: Path, weights: Weights) -> None:
        self.config: Mapping[str, Any] = _json(folder / "config.json")
        self._pictures = _json(folder / "preprocessor_config.json")
        self._rows = _json(folder / "processor_config.json").get("num_image_tokens", 576)
        self._weights = weights
        with quiet():
            self.tokenizer = files.tokenizer(folder)
        self.image: int = self.tokenizer.convert_tokens_to_ids(IMAGE)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), torch.inference_mode():
            state = causal.weights(self._weights)
            pixels = self.pixels(request.image)
            features = self.features(state, pixels)
            seen = causal.Seen(pixels, features, self.embeddings(state, features))
            around = _around(self.ids([IMAGE + request.prompt]), self.image)
            return causal.stages(seen, self.decoder(state), around, tokens)

    def ids(self, said: Sequence[str], system: str | None = None) -> list[int]:
        """Token ids of a conversation; each sign of a picture becomes as many as its embeddings."""
        found: list[int] = []
        for token in self.tokenizer.encode(conversation(said, system)):
            found += [token] * (self._rows if token == self.image else 1)
        return found

    def pixels(self, picture: NDArray[np.uint8]) -> Tensor:
        """A picture as the tower's first layer sees it, float32 [1, 3, size, size]."""
        said, params = self._pictures, self.config["vision_config"]["params"]
        size, least = said["image_size"], said.get("min_size", 14)
        drawn = Image.fromarray(picture)
        long = max(drawn.size)
        w, h = (max(int(side / long * size), least) for side in drawn.size)
        colour = tuple(int(x * 255) for x in said["image_mean"])
        square = Image.new("RGB", (size, size), colour)
        resized = drawn.resize((w, h), Image.Resampling.BICUBIC)
        square.paste(resized, ((size - w) // 2, (size - h) // 2))
        values = np.asarray(square).astype(np.float64) * said.get("rescale_factor", 1 / 255)
        pixels = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None]
        if said.get("do_normalize", True):
            pixels = _normalized(pixels, said["image_mean"], said["image_std"])
        if params.get("pixel_mean") and params.get("pixel_std"):
            pixels = _normalized(pixels, params["pixel_mean"], params["pixel_std"])
        return pixels

    def features(self, state: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
        """SigLIP's features of the patches [n, patches, width] (siglip_vit.py)."""
        start, heads = "vision_model.vision_tower.", 16

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, state[f"{start}{name}.weight"], state[f"{start}{name}.bias"])

        def norm(x: Tensor, name: str) -> Tensor:
            weight, bias = state[f"{start}{name}.weight"], state[f"{start}{name}.bias"]
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

        weight = state[f"{start}patch_embed.proj.weight"]
        bias = state[f"{start}patch_embed.proj.bias"]
        x = F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).mT
        x = x + state[f"{start}pos_embed"]
        for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
            layer = f"blocks.{i}."
            q, k, v = linear(norm(x, f"{layer}norm1"), f"{layer}attn.qkv").chunk(3, -1)
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
            scores = (q @ k.mT) * q.shape[-1] ** -0.5
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + linear(mixed, f"{layer}attn.proj")
            inner = F.gelu(linear(norm(x, f"{layer}norm2"), f"{layer}mlp.fc1"))
            x = x + linear(inner, f"{layer}mlp.fc2")
        return norm(x, "norm")

    def embeddings(self, state: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Image embeddings [n, rows, n_embd] of features (projector.py, mlp_gelu)."""
        x = features
        for i in range(self.config["aligner_config"]["params"].get("depth", 1)):
            name = f"aligner.layers.{2 * i}"
            x = F.linear(F.gelu(x) if i else x, state[f"{name}.weight"], state[f"{name}.bias"])
        return x

    def decoder(self, state: Mapping[str, Tensor]) -> Any:
        """The decoder in transformers' class."""
        start = "language_model."
        said = self.config["language_config"]
        config = _hf.LlamaConfig(**said, attn_implementation="eager")
        files.set_rotary(config)
        model = _hf.LlamaForCausalLM(config)
        weights = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
        weights = {n: t for n, t in weights.items() if not n.endswith("inv_freq")}
        model.load_state_dict(weights, strict=not config.tie_word_embeddings)
        return model.eval()


def _normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """As torchvision's Normalize."""
    return (pixels - torch.tensor(mean)[:, None, None]).div(torch.tensor(std)[:, None, None])


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found
