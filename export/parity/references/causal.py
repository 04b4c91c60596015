"""Base of references whose decoder reads text, a picture and text from left to right."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.parity.references import Arrays

# transformers leaves its classes without types.
_hf: Any = transformers


class Seen(NamedTuple):
    """Stages of a picture: pixels [1, 3, size, size], features [1, patches, width] and
    embeddings [1, rows, n_embd].
    """

    pixels: Tensor
    features: Tensor
    embeddings: Tensor


def weights(part: Weights) -> dict[str, Tensor]:
    """A part's tensors in float32, by canonical name."""
    return {name: torch.from_numpy(t.float32().copy()) for name, t in part.items()}


def stages(
    seen: Seen, decoder: Any, around: tuple[list[int], list[int]], tokens: NDArray[np.int32]
) -> Arrays:
    """See references.SourceModel.run; `around` are the token ids on both sides of the picture."""
    embed = decoder.get_input_embeddings()
    before, after = (embed(torch.tensor([ids])) for ids in around)
    logits = generated(decoder, torch.cat([before, seen.embeddings, after], 1), tokens)
    return {name: tensor.numpy() for name, tensor in seen._asdict().items()} | {
        "prompt_ids": np.array(around[0] + around[1], np.int32),
        "logits": logits,
    }


def generated(decoder: Any, rows: Tensor, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [1 + n, n_vocab] after rows [1, m, n_embd] and after each of n tokens."""
    cache = _hf.DynamicCache(config=decoder.config)
    out = decoder(inputs_embeds=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
    found = [out.logits[0, -1].numpy()]
    for token in tokens:
        step = torch.tensor([[int(token)]])
        out = decoder(input_ids=step, past_key_values=cache, use_cache=True)
        found.append(out.logits[0, -1].numpy())
    return np.stack(found)
