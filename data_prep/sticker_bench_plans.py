"""What the benches ask: bench pictures and their questions, on the held-out axes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from data_prep.sticker_benches import BenchPicture, balanced_existence
from data_prep.sticker_charts import (
    N_BARS,
    bar_item,
    digits_items,
    plan_chart,
    plan_digits,
    plan_word,
    short_words,
    word_items,
)
from data_prep.sticker_names import may_deny, plural
from data_prep.sticker_paint import difference_hash, encode_png, is_near_duplicate, paint
from data_prep.sticker_questions import (
    RELATIONS,
    Item,
    choice_item,
    count_item,
    count_options,
    count_question,
    existence_question,
    what_is_where_item,
    where_item,
)
from data_prep.sticker_scene_plans import (
    plan_counting,
    plan_drawing,
    plan_presence,
    plan_relation,
)
from data_prep.sticker_scenes import Plan
from data_prep.sticker_sources import PHOTO_STYLE
from data_prep.sticker_train import Split

CATEGORY_SHARES = {
    "naming photos": 0.25, "naming drawings": 0.22, "presence": 0.16, "counting": 0.13,
    "position": 0.12, "digits": 0.06, "words": 0.03, "charts": 0.03,
}  # fmt: skip
"""Share of each MMBench category; what a missing source leaves goes to the drawings."""

_TRIES = 50


class BenchPainter:
    """Paints bench pictures that keep clear of the train pictures, and numbers them from 1."""

    def __init__(self, sprites: dict[str, dict[str, list[bytes]]], keep_off: Sequence[int]) -> None:
        """Start at picture 1.

        Args:
            sprites: style -> concept -> PNG files.
            keep_off: Difference hashes that no picture may come near.
        """
        self.sprites = sprites
        self.keep_off = keep_off
        self.number = 0

    def paint(self, make: Callable[[], Plan]) -> BenchPicture:
        """Paint what ``make`` plans, planning anew while it nearly equals a train picture.

        Raises:
            RuntimeError: If 50 plans in a row do.
        """
        for _ in range(_TRIES):
            plan = make()
            image = paint(plan, self.sprites)
            if not is_near_duplicate(difference_hash(image), self.keep_off):
                break
        else:
            raise RuntimeError(
                f"{_TRIES} bench pictures in a row nearly equal a train picture; use another seed"
            )
        self.number += 1
        styles = sorted({item.style for item in plan.objects}) or [plan.kind]
        return BenchPicture(self.number, plan, encode_png(image), "+".join(styles))


@dataclass
class BenchPlanner:
    """Plans and paints bench pictures.

    Attributes:
        split: Held-out cut-outs, digits, tables; its ledger balances the answers.
        held_out: Ask only held-out combinations (the bench), or only trained ones (validation).
        paint: Paints a plan anew until it is no near duplicate of a train picture.
    """

    split: Split
    held_out: bool
    paint: Callable[[Callable[[], Plan]], BenchPicture]

    def restricted(self, styles: tuple[str, ...]) -> Split:
        """Return the split with only some of its styles."""
        return replace(self.split, stage=replace(self.split.stage, styles=styles))

    def lettered(self, rng: Random, n_questions: int) -> Iterator[tuple[BenchPicture, Item, str]]:
        """Yield (picture, lettered item, category) for the MMBench-like file.

        Args:
            rng: Random source.
            n_questions: How many base questions.
        """
        for category, count in self._category_counts(n_questions).items():
            made = 0
            while made < count:
                row = _LETTERED[category](self, rng)
                if row is not None:
                    made += 1
                    yield (*row, category)

    def scenes(self, rng: Random, n_pictures: int) -> Iterator[BenchPicture]:
        """Yield scenes of different things for the existence questions, a quarter of photos.

        In every other scene one thing has a subgroup mate that may be denied beside it: the
        adversarial questions need such pictures.
        """
        drawings, photos = self.styles()
        concepts = list(self.split.concepts.values())
        mated = [
            one.name
            for one in concepts
            if any(
                other.subgroup == one.subgroup and may_deny(other, [one])
                for other in concepts
                if other is not one
            )
        ]
        for index in range(n_pictures):
            stage = self.restricted(photos if photos and index % 4 == 3 else drawings).stage
            here = [concept.name for concept in stage.pool() if concept.name in mated]
            with_mate = [stage.pick(rng, here)] if here and index % 2 == 0 else []
            yield self.paint(lambda stage=stage, names=with_mate: plan_presence(rng, stage, names))

    def open_questions(
        self, rng: Random, scenes: list[BenchPicture], n_questions: int
    ) -> Iterator[tuple[BenchPicture, Item]]:
        """Yield (picture, short-answer item) for the VQA-like files.

        Args:
            rng: Random source.
            scenes: Pictures for the yes/no questions.
            n_questions: How many; 40 % yes/no, 25 % counts, the rest names and positions.
        """
        n_yes_no, n_counts = int(0.4 * n_questions) // 2 * 2, int(0.25 * n_questions)
        rows = balanced_existence(rng, "random", scenes, self.split.concepts, n_yes_no)
        for picture, name, label in rows:
            yield picture, Item("existence", existence_question(name), label, obj=name)
        for _ in range(n_counts):
            yield self.count(rng)
        for index in range(n_questions - n_yes_no - n_counts):
            yield self._what(rng) if index % 2 else self._name(rng)

    def styles(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the drawing styles and the photo style, the latter empty without photos."""
        styles = self.split.stage.styles
        drawings = tuple(style for style in styles if style != PHOTO_STYLE)
        return drawings, tuple(style for style in styles if style == PHOTO_STYLE)

    def _category_counts(self, n_questions: int) -> dict[str, int]:
        shares = dict(CATEGORY_SHARES)
        if PHOTO_STYLE not in self.split.stage.styles:
            del shares["naming photos"]
        if not self.split.stage.catalogue.digits:
            del shares["digits"]
        if not any(len(row) >= N_BARS for row in self.split.series):
            del shares["charts"]
        if not short_words(self.split.concepts):
            del shares["words"]
        counts = {category: int(n_questions * share) for category, share in shares.items()}
        counts["naming drawings"] += n_questions - sum(counts.values())
        return counts

    def count(self, rng: Random) -> tuple[BenchPicture, Item]:
        """Paint a counting scene of drawings; returns it with its question."""
        split = self.restricted(self.styles()[0])
        picture = self.paint(lambda: plan_counting(rng, split.stage, only_held_out=self.held_out))
        name, count = picture.plan.content["target"], picture.plan.content["count"]
        return picture, count_item(count_question(plural(name)), count, name)

    def _what(self, rng: Random) -> tuple[BenchPicture, Item]:
        split = self.restricted(self.styles()[0])
        stage = replace(split.stage, max_objects=2)
        picture = self.paint(lambda: plan_relation(rng, stage, only_held_out=self.held_out))
        (one, other), relation = picture.plan.content["pair"], picture.plan.content["relation"]
        return picture, what_is_where_item(one, other, relation)

    def _name(self, rng: Random) -> tuple[BenchPicture, Item]:
        drawings, photos = self.styles()
        split = self.restricted(photos if photos and rng.random() < 0.5 else drawings)
        picture = self.paint(lambda: plan_drawing(rng, split.stage))
        name = picture.plan.objects[0].name
        return picture, Item("naming", "What is shown in the picture?", name, obj=name)


