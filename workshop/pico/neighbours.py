"""Teaches which object is next on each side of another, and where answers find it.

The encoder's new layer finds the neighbours of every object, the projector writes them into
channels of their own, and the decoder's new layer fetches them for the noun of a question.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.benchmarks.scenes.kinds import KINDS
from edgevlm.benchmarks.scenes.phrasings import SIDES
from workshop.pico.batches import Texts
from workshop.pico.heads import entropy, text_of
from workshop.pico.initial import NEW_CHANNELS, NEW_LAYER
from workshop.pico.model import DecoderLayer, VisionLayer


class Neighbours(nn.Module):
    """Shows the first attention heads of the encoder's last layer, one for each side, where the
    nearest object on that side is, and has the layer say of what kind it is.

    A question about a side is then answered by what is known of the object that it names.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(SIDES) * len(KINDS))
        nn.init.normal_(self.linear.weight, std=width**-0.5)

    def losses(
        self, layer: VisionLayer, before: Tensor, features: Tensor, targets: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The layer's input and output [n, patches, width] -> one scalar each."""
        right = _neighbours(targets)
        log_p = layer.log_attention(before, len(SIDES))
        looked = -log_p.masked_fill(~right, -1e9).logsumexp(-1)[right.any(-1)]
        guessed = self.linear(features).unflatten(-1, (len(SIDES), -1))
        return {
            "beside attention": looked.mean() if looked.numel() else looked.sum(),
            "beside": entropy(guessed, _kinds_beside(right, targets)),
        }


def noun_losses(
    layer: DecoderLayer, layers: list[Tensor], texts: Texts, targets: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Shows the first attention head of the decoder's new layer the object that a question about a
    side names, the second one the word for the side, and has the noun's state hold the codes of the
    kinds that are beside that object.

    Takes the layer and the states [rows, p + t, width] behind every layer; one scalar each.
    """
    n_text = texts.ids.shape[1]
    before, after = layers[NEW_LAYER - 1], layers[NEW_LAYER]
    n_rows = before.shape[1] - n_text
    asked = texts.nouns.facts[:, -1] >= 0
    where, thing, side_word = texts.nouns.facts[asked][:, [0, -2, -1]].unbind(1)
    row, column = where // n_text, n_rows + where % n_text
    positions = torch.arange(n_rows).expand(len(before), -1)
    positions = torch.cat([positions, texts.positions], 1)
    log_p = layer.log_attention(before, positions, texts.mask, row, column, 2)
    right = targets["thing"][texts.picture_of[row]] == thing[:, None]
    looked = -log_p[:, 0, :n_rows].masked_fill(~right, -1e9).logsumexp(-1)[right.any(-1)]
    heard = -log_p[:, 1].gather(1, n_rows + side_word[:, None] % n_text)
    held = held_beside(text_of(after, n_text).flatten(0, 1)[where])
    return {
        "noun looks": looked.mean() if looked.numel() else looked.sum(),
        "noun hears": heard.mean() if heard.numel() else heard.sum(),
        "noun beside": entropy(held, texts.nouns.beside[asked]),
    }


def fill_new_channels(
    linear: nn.Linear, features: Tensor, kinds: Tensor, steps: int = 600
) -> float:
    """Has the projector write into NEW_CHANNELS what the features [n, vision_width] tell of the
    kinds int64 [n, sides] beside; returns the nats by which it fails.

    The new channels are half as loud as the others then: the norms hardly change.
    """
    with torch.no_grad():
        loudness = 0.5 * linear(features)[:, :-NEW_CHANNELS].square().mean().sqrt()
        new = _least_squares(features, beside_codes(kinds))
    optimiser = torch.optim.Adam([p.requires_grad_() for p in new], lr=5e-4)
    loss = torch.zeros(())
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 5e-4 * (1 - step / steps)
        some = torch.randint(len(features), (4096,))
        loss = entropy(held_beside(F.linear(features[some], *new)), kinds[some])
        for p, grad in zip(new, torch.autograd.grad(loss, new), strict=True):
            p.grad = grad
        optimiser.step()
    with torch.no_grad():
        scale = loudness / F.linear(features, *new).square().mean().sqrt()
        for p, value in zip((linear.weight, linear.bias), new, strict=True):
            p[-NEW_CHANNELS:] = scale * value
    return float(loss.detach())


def _least_squares(features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and bias that make of the features what is wanted, as nearly as can be."""
    mean, middle = features.mean(0), wanted.mean(0)
    centred = features - mean
    square = centred.T @ centred
    square.diagonal().add_(1e-4 * square.trace() / len(square))
    weight = torch.linalg.solve(square, centred.T @ (wanted - middle)).T.contiguous()
    return weight, middle - weight @ mean


def held_beside(states: Tensor) -> Tensor:
    """States [..., width] -> logits of the kinds on each side [..., sides, kinds], as NEW_CHANNELS
    hold them; twice as sharp as the channels are when equally loud.
    """
    channels = F.rms_norm(states[..., -NEW_CHANNELS:], (NEW_CHANNELS,))
    by_side: Tensor = torch.unflatten(channels, -1, (len(SIDES), -1))
    return 2 * by_side @ KIND_CODES.T


def beside_codes(kinds: Tensor) -> Tensor:
    """Kinds int64 [..., sides] -> what rows should hold of them in NEW_CHANNELS, a code for each
    side: [..., NEW_CHANNELS], zeros for -1.
    """
    return torch.where((kinds >= 0)[..., None], KIND_CODES[kinds], 0.0).flatten(-2)


def _kind_codes(size: int) -> Tensor:
    """One for each kind, the same on every side, so that what is learnt of one kind or side serves
    for all: a unit vector or its negative, and for the last kinds what is in between.
    """
    units = torch.eye(size)
    between = torch.tensor([[1.0] * size, [1.0, -1.0] * (size // 2)]) * size**-0.5
    codes = torch.cat([torch.stack([units, -units], 1).flatten(0, 1), between, -between])
    return codes[: len(KINDS)]


KIND_CODES = _kind_codes(NEW_CHANNELS // len(SIDES))


def _neighbours(targets: dict[str, Tensor]) -> Tensor:
    """The patches that show what is on each side of a patch's object: bool [n, sides, p, p]."""
    beside = targets["beside"].transpose(1, 2)[..., None]
    return (beside == targets["thing"][:, None, None]) & (beside >= 0)


def kinds_beside(targets: dict[str, Tensor]) -> Tensor:
    """The kinds on the sides of every patch's object: int64 [n, p, sides], -1 where none is."""
    return _kinds_beside(_neighbours(targets), targets)


def _kinds_beside(right: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """The kinds on the sides of every patch's object: [n, p, sides], -1 where none is."""
    first = right.int().argmax(-1)  # a patch of the neighbour
    kinds = targets["kind"].gather(1, first.flatten(1)).view_as(first) - 1
    return torch.where(right.any(-1), kinds, -1).transpose(1, 2)
