"""Extra heads that teach encoder and projector what lies under each patch; later dropped."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.benchmarks.scenes.kinds import COLOURS, KINDS, plural
from edgevlm.benchmarks.scenes.phrasings import SIDES
from edgevlm.benchmarks.scenes.questions import LOC_STEP
from workshop.pico.batches import Meant
from workshop.pico.model import DecoderLayer, Pico, rotate
from workshop.pico.targets import (
    LETTER_SLOTS,
    LETTERS,
    MASK_CELLS,
    MOST,
    RELATIONS,
    WORD_KIND,
)
from workshop.pico.tokenizer import N_LOC, Tokenizer

RELATION_WEIGHT = 2.0  # counts and orders are what the encoder is slowest to learn
NOUN_LAYER = 2  # the third of the decoder: two more bring what a noun knows to the answer
WRITTEN_LAYER = 3  # the fourth: what is next depends on what was written
MASK_LAYER = 2  # the third of the encoder: the layers after it can build on the masks
_SIZES = {
    "kind": WORD_KIND + 1,
    "colour": len(COLOURS),
    "centre": 1,
    "box": 4,
    "letter": LETTER_SLOTS * len(LETTERS),
    "letter_index": LETTER_SLOTS * 5,
}


class PatchHeads(nn.Module):
    """One linear layer from patch features to everything at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(_SIZES.values()))
        nn.init.normal_(self.linear.weight, std=width**-0.5)
        nn.init.zeros_(self.linear.bias)

    def losses(self, features: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features [n, patches, width] and the targets of batches.py -> one scalar each."""
        out = dict(
            zip(_SIZES, self.linear(features).split(tuple(_SIZES.values()), -1), strict=True)
        )
        seen = targets["kind"] > 0
        box_error = (out["box"][seen] - targets["box"][seen] * 4).abs()
        return {
            "kind": entropy(out["kind"], targets["kind"]),
            "colour": entropy(out["colour"], targets["colour"]),
            "centre": F.binary_cross_entropy_with_logits(
                out["centre"][..., 0], targets["centre"], pos_weight=torch.tensor(4.0)
            ),
            "box": box_error.mean() if box_error.numel() else box_error.sum(),
            "letter": entropy(out["letter"].unflatten(-1, (LETTER_SLOTS, -1)), targets["letter"]),
            "letter_index": entropy(
                out["letter_index"].unflatten(-1, (LETTER_SLOTS, -1)), targets["letter_index"]
            ),
        }


class MaskHead(nn.Module):
    """Teaches an early layer which pixels belong to a shape, whatever its colour.

    Left alone, the encoder takes tens of thousands of pictures to look at form rather than colour.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, MASK_CELLS**2)
        nn.init.normal_(self.linear.weight, std=width**-0.5)

    def loss(self, layers: list[Tensor], targets: dict[str, Tensor]) -> Tensor:
        """Layers' outputs for the patches -> mean cross entropy of the pixels' masks."""
        patches = layers[MASK_LAYER]
        logits = self.linear(F.layer_norm(patches, patches.shape[-1:]))
        mask = targets["mask"]
        known = (mask >= 0).float()
        wanted = mask.clamp(min=0).float()
        loss = F.binary_cross_entropy_with_logits(logits, wanted, known, reduction="sum")
        return loss / known.sum().clamp(min=1)


