"""Which questions pico's training asks of a scene, and what it takes for the right answer."""

from random import Random

import pytest

from edgevlm.benchmarks.scenes.questions import contested_position, position
from edgevlm.benchmarks.scenes.sides import on_side
from edgevlm.benchmarks.scenes.textured_scenes import Thing, make_scene


def at(kind: str, x: float, y: float) -> Thing:
    return Thing(kind, "red", (x - 0.1, y - 0.1, x + 0.1, y + 0.1))


CIRCLE, SQUARE = at("circle", 0.22, 0.3), at("square", 0.75, 0.3)
TRIANGLE, STAR = at("triangle", 0.25, 0.75), at("star", 0.74, 0.76)
SQUARE_OF_FOUR = (CIRCLE, SQUARE, TRIANGLE, STAR)


@pytest.mark.parametrize(
    ("anchor", "side", "answer"),
    [
        (CIRCLE, "right", SQUARE),
        (CIRCLE, "below", TRIANGLE),
        (SQUARE, "left", CIRCLE),
        (SQUARE, "below", STAR),
        (TRIANGLE, "right", STAR),
        (TRIANGLE, "above", CIRCLE),
        (STAR, "left", TRIANGLE),
        (STAR, "above", SQUARE),
        (CIRCLE, "left", None),
        (STAR, "below", None),
    ],
)
def test_in_a_square_of_four_it_is_the_one_beside_not_the_one_across(
    anchor: Thing, side: str, answer: Thing | None
) -> None:
    assert on_side(anchor, side, SQUARE_OF_FOUR) is answer


def test_in_a_row_it_is_the_neighbour() -> None:
    row = (at("circle", 0.2, 0.5), at("square", 0.5, 0.48), at("star", 0.8, 0.52))
    assert on_side(row[0], "right", row) is row[1]
    assert on_side(row[2], "left", row) is row[1]
    assert on_side(row[1], "right", row) is row[2]
    column = tuple(Thing(t.kind, t.colour, t.box[1::-1] + t.box[:1:-1]) for t in row)
    assert on_side(column[0], "below", column) is column[1]


def test_the_only_one_on_a_side_may_lie_across() -> None:
    assert on_side(CIRCLE, "right", (CIRCLE, STAR)) is STAR
    assert on_side(CIRCLE, "below", (CIRCLE, STAR)) is STAR


@pytest.mark.parametrize(
    "others",
    [
        (at("square", 0.8, 0.3), at("star", 0.6, 0.5)),  # the farther one is the straighter one
        (at("square", 0.6, 0.55), at("star", 0.55, 0.05)),  # both are across
        (at("square", 0.6, 0.42), at("star", 0.6, 0.18)),  # equally near
    ],
)
def test_where_a_person_might_waver_nothing_is_asked(others: tuple[Thing, ...]) -> None:
    assert on_side(CIRCLE, "right", (CIRCLE, *others)) is None


def test_ordered_scenes_stand_in_rows_and_columns() -> None:
    asked = 0
    for k in range(30):
        scene = make_scene(Random(f"ordered {k}"), word_share=0.0, ordered_share=1.0)
        assert 2 <= len(scene.things) <= 5
        for thing in scene.things:
            assert all(0 <= side <= 1 for side in thing.box)
            asked += sum(
                on_side(thing, side, scene.things) is not None
                for side in ("left", "right", "above", "below")
            )
    assert asked > 60  # two neighbours each, on average


def test_contested_sides_are_asked_of_only_where_several_objects_lie() -> None:
    alone = (CIRCLE, SQUARE)
    assert contested_position(alone, Random(0)) is None
    asked = position(alone, Random(0))
    assert asked is not None and asked.answer in ("circle", "square")
    for seed in range(10):
        question = contested_position(SQUARE_OF_FOUR, Random(seed))
        assert question is not None and question.task == "contested position"
