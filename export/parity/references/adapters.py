"""An adapter beside a source model that runs: what it adds is computed as the model runs.

Reads the files itself and shares nothing with the exporter's merging, which is compared with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Names = Iterable[tuple[str, str]]
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B)(?:\.\w+)?(?:\.weight)?")


class Added:
    """An adapter's files. `names` are patterns of its modules' names and what they are called in
    the model that runs, the first that fits.
    """

    def __init__(self, folder: Path, names: Names) -> None:
        path = folder / "adapter_config.json"
        self._config: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.whole: dict[str, Tensor] = {}
        self._factors: dict[str, dict[str, Tensor]] = {}
        self._before: dict[str, str] = {}
        for name, tensor in self._read(folder):
            factor = _FACTOR.fullmatch(name)
            before = factor[1] if factor else name.replace(".base_layer.", ".")
            after = next((re.sub(a, b, before) for a, b in names if re.match(a, before)), before)
            if factor:
                self._factors.setdefault(after, {})[factor[2]] = tensor.float()
                self._before[after] = before
            else:
                self.whole.setdefault(after, tensor.float())

    def _read(self, folder: Path) -> Iterable[tuple[str, Tensor]]:
        from safetensors.torch import load_file

        files = []
        if self._config:
            files = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
            files = [f for f in files if f.is_file()][:1]
        files += [folder / f"{name}.bin" for name in ("non_lora_trainables", "mm_projector")]
        for file in files:
            if file.suffix == ".safetensors":
                state = load_file(file)
            elif file.is_file():
                state = torch.load(file, map_location="cpu", weights_only=True)
            else:
                continue
            for name, tensor in state.items():
                yield re.sub(r"^base_model\.model\.", "", name), tensor

    def _scaling(self, name: str, rank: int) -> float:
        alpha = self._config.get("lora_alpha", 8)
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.search(rf"(?:^|\.)(?:{pattern})$", self._before[name]):
                alpha = value
                break
        return float(alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank)

    def attach(self, model: nn.Module, start: str = "") -> None:
        """Has the modules whose names begin with `start` add their part to what they return, and
        gives the model the tensors that were trained whole.
        """
        own = dict(model.named_modules())
        for name, pair in self._factors.items():
            if name.startswith(start) and name.removeprefix(start) in own:
                module, scale = own[name.removeprefix(start)], self._scaling(name, len(pair["A"]))
                module.register_forward_hook(_hook(pair["A"], pair["B"], scale))
        parameters = dict(model.named_parameters())
        for name, tensor in self.whole.items():
            if name.startswith(start) and name.removeprefix(start) in parameters:
                parameters[name.removeprefix(start)].data = tensor

    def modules(self) -> set[str]:
        """The modules that something is added to."""
        return set(self._factors)

    def added(self, name: str) -> Tensor | None:
        """The adapter's addition to a module's weight, for a model that is not a module."""
        pair = self._factors.get(name)
        if pair is None:
            return None
        down, up = pair["A"].flatten(1), pair["B"].flatten(1)
        # Column by column, as the module itself would see it.
        rows = F.linear(F.linear(torch.eye(down.shape[1]), down), up)
        return self._scaling(name, len(down)) * rows.T


def _hook(a: Tensor, b: Tensor, scale: float) -> Any:
    def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        (x,) = given
        if isinstance(module, nn.Embedding):
            more = F.linear(F.embedding(x, a.T), b)
        elif isinstance(module, nn.Conv2d):
            more = F.conv2d(F.conv2d(x, a, None, module.stride, module.padding), b)
        else:
            more = F.linear(F.linear(x, a), b)
        return out + scale * more

    return add
