"""Bench pictures and questions on the held-out axes, and the files that hold them.

The file formats are those of MMBench (TSV), POPE (JSON lines) and VQA v2 (JSON).
"""

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from data_prep.sticker import charts, questions, train
from data_prep.sticker.names import Concept, may_deny
from data_prep.sticker.pictures import Plan, difference_hash, encode_png, is_near_duplicate, paint
from data_prep.sticker.questions import LETTERS, RELATIONS, Item
from data_prep.sticker.sources import PHOTO_STYLE
from data_prep.sticker.train import Split, Stage

ROTATION_STEP = 1_000_000
DATA_SUBTYPE = "stickervqa"
N_ANSWERS = 10
MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
    "l2-category", "comment", "split",
)  # fmt: skip
_L2 = {
    "naming photos": "fine-grained perception",
    "naming drawings": "fine-grained perception",
    "presence": "coarse perception",
    "counting": "fine-grained perception",
    "position": "relation reasoning",
    "digits": "text recognition",
    "words": "text recognition",
    "charts": "logic reasoning",
}


@dataclass(frozen=True)
class BenchPicture:
    """A painted bench picture.

    Attributes:
        number: Names the file.
        plan: What it shows.
        png: The file.
        source: Where its cut-outs come from, for example "fluent".
    """

    number: int
    plan: Plan
    png: bytes
    source: str

    @property
    def file_name(self) -> str:
        """Return the name of the file below ``images/bench`` or ``images/val``, as VQA has it."""
        return f"{DATA_SUBTYPE}_{self.number:012d}.png"


def mmbench_tsv(rows: Sequence[tuple[BenchPicture, Item, str]], split: str) -> str:
    """Write lettered questions with their circular rotations.

    Args:
        rows: (picture, lettered item, category) of each base question.
        split: Text of the split column.

    Returns:
        Tab-separated text; row ``base + k * 1_000_000`` has the options moved k places on, and
        names the base row's index instead of repeating its picture.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(MMBENCH_COLUMNS)
    for turn in range(len(LETTERS)):
        for base, (picture, item, category) in enumerate(rows):
            # the options move one place on a turn, and the right letter with them
            options = item.options[-turn:] + item.options[:-turn] if turn else item.options
            image = str(base) if turn else base64.b64encode(picture.png).decode()
            writer.writerow(
                (
                    base + turn * ROTATION_STEP, item.question, "", *options,
                    LETTERS[options.index(item.answer)], category, image, picture.source,
                    _L2[category], "", split,
                )
            )  # fmt: skip
    return buffer.getvalue()


def balanced_existence(
    rng: Random,
    kind: str,
    pictures: Sequence[BenchPicture],
    concepts: dict[str, Concept],
    n_rows: int,
) -> list[tuple[BenchPicture, str, str]]:
    """Ask for objects so that each has as many "yes" as "no".

    Args:
        rng: Random source.
        kind: "random": a "no" in any picture; "popular": only about the objects shown most;
            "adversarial": a "no" in a picture that holds a mate from the object's subgroup.
        pictures: Scenes.
        concepts: All, by name.
        n_rows: Rows wanted, even; fewer if the pictures do not give as many.

    Returns:
        (picture, object, "yes" or "no"), shuffled, no question twice about a picture.
    """
    holds = [(picture, questions.names_in(picture.plan)) for picture in pictures]
    shown = Counter(name for _, names in holds for name in names)
    wanted = list(shown)
    if kind == "popular":
        wanted = [name for name, _ in shown.most_common(max(4, len(shown) // 3))]
    yes: dict[str, list[BenchPicture]] = {}
    no: dict[str, list[BenchPicture]] = {}
    for name in wanted:
        yes[name] = [picture for picture, names in holds if name in names]
        no[name] = [
            picture
            for picture, names in holds
            if may_deny(concepts[name], [concepts[each] for each in names])
            and (kind != "adversarial" or _has_mate(concepts, name, names))
        ]
        rng.shuffle(yes[name])
        rng.shuffle(no[name])
    rows: list[tuple[BenchPicture, str, str]] = []
    while len(rows) < n_rows:
        left = [name for name in wanted if yes[name] and no[name]]
        rng.shuffle(left)
        if not left:
            break
        for name in left[: (n_rows - len(rows)) // 2]:
            # in pairs, so that a thing is present as often as absent
            rows.append((yes[name].pop(), name, "yes"))
            rows.append((no[name].pop(), name, "no"))
    rng.shuffle(rows)
    return rows


def pope_lines(rows: Iterable[tuple[BenchPicture, str, str]]) -> str:
    """Return questions from ``balanced_existence`` as POPE's JSON lines."""
    records = (
        {
            "question_id": index,
            "image": picture.file_name,
            "text": questions.existence_question(name),
            "label": label,
        }
        for index, (picture, name, label) in enumerate(rows, start=1)
    )
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _has_mate(concepts: dict[str, Concept], name: str, names: Iterable[str]) -> bool:
    subgroup = concepts[name].subgroup
    return any(each != name and concepts[each].subgroup == subgroup for each in names)


