"""FastViTHD's tower, in the form for training or for inference, under Apple's names or timm's.

In the form for training a convolution is a sum of branches, each with a batch norm behind it. All
of that is linear, so the branches are folded into one convolution, in float64, as the original's
`reparameterize` does (apple/ml-fastvlm at 592b4ad, mobileclip/mci.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.computed import made, rows
from edgevlm.export.checkpoint.tensors import Tensor, Weights
from edgevlm.export.onnx.graph import Builder, Value
from edgevlm.export.onnx.layers import (
    activation,
    attention,
    layer_norm,
    linear,
    mlp,
    to_grid,
    to_rows,
)
from edgevlm.export.parts import Net
from edgevlm.parts.fastvit import HEAD, FastVit

Float64 = NDArray[np.float64]
# A module's tensors by name.
Values = Mapping[str, Float64]
Shape = tuple[int, ...]


def _build(b: Builder, config: FastVit, pixels: Value) -> Value:
    x = _conv(b, config, "stem.0", pixels, stride=2)
    x = _conv(b, config, "stem.1", x, stride=2, groups=config.widths[0])
    x = _conv(b, config, "stem.2", x)
    for i, width in enumerate(config.widths):
        stage = f"stages.{i}"
        if i:
            below = config.widths[i - 1]
            x = _conv(b, config, f"{stage}.downsample.0", x, stride=2, groups=below)
            x = _conv(b, config, f"{stage}.downsample.1", x)
        names = [f"{stage}.blocks.{j}" for j in range(config.depths[i])]
        if config.attends(i):
            x = b.conv(f"{stage}.positions", x, pad=3, groups=width)
            x = _attending(b, stage, names, x, config)
        else:
            for name in names:
                x = b.conv(f"{name}.mixer", x, pad=1, groups=width)
                x = b.apply("Add", name, x, to_grid(b, name, _mixed(b, name, x, config)))
    x = b.conv("final.conv", x, pad=1, groups=config.widths[-1])
    x = b.apply("Mul", "final", x, _gates(b, "final", x))
    return activation(b, "final.act", to_rows(b, "final", x), config.hidden_act)


def _conv(
    b: Builder, config: FastVit, name: str, x: Value, stride: int = 1, groups: int = 1
) -> Value:
    pad = b.shape(f"{name}.weight")[-1] // 2
    return activation(b, f"{name}.act", b.conv(name, x, stride, pad, groups), config.hidden_act)


def _mixed(b: Builder, name: str, grid: Value, config: FastVit) -> Value:
    """The output of a block's net for a map, in rows.

    Its convolutions of 1 x 1 are linear maps there, which 8 and 4 bits are made for; as they stand
    in the original they are a tenth faster in float32, and a third slower than 8 bits.
    """
    x = to_rows(b, name, b.conv(f"{name}.mlp.conv", grid, pad=3, groups=grid.shape[0]))
    return mlp(b, f"{name}.mlp", x, config.hidden_act)


def _attending(b: Builder, stage: str, names: list[str], grid: Value, config: FastVit) -> Value:
    """The blocks of a stage with attention."""
    x = to_rows(b, stage, grid)
    for name in names:
        y = layer_norm(b, f"{name}.norm", x, config.layer_norm_eps)
        q, k, v = (linear(b, f"{name}.attention.{kind}_proj", y) for kind in "qkv")
        y = attention(b, f"{name}.attention", q, k, v, x.shape[1] // HEAD)
        x = b.apply("Add", name, x, linear(b, f"{name}.attention.proj", y))
        x = b.apply("Add", name, x, _mixed(b, name, to_grid(b, name, x), config))
    return to_grid(b, stage, x)


def _gates(b: Builder, name: str, grid: Value) -> Value:
    """Squeeze and excitation: a number for each channel, [n, d, 1, 1]."""
    x = b.apply("Relu", name, b.conv(f"{name}.fc1", b.mean(name, grid, 1, 2)))
    return b.apply("Sigmoid", name, b.conv(f"{name}.fc2", x))


NET = Net(_build, quantized=True)

# Apple's names (mobileclip/mci.py) -> timm's (fastvit.py), one substitution after the other.
_TIMM = (
    (r"^patch_embed\.", "stem."),
    (r"^conv_exp\.", "final_conv."),
    (r"\.rbr_conv\.", ".conv_kxk."),
    (r"\.rbr_scale\.", ".conv_scale."),
    (r"\.rbr_skip\.", ".identity."),
    (r"\.lkb_origin\.", ".large_conv."),
    (r"\.lkb_reparam\.", ".reparam_conv."),
    (r"\.pe\.", ".pos_enc."),
    (r"\.convffn\.", ".mlp."),
    (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."),
    (r"(\.layer_scale(?:_\d)?)$", r"\1.gamma"),
)


def canonical(found: Weights, config: FastVit) -> Weights:
    """Branches folded, and the scales of layers in the maps that they follow."""
    given, shapes = _renamed(found, config), config.tensors()
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        kernel = shapes[f"{module}.weight"]
        if match := re.fullmatch(r"(.+)\.attention\.([qkv])_proj", module):
            stem = f"{match[1]}.token_mixer.qkv."
            tensors = _taken(given, stem, {"weight": (3 * kernel[0], kernel[1])})
            out[name] = rows(tensors["weight"], (3, kernel[0]), 0, "qkv".index(match[2]))
        else:
            stem, form = _form(module, given, kernel)
            tensors = _taken(given, stem, form.shapes(kernel))
            out[name] = made(tensors, shape, partial(_part, form.fold, part == "bias", kernel))
        used |= {f"{stem}{each}" for each in tensors}
    # What is left over is refused as a tensor of another model.
    return out | {name: tensor for name, tensor in given.items() if name not in used}


def _renamed(found: Weights, config: FastVit) -> dict[str, Tensor]:
    """The tensors under timm's names, Apple's list of modules in stages."""
    names: list[str] = []
    for i in range(len(config.widths)):
        names += [f"stages.{i}.downsample"] if i else []
        names += [f"stages.{i}.pos_emb"] if config.attends(i) else []
        names.append(f"stages.{i}.blocks")
    places, out = {f"network.{n}.": f"{name}." for n, name in enumerate(names)}, dict[str, Tensor]()
    for name, tensor in found.items():
        target = re.sub(r"^network\.\d+\.", lambda m: places.get(m[0], m[0]), name)
        for pattern, replacement in _TIMM:
            target = re.sub(pattern, replacement, target)
        if target in out:
            raise SourceError(f"{tensor.file}: {tensor.name} and {out[target].name} are the same")
        out[target] = tensor
    return out


def _taken(given: Weights, stem: str, wanted: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The tensors of a module; raises SourceError where one lacks or has another shape."""
    module: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        tensor = given.get(f"{stem}{name}")
        if tensor is None:
            folder = next(iter(given.values())).file.parent
            raise SourceError(
                f"{folder}: lacks the tensor for vision.{stem}{name}; download it again"
            )
        if tensor.shape != shape:
            raise SourceError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, those beside it say "
                f"{list(shape)}"
            )
        module[name] = tensor
    return module


