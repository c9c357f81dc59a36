import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from milora_vl.eval.answers import (
    CONTRACTIONS,
    m4c,
    most_common,
    parse_option,
    parse_yes_no,
    vqa_accuracy,
    vqa_official,
)

words = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(sorted(CONTRACTIONS))


@pytest.mark.parametrize(
    ("text", "official", "processed"),
    [
        ("red,blue", "red blue", "redblue"),
        ("one,two", "1 2", "onetwo"),
        ("it's", "it's", "it 's"),
        ("the dog's bowl", "dog's bowl", "dog 's bowl"),
        ("1,000", "1000", "1000"),
        ("$1,000.50", "$1000.50", "$1000.50"),
        ("3.", "3", "3"),
        ("3.0.", "3.0", "3.0"),
        ("3.5", "3.5", "3.5"),
        ("10-20", "10 20", "10 20"),
        ("8:30", "8:30", "8:30"),
        ("a", "", ""),
        ("none", "0", "0"),
        ("ten thousand", "10 thousand", "10 thousand"),
        ("eleven", "eleven", "eleven"),
        ("dont", "don't", "don't"),
        ("Yes", "yes", "yes"),
        (" line\nbreak\t", "line break", "line break"),
        ("what?", "what", "what"),
        ("what ?", "what", "what"),
        ("blue/green", "blue green", "blue green"),
        ("blue /green", "blue green", "blue green"),
    ],
)
def test_normalizers_on_published_examples(text, official, processed):
    assert vqa_official(text) == official
    assert m4c(text) == processed


def test_a_digit_comma_digit_anywhere_deletes_all_punctuation():
    assert vqa_official("a-b") == "b"  # "a b" loses its article
    assert vqa_official("x-y 1,2") == "xy 12"


def test_only_the_first_32_periods_go():
    assert vqa_official("x" + "." * 40) == "x" + "." * 8


def test_contraction_table_has_the_published_quirks():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert CONTRACTIONS["Im"] == "I'm"
    assert vqa_official("Im") == "im"  # lower case comes first, so the key is never reached
    assert vqa_official("couldntve couldnt've couldn'tve") == "couldntve couldn't've couldn't've"


@given(words)
def test_m4c_is_the_official_rule_on_a_prepared_text(text):
    prepared = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    assert m4c(text) == vqa_official(prepared)


@given(words)
def test_official_result_has_single_spaces_lower_case_and_no_article(text):
    result = vqa_official(text)
    assert result == " ".join(result.split())
    assert not {"a", "an", "the"} & set(result.split())


@pytest.mark.parametrize(
    ("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)]
)
def test_leave_one_out_accuracy(matches, score):
    answers = ["cat"] * matches + [f"other {index}" for index in range(10 - matches)]
    assert vqa_accuracy("cat", answers) == pytest.approx(score)


def test_a_capital_does_not_cost_the_score_when_all_answers_agree():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 1
    assert vqa_accuracy("A dog.", ["dog"] * 10) == 1


def test_the_2021_revision_leaves_identical_answers_as_they_are():
    assert vqa_accuracy("a dog", ["a dog"] * 10) == 1
    assert vqa_accuracy("a dog", ["a dog"] * 10, identical_as_is=True) == 0
    assert vqa_accuracy("a dog", ["a dog"] * 9 + ["cat"], identical_as_is=True) == 1


def test_predictions_go_through_m4c_first():
    assert vqa_accuracy("red,blue", ["red,blue"] * 10) == 0  # "redblue" against "red blue"


@given(words, st.lists(words, min_size=2, max_size=10))
def test_accuracy_is_a_fraction_and_ignores_the_order_of_people(text, answers):
    score = vqa_accuracy(text, answers)
    assert 0 <= score <= 1
    assert score == pytest.approx(vqa_accuracy(text, answers[::-1]))


@pytest.mark.parametrize("answers", [[], ["cat"]])
def test_leave_one_out_needs_company(answers):
    with pytest.raises(ValueError, match="two or more"):
        vqa_accuracy("cat", answers)


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("Yes.", "yes", "yes"),
        ("No.", "no", "no"),
        ("no, there is not", "no", "no"),
        ("There is not a dog", "no", None),
        ("NO", "yes", "no"),
        ("No\n", "yes", "no"),
        ("no!", "yes", "no"),
        ("Nope", "yes", None),
        ("", "yes", None),
        ("There is a dog.", "yes", None),
        ("I see. No dog", "yes", None),
        ("Yes, there is no doubt", "no", "yes"),
    ],
)
def test_yes_no_parsers_and_where_they_differ(text, official, strict):
    assert parse_yes_no(text) == official
    assert parse_yes_no(text, "strict") == strict


def test_unknown_yes_no_style_is_an_error():
    with pytest.raises(ValueError, match="official, strict"):
        parse_yes_no("yes", "loose")


OPTIONS = ["cat", "dog", "red bird", "None of these"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("C.", "C"),
        ("**D**", "D"),
        ("The answer is B.", "B"),
        ("B. dog", "B"),
        ("A or B", None),
        ("E", None),
        ("a", None),
        ("Dog", "B"),
        ("a red bird", "C"),
        ("cat and dog", None),
        ("", None),
        ("B is what I would choose here", None),  # not among the last five words
        ("well " * 30 + "dog", None),  # longer than twice all options
    ],
)
def test_option_parser(text, letter):
    assert parse_option(text, OPTIONS) == letter


def test_options_may_be_named_and_only_their_letters_count():
    assert parse_option("C", {"A": "x", "B": "y"}) is None
    assert parse_option("E", {"A": "one", "E": "two"}) == "E"


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=5))
@example("A", ["A", "B"])
def test_an_option_is_one_of_those_offered(text, options):
    assert parse_option(text, options) in {None, *"ABCDE"[: len(options)]}


def test_most_common_is_stable():
    assert most_common(["b", "a", "b", "a"]) == "a"
    with pytest.raises(ValueError, match="no values"):
        most_common([])
