"""What pico's training starts from and shows its layers."""

import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from edgevlm.benchmarks.scenes.kinds import KINDS
from edgevlm.benchmarks.scenes.textured_scenes import Thing
from workshop.pico.batches import Batch, BatchPlan, Meant, Texts, build
from workshop.pico.initial import NEW, NEW_CHANNELS, NEW_LAYER, grown
from workshop.pico.model import DecoderLayer, Pico, PicoConfig, VisionLayer, rotate
from workshop.pico.neighbours import (
    Neighbours,
    beside_codes,
    fill_new_channels,
    held_beside,
    kinds_beside,
    noun_losses,
)
from workshop.pico.schedule import CONTINUED
from workshop.pico.targets import Lexicon
from workshop.pico.train import Trainer

CHECKPOINT = Path(__file__).parent.parent / "workshop/pico/checkpoint"

# Patch 9 is a circle; on its left is patch 8, a square (kinds count from one).
NEIGHBOURS = {
    "kind": torch.zeros(1, 64, dtype=torch.int64),
    "thing": torch.full((1, 64), -1),
    "beside": torch.full((1, 64, 4), -1),
}
NEIGHBOURS["thing"][0, 8:10] = torch.tensor([1, 0])
NEIGHBOURS["kind"][0, 8:10] = torch.tensor([2, 1])
NEIGHBOURS["beside"][0, 9, 0] = 1

SIZES = {"vision_width": 32, "vision_ff": 32, "width": 24, "heads": 2, "head_dim": 8, "ff": 16}


def text(model: Pico, layers: list[torch.Tensor] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 112, 112, generator=generator)
    ids = torch.tensor([[1, 2, 3, 4]])
    mask = torch.ones(1, 1, 68, 68, dtype=torch.bool)
    rows = model.image_rows(model.features(pixels))
    return model.hidden(rows, ids, torch.arange(64, 68)[None], mask, layers)


@torch.no_grad()
def test_new_layers_and_channels_change_nothing_at_first() -> None:
    torch.manual_seed(0)
    small = Pico(PicoConfig(**SIZES, vision_layers=6, layers=4))
    large = Pico(PicoConfig(**SIZES | {"width": SIZES["width"] + NEW_CHANNELS}))
    for model in (small, large):
        for module in model.modules():
            if type(module).__name__ == "_RmsNorm":
                torch.nn.init.normal_(module.get_parameter("weight"), std=0.3)
    large.load_state_dict(grown(small.state_dict(), large))
    before = small.logits(text(small))
    # Up to float32's rounding of a root.
    torch.testing.assert_close(large.logits(text(large)), before, rtol=0, atol=1e-4)
    # They are there: what the image rows hold in them is copied to the text, and they can learn.
    large.multi_modal_projector.linear.bias[-NEW_CHANNELS:] = 1
    layers: list[torch.Tensor] = []
    text(large, layers)
    held, copied = (layers[k][0, -4:, -NEW_CHANNELS:] for k in (NEW_LAYER - 1, NEW_LAYER))
    assert not held.any() and (copied[:, : SIZES["head_dim"]] > 0.1).all()
    feed = f"language_model.model.layers.{NEW_LAYER}.mlp.down_proj.weight"
    large.get_parameter(feed).fill_(0.1)
    assert not torch.allclose(large.logits(text(large)), before, atol=1e-2)


def test_new_channels_hold_what_features_say_of_the_neighbours() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, SIZES["width"] + NEW_CHANNELS)
    linear.weight.data[-NEW_CHANNELS:] = 0
    features = torch.randn(4096, 32)
    kinds = torch.full((4096, 4), -1)
    kinds[:, 0] = (features[:, 0] > 0).long()  # on the left a square, or a circle
    kinds[:, 2] = (features[:, 1] > 0).long() * 5
    old = linear.weight[:-NEW_CHANNELS].clone()
    assert fill_new_channels(linear, features, kinds, steps=50) < 0.4  # a coin: 0.69
    assert torch.equal(linear.weight[:-NEW_CHANNELS], old)
    rows = linear(features).detach()
    loudness = rows[:, :-NEW_CHANNELS].square().mean().sqrt()
    assert float(rows[:, -NEW_CHANNELS:].square().mean().sqrt() / loudness) == pytest.approx(0.5)
    assert float((held_beside(rows).argmax(-1) == kinds)[:, ::2].float().mean()) > 0.95


def test_codes_tell_kinds_apart_on_every_side() -> None:
    for side in range(4):
        held = torch.zeros(len(KINDS), 5 + NEW_CHANNELS)
        for kind in range(len(KINDS)):
            targets = {**NEIGHBOURS, "beside": torch.full((1, 64, 4), -1)}
            targets["beside"][0, 9, side] = 1
            targets["kind"] = torch.where(NEIGHBOURS["kind"] == 2, kind + 1, NEIGHBOURS["kind"])
            held[kind, 5:] = beside_codes(kinds_beside(targets))[0, 9]
        assert held_beside(held)[:, side].argmax(-1).tolist() == list(range(len(KINDS)))