def vqa_files(rows: Sequence[tuple[BenchPicture, Item]]) -> tuple[dict, dict]:
    """Return questions and annotations in the layout of VQA v2, ten equal answers each."""
    head = {
        "info": {"description": "StickerVQA bench questions in VQA v2 format", "version": "1"},
        "license": {"name": "see ATTRIBUTION.md", "url": ""},
        "data_type": "mscoco",
        "data_subtype": DATA_SUBTYPE,
    }
    asked, annotations = [], []
    for index, (picture, item) in enumerate(rows):
        # ids as in VQA: the picture's number, then a running one
        key = {"question_id": picture.number * 1000 + index % 1000, "image_id": picture.number}
        asked.append({"image_id": key["image_id"], "question": item.question, **key})
        annotations.append(
            {
                **key,
                "question_type": " ".join(item.question.rstrip("?").lower().split()[:2]),
                "answer_type": answer_type(item.answer),
                "multiple_choice_answer": item.answer,
                "answers": [
                    {"answer": item.answer, "answer_confidence": "yes", "answer_id": each}
                    for each in range(1, N_ANSWERS + 1)
                ],
            }
        )
    return (
        {**head, "task_type": "Open-Ended", "questions": asked},
        {**head, "annotations": annotations},
    )


def answer_type(answer: str) -> str:
    """Return the VQA answer type: "yes/no", "number" or "other"."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


CATEGORY_SHARES = {
    "naming photos": 0.25, "naming drawings": 0.22, "presence": 0.16, "counting": 0.13,
    "position": 0.12, "digits": 0.06, "words": 0.03, "charts": 0.03,
}  # fmt: skip
"""Share of each MMBench category; what a missing source leaves goes to the drawings."""

_KIND_OF_CATEGORY = {
    "naming photos": "drawing", "naming drawings": "drawing", "presence": "presence",
    "counting": "counting", "position": "relation", "digits": "digits", "words": "word",
    "charts": "chart",
}  # fmt: skip
"""The kind of train record that teaches a category; what is not taught is not asked."""

_TRIES = 50


class BenchPainter:
    """Paints bench pictures that keep clear of the train pictures, and numbers them from 1."""

    def __init__(self, sprites: dict[str, dict[str, list[bytes]]], keep_off: Sequence[int]) -> None:
        """Keep the cut-outs, and the difference hashes that no picture may come near."""
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
        """Yield picture, lettered item and category of each base question of the MMBench file."""
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
            yield self.paint(
                lambda stage=stage, names=with_mate: train.plan_presence(rng, stage, names)
            )

    def open_questions(
        self, rng: Random, scenes: list[BenchPicture], n_questions: int
    ) -> Iterator[tuple[BenchPicture, Item]]:
        """Yield (picture, short-answer item) for the VQA files.

        40 % are yes/no questions about ``scenes``, 25 % counts, the rest names and positions; what
        the split does not teach is not asked.
        """
        taught = self.split.shares
        n_yes_no = int(0.4 * n_questions) // 2 * 2
        n_counts = int(0.25 * n_questions) if "counting" in taught else 0
        rows = balanced_existence(rng, "random", scenes, self.split.concepts, n_yes_no)
        for picture, name, label in rows:
            yield picture, Item("existence", questions.existence_question(name), label, obj=name)
        for _ in range(n_counts):
            yield self.count(rng)
        for index in range(n_questions - n_yes_no - n_counts):
            is_where = index % 2 and "relation" in taught
            yield self._what(rng) if is_where else self._name(rng)

    def styles(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the drawing styles and the photo style, the latter empty without photos."""
        styles = self.split.stage.styles
        drawings = tuple(style for style in styles if style != PHOTO_STYLE)
        return drawings, tuple(style for style in styles if style == PHOTO_STYLE)

    def _category_counts(self, n_questions: int) -> dict[str, int]:
        shares = {
            category: share
            for category, share in CATEGORY_SHARES.items()
            if _KIND_OF_CATEGORY[category] in self.split.shares
        }
        total = sum(shares.values())
        if PHOTO_STYLE not in self.split.stage.styles:
            del shares["naming photos"]
        if not self.split.stage.catalogue.digits:
            shares.pop("digits", None)
        if not any(len(row) >= charts.N_BARS for row in self.split.series):
            shares.pop("charts", None)
        if not charts.short_words(self.split.concepts):
            shares.pop("words", None)
        counts = {category: int(n_questions * share / total) for category, share in shares.items()}
        counts["naming drawings"] += n_questions - sum(counts.values())
        return counts

    def count(self, rng: Random) -> tuple[BenchPicture, Item]:
        """Paint a counting scene of drawings; returns it with its question."""
        split = self.restricted(self.styles()[0])
        picture = self.paint(
            lambda: train.plan_counting(rng, split.stage, only_held_out=self.held_out)
        )
        return picture, questions.count_item(
            picture.plan.content["target"], picture.plan.content["count"]
        )

    def relation(
        self, rng: Random, max_objects: int | None = None
    ) -> tuple[BenchPicture, tuple[str, str], str]:
        """Paint two drawings in a clear relation; returns the scene, their names, the relation."""
        stage = self.restricted(self.styles()[0]).stage
        stage = replace(stage, max_objects=max_objects or stage.max_objects)
        picture = self.paint(lambda: train.plan_relation(rng, stage, only_held_out=self.held_out))
        return picture, picture.plan.content["pair"], picture.plan.content["relation"]

    def _what(self, rng: Random) -> tuple[BenchPicture, Item]:
        picture, (one, other), relation = self.relation(rng, max_objects=2)
        return picture, questions.what_is_where_item(one, other, relation)

    def _name(self, rng: Random) -> tuple[BenchPicture, Item]:
        drawings, photos = self.styles()
        stage = self.restricted(photos if photos and rng.random() < 0.5 else drawings).stage
        picture = self.paint(lambda: train.plan_drawing(rng, stage))
        name = picture.plan.objects[0].name
        return picture, Item("naming", questions.NAME_QUESTION, name, obj=name)


