"""An adapter merged into a model's tensors: W + alpha / r * B @ A, one matrix at a time.

Nothing is read here; every tensor of an adapter finds its weight, or the export stops with its
name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.adapters import CURE, Adapter
from edgevlm.export.checkpoint.computed import adapted
from edgevlm.export.checkpoint.tensors import DTYPES, SourceTensor, Tensor
from edgevlm.family import Config

EMBED, LM_HEAD = "decoder.embed_tokens.weight", "decoder.lm_head.weight"
_LOW_RANK = re.compile(r"(.+)\.lora_(?:([AB])(?:\.[^.]+)?\.weight|embedding_([AB])(?:\.[^.]+)?)")
# What stands in the names of a model that has an adapter in it, and not in its own.
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")


@dataclass
class _Pair:
    """The two factors of a low-rank product, `table` where they are those of an embedding."""

    table: bool
    factors: dict[str, SourceTensor] = field(default_factory=dict)


def merge(
    chosen: Mapping[str, Tensor],
    adapter: Adapter,
    locate: Callable[[str], str | None],
    skipped: tuple[str, ...],
    tied: bool,
) -> tuple[dict[str, Tensor], str]:
    """The tensors by canonical name with an adapter in them, and what was done, for the manifest.

    `locate` and `skipped` are the family's and the model's words; `tied` says that the decoder has
    one table for input and output. Raises SourceError.
    """
    out, counts = dict(chosen), Counter[str]()
    pairs, whole = _sorted(adapter)
    _check_saved(adapter, whole)
    for name, tensor in whole.items():
        if target := _target(name, tensor, locate, skipped):
            out[target] = tensor
            counts["taken whole"] += 1
    alone = out.get(EMBED) is not chosen.get(EMBED) and LM_HEAD not in out
    if tied and alone and not adapter.config.get("ensure_weight_tying"):
        raise _half(out[EMBED])
    for module, pair in pairs.items():
        down, up = _factors(module, pair)
        _check_targeted(adapter.config, module, down)
        target = _target(f"{module}.weight", down, locate, skipped)
        if not target:
            continue
        base = out.get(target)
        if base is None:
            raise SourceError(f"{_at(down)}: the base has no {module}.weight; it is another model")
        if tied and target in (EMBED, LM_HEAD):
            raise _half(down)
        out[target] = _adapted(base, down, up, pair.table, _scale(adapter, module, down))
        counts["merged"] += 1
    return out, _note(adapter, counts)


def _sorted(adapter: Adapter) -> tuple[dict[str, _Pair], dict[str, SourceTensor]]:
    """Low-rank pairs by module, and what was trained whole by name."""
    pairs: dict[str, _Pair] = {}
    whole: dict[str, SourceTensor] = {}
    for name, tensor in adapter.tensors.items():
        if match := _LOW_RANK.fullmatch(name):
            pair = pairs.setdefault(match[1], _Pair(table=bool(match[3])))
            pair.factors[match[2] or match[3]] = tensor
        elif "lora_" in name or "token_adapter" in name:
            raise SourceError(f"{_at(tensor)} is of no kind of adapter that is known; {CURE}")
        else:
            whole[_WRAPPED.sub("", name)] = tensor
    return pairs, whole


def _check_saved(adapter: Adapter, whole: Collection[str]) -> None:
    for module in adapter.config.get("modules_to_save") or ():
        if not any(re.fullmatch(rf"(?:.*\.)?{re.escape(module)}\..+", name) for name in whole):
            raise SourceError(
                f"{adapter.folder}: modules_to_save names {module}, which has no tensor; "
                "download it again"
            )


def _target(
    name: str, tensor: SourceTensor, locate: Callable[[str], str | None], skipped: tuple[str, ...]
) -> str:
    """The canonical name of a weight; "" for one that the model never reads."""
    target = locate(name)
    if target is None:
        raise SourceError(f"{_at(tensor)} is of no weight of this model; it is of another one")
    if tensor.dtype not in DTYPES:
        raise SourceError(f"{_at(tensor)} is stored as {tensor.dtype}; {CURE}")
    return "" if target.startswith(skipped) else target


def _factors(module: str, pair: _Pair) -> tuple[SourceTensor, SourceTensor]:
    for factor, other in ("AB", "BA"):
        if factor not in pair.factors:
            tensor = pair.factors[other]
            raise SourceError(
                f"{_at(tensor)} is there without its lora_{factor}; download it again"
            )
    return pair.factors["A"], pair.factors["B"]


def _check_targeted(config: Config, module: str, tensor: SourceTensor) -> None:
    """peft leaves out, without a word, what its config does not name."""
    targets, left_out = config.get("target_modules"), config.get("exclude_modules")
    named = targets in (None, "all-linear") or _names(targets, module)
    layers = config.get("layers_to_transform")
    if named and layers not in (None, []):
        patterns = config.get("layers_pattern") or r"[^.]*"
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = (re.match(rf".*?\.{pattern}\.(\d+)\.", module) for pattern in patterns)
        index = next((int(match[1]) for match in found if match), None)
        named = index in ([layers] if isinstance(layers, int) else layers)
    if not named or (left_out and _names(left_out, module)):
        raise SourceError(
            f"{_at(tensor)} is of {module}, which target_modules does not name; {CURE}"
        )


def _names(names: str | Collection[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names)


def _scale(adapter: Adapter, module: str, down: SourceTensor) -> float:
    config = adapter.config
    rank = _of(config, "rank_pattern", module, config.get("r", 8))
    alpha = _of(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if down.shape[0] != rank:
        raise SourceError(f"{_at(down)} has rank {down.shape[0]}, adapter_config.json says {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of(config: Config, patterns: str, module: str, default: float) -> float:
    found: Mapping[str, float] = config.get(patterns) or {}
    matching = (v for p, v in found.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(matching, default)


def _adapted(
    base: Tensor, down: SourceTensor, up: SourceTensor, table: bool, scale: float
) -> Tensor:
    rank = down.shape[0]
    made = (math.prod(up.shape) // rank, math.prod(down.shape) // rank)
    wanted = (base.shape[0], math.prod(base.shape[1:]))
    if up.shape[1:2] != (rank,) or made != (wanted[::-1] if table else wanted):
        raise SourceError(
            f"{_at(down)} {list(down.shape)} and lora_B {list(up.shape)} are of another model, the "
            f"weight is {list(base.shape)}"
        )
    return adapted(base, down, up, scale, turned=table)


def _half(tensor: Tensor) -> SourceError:
    return SourceError(
        f"{_at(tensor)} was trained for one of the two uses of a table that is input and output; "
        "this architecture has one table for both"
    )


def _note(adapter: Adapter, counts: Counter[str]) -> str:
    kinds = sorted(counts.items())
    done = ", ".join(f"{n} tensor{'s' * (n > 1)} {what}" for what, n in kinds) or "nothing"
    config = adapter.config
    rank = f" (LoRA of rank {config.get('r', 8)}, alpha {config.get('lora_alpha', 8)})"
    return f"adapter {adapter.folder.resolve().name}{rank if config else ''}: {done}"


def _at(tensor: Tensor) -> str:
    return f"{tensor.file}: {tensor.name}"
