"""What pico's training starts from and shows its layers."""

import shutil
from pathlib import Path

import pytest
import torch

from edgevlm.benchmarks.pico.heads import Neighbours
from edgevlm.benchmarks.pico.initial import NEW, with_new_layers
from edgevlm.benchmarks.pico.model import Pico, PicoConfig
from edgevlm.benchmarks.pico.train import CONTINUED, Trainer

CHECKPOINT = Path(__file__).parent.parent / "benchmarks/pico/checkpoint"

SIZES = {"vision_width": 32, "vision_ff": 32, "width": 24, "heads": 2, "head_dim": 8, "ff": 16}


def text(model: Pico):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 112, 112, generator=generator)
    ids = torch.tensor([[1, 2, 3, 4]])
    mask = torch.ones(1, 1, 68, 68, dtype=torch.bool)
    rows = model.image_rows(model.features(pixels))
    return model.hidden(rows, ids, torch.arange(64, 68)[None], mask)


@torch.no_grad()
def test_new_layers_change_nothing_at_first():
    torch.manual_seed(0)
    small = Pico(PicoConfig(**SIZES, vision_layers=6, layers=4))
    grown = Pico(PicoConfig(**SIZES))
    grown.load_state_dict(with_new_layers(small.state_dict(), grown))
    assert torch.equal(text(small), text(grown))
    # The layers are there: they can learn.
    grown.language_model.model.layers[1].mlp.down_proj.weight.fill_(0.1)
    assert not torch.equal(text(small), text(grown))


def test_what_the_encoder_knew_stays(tmp_path: Path):
    shutil.copy(CHECKPOINT / "tokenizer.model", tmp_path)
    trainer = Trainer(tmp_path, PicoConfig(**SIZES), CONTINUED)
    groups = [g for part in trainer.optimisers for o in part for g in o.param_groups]
    trained = {id(p) for group in groups for p in group["params"]}
    for name, p in trainer.model.named_parameters():
        kept = name.startswith("vision_tower.") and not name.startswith(NEW)
        assert p.requires_grad is not kept, name
        assert (id(p) in trained) is not kept, name
    # The decoder's older weights follow slowly.
    rates = CONTINUED.rates(CONTINUED.vision_steps + 100)
    assert rates == (0.0, CONTINUED.inherited, 1.0)


@torch.no_grad()
def test_heads_are_shown_where_the_neighbours_are():
    torch.manual_seed(0)
    model = Pico(PicoConfig(**SIZES))
    layer = model.vision_tower.vision_model.encoder.layers[-1]
    neighbours = Neighbours(32)
    patches = torch.randn(1, 64, 32)
    # Patch 9 is a circle; on its left is patch 8, a square (kinds count from one).
    targets = {
        "kind": torch.zeros(1, 64, dtype=torch.int64),
        "thing": torch.full((1, 64), -1),
        "beside": torch.full((1, 64, 4), -1),
    }
    targets["thing"][0, 8:10] = torch.tensor([1, 0])
    targets["kind"][0, 8:10] = torch.tensor([2, 1])
    targets["beside"][0, 9, 0] = 1
    losses = neighbours.losses(layer, patches, layer(patches), targets)
    looked = layer.log_attention(patches, 4)[0, 0, 9, 8]
    assert float(losses["beside attention"]) == pytest.approx(-float(looked))
    said = neighbours.linear(layer(patches))[0, 9].unflatten(-1, (4, -1))[0].log_softmax(-1)
    assert float(losses["beside"]) == pytest.approx(-float(said[1]), rel=1e-5)
    alone = targets | {"beside": torch.full((1, 64, 4), -1)}
    assert [
        float(v) for v in neighbours.losses(layer, patches, layer(patches), alone).values()
    ] == [0, 0]
