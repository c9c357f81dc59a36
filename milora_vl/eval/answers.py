"""Answer normalization, parsing and scoring: pure functions on text, one place for all benches.

The two normalizers follow published definitions to the letter, quirks included, because a
friendlier rule would give numbers that cannot be compared:

* ``vqa_official``: the VQA challenge (github.com/GT-Vision-Lab/VQA, ``vqaEval.py``);
* ``m4c``: the EvalAI processor that LLaVA and TextVQA apply to predictions.

MMMU's reading of answers: the letter in a sentence, and open answers of words or numbers.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The published expression has a mistyped lookbehind that never holds, so what is left of it is
# "a period not followed by a digit": "3." becomes "3", "3.5" stays.
_PERIOD = re.compile(r"\.(?!\d)")
# It is called with a flag in the place of the count, and that flag's value is 32.
_PERIODS_REMOVED = 32

_NUMBER_WORDS = """zero one two three four five six seven eight nine ten"""
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = frozenset(("a", "an", "the"))

_PLAIN_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_DOUBLE_CONTRACTIONS = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
# The entries that follow no rule; two of them map a word to itself, one removes an apostrophe.
_ODD_CONTRACTIONS = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contraction_table() -> dict[str, str]:
    """Build the 120 published pairs; "I'm"-like keys keep their capital and so never match."""
    table = {word.replace("'", ""): word for word in _PLAIN_CONTRACTIONS.split()}
    for word in _DOUBLE_CONTRACTIONS.split():
        first, second = (place for place, letter in enumerate(word) if letter == "'")
        table[word[:first] + word[first + 1 :]] = word
        table[word[:second] + word[second + 1 :]] = word
    return table | _ODD_CONTRACTIONS


CONTRACTIONS = _contraction_table()
"""Spelling without an apostrophe -> spelling with it, as published (120 entries)."""


def _strip_punctuation(text: str) -> str:
    has_digit_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        touches_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if touches_space or has_digit_comma else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED)


def _normalize_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_official(text: str) -> str:
    """Normalize an answer as the VQA challenge does.

    Punctuation becomes a space, or nothing where it touches a space or where a digit-comma-digit
    occurs anywhere in the text; then lower case, number words to digits, no articles,
    contractions with their apostrophe.
    """
    return _normalize_words(_strip_punctuation(_one_line(text)))


def m4c(text: str) -> str:
    """Normalize an answer as LLaVA and TextVQA do before they upload or score it.

    Commas and question marks go first and "'s" is split off, then the steps of
    ``vqa_official``. So "red,blue" becomes "redblue" here and "red blue" there.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_official(text)


def vqa_accuracy(
    prediction: str, answers: Sequence[str], *, identical_as_is: bool = False
) -> float:
    """Score one prediction against human answers: leave-one-out VQA accuracy.

    The mean, over each annotator left out in turn, of ``min(1, matches among the others / 3)``:
    0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3 and at least 4 matches of 10. The prediction goes through
    ``m4c`` and then ``vqa_official`` (LLaVA's order), the answers through ``vqa_official``.

    Args:
        prediction: Raw model output.
        answers: The answers of all annotators, ten in the official files.
        identical_as_is: Follow the 2021 revision of the official code, which normalizes nothing
            when all answers are the same string: "a dog" then never matches ten times "a dog",
            since the uploaded prediction has lost its article.

    Returns:
        A fraction between 0 and 1.

    Raises:
        ValueError: If there are fewer than two answers: nobody is left to compare with.
    """
    if len(answers) < 2:
        raise ValueError(f"leave-one-out accuracy needs two or more answers, got {list(answers)!r}")
    candidate = m4c(prediction)
    lines = [_one_line(answer) for answer in answers]
    if not (identical_as_is and len(set(lines)) == 1):
        candidate = vqa_official(candidate)
        lines = [vqa_official(line) for line in lines]
    return _leave_one_out(candidate, lines)


def m4c_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score one prediction as TextVQA and VizWiz are: both sides through ``m4c``, leave-one-out.

    Args:
        prediction: Raw model output.
        answers: The answers of all annotators, ten in the official files.

    Returns:
        A fraction between 0 and 1.

    Raises:
        ValueError: If there are fewer than two answers.
    """
    if len(answers) < 2:
        raise ValueError(f"leave-one-out accuracy needs two or more answers, got {list(answers)!r}")
    return _leave_one_out(m4c(prediction), [m4c(answer) for answer in answers])


def _leave_one_out(candidate: str, lines: Sequence[str]) -> float:
    matches = sum(line == candidate for line in lines)
    misses = len(lines) - matches
    credited = matches * min(1.0, (matches - 1) / 3) + misses * min(1.0, matches / 3)
    return credited / len(lines)


def parse_yes_no(
    text: str, style: Literal["official", "strict"] = "official"
) -> Literal["yes", "no"] | None:
    """Read a yes/no answer out of model output.

    Args:
        text: Raw model output.
        style: "official" is POPE's own rule: the text before the first period, without commas,
            split at spaces; "No", "not" or "no" among the words means no, *anything else* yes
            (also "", "NO" and "Nope"). "strict" wants yes or no, in any case, as the first word.

    Returns:
        "yes", "no", or None (strict only) if the text does not say.

    Raises:
        ValueError: If ``style`` is neither of the two.
    """
    if style == "official":
        words = text.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"
    if style == "strict":
        first = re.match(r"\W*(yes|no)(?!\w)", text.lower())
        return first.group(1) if first else None
    raise ValueError(f"style {style!r} is not one of: official, strict")


_OPTION_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LETTER_WINDOW_WORDS = 5


def option_letters(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return options as letter -> text; a sequence is lettered A, B, C, ... in its order."""
    if isinstance(options, Mapping):
        return dict(options)
    return {chr(ord("A") + index): text for index, text in enumerate(options)}


