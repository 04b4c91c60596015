"""Random tensors of a tiny FastViTHD, in the form for training and for inference, under Apple's
names (mobileclip/mci.py) and under timm's (fastvit.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints.paligemma import Tensors

Array = NDArray[np.float64]
# Apple's numbers of modules, by stage: positions, blocks, and what leads to the next stage.
STAGES: tuple[tuple[int | None, int, int | None], ...] = (
    (None, 0, 1),
    (None, 2, 3),
    (None, 4, 5),
    (6, 7, 8),
    (9, 10, None),
)
EPS = 1e-5
# Of norms: with less, features of all pictures are nearly the same.
GAIN = 1.2


def training(widths: tuple[int, ...], depths: tuple[int, ...], seed: int) -> Tensors:
    """The form for training under Apple's names. Norms and scales are anything but 1."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}

    def add(name: str, *shape: int, spread: float | None = None) -> None:
        made[name] = rng.normal(size=shape) * (
            np.prod(shape[1:]) ** -0.5 if spread is None else spread
        )

    def linear(name: str, *shape: int) -> None:
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0], spread=0.1)

    def norm(name: str, width: int, gain: float = 1.0) -> None:
        made[f"{name}.weight"] = gain * rng.uniform(0.6, 1.4, width)
        add(f"{name}.bias", width, spread=0.1)
        add(f"{name}.running_mean", width, spread=0.2)
        made[f"{name}.running_var"] = rng.uniform(0.4, 1.8, width)
        made[f"{name}.num_batches_tracked"] = np.array(7.0)

    def branch(name: str, width: int, given: int, side: int) -> None:
        add(f"{name}.conv.weight", width, given, side, side)
        norm(f"{name}.bn", width, GAIN)

    def scale(name: str, width: int) -> None:
        made[name] = rng.uniform(0.2, 0.7, (width, 1, 1))

    def net(name: str, width: int) -> None:
        branch(f"{name}.conv", width, 1, 7)
        linear(f"{name}.fc1", 4 * width, width, 1, 1)
        linear(f"{name}.fc2", width, 4 * width, 1, 1)

    first, last = widths[0], widths[-1]
    for i, (given, side) in enumerate(((3, 3), (1, 3), (first, 1))):
        branch(f"patch_embed.{i}.rbr_conv.0", first, given, side)
    norm("patch_embed.2.rbr_skip", first, GAIN)
    for (positions, blocks, down), width, depth in zip(STAGES, widths, depths, strict=True):
        if positions is not None:
            linear(f"network.{positions}.pe", width, 1, 7, 7)
        for j in range(depth):
            block = f"network.{blocks}.{j}"
            mixer = f"{block}.token_mixer"
            if positions is None:
                branch(f"{mixer}.mixer.rbr_conv.0", width, 1, 3)
                branch(f"{mixer}.mixer.rbr_scale", width, 1, 1)
                norm(f"{mixer}.mixer.rbr_skip", width)
                norm(f"{mixer}.norm.rbr_skip", width)
                scale(f"{mixer}.layer_scale", width)
                scale(f"{block}.layer_scale", width)
            else:
                made[f"{block}.norm.weight"] = rng.uniform(0.6, 1.4, width)
                add(f"{block}.norm.bias", width, spread=0.1)
                add(f"{mixer}.qkv.weight", 3 * width, width)
                linear(f"{mixer}.proj", width, width)
                scale(f"{block}.layer_scale_1", width)
                scale(f"{block}.layer_scale_2", width)
            net(f"{block}.convffn", width)
        if down is not None:
            wider = widths[widths.index(width) + 1]
            branch(f"network.{down}.proj.0.lkb_origin", wider, 1, 7)
            branch(f"network.{down}.proj.0.small_conv", wider, 1, 3)
            branch(f"network.{down}.proj.1.rbr_conv.0", wider, wider, 1)
            norm(f"network.{down}.proj.1.rbr_skip", wider, GAIN)
    branch("conv_exp.rbr_conv.0", 2 * last, 1, 3)
    branch("conv_exp.rbr_scale", 2 * last, 1, 1)
    linear("conv_exp.se.reduce", last // 8, 2 * last, 1, 1)
    linear("conv_exp.se.expand", 2 * last, last // 8, 1, 1)
    add("head.proj", 2 * last, 8)
    return {name: values.astype(np.float32) for name, values in made.items()}


def inference(made: Tensors) -> Tensors:
    """The form for inference: branches, skips and RepMixers as one convolution each."""
    out = dict(made)
    stems = {
        m[1] for name in made if (m := re.match(r"(.+?)\.(?:rbr|lkb_origin|small_conv)", name))
    }
    plain = sorted(stem for stem in stems if ".token_mixer" not in stem)
    for stem in plain:
        weight, bias = _sum(_taken(out, f"{stem}."))
        kind = "lkb_reparam" if f"{stem}.lkb_origin.conv.weight" in made else "reparam_conv"
        _put(out, f"{stem}.{kind}", weight, bias)
    for stem in sorted({s.removesuffix(".mixer") for s in stems if s.endswith(".mixer")}):
        weight, bias = _sum(_taken(out, f"{stem}.mixer."))
        less, less_bias = _sum(_taken(out, f"{stem}.norm."), weight.shape)
        gain = out.pop(f"{stem}.layer_scale").astype(np.float64)
        kernel = _skip(weight.shape) + gain[..., None] * (weight - less)
        _put(out, f"{stem}.reparam_conv", kernel, gain.ravel() * (bias - less_bias))
    for name in [name for name in out if name.endswith(".pe.weight")]:
        stem, weight = name.removesuffix(".pe.weight"), out.pop(name).astype(np.float64)
        bias = out.pop(f"{stem}.pe.bias").astype(np.float64)
        _put(out, f"{stem}.reparam_conv", weight + _skip(weight.shape), bias)
    return out


def _taken(out: Tensors, stem: str) -> dict[str, Array]:
    """A module's branches, which are taken out; squeeze and excitation stay."""
    names = [n for n in out if n.startswith(stem) and ".se." not in n]
    return {n.removeprefix(stem): out.pop(n).astype(np.float64) for n in names}


def _put(out: Tensors, name: str, weight: Array, bias: Array) -> None:
    out |= {f"{name}.weight": weight.astype(np.float32), f"{name}.bias": bias.astype(np.float32)}


def _sum(given: Mapping[str, Array], shape: tuple[int, ...] = ()) -> tuple[Array, Array]:
    kernels = [values.shape for name, values in given.items() if name.endswith("conv.weight")]
    shape = shape or max(kernels, key=lambda each: each[-1])
    weight, bias = np.zeros(shape), np.zeros(shape[0])
    for kernel, norm in _branches(given, shape):
        gain, shift, mean, variance = (given[f"{norm}.{part}"] for part in _PARTS)
        gain = gain / np.sqrt(variance + EPS)
        edge = (shape[-1] - kernel.shape[-1]) // 2
        inside = slice(edge, shape[-1] - edge)
        weight[:, :, inside, inside] += kernel * gain[:, None, None, None]
        bias += shift - mean * gain
    return weight, bias


_PARTS = ("weight", "bias", "running_mean", "running_var")


def _branches(given: Mapping[str, Array], shape: tuple[int, ...]) -> Iterator[tuple[Array, str]]:
    for name, values in given.items():
        if name.endswith("conv.weight"):
            yield values, name.removesuffix("conv.weight") + "bn"
        elif name == "rbr_skip.weight":
            yield _skip(shape), "rbr_skip"


def _skip(shape: tuple[int, ...]) -> Array:
    width, given, side, _ = shape
    kernel = np.zeros(shape)
    for i in range(width):
        kernel[i, i % given, side // 2, side // 2] = 1
    return kernel


def as_timm(made: Tensors) -> Tensors:
    """The tensors under timm's names, without the pooling head."""
    return {_timm(name): tensor for name, tensor in made.items() if name != "head.proj"}


def _timm(name: str) -> str:
    for i, (positions, blocks, down) in enumerate(STAGES):
        name = name.replace(f"network.{positions}.pe.", f"stages.{i}.pos_emb.pos_enc.")
        name = name.replace(f"network.{positions}.", f"stages.{i}.pos_emb.")
        name = re.sub(rf"^network\.{blocks}\.", f"stages.{i}.blocks.", name)
        name = name.replace(f"network.{down}.", f"stages.{i + 1}.downsample.")
    for own, timm in (
        ("patch_embed", "stem"),
        ("conv_exp", "final_conv"),
        ("rbr_conv", "conv_kxk"),
        ("rbr_scale", "conv_scale"),
        ("rbr_skip", "identity"),
        ("lkb_origin", "large_conv"),
        ("lkb_reparam", "reparam_conv"),
        ("convffn", "mlp"),
        ("se.reduce", "se.fc1"),
        ("se.expand", "se.fc2"),
    ):
        name = name.replace(own, timm)
    return f"{name}.gamma" if re.search(r"layer_scale(_\d)?$", name) else name
