"""A part's tensors in another project's layout: other names, several matrices fused in one.

Does not know any part; their rooms state the patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.computed import rows
from edgevlm.export.checkpoint.tensors import Tensor, Weights

# A layer of open_clip's transformers, and of OpenAI's -> transformers' names, both of its towers.
OPEN_CLIP_LAYERS = {
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.(.+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.+)": (
        r"encoder.layers.\1.self_attn.out_proj.\2"
    ),
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.+)": r"encoder.layers.\1.mlp.fc1.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.+)": r"encoder.layers.\1.mlp.fc2.\2",
}
OPEN_CLIP_FUSED = {
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)": tuple(
        rf"encoder.layers.\1.self_attn.{x}_proj.\2" for x in "qkv"
    )
}


def renamed(
    found: Weights, names: Mapping[str, str], fused: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """The tensors under canonical names.

    `names` are patterns of whole names and what each becomes, `fused` those of matrices of which
    equally many rows belong to each of several. Other tensors keep their names. Raises SourceError
    for two tensors of one name.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in found.items():
        for target, part in _parts(name, tensor, names, fused).items():
            if target in out:
                raise SourceError(
                    f"{tensor.file}: {tensor.name} and {out[target].name} are the same"
                )
            out[target] = part
    return out


def _parts(
    name: str, tensor: Tensor, names: Mapping[str, str], fused: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    for pattern, targets in fused.items():
        match, n = re.fullmatch(pattern, name), len(targets)
        if match and tensor.shape[0] % n == 0:
            axes = (n, tensor.shape[0] // n)
            return {match.expand(t): rows(tensor, axes, 0, i) for i, t in enumerate(targets)}
    for pattern, target in names.items():
        if match := re.fullmatch(pattern, name):
            return {match.expand(target): tensor}
    return {name: tensor}