def parse_option(text: str, options: Sequence[str] | Mapping[str, str]) -> str | None:
    """Read the chosen letter out of model output, without a judge model.

    First by letter: exactly one of the valid letters, in upper case, stands as a word of its own,
    among the last five words. Otherwise by text: exactly one option's text occurs in the output,
    in any case, and the output is no longer than twice all options together.

    Args:
        text: Raw model output.
        options: Option texts in order, or letter -> text.

    Returns:
        The letter, or None if no single option can be told.
    """
    lettered = option_letters(options)
    words = text.translate(_OPTION_SEPARATORS).split()
    present = [letter for letter in lettered if letter in words]
    if len(present) == 1 and words.index(present[0]) > len(words) - _LETTER_WINDOW_WORDS:
        return present[0]
    lowered = text.lower()
    if len(lowered) > 2 * sum(len(option) for option in lettered.values()):
        return None
    contained = [letter for letter, option in lettered.items() if option.lower() in lowered]
    return contained[0] if len(contained) == 1 else None


def most_common(values: Sequence[str]) -> str:
    """Return the most frequent value; among equals the alphabetically first, so it is stable.

    Raises:
        ValueError: If ``values`` is empty.
    """
    if not values:
        raise ValueError("no values to choose from")
    return min(Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))[0]


_EDGE_MARKS = ",.!?;:'"
_FEWEST_WORDS_FOR_TEXT = 6
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")
_EXPONENT = r"e[+-]?\d+"  # answers are in lower case by then
_NUMBERS_IN_TEXT = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(rf"-?\d+(?:\.\d+)?{_EXPONENT}"),
    re.compile(rf"-?(?:\d*\.\d+|\d+\b)(?!{_EXPONENT})(?![,\d])"),
)


def parse_choice(text: str, options: Sequence[str]) -> str | None:
    """Return the letter that an answer names.

    Tried in turn, the first that finds any: "(A)"; "A" followed by a space; "A."; in an answer of
    six words or more the text of an option. Of several found, the one named last.

    Args:
        text: Raw model output.
        options: Option texts, in order.

    Returns:
        The letter, or None if none of these finds one (the official code then draws at random).
    """
    named = option_letters(options)
    for mark in _EDGE_MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in named if form.format(letter) in text]
        if found:
            return _last(found, [text.rfind(place.format(letter)) for letter in found])
    if len(text.split()) < _FEWEST_WORDS_FOR_TEXT:
        return None
    lowered = text.lower()
    found = [letter for letter, option in named.items() if option.lower() in lowered]
    return _last(found, [lowered.rfind(named[letter].lower()) for letter in found])


def _last(letters: Sequence[str], places: Sequence[int]) -> str | None:
    """Return the letter of the last place; of equals the first."""
    return letters[places.index(max(places))] if letters else None


def is_open_answer_right(text: str, answers: Sequence[str]) -> bool:
    """Tell whether an open answer holds one of the right ones.

    What follows a cue ("is", "so", "answer", ...) in a sentence counts, and every number; if no
    sentence has a cue, the whole answer. A word must occur in it, a number must be equal when
    both are rounded to two decimals.
    """
    right = [value for answer in answers for value in _normalize(answer)]
    said = [value for part in _candidates(text) for value in _normalize(part)]
    for value in said:
        if isinstance(value, str):
            if any(isinstance(one, str) and one in value for one in right):
                return True
        elif value in right:
            return True
    return False


def _candidates(text: str) -> list[str]:
    # Lower case comes first in the published order, so only line breaks still part sentences.
    sentences = _SENTENCE_END.split(text.strip().strip(".").lower())
    keys = []
    for place, sentence in enumerate(sentences):
        cues = (*_CUES, "=") if place == len(sentences) - 1 else _CUES
        shortest = ""
        for cue in cues:
            tail = sentence.rpartition(cue)[2].strip()
            if cue in sentence and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            keys.append(shortest)
    keys = keys or [text.strip().strip(".").lower()]
    numbers = [number for key in keys for one in _NUMBERS_IN_TEXT for number in one.findall(key)]
    return keys + numbers


def _normalize(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, or lower case; one letter must stand alone."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]
