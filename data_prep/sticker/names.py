"""Which concepts are used, and how their names are written in English.

The choice is a rule, with every exception listed here: names that mean two things, that name a
class of other concepts, that cannot be counted, or that ordinary speakers would not use.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

RENAMED = {
    "alarm clock": "clock",
    "American football": "football",
    "automobile": "car",
    "baby chick": "chick",
    "birthday cake": "cake",
    "cheese wedge": "cheese",
    "deciduous tree": "tree",
    "delivery truck": "truck",
    "desktop computer": "computer",
    "honeybee": "bee",
    "hot pepper": "pepper",
    "hourglass done": "hourglass",
    "kitchen knife": "knife",
    "lady beetle": "ladybug",
    "light bulb": "lightbulb",
    "maple leaf": "leaf",
    "musical keyboard": "piano",
    "open book": "book",
    "red apple": "apple",
    "running shoe": "shoe",
    "spiral shell": "shell",
    "top hat": "hat",
    "t-shirt": "shirt",
    "woman’s boot": "boot",
}
"""Emoji label -> the everyday word for what is drawn."""

_CLASS_WORDS = "bird bug fish blossom seat station label package instrument tangerine"
_NEAR_SYNONYMS = (
    "poodle boar ram ewe ox rooster rat hamster chipmunk leopard gorilla orangutan dove goose "
    "wing feather rosette hibiscus hyacinth lotus melon burrito flatbread shortcake cupcake "
    "custard locomotive metro tram monorail trolleybus minibus taxi speedboat ferry sailboat "
    "softball purse handbag notebook ledger memo books houses microbe mosquito fly cricket "
    "beetle blowfish cyclone fog foggy firecracker sparkler stopwatch pick axe dagger luggage "
    "seedling shamrock comet cockroach moose bison bikini kimono sari briefs shorts dress coat "
    "paintbrush pen crayon clipboard receipt scroll newspaper pager satellite canoe toolbox "
    "alembic"
)
_NOT_COUNTED_OR_SCENES = (
    "bread bacon garlic broccoli butter salt popcorn spaghetti sushi oden dango sake mate ice wood "
    "rock brick coral camping cooking desert sunrise sunset cityscape wedding construction "
    "motorway fire rainbow herb bouquet tennis bowling lacrosse badminton thread yarn knot "
    "soap shower tamale falafel fondue mountain corn cheese volcano fountain stadium link joker "
    "hospital bank hotel school factory mosque synagogue kaaba amphora moai hamsa placard "
    "dna dvd videocassette abacus trackball battery locked unlocked clamp cigarette coffin "
    "skis headstone lipstick razor sponge plunger bullseye ticket bookmark ribbon droplet "
    "thermometer elevator wheel gear hook crutch bubbles mammoth sauropod dodo"
)
TRAPS = frozenset(" ".join((_CLASS_WORDS, _NEAR_SYNONYMS, _NOT_COUNTED_OR_SCENES)).split())
"""One-word names left out of ``core``."""

_NOT_COUNTED = (
    "bacon broccoli butter salt popcorn spaghetti sushi oden dango sake mate ice wood coral "
    "camping cooking sunrise sunset wedding construction fire fog foggy tennis bowling "
    "lacrosse badminton thread yarn soap rice shower falafel fondue rail railway money milk "
    "food meat tea salad green ramen wind way mail night day dusk park cash skiing"
)
FULL_TRAPS = frozenset(
    (
        "locked with key", "locked with pen", "DNA", "dna", "oncoming taxi", "oncoming automobile",
        "oncoming bus", "oncoming police car", "unlocked", "locked", "label", "link", "station",
        "black bird", "black cat", "guide dog", "service dog",
    )
)  # fmt: skip
"""Labels left out of ``full`` too: the picture does not settle the name."""

_FULL_SKIP = re.compile(
    r"o.clock|thirty|moon|button|symbol|sign$|face$|map of|globe|Japanese|done$|clinking|two |"
    r"fluttering|departure|arrival|suit$|\d|sun behind",
    re.I,
)
_LINKING_WORDS = frozenset(
    ("with", "of", "in", "on", "at", "over", "behind", "without", "from", "and", "showing")
)
_IRREGULAR_PLURALS = {
    "mouse": "mice", "wolf": "wolves", "leaf": "leaves", "knife": "knives", "deer": "deer",
    "sheep": "sheep", "fish": "fish", "goose": "geese", "ox": "oxen", "tooth": "teeth",
    "bison": "bison", "shrimp": "shrimp", "squid": "squid", "scissors": "scissors",
}  # fmt: skip
_TAKES_AN_S = frozenset(("piano", "kangaroo", "taco", "avocado", "photo", "radio", "banjo"))
_KINDS = (
    ("animal", "animal"), ("plant", "plant"), ("food", "food"), ("drink", "drink"),
    ("transport-ground", "vehicle"), ("transport-water", "vehicle"),
    ("transport-air", "vehicle"), ("clothing", "clothing"), ("musical-instrument", "instrument"),
    ("tool", "tool"), ("place-building", "building"), ("place-religious", "building"),
    ("household", "household object"), ("shape", "shape"), ("sign", "sign"),
)  # fmt: skip
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Concept:
    """One thing that can be in a picture.

    Attributes:
        name: What it is called in questions, lower case; a word in ``core``.
        subgroup: Finest class it belongs to; mates share it.
        tags: Words tied to it, lower case.
        key: Emoji code point, or the shape's name in the drawn fallback.
    """

    name: str
    subgroup: str
    tags: frozenset[str]
    key: str

    @property
    def kind(self) -> str | None:
        """Everyday class word ("animal"), or None where no plain word fits."""
        return next((kind for start, kind in _KINDS if self.subgroup.startswith(start)), None)


def with_article(name: str) -> str:
    """Return "a dog" or "an apple"."""
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "eu", "use", "one"))
    return f"{'an' if vowel else 'a'} {name}"


def plural(name: str) -> str:
    """Return the plural of a name; its head word is inflected."""
    before, word, after = _parts(name)
    if word in _IRREGULAR_PLURALS:
        word = _IRREGULAR_PLURALS[word]
    elif re.search(r"(s|x|z|ch|sh)$", word) or (
        re.search(r"[^aeiou]o$", word) and word not in _TAKES_AN_S
    ):
        word += "es"
    elif re.search(r"[^aeiou]y$", word):
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join((*before, word, *after))


def head_word(name: str) -> str:
    """Return the noun a name is about: "cloud" of "cloud with rain", "bus" of "school bus"."""
    return _parts(name)[1]


def _parts(name: str) -> tuple[list[str], str, list[str]]:
    words = name.split(" ")
    linking = [index for index, word in enumerate(words) if word in _LINKING_WORDS and index]
    end = linking[0] if linking else len(words)
    return words[: end - 1], words[end - 1], words[end:]


def counted(name: str, count: int) -> str:
    """Return "a dog" for one and "three dogs" for more."""
    return with_article(name) if count == 1 else f"{NUMBER_WORDS[count]} {plural(name)}"


def is_plural_form(name: str) -> bool:
    """Tell whether a word is grammatically plural, such as "grapes"."""
    return name.endswith("s") and not re.search(r"(ss|us|is)$", name) and name != "compass"


def core_name(label: str) -> str | None:
    """Return the one-word name for ``core``, or None where the label is not used."""
    name = RENAMED.get(label, label)
    if not re.fullmatch(r"[a-z]+", name) or name in TRAPS or is_plural_form(name):
        return None
    return name


def full_name(label: str) -> str | None:
    """Return the name for ``full``; None for clocks, moons, symbols, traps and uncountables."""
    if label in FULL_TRAPS or _FULL_SKIP.search(label) or not label.isascii():
        return None
    name = label.lower()
    head = head_word(name)
    return None if is_plural_form(head) or head in _NOT_COUNTED.split() else name


def may_deny(name: Concept, present: Iterable[Concept]) -> bool:
    """Tell whether "no, there is none" is beyond dispute for a picture.

    Args:
        name: The concept asked for.
        present: Everything in the picture.

    Returns:
        False if the concept is there, or shares a head word or a tag with anything there.
    """
    return not any(_overlap(name, other) for other in present)


def _overlap(one: Concept, other: Concept) -> bool:
    if one.name == other.name or head_word(one.name) == head_word(other.name):
        return True
    if set(one.name.split()) & other.tags or set(other.name.split()) & one.tags:
        return True
    return bool(one.tags & other.tags)
