"""Train and validation pictures with their conversations, as LLaVA JSON records.

Scenes are chosen so that held-out combinations never appear in the train split.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from data_prep.sticker import charts, pictures, questions
from data_prep.sticker.names import Concept
from data_prep.sticker.pictures import PICTURE_PX, Placed, Plan, Wanted, plan_background
from data_prep.sticker.questions import RELATIONS, Item, Ledger
from data_prep.sticker.sources import Catalogue
from milora_vl.constants import IMAGE_TOKEN

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
    width, height = pictures.extent(wanted.aspect, side)
    x0, y0 = rng.uniform(0.01, 0.99 - width), rng.uniform(0.01, 0.99 - height)
    box = (x0, y0, x0 + width, y0 + height)
    placed = Placed(name, wanted.style, wanted.variant, box, rng.random() < 0.5)
    return Plan("drawing", plan_background(rng, held_out=stage.held_out), (placed,))


def plan_counting(rng: Random, stage: Stage, *, only_held_out: bool = False) -> Plan:
    """Plan a scene around n copies of one thing, n uniform from 1 to the most allowed.

    Held-out pairs of object and count alone are chosen, or all but these. The content of the plan
    says the ``target`` and the ``count``.
    """
    names = [concept.name for concept in stage.pool()]
    highest = stage.max_objects
    fitting = {
        count: [name for name in names if questions.count_held_out(name, count) == only_held_out]
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
    return Plan("scene", background, pictures.place(rng, wanted), content)


def plan_relation(rng: Random, stage: Stage, *, only_held_out: bool = False) -> Plan:
    """Plan a scene in which two things are in a clear relation, the four relations uniform.

    Held-out relations of a pair alone are chosen, or all but these. The content of the plan says
    the ``pair`` and the ``relation``.
    """
    names = [concept.name for concept in stage.pool()]
    relation = str(stage.least_asked(rng, RELATIONS))
    for _ in range(_TRIES):
        one = rng.choice(names)
        other = rng.choice(names)
        if one != other and questions.relation_held_out(one, relation, other) == only_held_out:
            break
    stage.shown.update((one, other))
    n_more = rng.choice((0, 0, 1, 2)) if stage.max_objects > 3 else 0
    others = _others(rng, stage, {one, other}, n_more)
    wanted = [stage.cut_out(rng, name) for name in (one, other, *others)]
    content = {"pair": (one, other), "relation": relation}
    background = plan_background(rng, held_out=stage.held_out)
    return Plan("scene", background, pictures.place_pair(rng, wanted, relation), content)


def plan_presence(rng: Random, stage: Stage, names: Sequence[str] = ()) -> Plan:
    """Plan a scene of different things, with the given ones among them."""
    n_more = rng.randint(2, stage.max_objects) - len(names)
    others = _others(rng, stage, set(names), max(0, n_more))
    wanted = [stage.cut_out(rng, name) for name in (*names, *others)]
    rng.shuffle(wanted)
    background = plan_background(rng, held_out=stage.held_out)
    return Plan("scene", background, pictures.place(rng, wanted))


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


FULL_SHARES = {
    "relation": 0.16, "counting": 0.16, "presence": 0.25, "drawing": 0.30,
    "digits": 0.04, "word": 0.03, "chart": 0.03, "text": 0.03,
}  # fmt: skip
"""Share of each kind of record in train; what a missing source leaves goes to the scenes."""

CORE_SHARES = {"presence": 0.57, "drawing": 0.38, "text": 0.05}
"""The kinds that the CPU demo learns; the benches ask for no other ones either."""

N_CHOICES = {"scene": 3, "drawing": 3}
"""Lettered questions about a picture, by its kind."""

MOST_AFFIRMED = 3
"""Things in an image whose existence is asked for; one absent thing is denied.

