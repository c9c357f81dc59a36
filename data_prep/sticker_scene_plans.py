"""Choosing what goes into a scene, with the held-out combinations kept out of train."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from data_prep.sticker_names import Concept
from data_prep.sticker_questions import (
    RELATIONS,
    count_held_out,
    relation_held_out,
)
from data_prep.sticker_scenes import (
    PICTURE_PX,
    Placed,
    Plan,
    Wanted,
    place,
    place_pair,
    plan_background,
)
from data_prep.sticker_sources import Catalogue

_TRIES = 400


@dataclass
class Stage:
    """Where the pictures of one split come from.

    Attributes:
        catalogue: Cut-outs.
        aspects: (style, name, variant) -> width / height of the cut-out.
        styles: Styles of this split.
        max_objects: Most cut-outs in a picture.
        held_out: True for the bench: its background hues, and only held-out combinations asked.
        shown: How often each concept was chosen so far.
        asked: How often each count and each relation was planned so far.
    """

    catalogue: Catalogue
    aspects: dict[tuple[str, str, int], float]
    styles: tuple[str, ...]
    max_objects: int
    held_out: bool
    shown: Counter = field(default_factory=Counter)
    asked: Counter = field(default_factory=Counter)

    def least_asked(self, rng: Random, choices: Sequence[int | str]) -> int | str:
        """Choose so that all choices become equally frequent: no answer is a better guess."""
        fewest = min(self.asked[each] for each in choices)
        choice = rng.choice([each for each in choices if self.asked[each] == fewest])
        self.asked[choice] += 1
        return choice

    def pool(self) -> list[Concept]:
        """Return the concepts that have a cut-out in the stage's styles."""
        return [
            concept
            for concept in self.catalogue.concepts
            if self.catalogue.styles_of(concept.name, self.styles)
        ]

    def pick(self, rng: Random, names: Sequence[str]) -> str:
        """Pick a name, rarely shown ones first."""
        fewest = min(self.shown[name] for name in names)
        name = rng.choice([name for name in names if self.shown[name] <= fewest])
        self.shown[name] += 1
        return name

    def cut_out(self, rng: Random, name: str) -> Wanted:
        """Choose one of the concept's cut-outs."""
        style = rng.choice(self.catalogue.styles_of(name, self.styles))
        variant = rng.randrange(len(self.catalogue.sprites[style][name]))
        return Wanted(name, style, variant, self.aspects[style, name, variant])


def plan_drawing(rng: Random, stage: Stage, name: str | None = None) -> Plan:
    """Plan a picture of one large cut-out."""
    name = name or stage.pick(rng, [concept.name for concept in stage.pool()])
    wanted = stage.cut_out(rng, name)
    side = rng.uniform(0.55, 0.92)
    width, height = (side, side / wanted.aspect) if wanted.aspect >= 1 else (
        side * wanted.aspect, side,
    )  # fmt: skip
    x0, y0 = rng.uniform(0.01, 0.99 - width), rng.uniform(0.01, 0.99 - height)
    box = (x0, y0, x0 + width, y0 + height)
    placed = Placed(name, wanted.style, wanted.variant, box, rng.random() < 0.5)
    return Plan("drawing", plan_background(rng, held_out=stage.held_out), (placed,))


def plan_counting(rng: Random, stage: Stage, *, only_held_out: bool = False) -> Plan:
    """Plan a scene around n copies of one thing, n uniform from 1 to the most allowed.

    Args:
        rng: Random source.
        stage: Of the split.
        only_held_out: Choose a held-out (object, count); otherwise such are avoided.

    Returns:
        A scene; ``content["target"]`` and ``content["count"]`` say what to count.
    """
    names = [concept.name for concept in stage.pool()]
    highest = stage.max_objects
    fitting = {
        count: [name for name in names if count_held_out(name, count) == only_held_out]
        for count in range(1, highest + 1)
    }
    count = int(stage.least_asked(rng, [count for count, found in fitting.items() if found]))
    target = stage.pick(rng, fitting[count])
    n_more = rng.randint(0, highest - count) if count > 1 else rng.randint(1, highest - 1)
    others = _others(rng, stage, {target}, n_more)
    wanted = [stage.cut_out(rng, target) for _ in range(count)]
    wanted += [stage.cut_out(rng, name) for name in others]
    content = {"target": target, "count": count}
    background = plan_background(rng, held_out=stage.held_out)
    return Plan("scene", background, place(rng, wanted), content)


def plan_relation(rng: Random, stage: Stage, *, only_held_out: bool = False) -> Plan:
    """Plan a scene in which two things are in a clear relation, the four relations uniform.

    Args:
        rng: Random source.
        stage: Of the split.
        only_held_out: Choose a held-out (pair, relation); otherwise such are avoided.

    Returns:
        A scene; ``content["pair"]`` and ``content["relation"]`` say what to ask.
    """
    names = [concept.name for concept in stage.pool()]
    relation = str(stage.least_asked(rng, RELATIONS))
    for _ in range(_TRIES):
        one = rng.choice(names)
        other = rng.choice(names)
        if one != other and relation_held_out(one, relation, other) == only_held_out:
            break
    stage.shown.update((one, other))
    n_more = rng.choice((0, 0, 1, 2)) if stage.max_objects > 3 else 0
    others = _others(rng, stage, {one, other}, n_more)
    wanted = [stage.cut_out(rng, name) for name in (one, other, *others)]
    content = {"pair": (one, other), "relation": relation}
    background = plan_background(rng, held_out=stage.held_out)
    return Plan("scene", background, place_pair(rng, wanted, relation), content)


def plan_presence(rng: Random, stage: Stage, names: Sequence[str] = ()) -> Plan:
    """Plan a scene of different things, with the given ones among them."""
    n_more = rng.randint(2, stage.max_objects) - len(names)
    others = _others(rng, stage, set(names), max(0, n_more))
    wanted = [stage.cut_out(rng, name) for name in (*names, *others)]
    rng.shuffle(wanted)
    background = plan_background(rng, held_out=stage.held_out)
    return Plan("scene", background, place(rng, wanted))


def boxes_of(plan: Plan) -> list[dict]:
    """Return the objects as records: name and box as fractions, rounded to a tenth of a pixel."""
    return [
        {
            "name": item.name,
            "style": item.style,
            "box": [round(edge * PICTURE_PX * 10) / (PICTURE_PX * 10) for edge in item.box],
        }
        for item in plan.objects
    ]


def _others(rng: Random, stage: Stage, taken: set[str], n_more: int) -> list[str]:
    """Pick further names; none may make a held-out count or a confusing neighbour."""
    names = [concept.name for concept in stage.pool()]
    others: list[str] = []
    while len(others) < n_more:
        left = [name for name in names if name not in taken and name not in others]
        if not left:
            break
        others.append(stage.pick(rng, rng.sample(left, min(12, len(left)))))
    return others