def _part(fold: Fold, bias: bool, kernel: Shape, given: Values) -> Float64:
    return fold(given, kernel)[bias]


# A module's values and the shape of its kernel -> weight and bias.
Fold = Callable[[Values, Shape], tuple[Float64, Float64]]


@dataclass(frozen=True)
class _Form:
    """A form in which a module is published: the shapes of its tensors, of that of the kernel, and
    how they are folded.
    """

    shapes: Callable[[Shape], dict[str, Shape]]
    fold: Fold


def _norm(name: str, kernel: Shape) -> dict[str, Shape]:
    """A batch norm."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": kernel[:1] for part in parts}


def _branch(name: str, kernel: Shape, side: int = 0) -> dict[str, Shape]:
    """A convolution of the kernel's side, or another, and a batch norm."""
    sides = (side, side) if side else kernel[2:]
    return {f"{name}.conv.weight": (*kernel[:2], *sides), **_norm(f"{name}.bn", kernel)}


def _plain(kernel: Shape, name: str = "", more: Shape = ()) -> dict[str, Shape]:
    return {f"{name}weight": (*kernel, *more), f"{name}bias": kernel[:1]}


def _as_is(given: Values, _: Shape) -> tuple[Float64, Float64]:
    weight, bias = given.values()
    return weight, bias


# PyTorch's default, which both codes leave as it is.
_EPS = 1e-5


def _summed(given: Values, kernel: Shape, within: str = "") -> tuple[Float64, Float64]:
    """The sum of a module's branches, of which one without a convolution passes its input on."""
    weight, bias = np.zeros(kernel), np.zeros(kernel[0])
    for name in (name for name in given if name.startswith(within)):
        if name.endswith(".conv.weight"):
            own, norm = given[name], name.replace(".conv.weight", ".bn")
        elif name.endswith("identity.weight"):
            own, norm = _identity(kernel), name.removesuffix(".weight")
        else:
            continue
        gain = given[f"{norm}.weight"] / np.sqrt(given[f"{norm}.running_var"] + _EPS)
        edge = (kernel[-1] - own.shape[-1]) // 2
        weight += np.pad(_times(own, gain), [(0, 0), (0, 0), (edge, edge), (edge, edge)])
        bias += given[f"{norm}.bias"] - given[f"{norm}.running_mean"] * gain
    return weight, bias