def _naming(planner: BenchPlanner, rng: Random, styles: tuple[str, ...]) -> tuple | None:
    split = planner.restricted(styles)
    picture = planner.paint(lambda: plan_drawing(rng, split.stage))
    # wrong options come from the same pool as the answers: what may be shown tells nothing
    item = choice_item(rng, picture.plan, split.ledger, split.concepts, split.stage.pool())
    return None if item is None else (picture, item)


def _naming_photos(planner: BenchPlanner, rng: Random) -> tuple | None:
    return _naming(planner, rng, planner.styles()[1])


def _naming_drawings(planner: BenchPlanner, rng: Random) -> tuple | None:
    return _naming(planner, rng, planner.styles()[0])


def _presence(planner: BenchPlanner, rng: Random) -> tuple | None:
    split = planner.restricted(planner.styles()[0])
    picture = planner.paint(lambda: plan_presence(rng, split.stage))
    item = choice_item(rng, picture.plan, split.ledger, split.concepts, split.stage.pool())
    return None if item is None else (picture, item)


def _counting(planner: BenchPlanner, rng: Random) -> tuple:
    picture, item = planner.count(rng)
    wrong = count_options(int(item.answer), planner.split.stage.max_objects)
    return picture, planner.split.ledger.lettered(rng, item, wrong)


def _position(planner: BenchPlanner, rng: Random) -> tuple:
    split = planner.restricted(planner.styles()[0])
    picture = planner.paint(lambda: plan_relation(rng, split.stage, only_held_out=planner.held_out))
    (one, other), relation = picture.plan.content["pair"], picture.plan.content["relation"]
    wrong = [each for each in RELATIONS if each != relation]
    return picture, split.ledger.lettered(rng, where_item(one, other, relation), wrong)


def _digits(planner: BenchPlanner, rng: Random) -> tuple:
    split = planner.split
    digits = split.stage.catalogue.digits
    picture = planner.paint(
        lambda: plan_digits(rng, digits, split.digit_span, held_out=planner.held_out)
    )
    return picture, digits_items(rng, split.ledger, picture.plan)[1]


def _words(planner: BenchPlanner, rng: Random) -> tuple:
    split = planner.split
    words = short_words(split.concepts)
    word = rng.choice(words)
    picture = planner.paint(lambda: plan_word(rng, word, held_out=planner.held_out))
    return picture, word_items(rng, split.ledger, picture.plan, words)[1]


def _charts(planner: BenchPlanner, rng: Random) -> tuple:
    split = planner.split
    picture = planner.paint(
        lambda: plan_chart(rng, split.series, N_BARS, held_out=planner.held_out)
    )
    word = rng.choice(("highest", "lowest"))
    return picture, bar_item(rng, split.ledger, picture.plan, word, lettered=True)


_LETTERED: dict[str, Callable[[BenchPlanner, Random], tuple | None]] = {
    "naming photos": _naming_photos, "naming drawings": _naming_drawings, "presence": _presence,
    "counting": _counting, "position": _position, "digits": _digits, "words": _words,
    "charts": _charts,
}  # fmt: skip