After even answers a model denies what it only half knows, such as things drawn by an artist it
never saw: its "Yes" is nearly always right, and four things in ten are missed. The benches ask for
as many things that are there as for absent ones."""

VARIED_RATIO = 0.5
"""Share of the cut-outs in train that are painted with a variation."""


@dataclass
class Split:
    """What one split is planned with.

    Attributes:
        stage: Cut-outs and styles.
        digit_span: Part of each digit's pictures that belongs to this split.
        series: Bar series of this split.
        varied_ratio: Share of the cut-outs that are painted with a variation.
        shares: Share of each kind of record; a kind without one is not asked in the benches.
        ledger: Its balance so far.
    """

    stage: Stage
    digit_span: tuple[float, float]
    series: list[list[tuple[str, float]]]
    varied_ratio: float = 0.0
    shares: Mapping[str, float] = field(default_factory=lambda: FULL_SHARES)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def concepts(self) -> dict[str, Concept]:
        """Return all concepts by name."""
        return {concept.name: concept for concept in self.stage.catalogue.concepts}


def plan_records(
    rng: Random, split: Split, n_pictures: int, folder: str
) -> tuple[list[dict], list[tuple[str, Plan]]]:
    """Plan a split.

    Args:
        rng: Random source; decides everything.
        split: What to plan with.
        n_pictures: How many records, the text-only ones among them.
        folder: "train" or "val": the folder below ``images`` and prefix of the ids.

    Returns:
        Records, and (file path below the set, plan) of the pictures to paint.
    """
    kinds = _kinds(rng, split, n_pictures)
    records, plans = [], []
    for index, kind in enumerate(kinds):
        plan, items = _MAKERS[kind](rng, split)
        record: dict[str, Any] = {"id": f"{folder}_{index:06d}", "source": kind}
        if plan is not None:
            plan = vary_plan(rng, plan, split.varied_ratio)
            record["source"] = plan.kind
            record["image"] = f"images/{folder}/{index:06d}.png"
            plans.append((record["image"], plan))
        record["conversations"] = _conversation(items, has_image=plan is not None)
        record["kinds"] = [item.category for item in items]
        if plan is not None and plan.objects:
            record["objects"] = boxes_of(plan)
        records.append(record)
    return records, plans


def vary_plan(rng: Random, plan: Plan, ratio: float) -> Plan:
    """Return the plan with a share of its cut-outs to be painted with a variation."""
    objects = tuple(
        replace(item, variation=rng.randrange(1 << 30)) if rng.random() < ratio else item
        for item in plan.objects
    )
    return replace(plan, objects=objects)


def caption_records(records: list[dict]) -> list[dict]:
    """Return stage-1 records: each captioned picture with its caption as the only turn."""
    found = []
    for record in records:
        if "caption" in record["kinds"]:
            at = 2 * record["kinds"].index("caption")
            question, answer = record["conversations"][at : at + 2]
            text = question["value"].removeprefix(f"{IMAGE_TOKEN}\n")
            turns = [{**question, "value": f"{IMAGE_TOKEN}\n{text}"}, answer]
            found.append({**record, "conversations": turns, "kinds": ["caption"]})
    return found


def _kinds(rng: Random, split: Split, n_pictures: int) -> list[str]:
    shares = dict(split.shares)
    if not split.stage.catalogue.digits:
        shares.pop("digits", None)
    if not split.series:
        shares.pop("chart", None)
    if len({concept.kind for concept in split.concepts.values()} - {None}) < 2:
        shares.pop("text", None)
    total = sum(shares.values())
    kinds = []
    for kind, share in shares.items():
        kinds += [kind] * int(n_pictures * share / total)
    # what rounding leaves goes to scenes
    rest = "counting" if "counting" in shares else "presence"
    kinds += [rest] * (n_pictures - len(kinds))
    rng.shuffle(kinds)
    return kinds


def _conversation(items: list[Item], *, has_image: bool) -> list[dict[str, str]]:
    turns = []
    for index, item in enumerate(items):
        question, answer = item.as_turn()
        if index == 0 and has_image:
            question = f"{IMAGE_TOKEN}\n{question}"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def _common_items(rng: Random, split: Split, plan: Plan) -> list[Item]:
    """Ask for things in it, for one that is not, and for letters."""
    found: list[Item | None] = []
    asked: list[str] = []
    n_affirmed = min(MOST_AFFIRMED, len(questions.names_in(plan)))
    for yes in [True] * n_affirmed + [False]:
        item = questions.existence_item(rng, plan, split.ledger, split.concepts, asked, yes=yes)
        found.append(item)
        asked += [item.obj] if item else []
    for _ in range(N_CHOICES[plan.kind]):
        item = questions.choice_item(rng, plan, split.ledger, split.concepts)
        while item is not None and item in found:  # few concepts: the very same question again
            item = _reorder_wrong(rng, item)
        found.append(item)
    return [item for item in found if item is not None]


def _reorder_wrong(rng: Random, item: Item) -> Item:
    """Shuffle the wrong options; the letter of the right one stays, so letters stay uniform."""
    wrong = [option for option in item.options if option != item.answer]
    rng.shuffle(wrong)
    at = item.options.index(item.answer)
    return replace(item, options=(*wrong[:at], item.answer, *wrong[at:]))


def _finish(rng: Random, items: list[Item], caption: Item) -> list[Item]:
    """Shuffle; the caption, which gives the other answers away, mostly comes last."""
    rng.shuffle(items)
    return [caption, *items] if rng.random() < 0.3 else [*items, caption]


def _counting(rng: Random, split: Split) -> tuple[Plan, list[Item]]:
    plan = plan_counting(rng, split.stage)
    items = _common_items(rng, split, plan)
    name, count = plan.content["target"], plan.content["count"]
    item = questions.count_item(name, count)
    if rng.random() < 0.5:
        wrong = questions.count_options(count, split.stage.max_objects)
        item = split.ledger.lettered(rng, item, wrong)
    items.append(item)
    return plan, _finish(rng, items, questions.caption_item(rng, plan))


def _relation(rng: Random, split: Split) -> tuple[Plan, list[Item]]:
    plan = plan_relation(rng, split.stage)
    items = _common_items(rng, split, plan)
    (one, other), relation = plan.content["pair"], plan.content["relation"]
    only_two = len(plan.objects) == 2
    items.append(_where(rng, split, (one, other, relation), only_two=only_two))
    more = [
        (a.name, b.name, between)
        for a, b, between in questions.clear_pairs(plan)
        if {a.name, b.name} != {one, other}
        and not questions.relation_held_out(a.name, between, b.name)
    ]
    if more:
        items.append(_where(rng, split, rng.choice(more), only_two=only_two))
    return plan, _finish(rng, items, questions.caption_item(rng, plan))


def _where(rng: Random, split: Split, related: tuple[str, str, str], *, only_two: bool) -> Item:
    one, other, relation = related
    form = rng.random()
    if form < 0.5:
        wrong = [each for each in RELATIONS if each != relation]
        return split.ledger.lettered(rng, questions.where_item(one, other, relation), wrong)
    if form < 0.65:
        return questions.where_item(one, other, relation)
    if form < 0.9 or not only_two:
        false = [
            each
            for each in RELATIONS
            if each != relation and not questions.relation_held_out(one, each, other)
        ]
        yes = split.ledger.say_yes(rng, "relation")
        return questions.is_where_item(
            one, other, relation, relation if yes or not false else rng.choice(false)
        )
    return questions.what_is_where_item(one, other, relation)


def _presence(rng: Random, split: Split) -> tuple[Plan, list[Item]]:
    plan = plan_presence(rng, split.stage)
    return plan, _finish(rng, _common_items(rng, split, plan), questions.caption_item(rng, plan))


def _drawing(rng: Random, split: Split) -> tuple[Plan, list[Item]]:
    plan = plan_drawing(rng, split.stage)
    name = plan.objects[0].name
    items = _common_items(rng, split, plan)
    items.append(Item("naming", questions.NAME_QUESTION, name, obj=name))
    kind = split.concepts[name].kind
    if kind is not None and rng.random() < 0.4:
        items.append(Item("naming", "What kind of thing is shown in the picture?", kind, obj=name))
    return plan, _finish(rng, items, questions.caption_item(rng, plan))


def _digits(rng: Random, split: Split) -> tuple[Plan, list[Item]]:
    plan = charts.plan_digits(rng, split.stage.catalogue.digits, split.digit_span, held_out=False)
    items = charts.digits_items(rng, split.ledger, plan)
    length = str(len(plan.content["text"]))
    items.append(Item("digits", "How many digits are in the picture?", length))
    rng.shuffle(items)
    return plan, items


def _word(rng: Random, split: Split) -> tuple[Plan, list[Item]]:
    words = charts.short_words(split.concepts)
    plan = charts.plan_word(rng, rng.choice(words), held_out=False)
    items = charts.word_items(rng, split.ledger, plan, words)
    rng.shuffle(items)
    return plan, items


def _chart(rng: Random, split: Split) -> tuple[Plan, list[Item]]:
    n_bars = rng.randint(2, 5)
    plan = charts.plan_chart(rng, split.series, n_bars, held_out=False)
    if plan is None:
        return _counting(rng, split)
    return plan, charts.chart_items(rng, split.ledger, plan)


def _text(rng: Random, split: Split) -> tuple[None, list[Item]]:
    known = [concept for concept in split.concepts.values() if concept.kind is not None]
    kinds = sorted({concept.kind for concept in known if concept.kind != "clothing"} - {None})
    items = []
    for concept in rng.sample(known, min(len(known), rng.randint(3, 5))):
        if concept.kind not in kinds or rng.random() < 0.5:
            items.append(questions.what_kind_item(concept))
            continue
        wrong = [kind for kind in kinds if kind != concept.kind]
        asked = concept.kind if rng.random() < 0.5 else rng.choice(wrong)
        items.append(questions.kind_item(concept, asked))
    return None, items


_MAKERS: dict[str, Callable[[Random, Split], tuple[Plan | None, list[Item]]]] = {
    "relation": _relation, "counting": _counting, "presence": _presence,
    "drawing": _drawing, "digits": _digits, "word": _word, "chart": _chart, "text": _text,
}  # fmt: skip