def _identity(kernel: Shape) -> Float64:
    """The kernel of a convolution that changes nothing."""
    width, given, side, _ = kernel
    out = np.zeros(kernel)
    out[range(width), np.arange(width) % given, side // 2, side // 2] = 1
    return out


def _times(weight: Float64, gain: Float64) -> Float64:
    """A kernel with each channel that it makes times a number."""
    return weight * gain.reshape(-1, *[1] * (weight.ndim - 1))


_FOLDED = _Form(partial(_plain, name="reparam_conv."), _as_is)
_PLAIN = _Form(_plain, _as_is)


def _mixer(given: Values, kernel: Shape) -> tuple[Float64, Float64]:
    """RepMixer: x + scale * (mixer(x) - norm(x))."""
    weight, bias = _summed(given, kernel, "mixer.")
    less, less_bias = _summed(given, kernel, "norm.")
    gain = given["layer_scale.gamma"].ravel()
    return _identity(kernel) + _times(weight - less, gain), (bias - less_bias) * gain


def _mixer_shapes(kernel: Shape) -> dict[str, Shape]:
    branches = _branch("mixer.conv_kxk.0", kernel) | _branch("mixer.conv_scale", kernel, 1)
    norms = _norm("mixer.identity", kernel) | _norm("norm.identity", kernel)
    return branches | norms | {"layer_scale.gamma": (kernel[0], 1, 1)}


def _positions(given: Values, kernel: Shape) -> tuple[Float64, Float64]:
    weight, bias = given.values()
    return weight + _identity(kernel), bias


def _scaled(name: str, scale: str, more: Shape = ()) -> _Form:
    """A map and the scale of its layer."""
    key = f"{scale}.gamma"

    def fold(given: Values, kernel: Shape) -> tuple[Float64, Float64]:
        weight, bias, gain = given.values()
        return _times(weight.reshape(kernel), gain.ravel()), bias * gain.ravel()

    def shapes(kernel: Shape) -> dict[str, Shape]:
        return {**_plain(kernel, f"{name}.", more), key: (kernel[0], 1, 1)}

    return _Form(shapes, fold)


def _branches(*which: Callable[[Shape], dict[str, Shape]]) -> tuple[_Form, _Form]:
    """For inference, and for training."""

    def shapes(kernel: Shape) -> dict[str, Shape]:
        return {name: shape for each in which for name, shape in each(kernel).items()}

    return _FOLDED, _Form(shapes, _summed)


_KXK, _SKIP = partial(_branch, "conv_kxk.0"), partial(_norm, "identity")
_POINT = (1, 1)
# Canonical modules, what stands before the names of their tensors, and the forms of these.
_MODULES: tuple[tuple[str, str, tuple[_Form, ...]], ...] = (
    (r"stem\.[01]", r"\g<0>.", _branches(_KXK)),
    (r"stem\.2", r"\g<0>.", _branches(_KXK, _SKIP)),
    (
        r"(.+\.downsample)\.0",
        r"\1.proj.0.",
        _branches(partial(_branch, "large_conv"), partial(_branch, "small_conv", side=3)),
    ),
    (r"(.+\.downsample)\.1", r"\1.proj.1.", _branches(_KXK, _SKIP)),
    (
        r"(.+)\.positions",
        r"\1.pos_emb.",
        (_FOLDED, _Form(partial(_plain, name="pos_enc."), _positions)),
    ),
    (r"(.+)\.mixer", r"\1.token_mixer.", (_FOLDED, _Form(_mixer_shapes, _mixer))),
    (r".+\.norm", r"\g<0>.", (_PLAIN,)),
    (r"(.+)\.attention\.proj", r"\1.", (_scaled("token_mixer.proj", "layer_scale_1"),)),
    (r"(.+\.mlp)\.conv", r"\1.", (_Form(partial(_branch, "conv"), _summed),)),
    (r".+\.mlp\.fc1", r"\g<0>.", (_Form(partial(_plain, more=_POINT), _as_is),)),
    (
        r"(.+)\.mlp\.fc2",
        r"\1.",
        tuple(_scaled("mlp.fc2", f"layer_scale{end}", _POINT) for end in ("_2", "")),
    ),
    (
        r"final\.conv",
        "final_conv.",
        _branches(_KXK, partial(_branch, "conv_scale", side=1)),
    ),
    (r"final\.(fc[12])", r"final_conv.se.\1.", (_PLAIN,)),
)


def _form(module: str, given: Weights, kernel: Shape) -> tuple[str, _Form]:
    """The start of the names of a module's tensors, and the form that they have: the first that is
    whole, or else the last.
    """
    for pattern, prefix, forms in _MODULES:
        if match := re.fullmatch(pattern, module):
            stem = match.expand(prefix)
            whole = (f for f in forms if all(f"{stem}{name}" in given for name in f.shapes(kernel)))
            return stem, next(whole, forms[-1])
    raise AssertionError(module)
