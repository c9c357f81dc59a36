"""What the benches ask: bench pictures and their questions, on the held-out axes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from data_prep.sticker_benches import BenchPicture
from data_prep.sticker_charts import (
    N_BARS,
    plan_chart,
    plan_digits,
    plan_word,
)
from data_prep.sticker_names import plural
from data_prep.sticker_questions import (
    RELATIONS,
    Item,
    choice_item,
    clear_pairs,
    count_item,
    count_options,
    count_question,
    existence_item,
    names_in,
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
from data_prep.sticker_train import Split, chart_items, digits_items, short_words, word_items

CATEGORY_SHARES = {
    "naming photos": 0.25, "naming drawings": 0.22, "presence": 0.16, "counting": 0.13,
    "position": 0.12, "digits": 0.06, "words": 0.03, "charts": 0.03,
}  # fmt: skip
"""Share of each MMBench category; what a missing source leaves goes to the drawings."""

Painter = Callable[[Callable[[], Plan]], BenchPicture]


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
    paint: Painter

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
        """Yield scenes of different things for the existence questions, a quarter of photos."""
        drawings, photos = self._styles()
        by_subgroup: dict[str, list[str]] = {}
        for concept in self.split.stage.pool():
            by_subgroup.setdefault(concept.subgroup, []).append(concept.name)
        del by_subgroup
        for index in range(n_pictures):
            split = self.restricted(photos if photos and index % 4 == 3 else drawings)
            yield self.paint(lambda split=split: plan_presence(rng, split.stage))

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
        asked: set[tuple[int, str]] = set()
        while len(asked) < n_yes_no:
            picture = rng.choice(scenes)
            item = existence_item(
                rng, picture.plan, self.split.ledger, self.split.concepts, yes=len(asked) % 2 == 0
            )
            if item is not None and (picture.number, item.question) not in asked:
                asked.add((picture.number, item.question))
                yield picture, item
        for _ in range(n_counts):
            yield self._count(rng)
        for index in range(n_questions - n_yes_no - n_counts):
            yield self._what(rng) if index % 2 else self._name(rng)

    def _styles(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
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

    def _count(self, rng: Random) -> tuple[BenchPicture, Item]:
        split = self.restricted(self._styles()[0])
        picture = self.paint(lambda: plan_counting(rng, split.stage, only_held_out=self.held_out))
        name, count = picture.plan.content["target"], picture.plan.content["count"]
        return picture, count_item(count_question(plural(name)), count, name)

    def _what(self, rng: Random) -> tuple[BenchPicture, Item]:
        split = self.restricted(self._styles()[0])
        stage = replace(split.stage, max_objects=2)
        picture = self.paint(lambda: plan_relation(rng, stage, only_held_out=self.held_out))
        (one, other), relation = picture.plan.content["pair"], picture.plan.content["relation"]
        return picture, what_is_where_item(one, other, relation)

    def _name(self, rng: Random) -> tuple[BenchPicture, Item]:
        drawings, photos = self._styles()
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
    return _naming(planner, rng, planner._styles()[1])


def _naming_drawings(planner: BenchPlanner, rng: Random) -> tuple | None:
    return _naming(planner, rng, planner._styles()[0])


def _presence(planner: BenchPlanner, rng: Random) -> tuple | None:
    split = planner.restricted(planner._styles()[0])
    picture = planner.paint(lambda: plan_presence(rng, split.stage))
    item = choice_item(rng, picture.plan, split.ledger, split.concepts, split.stage.pool())
    return None if item is None else (picture, item)


def _counting(planner: BenchPlanner, rng: Random) -> tuple:
    picture, item = planner._count(rng)
    wrong = count_options(int(item.answer), planner.split.stage.max_objects)
    return picture, planner.split.ledger.lettered(rng, item, wrong)


def _position(planner: BenchPlanner, rng: Random) -> tuple:
    split = planner.restricted(planner._styles()[0])
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


def _charts(planner: BenchPlanner, rng: Random) -> tuple | None:
    split = planner.split
    picture = planner.paint(
        lambda: plan_chart(rng, split.series, N_BARS, held_out=planner.held_out)
    )
    items = chart_items(rng, split.ledger, picture.plan)
    item = next((each for each in items if each.options), None)
    return None if item is None else (picture, item)


_LETTERED: dict[str, Callable[[BenchPlanner, Random], tuple | None]] = {
    "naming photos": _naming_photos, "naming drawings": _naming_drawings, "presence": _presence,
    "counting": _counting, "position": _position, "digits": _digits, "words": _words,
    "charts": _charts,
}  # fmt: skip
__all__ = ["CATEGORY_SHARES", "BenchPlanner", "clear_pairs", "names_in"]
