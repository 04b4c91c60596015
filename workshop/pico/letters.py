"""Channels of the encoder's width in which it reads.

They are added to a trained encoder and change nothing of what it does: in the first layers they
look at its older channels, which do not look at them. What letter lies under each patch is read
first; the last layer gathers the letters of a word, in order, in the first image rows, where the
decoder finds them by counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workshop.pico.heads import entropy
from workshop.pico.targets import LETTER_SLOTS, LETTERS

CHANNELS = 64
HEADS = 2
HEAD_DIM = 32  # as wide as the older heads are
FF = 96
READ_LAYERS = 3  # whose older channels are looked at: later ones know little of single pixels
LONGEST = 5  # letters of a word
N_ROWS = LONGEST + 1  # image rows that hold a word and its end
END = len(LETTERS)  # what a row behind the last letter holds
# Which neighbour (rows down, columns right) the heads of the first layers are shown at first.
_SHOWN = (((0, -1), (0, 1)), ((-1, 0), (1, 0)), ((0, -1), (0, 1)))
_SLOT_LAYER, _MIDDLE_LAYER = 6, 4  # what goes into them is asked for letters


class Older(NamedTuple):
    """The older channels of a picture's patches: ``seen`` float32 [n, patches,
    (1 + 3 * READ_LAYERS) * width], the patch embedding and, of each of the first layers, what
    attention sees, its heads and what the feed-forward sees; ``loudness`` float32 [n, patches,
    2 * layers + 1], by what every norm divides, relative to its mean.
    """

    seen: Tensor
    loudness: Tensor


class Printed(NamedTuple):
    """Letters and words in pictures. ``letter`` and its ``place`` in its word int64 [n, patches,
    slots], -1 where there is none; ``word`` int64 [n, LONGEST], -1 behind its end; ``alone`` and
    ``blank`` bool [n], whether the word is the only one, whether there are no letters at all.
    """

    letter: Tensor
    place: Tensor
    word: Tensor
    alone: Tensor
    blank: Tensor


class _Linear(nn.Linear):
    def __init__(self, n_in: int, n_out: int, scale: float = 1.0) -> None:
        super().__init__(n_in, n_out)
        nn.init.normal_(self.weight, std=scale * n_in**-0.5)
        nn.init.zeros_(self.bias)


class _Layer(nn.Module):
    """The part of an encoder layer that writes into the new channels."""

    def __init__(self, older: int) -> None:
        super().__init__()
        self.older = older
        self.q_proj, self.k_proj, self.v_proj = (
            _Linear(older + CHANNELS, HEADS * HEAD_DIM) for _ in range(3)
        )
        self.out_proj = _Linear(older + HEADS * HEAD_DIM, CHANNELS, 0.4)
        self.fc1 = _Linear(older + CHANNELS, FF)
        self.fc2 = _Linear(FF, CHANNELS, 0.4)

    def forward(
        self, x: Tensor, normed: Tensor, seen: Tensor, norm: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Channels [n, patches, CHANNELS], as they are and normed -> what becomes of them, and the
        logarithms of the attention; ``norm`` is the second one.
        """
        before, heads, between = torch.split(seen, self.older, -1) if self.older else (seen,) * 3
        normed = torch.cat([before, normed], -1)
        q, k, v = (
            f(normed).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        log_p = F.log_softmax(q @ k.transpose(-1, -2) * HEAD_DIM**-0.5, -1)
        mixed = (log_p.exp() @ v).transpose(1, 2).flatten(2)
        x = x + self.out_proj(torch.cat([heads, mixed], -1))
        normed = torch.cat([between, norm(x)], -1)
        return x + self.fc2(F.gelu(self.fc1(normed), approximate="tanh")), log_p


class LetterChannels(nn.Module):
    """All new channels of an encoder of ``layers`` layers and older ``width``.

    ``roughness`` is the noise on what norms hand on, while they learn: an encoder in int8 rounds.
    """

    def __init__(self, width: int, layers: int, grid: int, roughness: float = 0.0) -> None:
        super().__init__()
        self.width, self.roughness = width, roughness
        self.share = CHANNELS / (width + CHANNELS)
        self.embedding = _Linear(width, CHANNELS, 0.5)
        self.position = nn.Parameter(_places(grid))
        self.layers = nn.ModuleList(
            _Layer(width if index < READ_LAYERS else 0) for index in range(layers)
        )

    def forward(self, older: Older) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The new channels behind the last norm [n, patches, CHANNELS], what goes into every layer,
        and the logarithms of its attention [n, HEADS, patches, patches].
        """
        sizes = [self.width] + [3 * self.width] * READ_LAYERS
        embedded, *parts = torch.split(older.seen, sizes, -1)
        nothing = embedded[..., :0]
        x = self.embedding(embedded) + self.position
        inputs, attentions = [], []
        for index, layer in enumerate(self.layers):
            first, second = (older.loudness[..., 2 * index + k, None] for k in range(2))
            inputs.append(self._normed(x, first))
            seen = parts[index] if index < READ_LAYERS else nothing
            x, log_p = layer(x, inputs[-1], seen, partial(self._normed, loudness=second))
            attentions.append(log_p)
        return self._normed(x, older.loudness[..., -1:]), inputs, attentions

    def _normed(self, x: Tensor, loudness: Tensor) -> Tensor:
        """The new channels behind a norm over all of them while they are too quiet to matter to it:
        they lose, by their share of the width, of their mean.
        """
        normed = (x - self.share * x.mean(-1, keepdim=True)) / loudness
        if self.training and self.roughness:
            normed = normed + self.roughness * torch.randn_like(normed)
        return normed


class LetterHeads(nn.Module):
    """Heads on the letters' channels. ``code`` stays: it says what the image rows are to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.letter = _Linear(CHANNELS, LETTER_SLOTS * len(LETTERS))
        self.middle = _Linear(CHANNELS, LETTER_SLOTS * len(LETTERS))
        self.index = _Linear(CHANNELS, LETTER_SLOTS * (LONGEST + 1))
        self.code = _Linear(CHANNELS, CHANNELS)

    def word(self, channels: Tensor) -> Tensor:
        """Channels behind the last norm -> logits of the word's letters [n, N_ROWS, END + 1]."""
        out: Tensor = self.code(channels[:, :N_ROWS]) @ CODES.T / CHANNELS**0.5
        return out

    def losses(
        self, letters: LetterChannels, older: Older, printed: Printed, shown: float
    ) -> dict[str, Tensor]:
        """One scalar each; ``shown`` weighs how far the first heads look at their neighbours."""
        last, inputs, attentions = letters(older)
        slots = (LETTER_SLOTS, -1)
        letter = self.letter(inputs[_SLOT_LAYER]).unflatten(-1, slots)
        middle = self.middle(inputs[_MIDDLE_LAYER]).unflatten(-1, slots)
        index = self.index(inputs[_SLOT_LAYER]).unflatten(-1, slots)
        # Most of a page has no letters.
        rare = torch.tensor([0.15] + [1.0] * LONGEST)
        wanted = word_rows(printed)
        known = wanted >= 0
        code = self.code(last)
        sound = code.square().mean(-1)
        blank, others = sound[printed.blank], sound[~printed.blank, N_ROWS:]
        held = code[:, :N_ROWS][known] - CODES[wanted[known]]
        loud = [F.relu(x.square().mean(-1) - 4).square().mean() for x in (*inputs[1:], last)]
        return {
            "letter": entropy(letter, printed.letter),
            "middle": 0.5 * entropy(middle, printed.letter),
            "index": F.cross_entropy(index.flatten(0, 2), printed.place.flatten() + 1, weight=rare),
            "word": entropy(self.word(last), wanted),
            "held": held.square().mean() if len(held) else held.sum(),
            # A picture without words must not sound like one to the decoder.
            "silence": 4 * (blank.mean() if len(blank) else blank.sum()),
            "silent rows": others.mean() if len(others) else others.sum(),
            "gathered": 0.5 * _gathered(attentions[-1], printed),
            # No norm holds these channels: left alone, they grow from layer to layer.
            "loud": 0.1 * torch.stack(loud).sum(),
            "shown": shown * _shown(attentions),
        }


def word_rows(printed: Printed) -> Tensor:
    """Targets of the first image rows: int64 [n, N_ROWS], -1 where no word stands alone."""
    word = F.pad(printed.word, (0, 1), value=-1)
    return torch.where(word >= 0, word, END).masked_fill(~printed.alone[:, None], -1)


def _gathered(log_p: Tensor, printed: Printed) -> Tensor:
    """-log of the attention of the first rows that falls on their letter, each head's on one
    slot.
    """
    total = log_p.sum() * 0
    for slot in range(LETTER_SLOTS):
        right = printed.place[:, None, :, slot] == torch.arange(LONGEST)[:, None]
        right &= printed.alone[:, None, None]
        looked = log_p[:, slot, :LONGEST].masked_fill(~right, -1e9).logsumexp(-1)[right.any(-1)]
        total = total - (looked.mean() if looked.numel() else looked.sum())
    return total


def _shown(attentions: list[Tensor]) -> Tensor:
    grid = math.isqrt(attentions[0].shape[-1])
    losses = []
    for log_p, offsets in zip(attentions, _SHOWN, strict=False):
        for head, (down, right) in enumerate(offsets):
            own, other = _neighbours(grid, down, right)
            losses.append(-log_p[:, head, own, other].mean())
    return torch.stack(losses).mean()


def _neighbours(grid: int, down: int, right: int) -> tuple[Tensor, Tensor]:
    """The patches that have a neighbour there, and the neighbours."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    there = (rows + down).clamp(0, grid - 1), (columns + right).clamp(0, grid - 1)
    inside = (there[0] == rows + down) & (there[1] == columns + right)
    return (rows * grid + columns)[inside], (there[0] * grid + there[1])[inside]


def _places(grid: int) -> Tensor:
    """Waves along both sides in the first channels, so that a head finds a neighbour at once."""
    angles = 2 * math.pi * torch.arange(grid)[:, None] * torch.arange(1, 5) / (2 * grid)
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    along = torch.cat([waves.repeat(grid, 1), waves.repeat_interleave(grid, 0)], 1)
    return F.pad(along, (0, CHANNELS - along.shape[1]))


def _codes() -> Tensor:
    """Rows of a Hadamard matrix, orthogonal to one another: [END + 1, CHANNELS] of ones and minus
    ones.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < CHANNELS:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[: END + 1]


CODES = _codes()
