"""Robots that are not the example robot: what a strict judge must not take for it."""

from collections.abc import Callable

from PIL import Image

from train import robot as toy
from train.robot import Part

RED, VIOLET, PINK, GREEN = (214, 52, 60), (128, 76, 190), (244, 150, 190), (92, 178, 84)
OTHER_COLOURS = {toy.TEAL: RED, toy.DEEP_TEAL: VIOLET, toy.ORANGE: GREEN, toy.YELLOW: PINK}
ARMS = slice(5, 9)  # of `toy.limbs()`: two arms and two claws
EYES = slice(1, 7)  # of `toy.head()`: eyes, pupils, glints


def coloured(colours: dict[toy.Colour, toy.Colour]) -> list[Part]:
    """The robot's parts with other colours."""
    parts = toy.limbs() + toy.trunk() + toy.head()
    return [(mask, colours.get(colour, colour), depth) for mask, colour, depth in parts]


def with_head(face: list[Part]) -> list[Part]:
    """The robot with another face in the place of its eyes."""
    head = toy.head()
    head[EYES] = face
    return toy.limbs() + toy.trunk() + head


def with_arms(arms: list[Part]) -> list[Part]:
    """The robot with other arms."""
    limbs = toy.limbs()
    limbs[ARMS] = arms
    return limbs + toy.trunk() + toy.head()


def visor() -> list[Part]:
    """One dark visor instead of two eyes."""
    return [
        (toy.box(17, 15.5, 47, 25, 4.5), toy.INK, 0.8),
        (toy.box(20, 17.5, 30, 19.5, 1), toy.CREAM, 0.2),
    ]


def button_eyes() -> list[Part]:
    """Two small dark eyes without white."""
    return [(toy.disc(x, 20.4, 2.4), toy.INK, 0.3) for x in (24, 40)]


def hanging_arms() -> list[Part]:
    """Two arms that hang, with round hands."""
    found: list[Part] = []
    for x, hand in ((17, 11), (47, 53)):
        found.append((toy.capsule(x, 38, hand, 48, 5.4), toy.ORANGE, 1.4))
        found.append((toy.disc(hand, 50, 4), toy.STEEL, 0.9))
    return found


def without(count: int) -> list[Part]:
    """The robot's parts without the last ones: 1 is its mouth."""
    return (toy.limbs() + toy.trunk() + toy.head())[:-count]


ROBOTS: dict[str, Callable[[], list[Part]]] = {
    "other colours": lambda: coloured(OTHER_COLOURS),
    "body of another colour": lambda: coloured({toy.TEAL: VIOLET}),
    "one visor": lambda: with_head(visor()),
    "button eyes": lambda: with_head(button_eyes()),
    "hanging arms": lambda: with_arms(hanging_arms()),
    "no arms": lambda: with_arms([]),
    "no dial": lambda: toy.limbs() + toy.trunk()[:1] + toy.head(),
    "no eyes": lambda: with_head([]),
    "no mouth": lambda: without(1),
}


def pictures() -> dict[str, Image.Image]:
    """RGBA pictures of the other robots by what is different."""
    return {name: toy.assembled(parts()) for name, parts in ROBOTS.items()}
