"""MMMU's reading of answers: the letter in a sentence, and open answers of words or numbers."""

import re
from collections.abc import Sequence

from milora_vl.eval.answers import option_letters

_EDGE_MARKS = ",.!?;:'"
_FEWEST_WORDS_FOR_TEXT = 6
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")
_EXPONENT = r"e[+-]?\d+"  # answers are in lower case by then
_NUMBERS = (
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
    right = [value for answer in answers for value in _normalise(answer)]
    said = [value for part in _candidates(text) for value in _normalise(part)]
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
    numbers = [number for key in keys for one in _NUMBERS for number in one.findall(key)]
    return keys + numbers


def _normalise(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, or lower case; one letter must stand alone."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]
