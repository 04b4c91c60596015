"""Kinds that pico can name: shapes, colours and everyday objects. Data only."""

from __future__ import annotations

from typing import Final

SHAPES: Final = ("circle", "square", "triangle", "star")
COLOURS: Final = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")

# Each noun with the emoji that draw it; several drawings make the noun mean more than one bitmap.
OBJECTS: Final[dict[str, str]] = {
    "cat": "🐱🐈",
    "dog": "🐶🐕",
    "rabbit": "🐰🐇",
    "pig": "🐷🐖",
    "fish": "🐟🐠",
    "bird": "🐦",
    "frog": "🐸",
    "elephant": "🐘",
    "penguin": "🐧",
    "butterfly": "🦋",
    "turtle": "🐢",
    "apple": "🍎",
    "banana": "🍌",
    "grapes": "🍇",
    "strawberry": "🍓",
    "lemon": "🍋",
    "pear": "🍐",
    "pineapple": "🍍",
    "carrot": "🥕",
    "car": "🚗🚙",
    "bus": "🚌",
    "bicycle": "🚲",
    "train": "🚂🚆",
    "airplane": "✈",
    "rocket": "🚀",
    "boat": "⛵",
    "house": "🏠",
    "tree": "🌳🌲",
    "flower": "🌸🌻",
    "umbrella": "☂☔",
}
ANIMALS: Final = tuple(OBJECTS)[:11]
FRUITS: Final = ("apple", "banana", "grapes", "strawberry", "lemon", "pear", "pineapple")
VEHICLES: Final = ("car", "bus", "bicycle", "train", "airplane", "rocket", "boat")
KINDS: Final = (*SHAPES, *OBJECTS)

_PLURALS: Final = {
    "fish": "fish",
    "butterfly": "butterflies",
    "strawberry": "strawberries",
    "bus": "buses",
    "grapes": "grapes",
}
NUMBER_WORDS: Final = ("no", "one", "two", "three", "four", "five", "six")

# Hue in degrees, saturation and value ranges. The gaps between neighbours keep every colour's
# name beyond dispute.
HSV_RANGES: Final[dict[str, tuple[tuple[float, float], ...]]] = {
    "red": ((-7, 5), (0.78, 1.0), (0.68, 1.0)),
    "orange": ((24, 39), (0.85, 1.0), (0.88, 1.0)),
    "yellow": ((51, 61), (0.7, 1.0), (0.86, 1.0)),
    "green": ((98, 142), (0.6, 1.0), (0.4, 1.0)),
    "blue": ((208, 242), (0.68, 1.0), (0.55, 1.0)),
    "purple": ((268, 300), (0.55, 1.0), (0.42, 0.75)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.13)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
}
# The values a person types when asked for the colour by name (CSS, Tk, and what plotting tools
# use).
PURE_COLOURS: Final[dict[str, tuple[tuple[int, int, int], ...]]] = {
    "red": ((255, 0, 0), (220, 20, 60), (214, 39, 40), (220, 30, 30)),
    "orange": ((255, 165, 0), (255, 140, 0), (255, 127, 14), (255, 128, 0)),
    "yellow": ((255, 255, 0), (255, 215, 0), (240, 220, 30), (255, 235, 0)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 139, 34), (44, 160, 44), (0, 160, 0), (50, 205, 50)),
    "blue": (
        (0, 0, 255),
        (30, 144, 255),
        (0, 0, 205),
        (31, 119, 180),
        (65, 105, 225),
        (30, 60, 220),
    ),
    "purple": ((128, 0, 128), (138, 43, 226), (160, 32, 240), (148, 0, 211), (140, 40, 170)),
    "black": ((0, 0, 0), (10, 10, 10), (20, 20, 20), (30, 30, 30)),
    "white": ((255, 255, 255), (250, 250, 250), (245, 245, 245)),
}

WORDS: Final = tuple(
    """a i am at be by do go he hi if in is it me my no of on or so to up us we act add age air
    all and ant any arm art ask bad bag bat bed bee big bin box boy bus but can cap car cat cow
    cup cut day did dog dry ear eat egg end eye far fan fish fix fly for fox fun get got gum guy
    had ham has hat her hey him hit hot how ice ink jam jar jet job joy key kid kit lab leg let
    lid lip log lot low mad man map mat mix mom mud mug net new nut oak odd off oil old one our
    out owl own pan pay pea pen pet pie pig pin pot put rat raw red rug run sad sea see set she
    sit six sky son sun tax tea ten the tie tin toe top toy try two van vet was wax way web wet
    who why win yes you zip zoo able acid area army aunt away baby back bake ball band bank barn
    base bath bear beer bell belt bike bird blue boat body bold bone book boot born boss both bowl
    busy cafe cake call calm card care cash city club coal coat code cold cool cook corn crab crew
    dark data date deep desk dish door down duck dust each easy edge ever exit face fact farm fast
    film fire five flag food foot four free frog fuel game gate gift girl glad goat gold good gray
    grow hair half hand hard head heat help here hero high hill home hook hope horn hour idea iron
    item jazz join jump june just keep kind king kite knee lake lamp land last lazy leaf left less
    life lift lime line lion list live long look love luck mail main mars menu milk mind mint moon
    more nail name near news next nine nose note once only open page pair palm park path peak pear
    pink plan play plum poem pony pool post quiz race rain read rest rice ride ring road rock roof
    room rose safe sail salt sand save seal seat seed ship shoe shop show sign silk sing size skin
    slow snow soap sock soft song soup star stop sure swan swim tail tale tall tank taxi team tent
    text tide time tiny town tree trip true tuna turn unit vase very view wall warm wash wave west
    whip wild wind wine wing wolf wood wool word work yard year zero zone about above alarm album
    alien amber angel apple april arrow audio bacon badge beach berry black blend block bread
    brick brown brush cabin camel candy chain chair chalk chess child clean clock cloud coach
    coast cocoa crane cream crown cycle daisy dance diary dream drink drive eagle earth eight
    empty enjoy entry equal event extra field first flame flute focus fresh fruit ghost giant
    glass globe grape grass green hello honey horse hotel house image jelly juice knife koala
    label laser lemon level light lucky lunch magic mango maple march medal melon metal money
    month motor mouse movie music night north ocean olive onion orbit otter paint panda paper
    party peach pearl phone photo piano pilot pixel pizza plane plant plate poppy power prize
    proud puppy queen quick quiet radio river robot royal sauce scale seven shark sheep shell
    shirt skate sleep small smile snake solar south space spoon sport stage stamp steam stone
    storm story sugar sunny sweet table taste tiger title toast today torch tower track train
    truck tulip uncle vegan video visit vocal voice water whale wheat wheel white world write
    yacht young zebra""".split()
)


def plural(kind: str) -> str:
    """The plural of a kind: ``"bus" -> "buses"``."""
    return _PLURALS.get(kind, kind + "s")


def article(noun_phrase: str) -> str:
    """``"a"`` or ``"an"`` as the phrase asks for; nothing before grapes, which are many."""
    if noun_phrase == "grapes":
        return "some"
    return "an" if noun_phrase[0] in "aeiou" else "a"
