"""Sides: things left of, right of, above or below others."""

from __future__ import annotations

from typing import NamedTuple

from edgevlm.benchmarks.scenes.phrasings import SIDES
from edgevlm.benchmarks.scenes.textured_scenes import Thing

# One centre lies beyond another, to its left for instance, by at least this share of the side.
CLEARLY = 0.08
STRAIGHT = 1.25  # so many times as far along as across: that direction is the main one
CLEARLY_NEARER = 1.5  # the next nearest object is so many times as far away

Things = tuple[Thing, ...]


class Side(NamedTuple):
    """A side of a thing, by the name that means no other, and the thing that is there."""

    name: str
    side: str
    found: Thing
    contested: bool  # other things lie on that side too, farther away or across


def unambiguous(things: Things) -> list[Side]:
    """Every side of every thing of which one can ask without doubt."""
    return [
        Side(name, side, found, len(_beyond(anchor, side, things)) > 1)
        for anchor in things
        for name in _unique_names(anchor, things)
        for side in SIDES
        if (found := on_side(anchor, side, things)) is not None
    ]


def on_side(anchor: Thing, side: str, things: Things) -> Thing | None:
    """The one object on that side, or ``None`` when there is none or a person might waver.

    The only object whose centre lies on that side, clearly. Among several, the nearest one, where
    a step to the side counts double, if that direction is also the main one and the next nearest
    is half as far again: in a row of three the neighbour, in a square of four the one beside, not
    the one across.
    """
    beyond = sorted(_beyond(anchor, side, things), key=_far)
    if not beyond:
        return None
    (along, across, found), *others = beyond
    if along <= CLEARLY:
        return None
    if others and (
        along <= STRAIGHT * across or _far(others[0]) < CLEARLY_NEARER * _far(beyond[0])
    ):
        return None
    return found


def _beyond(anchor: Thing, side: str, things: Things) -> list[tuple[float, float, Thing]]:
    """Things on that side of the anchor or level with it: distance along, across, and the thing."""
    places = [(*_along(anchor, t, side), t) for t in things if t is not anchor]
    return [place for place in places if place[0] > -0.02]


def _far(place: tuple[float, float, Thing]) -> float:
    along, across, _ = place
    return along + 2 * across


def _along(anchor: Thing, other: Thing, side: str) -> tuple[float, float]:
    """Distances of ``other`` from ``anchor``: along that side, and across."""
    dx = other.centre[0] - anchor.centre[0]
    dy = other.centre[1] - anchor.centre[1]
    return {
        "left": (-dx, abs(dy)),
        "right": (dx, abs(dy)),
        "above": (-dy, abs(dx)),
        "below": (dy, abs(dx)),
    }[side]


def _unique_names(thing: Thing, things: Things) -> list[str]:
    same_kind = sum(t.kind == thing.kind for t in things)
    names = [thing.kind] * 2 if same_kind == 1 else []
    if thing.colour and sum(t.name == thing.name for t in things) == 1:
        names.append(thing.name)
    return names
