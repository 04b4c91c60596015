"""What pico's training tells patches and words about a scene."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest

from edgevlm.benchmarks.scenes import questions
from edgevlm.benchmarks.scenes.kinds import COLOURS, KINDS
from edgevlm.benchmarks.scenes.phrasings import SIDES
from edgevlm.benchmarks.scenes.textured_scenes import Thing
from workshop.pico.targets import RELATIONS, Lexicon, Named, flipped, patch_targets
from workshop.pico.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parent.parent / "workshop/pico/checkpoint"
# In reading order: two red circles with a blue star between them.
FIRST = Thing("circle", "red", (0.1, 0.1, 0.3, 0.3))
STAR = Thing("star", "blue", (0.6, 0.2, 0.9, 0.5))
LAST = Thing("circle", "red", (0.2, 0.7, 0.4, 0.9))
THINGS = (LAST, STAR, FIRST)


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon(Tokenizer(CHECKPOINT / "tokenizer.model"))


def described(named: Named) -> tuple[object, ...]:
    def of(names: Sequence[str], index: int) -> str | None:
        return names[index] if index >= 0 else None

    return (named.number, of(KINDS, named.kind), of(COLOURS, named.colour), named.box)


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        ("answer en what colour is the star?", [(1, "star", "blue", STAR.box)]),
        ("answer en how many red circles are there?", [(2, "circle", "red", FIRST.box)]),
        ("answer en what shape is blue?", [(1, "star", "blue", STAR.box)]),
        ("answer en is there a blue circle?", [(0, None, None, (-1.0,) * 4)]),
        ("caption en", []),
    ],
)
def test_nouns_and_colours_of_a_prompt_know_their_things(
    lexicon: Lexicon, prompt: str, meant: list[tuple[object, ...]]
) -> None:
    ids = lexicon.tokenizer.prompt_ids(prompt)
    asked = questions.Question(prompt, "", "colour")
    found = lexicon.named(asked, ids, THINGS, 10)
    assert [described(named) for named in found] == meant
    assert all(ids[named.column - 10] in lexicon.kinds | lexicon.colours for named in found)


def test_every_word_of_an_answer_knows_what_comes_next(lexicon: Lexicon) -> None:
    detect = questions.Question("detect circle", "", "detect")
    detect = detect._replace(answer=questions.detection_text(["circle"], THINGS))
    answer = lexicon.tokenizer.answer_ids(detect.answer, "detect")
    found = lexicon.written(detect, answer, THINGS, 20)
    assert [named.column for named in found] == list(range(19, 19 + len(answer)))
    # Four places and a word for each circle, a semicolon with the second, then the end.
    second = len(answer) - 6
    assert [named.left for named in found] == [2] * 5 + [1] * second + [0]
    assert [named.box for named in found] == [FIRST.box] * 5 + [LAST.box] * second + [(-1.0,) * 4]
    colour = questions.Question("answer en what colour is the star?", "blue", "colour")
    assert lexicon.written(colour, lexicon.tokenizer.answer_ids("blue", "colour"), THINGS, 0) == []


def test_patches_know_how_many_there_are_and_in_which_order() -> None:
    grid = 8
    targets = patch_targets([(THINGS, None)], grid)
    cell = int(STAR.centre[1] * grid) * grid + int(STAR.centre[0] * grid)
    star = dict(zip(RELATIONS, targets["relations"][0, cell], strict=True))
    assert star == {
        "rank": 1, "nth of kind": 0, "nth of name": 0, "of kind": 1, "of name": 1, "of colour": 1,
        "all": 3,
    }  # fmt: skip
    cell = int(LAST.centre[1] * grid) * grid + int(LAST.centre[0] * grid)
    last = dict(zip(RELATIONS, targets["relations"][0, cell], strict=True))
    assert (last["rank"], last["nth of kind"], last["of name"]) == (0, 1, 2)


def kinds_beside(indices: Iterable[int], things: tuple[Thing, ...]) -> dict[str, str | None]:
    kinds = [things[k].kind if k >= 0 else None for k in indices]
    return dict(zip(SIDES, kinds, strict=True))


def test_patches_know_what_is_beside_their_thing() -> None:
    grid = 8
    low = Thing("square", "green", (0.4, 0.7, 0.6, 0.9))
    ears = [Thing("star", "red", (x, 0.1, x + 0.2, 0.3)) for x in (0.2, 0.6)]
    scenes = [THINGS, (low, *ears)]
    targets = patch_targets([(things, None) for things in scenes], grid)

    def beside(scene: int, thing: Thing) -> dict[str, str | None]:
        cell = int(thing.centre[1] * grid) * grid + int(thing.centre[0] * grid)
        assert scenes[scene][targets["thing"][scene, cell]] == thing
        return kinds_beside(targets["beside"][scene, cell], scenes[scene])

    assert beside(0, STAR) == {
        "left": "circle",
        "right": None,
        "above": "circle",
        "below": "circle",
    }
    # Two are above, neither nearer: nobody could say which one is meant.
    assert beside(1, low)["above"] is None
    nothing = targets["kind"][0] == 0
    assert set(targets["beside"][0][nothing].ravel()) == {-1}
    assert set(targets["thing"][0][nothing]) == {-1}


@pytest.mark.parametrize(
    ("task", "kind"), [("position", "circle"), ("colour", None)], ids=["a side", "a colour"]
)
def test_a_noun_knows_what_is_beside_its_thing_where_a_side_is_asked_of(
    lexicon: Lexicon, task: str, kind: str | None
) -> None:
    asked = questions.Question("answer en what is left of the star?", "circle", task)
    (named,) = lexicon.named(asked, lexicon.tokenizer.prompt_ids(asked.prompt), THINGS, 0)
    beside = [*named.beside, named.asked]
    assert [KINDS[k] if k >= 0 else None for k in beside] == [kind, None, kind, kind, kind]
    assert named.thing == (THINGS.index(STAR) if kind else -1)
    side = tuple(SIDES)[named.side] if named.side >= 0 else None
    assert side == ("left" if kind else None)
    if kind:
        prompt = lexicon.tokenizer.prompt_ids(asked.prompt)
        assert prompt[named.side_column] == lexicon.tokenizer.word_id("left")


def test_a_mirror_turns_pictures_and_places_alike() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    turned, facts = flipped(picture, [(THINGS, None)])
    assert np.array_equal(turned[0], picture[0, :, ::-1])
    assert facts[0][0][1].box == pytest.approx((0.1, 0.2, 0.4, 0.5))
    back, again = flipped(turned, facts)
    assert np.array_equal(back, picture) and again[0][0][0].box == pytest.approx(LAST.box)
    asked = questions.position(facts[0][0], Random(0))
    assert asked is None or asked.answer in KINDS


def test_the_answer_about_a_side_knows_where_its_thing_is(lexicon: Lexicon) -> None:
    asked = questions.Question("answer en what is right of the circle?", "star", "position")
    answer = lexicon.tokenizer.answer_ids("star", "position")
    (named,) = lexicon.written(asked, answer, (FIRST, STAR), 12)
    assert named.column == 11 and described(named) == (1, "star", "blue", STAR.box)
    several = asked._replace(answer="circle")
    assert lexicon.written(several, answer, THINGS, 12) == []
