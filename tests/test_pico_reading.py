"""How pico learns to read without forgetting."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.benchmarks.scenes.textured_scenes import Thing, Word
from workshop.pico.batches import Batch, BatchPlan, build
from workshop.pico.checkpoint import load_checkpoint
from workshop.pico.initial import NEW_CHANNELS, NEW_LAYER
from workshop.pico.letters import (
    CHANNELS,
    CODES,
    END,
    LetterChannels,
    LetterHeads,
    Older,
    Printed,
    word_rows,
)
from workshop.pico.model import Pico, PicoConfig, to_pixels
from workshop.pico.optimiser import set_gradients
from workshop.pico.pages import make_page, pages_path, read_words
from workshop.pico.reading import LetterTraining, with_letters
from workshop.pico.schedule import ReadingSchedule
from workshop.pico.shards import Facts
from workshop.pico.spelling import SpellingTraining, spare_units
from workshop.pico.targets import LETTERS, Lexicon, letter_slots
from workshop.pico.tokenizer import Tokenizer
from workshop.pico.wider import QUIET, QUIET_FEATURES, older_state, widened

TOKENIZER = Path(__file__).parent.parent / "workshop/pico/checkpoint/tokenizer.model"
SMALL = PicoConfig(vision_width=64, vision_heads=2, vision_ff=32, width=128, heads=1, ff=16)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 112, 112, 3), generator=generator).to(torch.uint8)


@pytest.fixture
def small() -> Pico:
    torch.manual_seed(0)
    model = Pico(SMALL)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.2)
    return model


@torch.no_grad()
def test_new_channels_leave_the_older_ones_as_they_were(
    small: Pico, pictures: torch.Tensor
) -> None:
    letters = LetterChannels(SMALL.vision_width, SMALL.vision_layers, SMALL.grid)
    code = LetterHeads().code
    older = older_state(small, pictures)
    mean = older.loudness.mean((0, 1))
    channels, _, _ = letters(Older(older.seen, older.loudness / mean))
    wide = widened(small, letters, code, mean)
    before, after = small.features(to_pixels(pictures)), wide.features(to_pixels(pictures))
    # A norm over all channels notices the new ones a little: they are a twentieth as loud.
    torch.testing.assert_close(after[..., :-CHANNELS], before, rtol=0, atol=0.02)
    found = after[..., -CHANNELS:] / QUIET_FEATURES
    torch.testing.assert_close(found, channels, rtol=0, atol=0.05)
    assert channels.std() > 0.3
    rows, written = small.image_rows(before), wide.image_rows(after)
    torch.testing.assert_close(written[..., :-CHANNELS], rows[..., :-CHANNELS], rtol=0, atol=0.02)
    assert not torch.allclose(written[..., -CHANNELS:], rows[..., -CHANNELS:], atol=1)


def test_the_first_rows_hold_a_word_and_its_end() -> None:
    word = torch.tensor([[7, 3, -1, -1, -1], [1, 2, 3, 4, 5], [-1] * 5])
    nothing = torch.full((3, 64, 2), -1)
    alone = torch.tensor([True, True, False])
    rows = word_rows(Printed(nothing, nothing, word, alone, ~alone))
    assert rows.tolist() == [[7, 3, *[END] * 4], [1, 2, 3, 4, 5, END], [-1] * 6]
    # One code does not sound like another.
    assert torch.equal(CODES @ CODES.T, CHANNELS * torch.eye(END + 1))


def test_letters_lie_where_they_are_drawn() -> None:
    box = (0.1, 0.25, 0.9, 0.5)
    word = Word("No", box, ((0.1, 0.25, 0.5, 0.5), (0.5, 0.25, 0.9, 0.5)))
    letter, place = letter_slots((word,), 8)
    rows = {cell // 8 for cell in np.nonzero((place >= 0).any(1))[0]}
    assert rows == {2, 3}
    along = place[16:24].ravel()
    # Sixteen halves of patches; the word covers 1.6 to 14.4 of them, counted at their middles.
    assert along.tolist() == [-1, -1, *[0] * 6, *[1] * 6, -1, -1]
    assert {LETTERS[k] for k in letter[16:24].ravel() if k >= 0} == {"N", "o"}


def test_pages_hold_words_inside_the_picture() -> None:
    drawn = [make_page(Random(f"test {k}")) for k in range(40)]
    counts = [len(words) for _, words in drawn]
    assert min(counts) == 0 and 1 in counts and max(counts) > 5
    for scene, words in drawn:
        assert scene.word is None or words == (scene.word,)
        for word in words:
            assert 1 <= len(word.text) <= 5 and len(word.letters) == len(word.text)
            assert 0 <= word.box[0] < word.box[2] <= 1 and 0 <= word.box[1] < word.box[3] <= 1


def test_gradients_are_summed_over_parts() -> None:
    one, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    with ThreadPoolExecutor(2) as threads:
        set_gradients([one, other], [1.0, 2.0, 4.0], lambda part: (part * one).sum(), threads)
    assert one.grad is not None and one.grad.tolist() == [7.0, 7.0] and other.grad is None


@pytest.fixture
def folder(tmp_path: Path, pictures: torch.Tensor) -> Path:
    """Pages as write_pages leaves them: noise, with one word each."""
    (tmp_path / "pages").mkdir()
    n = 64
    generator = np.random.default_rng(0)
    word = np.full((n, 5), -1, np.int8)
    word[:, :2] = generator.integers(0, 52, (n, 2))
    letter, place = (np.full((n, 64, 2), -1, np.int8) for _ in range(2))
    letter[:, 30:32], place[:, 30:32] = word[:, :2, None], np.array([[0, 0], [1, 1]])
    np.savez(
        pages_path(tmp_path / "pages", 0),
        pictures=pictures.repeat(16, 1, 1, 1).numpy(),
        letter=letter,
        index=place,
        word=word,
        blank=np.zeros(n, bool),
    )
    return tmp_path


SHORT = ReadingSchedule(
    letter_steps=6, letter_pictures=16, spelling_steps=2, words=8, page_shards=1, scene_shards=1
)


def test_letters_are_learnt_and_resumed(folder: Path, small: Pico) -> None:
    training = LetterTraining(folder, small, SHORT)
    before = {name: value.clone() for name, value in training.trained.items()}
    training.run(save_every=3)
    changed = {name for name, value in training.trained.items() if (value != before[name]).any()}
    # A key's bias never changes what is looked at.
    assert {n for n in before if not n.endswith("k_proj.bias")} <= changed
    again = LetterTraining(folder, small, SHORT)
    again.resume()
    assert again.step == 6
    for name, value in training.trained.items():
        assert torch.equal(again.trained[name], value), name
    wide = with_letters(small, folder / "letters.safetensors")
    mean, found = training.pages.loudness, training.average["letters.position"]
    torch.testing.assert_close(
        wide.vision_tower.vision_model.embeddings.position_embedding.weight[:, -CHANNELS:],
        QUIET * found,
        rtol=1e-3,
        atol=1e-4,
    )
    gains = wide.get_parameter("vision_tower.vision_model.encoder.layers.0.layer_norm1.weight")
    gain = gains[-1].detach()
    assert float(gain) == pytest.approx(float(mean[0]) * (64 / 128) ** 0.5 / QUIET, rel=1e-3)
    pictures, words = read_words(folder / "pages", [0])
    assert len(pictures) == len(words) == 64 and {len(word) for word in words} == {2}


@pytest.fixture(scope="module")
def asked() -> list[Batch]:
    """Slices of scenes and of words, as SpellingTraining is given them."""
    lexicon = Lexicon(Tokenizer(TOKENIZER))
    seen = np.zeros((8, 112, 112, 3), np.uint8)
    things = (Thing("circle", "red", (0.1, 0.1, 0.4, 0.4)),)
    facts: dict[str, list[Facts]] = {
        "packed": [(things, None)] * 8,
        "true": [((), Word(text, (0, 0, 1, 1), ())) for text in ("cat", "Dog", "IS", "e") * 2],
    }
    return [
        build(seen, facts[mode], BatchPlan(8, mode=mode), lexicon, SMALL, Random(0))
        for mode in ("packed", "true")
    ]


@torch.no_grad()
def test_units_that_add_nothing_are_found(small: Pico, asked: list[Batch]) -> None:
    weight = small.get_parameter("language_model.model.layers.1.mlp.down_proj.weight")
    weight[:, [3, 5]] *= 1e-4
    weight[:, [4, 6]] *= 1e2
    found = [set(units.tolist()) for units in spare_units(small, asked[:1])]
    assert found[1] >= {3, 5} and not found[1] & {4, 6}


def test_the_decoder_learns_to_spell_and_the_rest_stays(
    tmp_path: Path, small: Pico, asked: list[Batch]
) -> None:
    scenes, words = asked
    before = {name: value.clone() for name, value in small.state_dict().items()}
    spare = [torch.tensor([3, 5])] * SMALL.layers
    training = SpellingTraining(tmp_path, small, TOKENIZER, SHORT, spare)
    for _ in range(2):
        training.train_step([scenes], [words])
    assert set(training.sums) == {"word", "looked", "kept", "silence"}
    training.save()
    training.save_checkpoint()
    trained = load_checkpoint(tmp_path / "hf-latest").state_dict()

    def same(name: str) -> Tensor:
        equal: Tensor = trained[name] == before[name].half().float()
        return equal

    table = "language_model.model.embed_tokens.weight"
    layers = "language_model.model.layers."
    queries = f"{layers}{NEW_LAYER}.self_attn.q_proj.weight"
    feeds = {
        f"{layers}{k}.mlp.{part}_proj.weight"
        for k in range(SMALL.layers)
        for part in ("gate", "up", "down")
    }
    assert {name for name in before if not same(name).all()} == {table, queries} | feeds
    tokens = (~same(table)).any(1).nonzero()[:, 0].tolist()
    pieces = {training.tokenizer.model.id_to_piece(k) for k in tokens}
    assert pieces == {"ocr", "<eos>", *LETTERS}
    columns = (~same(queries)).any(0).nonzero()[:, 0]
    assert columns.min() >= SMALL.width - NEW_CHANNELS
    for name in feeds:
        units = (~same(name)).any(int("down" not in name)).nonzero()[:, 0].tolist()
        assert units == [3, 5], name
    # What is saved says what was trained.
    rows = torch.randn(2, 64, SMALL.width)
    ids, mask = torch.tensor([[2, 9, 4]] * 2), torch.ones(2, 1, 67, 67, dtype=torch.bool)
    positions = torch.arange(64, 67).expand(2, -1)
    averaged = load_checkpoint(tmp_path / "hf-latest")
    with torch.no_grad():
        for name, p in training.model.named_parameters():
            p.copy_(training.average.get(name, p))
        joined, apart = (m.hidden(rows, ids, positions, mask) for m in (averaged, training.model))
    torch.testing.assert_close(joined, apart, rtol=0, atol=0.02)  # weights are stored as float16

    again = SpellingTraining(tmp_path, small, TOKENIZER, SHORT, spare)
    again.resume()
    assert again.step == 2
    for name, value in again.trained.items():
        assert torch.equal(value, torch.load(again.snapshot)["weights"][name])