def _one_of_four(
    planner: BenchPlanner, rng: Random, plan: Callable[[Random, Stage], Plan], *, photos: bool
) -> tuple[BenchPicture, Item] | None:
    split = planner.restricted(planner.styles()[photos])
    picture = planner.paint(lambda: plan(rng, split.stage))
    # wrong options come from the same pool as the answers: what may be shown tells nothing
    item = questions.choice_item(
        rng, picture.plan, split.ledger, split.concepts, split.stage.pool()
    )
    return None if item is None else (picture, item)


def _counting(planner: BenchPlanner, rng: Random) -> tuple[BenchPicture, Item]:
    picture, item = planner.count(rng)
    wrong = questions.count_options(int(item.answer), planner.split.stage.max_objects)
    return picture, planner.split.ledger.lettered(rng, item, wrong)


def _position(planner: BenchPlanner, rng: Random) -> tuple[BenchPicture, Item]:
    picture, (one, other), relation = planner.relation(rng)
    wrong = [each for each in RELATIONS if each != relation]
    return picture, planner.split.ledger.lettered(
        rng, questions.where_item(one, other, relation), wrong
    )


def _digits(planner: BenchPlanner, rng: Random) -> tuple[BenchPicture, Item]:
    split, held_out = planner.split, planner.held_out
    digits = split.stage.catalogue.digits
    picture = planner.paint(
        lambda: charts.plan_digits(rng, digits, split.digit_span, held_out=held_out)
    )
    return picture, charts.digits_items(rng, split.ledger, picture.plan)[1]


def _words(planner: BenchPlanner, rng: Random) -> tuple[BenchPicture, Item]:
    words = charts.short_words(planner.split.concepts)
    word = rng.choice(words)
    picture = planner.paint(lambda: charts.plan_word(rng, word, held_out=planner.held_out))
    return picture, charts.word_items(rng, planner.split.ledger, picture.plan, words)[1]


def _charts(planner: BenchPlanner, rng: Random) -> tuple[BenchPicture, Item]:
    split, held_out = planner.split, planner.held_out
    picture = planner.paint(
        lambda: charts.plan_chart(rng, split.series, charts.N_BARS, held_out=held_out)
    )
    word = rng.choice(("highest", "lowest"))
    return picture, charts.bar_item(rng, split.ledger, picture.plan, word, lettered=True)


_LETTERED: dict[str, Callable[[BenchPlanner, Random], tuple[BenchPicture, Item] | None]] = {
    "naming photos": partial(_one_of_four, plan=train.plan_drawing, photos=True),
    "naming drawings": partial(_one_of_four, plan=train.plan_drawing, photos=False),
    "presence": partial(_one_of_four, plan=train.plan_presence, photos=False),
    "counting": _counting, "position": _position, "digits": _digits, "words": _words,
    "charts": _charts,
}  # fmt: skip
