"""Question texts and answers, balanced so that they cannot be guessed without the picture.

Over a whole split, ``Ledger`` balances yes and no for each object, how often a name is the right
or a wrong option, and the option letters. Counts are uniform because scenes are planned so.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from data_prep.sticker.names import Concept, counted, may_deny, plural, with_article
from data_prep.sticker.pictures import Placed, Plan, relation_of

LETTERS = "ABCD"
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
SHORT_SUFFIX = "Answer the question using a single word or phrase."
RELATIONS = ("left", "right", "above", "below")
RELATION_TEXTS = {
    "left": "to the left of", "right": "to the right of", "above": "above", "below": "below",
}  # fmt: skip
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
CAPTION_QUESTIONS = (
    "Describe the picture.",
    "What is in the picture?",
    "List everything in the picture.",
    "Describe the image briefly.",
)
NAME_QUESTION = "What is shown in the picture?"
PRESENCE_QUESTION = "Which of these is in the picture?"
NUMBER_QUESTION = "What number is written in the picture?"
WORD_QUESTION = "What word is written in the picture?"
IS_WORD_QUESTION = "Is the word {word} written in the picture?"
BARS_QUESTION = "How many bars are in the chart?"


@dataclass(frozen=True)
class Item:
    """One question about one picture (or none).

    Attributes:
        category: naming, presence, existence, counting, position, caption, digits, words, charts
            or text.
        question: Without options or suffix.
        answer: Short form, lower case unless a caption.
        options: Four texts for a lettered question, else empty; ``answer`` is one of them.
        obj: The concept asked for, where there is one.
    """

    category: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    obj: str = ""

    @property
    def letter(self) -> str:
        """Return the letter of the right option.

        Raises:
            ValueError: If the item has no options.
        """
        return LETTERS[self.options.index(self.answer)]

    def as_turn(self) -> tuple[str, str]:
        """Return question and answer text in the prompt format of the benches."""
        if self.options:
            rows = [f"{letter}. {text}" for letter, text in zip(LETTERS, self.options, strict=True)]
            return "\n".join((self.question, *rows, LETTER_SUFFIX)), self.letter
        if self.category == "caption":
            return self.question, self.answer
        answer = self.answer.capitalize() if self.answer in ("yes", "no") else self.answer
        return f"{self.question}\n{SHORT_SUFFIX}", answer


@dataclass
class Ledger:
    """What a split has asked so far."""

    yes_minus_no: Counter = field(default_factory=Counter)
    right_minus_wrong: Counter = field(default_factory=Counter)
    letters: Counter = field(default_factory=Counter)
    truths: Counter = field(default_factory=Counter)

    def arrange(self, rng: Random, answer: str, wrong: Sequence[str]) -> tuple[str, ...]:
        """Return the options in an order that keeps the letters of the answers uniform."""
        fewest = min(self.letters[letter] for letter in LETTERS)
        letter = rng.choice([each for each in LETTERS if self.letters[each] == fewest])
        self.letters[letter] += 1
        options = rng.sample(list(wrong), len(LETTERS) - 1)
        options.insert(LETTERS.index(letter), answer)
        return tuple(options)

    def say_yes(self, rng: Random, kind: str) -> bool:
        """Decide the truth of a yes/no question so that both stay about equally frequent.

        The pull back to even is soft: strict alternation would tell the next answer.
        """
        yes = rng.random() < min(0.9, max(0.1, 0.5 - self.truths[kind] / 30))
        self.truths[kind] += 1 if yes else -1
        return yes

    def lettered(self, rng: Random, item: Item, wrong: Sequence[str]) -> Item:
        """Return the item as a lettered question with the given wrong options."""
        return replace(item, options=self.arrange(rng, item.answer, wrong))

    def wrong_names(
        self, rng: Random, answer: str, present: Iterable[Concept], pool: Sequence[Concept]
    ) -> list[str] | None:
        """Choose three names that are surely wrong, those that are most often right first.

        Returns:
            None when the pool has fewer than three.
        """
        present = list(present)
        sure = [concept for concept in pool if may_deny(concept, present)]
        rng.shuffle(sure)
        # the sort is stable: equals stay shuffled
        sure.sort(key=lambda concept: -self.right_minus_wrong[concept.name])
        wrong: list[Concept] = []
        for concept in sure:
            if len(wrong) < len(LETTERS) - 1 and may_deny(concept, wrong):
                wrong.append(concept)
        if len(wrong) < len(LETTERS) - 1:
            return None
        self.right_minus_wrong[answer] += 3
        for concept in wrong:
            self.right_minus_wrong[concept.name] -= 1
        return [concept.name for concept in wrong]


def is_held_out(*parts: object) -> bool:
    """Tell whether a combination is kept for the bench: one in five, the same for every seed."""
    # a hash of the names, so that no seed and no size moves a combination to train
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 5 == 0


def relation_held_out(one: str, relation: str, other: str) -> bool:
    """Tell whether a (pair, relation) is held out; "a left of b" is "b right of a"."""
    if one > other:
        one, relation, other = other, INVERSE[relation], one
    return is_held_out("relation", one, relation, other)


def count_held_out(name: str, count: int) -> bool:
    """Tell whether an (object, count) is held out."""
    return is_held_out("count", name, count)


def names_in(plan: Plan) -> list[str]:
    """Return the different names in a picture, from left to right."""
    ordered = sorted(plan.objects, key=lambda item: item.center[0])
    return list(dict.fromkeys(item.name for item in ordered))


def caption_item(rng: Random, plan: Plan) -> Item:
    """List what is there, from left to right, with counts."""
    counts = Counter(item.name for item in plan.objects)
    parts = [counted(name, counts[name]) for name in names_in(plan)]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return Item("caption", rng.choice(CAPTION_QUESTIONS), f"{text[0].upper()}{text[1:]}.")


def existence_item(
    rng: Random,
    plan: Plan,
    ledger: Ledger,
    concepts: dict[str, Concept],
    asked: Iterable[str],
    *,
    yes: bool,
) -> Item | None:
    """Ask "Is there a dog in the image?", balanced for each object.

    "Yes" goes to the thing there that had the fewest, "no" to the absent one that had the most.

    Args:
        rng: Random source.
        plan: The picture.
        ledger: Of the split.
        concepts: All, by name.
        asked: Names this picture was asked about already.
        yes: The right answer.

    Returns:
        None if nothing is left to ask for.
    """
    names = [name for name in names_in(plan) if name not in asked]
    if not yes:
        present = [concepts[name] for name in names_in(plan)]
        names = [
            name
            for name, concept in concepts.items()
            if name not in asked and may_deny(concept, present)
        ]
    if not names:
        return None
    rng.shuffle(names)
    sign = 1 if yes else -1
    name = min(names, key=lambda each: sign * ledger.yes_minus_no[each])
    ledger.yes_minus_no[name] += sign
    return Item("existence", existence_question(name), "yes" if yes else "no", obj=name)


def existence_question(name: str) -> str:
    """Return the question in the wording of POPE."""
    return f"Is there {with_article(name)} in the image?"


def choice_item(
    rng: Random,
    plan: Plan,
    ledger: Ledger,
    concepts: dict[str, Concept],
    pool: Sequence[Concept] | None = None,
) -> Item | None:
    """Ask for the one option that is in the picture; wrong ones come from ``pool``, or from all."""
    names = names_in(plan)
    rng.shuffle(names)
    answer = min(names, key=lambda name: ledger.right_minus_wrong[name])
    present = [concepts[name] for name in names]
    wrong = ledger.wrong_names(rng, answer, present, pool or list(concepts.values()))
    if wrong is None:
        return None
    single = plan.kind == "drawing"
    category, question = ("naming", NAME_QUESTION) if single else ("presence", PRESENCE_QUESTION)
    return ledger.lettered(rng, Item(category, question, answer, obj=answer), wrong)


def count_item(name: str, count: int) -> Item:
    """Ask how many; the answer is a figure."""
    return Item("counting", f"How many {plural(name)} are in the picture?", str(count), obj=name)


def count_options(count: int, highest: int) -> list[str]:
    """Return three other figures from a window of four that holds the count."""
    # the window does not center on the count, or the middle option would be right
    low = min(max(1, 1 + 4 * ((count - 1) // 4)), highest - 3)
    return [str(each) for each in range(low, low + 4) if each != count]


def clear_pairs(plan: Plan) -> list[tuple[Placed, Placed, str]]:
    """Return (one, other, relation) for the pairs of single things with a clear relation."""
    counts = Counter(item.name for item in plan.objects)
    single = [item for item in plan.objects if counts[item.name] == 1]
    return [
        (one, other, relation)
        for one in single
        for other in single
        if one is not other and (relation := relation_of(one, other)) is not None
    ]


def where_item(one: str, other: str, relation: str) -> Item:
    """Ask where one thing is, as seen from another."""
    question = f"Where is the {one} compared with the {other}?"
    return Item("position", question, relation, obj=one)


def is_where_item(one: str, other: str, relation: str, asked: str) -> Item:
    """Ask whether one thing is in a given relation to another."""
    question = f"Is the {one} {RELATION_TEXTS[asked]} the {other}?"
    return Item("position", question, "yes" if asked == relation else "no", obj=one)


def what_is_where_item(one: str, other: str, relation: str) -> Item:
    """Ask for the thing in a given relation; only for pictures of two things."""
    question = f"What is {RELATION_TEXTS[relation]} the {other}?"
    return Item("position", question, one, obj=one)


def kind_item(concept: Concept, asked: str) -> Item:
    """Ask, without a picture, whether a thing belongs to a class."""
    question = f"Is {with_article(concept.name)} {with_article(asked)}?"
    return Item("text", question, "yes" if asked == concept.kind else "no", obj=concept.name)


def what_kind_item(concept: Concept) -> Item:
    """Ask, without a picture, for the class of a thing."""
    question = f"What kind of thing is {with_article(concept.name)}?"
    return Item("text", question, concept.kind or "", obj=concept.name)