class RowHeads(nn.Module):
    """Ties the image rows to the decoder's own words and places.

    A row near the embedding of its object's noun and colour is what the attention of a prompt with
    these words can find at once; without this, that match is learnt late.
    """

    def __init__(self, width: int, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.places = nn.Linear(width, 4 * width, bias=False)
        self.relations = nn.Linear(width, len(RELATIONS) * MOST)
        for linear in (self.places, self.relations):
            nn.init.normal_(linear.weight, std=width**-0.5)
        # Nouns as they stand in a prompt (after a space) and as they begin an answer.
        self.nouns = [_word_ids(tokenizer, KINDS, space) for space in (" ", "")]
        self.colours = [_word_ids(tokenizer, COLOURS, space) for space in (" ", "")]
        first = tokenizer.first_loc
        self.place_ids = torch.arange(first, first + N_LOC, LOC_STEP)

    def losses(
        self, rows: Tensor, embeddings: Tensor, targets: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Image rows [n, patches, width], the embedding table, the targets of batches.py."""
        seen = (targets["kind"] > 0) & (targets["kind"] < WORD_KIND)
        found, kind, colour = rows[seen], targets["kind"][seen] - 1, targets["colour"][seen]
        nouns = [entropy(found @ embeddings[ids].T, kind) for ids in self.nouns]
        colours = [entropy(found @ embeddings[ids].T, colour) for ids in self.colours]
        box = (targets["box"] + _centres(rows.shape[1]))[seen]
        near = (torch.arange(len(self.place_ids)) - box[..., None] * (1023 / LOC_STEP)) / 0.75
        wanted = torch.softmax(-0.5 * near**2, -1)
        guessed = self.places(found).unflatten(-1, (4, -1)) @ embeddings[self.place_ids].T
        related = self.relations(found).unflatten(-1, (len(RELATIONS), MOST))
        return {
            "relations": RELATION_WEIGHT * entropy(related, targets["relations"][seen]),
            "noun": torch.stack(nouns).mean(),
            "colour word": torch.stack(colours).mean(),
            "place": F.cross_entropy(guessed.flatten(0, 1), wanted.flatten(0, 1)),
        }


class Referents(nn.Module):
    """Teaches tokens what they refer to, halfway through the decoder: the nouns of a prompt, and
    the words of a caption or the places of a box what they are about to name.

    From the answers alone, "what colour is the circle?" stays a guess among the colours of the
    picture for a hundred thousand pictures, though "is the circle red?" is learnt at once; and a
    box takes one side from one star, the next from another.
    """

    SIZES = (MOST, MOST, len(KINDS), len(COLOURS), len(KINDS), 4, len(SIDES))

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(width, sum(self.SIZES))
        nn.init.normal_(self.linear.weight, std=width**-0.5)

    def losses(self, layers: list[Tensor], meant: Meant, n_text: int) -> dict[str, Tensor]:
        """The states [rows, p + t, width] behind every decoder layer -> one scalar each."""
        states = text_of(layers[self.layer], n_text).flatten(0, 1)[meant.facts[:, 0]]
        out = self.linear(F.rms_norm(states, states.shape[-1:])).split(self.SIZES, -1)
        any_thing = meant.facts[:, 2] > 0
        error = (out[5][any_thing] - meant.boxes[any_thing] * 4).abs()
        names = ("left", "number", "kind", "colour", "asked")
        known = {name: entropy(out[k], meant.facts[:, k + 1]) for k, name in enumerate(names)}
        return known | {
            "box": error.mean() if error.numel() else error.sum(),
            "side": entropy(out[6], meant.facts[:, 6]),
        }


class NounAttention:
    """Shows one attention head of the decoder's first layer where a noun of the prompt should look.

    Questions that name a kind stay a guess among the objects until some head finds that kind; here
    it is told, on the patches of every kind a picture shows.
    """

    HEAD = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        several = tuple(plural(kind) for kind in KINDS)
        self.forms = [_word_ids(tokenizer, words, " ") for words in (KINDS, several)]

    def loss(self, model: Pico, rows: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Mean -log of the attention that falls on the right patches, among all patches."""
        decoder = model.language_model.model
        layer = cast(DecoderLayer, decoder.layers[0])
        attention, norm = layer.self_attn, layer.input_layernorm
        size, n_rows = attention.head_dim, rows.shape[1]
        right = targets["kind"][:, None, :] == torch.arange(1, len(KINDS) + 1)[:, None]
        shown = right.any(-1)
        keys = rotate(attention.k_proj(norm(rows)), torch.arange(n_rows))
        losses = []
        for ids in self.forms:
            words = norm(decoder.embed_tokens(ids) * model.config.width**0.5)
            queries = attention.q_proj(words)[:, self.HEAD * size : (self.HEAD + 1) * size]
            # Nouns stand five to eleven tokens behind the picture.
            queries = rotate(queries, n_rows + torch.randint(5, 12, (len(ids),)))
            log_p = F.log_softmax(torch.einsum("nd,bpd->bnp", queries, keys) * size**-0.5, -1)
            losses.append(-log_p.masked_fill(~right, -1e9).logsumexp(-1)[shown].mean())
        return torch.stack(losses).mean()


def text_of(states: Tensor, n_text: int) -> Tensor:
    """The rows of the text: after a picture's, or all that there are behind the last layer."""
    return states[:, -n_text:]


def _word_ids(tokenizer: Tokenizer, words: tuple[str, ...], space: str) -> Tensor:
    return torch.tensor([tokenizer.word_id(word, space) for word in words])


def _centres(n_patches: int) -> Tensor:
    grid = round(n_patches**0.5)
    middles = (torch.arange(grid) + 0.5) / grid
    return torch.stack([middles.repeat(grid), middles.repeat_interleave(grid)] * 2, 1)


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy where the target is not -1; 0 when there is none."""
    known = targets >= 0
    if not bool(known.any()):
        return logits.sum() * 0
    return F.cross_entropy(logits[known], targets[known])