def test_what_comes_before_new_layers_stays(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT / "tokenizer.model", tmp_path)
    trainer = Trainer(tmp_path, PicoConfig(**SIZES), CONTINUED)
    groups = [g for part in trainer.optimisers for o in part for g in o.param_groups]
    trained = {id(p) for group in groups for p in group["params"]}
    later = tuple(f"language_model.model.{part}." for part in ("layers.3", "layers.4", "norm"))
    for name, p in trainer.model.named_parameters():
        kept = not name.startswith(NEW + later)
        assert p.requires_grad is not kept, name
        assert (id(p) in trained) is not kept, name
    # The encoder's new layer learns first and alone, the decoder's older weights follow slowly.
    vision, language, _ = CONTINUED.rates(CONTINUED.vision_steps // 2)
    assert vision > 0 and language == 0
    assert CONTINUED.rates(CONTINUED.vision_steps)[1] == 0  # the heads know nothing yet
    rates = CONTINUED.rates(CONTINUED.vision_steps + 100)
    assert rates == (0.0, CONTINUED.inherited, 1.0)


def one_batch(trainer: Trainer, mode: str) -> Batch:
    things = (
        Thing("circle", "red", (0.1, 0.1, 0.4, 0.4)),
        Thing("cat", None, (0.6, 0.1, 0.9, 0.5)),
    )
    pictures = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    plan, lexicon = BatchPlan(2, mode=mode), Lexicon(trainer.tokenizer)
    return build(pictures, [(things, None)] * 2, plan, lexicon, trainer.config, Random(0))


@pytest.mark.parametrize(
    ("mode", "step", "learning"),
    [("vision", 50, NEW[:1]), ("packed", 100, "language_model.")],
)
def test_first_the_encoder_learns_then_the_decoder(
    tmp_path: Path, mode: str, step: int, learning: tuple[str, ...] | str
) -> None:
    shutil.copy(CHECKPOINT / "tokenizer.model", tmp_path)
    sizes = SIZES | {"width": SIZES["width"] + NEW_CHANNELS}
    trainer = Trainer(tmp_path, PicoConfig(**sizes), CONTINUED)
    trainer.step = step if mode == "vision" else CONTINUED.vision_steps + step
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step([one_batch(trainer, mode)], mode)
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(name.startswith(learning) for name in changed)
    losses = set(trainer.sums)
    assert ("rows kept" in losses) is (mode == "vision")
    assert ("noun asked" in losses) is (mode == "packed")


@torch.no_grad()
def test_heads_are_shown_where_the_neighbours_are() -> None:
    torch.manual_seed(0)
    model = Pico(PicoConfig(**SIZES))
    layer = model.vision_tower.vision_model.encoder.layers[-1]
    assert isinstance(layer, VisionLayer)
    neighbours = Neighbours(32)
    patches = torch.randn(1, 64, 32)
    losses = neighbours.losses(layer, patches, layer(patches), NEIGHBOURS)
    looked = layer.log_attention(patches, 4)[0, 0, 9, 8]
    assert float(losses["beside attention"]) == pytest.approx(-float(looked))
    said = neighbours.linear(layer(patches))[0, 9].unflatten(-1, (4, -1))[0].log_softmax(-1)
    assert float(losses["beside"]) == pytest.approx(-float(said[1]), rel=1e-5)
    alone = NEIGHBOURS | {"beside": torch.full((1, 64, 4), -1)}
    assert [
        float(v) for v in neighbours.losses(layer, patches, layer(patches), alone).values()
    ] == [0, 0]


@torch.no_grad()
def test_a_noun_is_shown_the_object_whose_side_is_asked_about() -> None:
    torch.manual_seed(0)
    model = Pico(PicoConfig(**SIZES | {"width": SIZES["width"] + NEW_CHANNELS}))
    rows = model.image_rows(model.features(torch.randn(2, 3, 112, 112)))
    # The noun is the third token of the second picture's text, its object patch 9 of that picture;
    # the word for the side is the first token.
    texts = Texts(
        picture_of=torch.tensor([0, 1]),
        ids=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),
        positions=torch.arange(64, 68).expand(2, -1),
        mask=torch.ones(2, 1, 68, 68, dtype=torch.bool),
        where=torch.tensor([3, 7]),
        targets=torch.zeros(2, 5, dtype=torch.int64),
        target_weights=torch.zeros(2, 5),
        weights=torch.ones(2),
        nouns=Meant(
            facts=torch.tensor([[2, -1, 1, 0, 0, -1, -1, -1, -1], [6, -1, 1, 0, 0, 5, 1, 1, 4]]),
            boxes=torch.zeros(2, 4),
            beside=torch.tensor([[-1, -1, -1, -1], [-1, 5, -1, -1]]),
        ),
        written=Meant(torch.zeros(0, 9, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0, 4)),
        tasks=["colour", "position"],
    )
    things = torch.full((2, 64), -1)
    things[1, 9] = 1
    layers: list[torch.Tensor] = []
    model.hidden(rows, texts.ids, texts.positions, texts.mask, layers)
    layer = model.language_model.model.layers[NEW_LAYER]
    assert isinstance(layer, DecoderLayer)
    losses = noun_losses(layer, layers, texts, {"thing": things})

    normed = layer.input_layernorm(layers[NEW_LAYER - 1][1])
    attention = layer.self_attn
    keys = rotate(attention.k_proj(normed), torch.arange(68))
    for head, name, patch in ((0, "noun looks", 9), (1, "noun hears", 64)):
        queries = attention.q_proj(normed)[66:67, 8 * head : 8 * head + 8]
        query = rotate(queries, torch.tensor([66]))[0]
        looked = (keys @ query * 8**-0.5).log_softmax(0)[patch]
        assert float(losses[name]) == pytest.approx(-float(looked), rel=1e-4)
    held = held_beside(layers[NEW_LAYER][1, 66])[1].log_softmax(-1)
    assert float(losses["noun beside"]) == pytest.approx(-float(held[5]), rel=1e-4)
