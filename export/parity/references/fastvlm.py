"""FastVLM, run in float32: FastViTHD computed branch by branch from the checkpoint's own tensors,
with transformers' Qwen2.

transformers has the model from 5 on, with a tower of timm's. Nothing is folded here but what the
checkpoint has folded: batch norms are norms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from edgevlm.errors import ExportError
from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.components import Job
from edgevlm.export.parity.references import files, llava
from edgevlm.export.parity.references.adapters import Added

# transformers leaves its classes without types.
_hf: Any = transformers
_IMAGE = "<image>"
# Channels of a head (mobileclip/mci.py, MHSA).
_HEAD = 32


class Reference(llava.Reference):
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # Apple's texts are tokenized apart, whether or not there is a token for pictures.
        self._alone = self._stated["model_type"] == "llava_qwen2"

    def _features(self, pixels: Tensor, part: Weights, added: Added | None) -> Tensor:
        if added and any(name.startswith("vision.") for name in added.modules()):
            raise ExportError(
                "an adapter of FastVLM's vision tower cannot be compared with the original; export "
                "without verification (--no-verify)"
            )
        found = self._job.checkpoint.tensors
        start = re.compile(r"model\.vision_tower\.(?:vision_tower\.model|timm_model)\.")
        state = {
            start.sub("", name): torch.from_numpy(tensor.float32().copy())
            for name, tensor in found.items()
            if start.match(name) and not name.endswith("num_batches_tracked")
        }
        return _Tower(state)(pixels)

    def _processor(self) -> Any:
        """The one that mobileclip_encoder.py makes, or the checkpoint's in transformers' layout."""
        if not self._alone:
            return super()._processor()
        side = self._job.model.vision.image_size
        return _hf.CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
        )

    def _around(self, prompt: str) -> tuple[list[int], list[int]]:
        folder = self._job.checkpoint.folder
        chat = None if self._alone else files.chat_template(folder)
        if not chat or self._job.options.template:
            return super()._around(prompt)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        asked = [{"role": "user", "content": content}]
        ids = self._tokenizer.apply_chat_template(
            asked, chat_template=chat, add_generation_prompt=True
        )
        place = ids.index(self._tokenizer.convert_tokens_to_ids(_IMAGE))
        return ids[:place], ids[place + 1 :]


class _Tower:
    """FastViTHD with the tensors of either layout, as `forward` of its modules."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state
        self._apple = any(name.startswith("network.") for name in state)

    def __call__(self, pixels: Tensor) -> Tensor:
        stem, last = ("patch_embed", "conv_exp") if self._apple else ("stem", "final_conv")
        x = F.gelu(self._block(f"{stem}.0", pixels, 2))
        x = F.gelu(self._block(f"{stem}.1", x, 2))
        x = F.gelu(self._block(f"{stem}.2", x))
        for step in self._apples() if self._apple else self._timms():
            x = step(x)
        x = self._block(last, x)
        names = ("reduce", "expand") if self._apple else ("fc1", "fc2")
        down, up = (f"{last}.se.{name}" for name in names)
        squeezed = F.relu(self._conv(down, x.mean((2, 3), keepdim=True)))
        x = F.gelu(x * torch.sigmoid(self._conv(up, squeezed)))
        return x.flatten(2).transpose(1, 2)

    def _apples(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """mci.py's list of modules: stages, what is between them, and positions."""
        for n in range(1 + max(self._numbers("network"))):
            name = f"network.{n}"
            if self._has(f"{name}.proj."):
                yield partial(self._down, f"{name}.proj")
            elif self._has(f"{name}.0."):
                yield from self._blocks(name)
            else:
                yield partial(self._positions, name, f"{name}.pe")

    def _timms(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """fastvit.py's stages."""
        for n in range(1 + max(self._numbers("stages"))):
            name = f"stages.{n}"
            if self._has(f"{name}.downsample."):
                yield partial(self._down, f"{name}.downsample.proj")
            if self._has(f"{name}.pos_emb."):
                where = f"{name}.pos_emb"
                yield partial(self._positions, where, f"{where}.pos_enc")
            yield from self._blocks(f"{name}.blocks")

    def _blocks(self, name: str) -> Iterator[Callable[[Tensor], Tensor]]:
        for i in range(1 + max(self._numbers(name))):
            block = f"{name}.{i}"
            kind = self._attend if self._has(f"{block}.norm.") else self._mix
            yield partial(kind, block)

    def _has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self._state)

    def _numbers(self, name: str) -> set[int]:
        found = (re.match(rf"{re.escape(name)}\.(\d+)\.", each) for each in self._state)
        return {int(match[1]) for match in found if match}

    def _down(self, name: str, x: Tensor) -> Tensor:
        """PatchEmbed."""
        return F.gelu(self._block(f"{name}.1", F.gelu(self._block(f"{name}.0", x, 2))))

    def _positions(self, name: str, branch: str, x: Tensor) -> Tensor:
        """RepCPE."""
        if f"{branch}.weight" in self._state:
            return x + self._conv(branch, x)
        return self._block(name, x)

    def _mix(self, name: str, x: Tensor) -> Tensor:
        """RepMixerBlock."""
        mixer = f"{name}.token_mixer"
        if self._has(f"{mixer}.mixer."):
            mixed = self._block(f"{mixer}.mixer", x) - self._block(f"{mixer}.norm", x)
            x = x + self._scale(f"{mixer}.layer_scale") * mixed
        else:
            x = self._block(mixer, x)
        return x + self._scale(f"{name}.layer_scale") * self._net(name, x)

    def _attend(self, name: str, x: Tensor) -> Tensor:
        """AttentionBlock."""
        w, mixer = self._state, f"{name}.token_mixer"
        weight, bias = w[f"{name}.norm.weight"], w[f"{name}.norm.bias"]
        rows = x.permute(0, 2, 3, 1)
        rows = F.layer_norm(rows, rows.shape[-1:], weight, bias, 1e-5).flatten(1, 2)
        qkv = torch.unflatten(F.linear(rows, w[f"{mixer}.qkv.weight"]), -1, (3, -1, _HEAD))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        read = ((q * _HEAD**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        made = F.linear(
            read.transpose(1, 2).flatten(2), w[f"{mixer}.proj.weight"], w[f"{mixer}.proj.bias"]
        )
        x = x + self._scale(f"{name}.layer_scale_1") * made.transpose(1, 2).reshape(x.shape)
        return x + self._scale(f"{name}.layer_scale_2") * self._net(name, x)

    def _net(self, name: str, x: Tensor) -> Tensor:
        """ConvFFN."""
        stem = f"{name}.{'convffn' if self._apple else 'mlp'}"
        x = self._norm(f"{stem}.conv.bn", self._conv(f"{stem}.conv.conv", x))
        return self._conv(f"{stem}.fc2", F.gelu(self._conv(f"{stem}.fc1", x)))

    def _scale(self, name: str) -> Tensor:
        return self._state[name if self._apple else f"{name}.gamma"]

    def _block(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """MobileOneBlock and ReparamLargeKernelConv without what follows them: one convolution for
        inference, or the sum of all branches that are there.
        """
        for folded in ("reparam_conv", "lkb_reparam"):
            if f"{name}.{folded}.weight" in self._state:
                return self._conv(f"{name}.{folded}", x, stride)
        out = torch.zeros(1)
        for key in self._state:
            if not key.startswith(f"{name}.") or ".se." in key:
                continue
            if key.endswith(".conv.weight"):
                branch = key.removesuffix(".conv.weight")
                out = out + self._norm(f"{branch}.bn", self._conv(f"{branch}.conv", x, stride))
            elif key.endswith((".rbr_skip.weight", ".identity.weight")):
                out = out + self._norm(key.removesuffix(".weight"), x)
        return out

    def _conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self._state[f"{name}.weight"]
        bias, groups = self._state.get(f"{name}.bias"), x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        w = self._state
        mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)
