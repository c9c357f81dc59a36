"""What a guesser without the picture gets from StickerVQA, and that held out is held out."""

import base64
import colorsys
import io
import math
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import pytest
from PIL import Image
from sticker_sets import (
    COUNT_TEXT,
    IS_WHERE_TEXT,
    POPE_TEXT,
    WHAT_WHERE_TEXT,
    WHERE_TEXT,
    BuiltSet,
)

from data_prep.sticker import charts
from data_prep.sticker.benches import BenchPainter
from data_prep.sticker.build import BENCH_DIGITS, SIZES, TRAIN_DIGITS, Builder
from data_prep.sticker.fallback import drawn_catalogue
from data_prep.sticker.names import may_deny
from data_prep.sticker.pictures import (
    BENCH_HUES,
    NEAR_DUPLICATE_BITS,
    difference_hash,
    paint,
    plan_background,
)
from data_prep.sticker.questions import INVERSE, RELATION_TEXTS, count_held_out, relation_held_out


@pytest.fixture(scope="module")
def core_sets(tmp_path_factory):
    """Small sets drawn in code with the kinds of ``core`` alone, one a seed."""
    sizes = replace(SIZES["tiny"], shares=SIZES["core"].shares)
    folders = [tmp_path_factory.mktemp("core") for _ in range(3)]
    for seed, folder in enumerate(folders):
        Builder(folder, drawn_catalogue(), sizes, seed, False).build(60, "core")
    return [BuiltSet(folder, drawn_catalogue()) for folder in folders]


def test_core_asks_only_for_what_it_teaches(core_sets):
    for each in core_sets:
        taught = {kind for _, kind, _, _ in each.train_turns()}
        assert taught == {"existence", "presence", "naming", "caption", "text"}
        categories = set(each.mmbench["category"])
        assert {"naming drawings", "presence"} <= categories
        assert categories <= {"naming photos", "naming drawings", "presence"}
        answers = each.vqa_annotations["annotations"]
        assert {row["answer_type"] for row in answers} == {"yes/no", "other"}
        for question in each.vqa_questions["questions"]:
            text = question["question"]
            assert POPE_TEXT.fullmatch(text) or text == "What is shown in the picture?"
    shares = SIZES["full"].shares
    assert {"counting", "relation", "digits", "word", "chart"} <= set(shares)


def test_core_is_as_balanced_as_full(core_sets):
    _check_blind(core_sets)
    for each in core_sets:
        test_train_leans_to_yes_for_every_object_alike(each)
        test_held_out_artists_are_only_in_the_bench(each)
        test_no_bench_picture_nearly_equals_a_train_picture(each)


def test_train_leans_to_yes_for_every_object_alike(built):
    for kind, rows in built.pope.items():
        balance = Counter()
        for row in rows:
            balance[POPE_TEXT.fullmatch(row["text"])[1]] += 1 if row["label"] == "yes" else -1
        assert not any(balance.values()), kind
        assert len({(row["image"], row["text"]) for row in rows}) == len(rows)
    balance = Counter()
    for _, kind, question, answer in built.train_turns():
        if kind == "existence":
            balance[POPE_TEXT.fullmatch(question)[1]] += 1 if answer == "Yes" else -1
    # train leans to "Yes", and for every object alike: its name does not tell the answer
    assert min(balance.values()) >= -2
    assert max(balance.values()) - min(balance.values()) <= 6


def test_counts_relations_and_letters_are_uniform(built):
    counts, letters, pairs = Counter("1234"), Counter("ABCD"), Counter(list(INVERSE))
    for _, kind, question, answer in built.train_turns():
        if kind == "counting":
            counts[answer] += 1
        elif kind == "position" and WHERE_TEXT.fullmatch(question):
            pairs[answer] += 1
    for record in built.train:
        letters.update(
            turn["value"] for turn in record["conversations"][1::2] if turn["value"] in "ABCD"
        )
    assert set(counts) == set("1234")
    assert max(counts.values()) - min(counts.values()) <= 1
    assert max(pairs.values()) <= 0.5 * sum(pairs.values())
    assert max(letters.values()) - min(letters.values()) <= 1
    letters = Counter("ABCD") + Counter(built.base_rows()["answer"])
    assert max(letters.values()) - min(letters.values()) <= 4
    truth = Counter(
        each["multiple_choice_answer"]
        for each in built.vqa_annotations["annotations"]
        if each["answer_type"] != "other"
    )
    assert truth["yes"] == truth["no"]
    counts = [truth[each] for each in "1234"]
    # a count with no held-out object among a few shapes cannot be asked for
    assert max(counts) <= math.ceil(sum(counts) / sum(map(bool, counts))) + 1


def test_held_out_combinations_are_only_in_the_bench(built):
    relation_of_text = {text: name for name, text in RELATION_TEXTS.items()}
    for record, kind, question, answer in built.train_turns():
        if kind == "counting":
            assert not count_held_out(built.names[COUNT_TEXT.fullmatch(question)[1]], int(answer))
        for name, count in Counter(each["name"] for each in record.get("objects", [])).items():
            assert count == 1 or not count_held_out(name, count)
        if found := WHERE_TEXT.fullmatch(question):
            assert not relation_held_out(found[1], answer, found[2])
        elif (found := IS_WHERE_TEXT.fullmatch(question)) and kind == "position":
            assert not relation_held_out(found[1], relation_of_text[found[2]], found[3])
        elif found := WHAT_WHERE_TEXT.fullmatch(question):
            assert not relation_held_out(answer, relation_of_text[found[1]], found[2])
    for row in built.base_rows().to_dict("records"):
        answer = row[row["answer"]]
        if row["category"] == "counting":
            name = built.names[COUNT_TEXT.fullmatch(row["question"])[1]]
            assert count_held_out(name, int(answer))
        elif row["category"] == "position":
            found = WHERE_TEXT.fullmatch(row["question"])
            assert relation_held_out(found[1], answer, found[2])


def test_a_relation_and_its_inverse_are_held_out_together():
    held = 0
    for one in ("cat", "dog", "bus", "pear"):
        for other in ("ant", "key", "sun"):
            for relation in INVERSE:
                out = relation_held_out(one, relation, other)
                assert out == relation_held_out(other, INVERSE[relation], one)
                held += out
    assert 0 < held < 24


def test_held_out_artists_are_only_in_the_bench(built):
    train_styles = set(built.manifest["train_styles"])
    held_out = set(built.manifest["held_out_styles"])
    assert not train_styles & held_out
    for record in built.train + built.val:
        assert {each["style"] for each in record.get("objects", [])} <= train_styles
    for rows in built.bench_objects.values():
        assert {each["style"] for each in rows} <= held_out
    shown = set("+".join(built.mmbench["source"]).split("+")) - {"digits", "word", "chart"}
    assert shown <= held_out
    train_names = {each["name"] for record in built.train for each in record.get("objects", [])}
    if len(built.train) > 2 * len(built.manifest["concepts"]):
        assert {
            each["name"] for rows in built.bench_objects.values() for each in rows
        } <= train_names


def test_held_out_digits_fonts_tables_and_colors():
    catalogue = drawn_catalogue()
    rng = Random(0)
    seen = {}
    for name, span in (("train", TRAIN_DIGITS), ("bench", BENCH_DIGITS)):
        seen[name] = set()
        for _ in range(80):
            content = charts.plan_digits(
                rng, catalogue.digits, span, held_out=name == "bench"
            ).content
            seen[name] |= set(zip(content["text"], content["indices"], strict=True))
    assert not seen["train"] & seen["bench"]
    fonts = {
        held_out: {
            charts.plan_word(rng, "dog", held_out=held_out).content["font"] for _ in range(60)
        }
        for held_out in (True, False)
    }
    assert not fonts[True] & fonts[False]
    assert not set(charts.TRAIN_TABLES) & set(charts.BENCH_TABLES)
    for held_out in (True, False):
        for _ in range(200):
            for color in plan_background(rng, held_out=held_out)["colors"]:
                assert _has_bench_hue(color, slack=0.03 if held_out else -0.03) == held_out


def _has_bench_hue(color, slack):
    """Hue of an 8-bit color; ``slack`` allows for the rounding of pale colors."""
    hue = colorsys.rgb_to_hsv(*(value / 255 for value in color))[0]
    return any(low - slack <= hue < high + slack for low, high in BENCH_HUES)


def test_no_bench_picture_nearly_equals_a_train_picture(built):
    train = [
        difference_hash(Image.open(built.folder / record["image"]))
        for record in built.train
        if "image" in record
    ]
    bench = [
        difference_hash(Image.open(path)) for path in (built.folder / "images/bench").iterdir()
    ]
    for text in built.base_rows()["image"]:
        bench.append(difference_hash(Image.open(io.BytesIO(base64.b64decode(text)))))
    closest = min((one ^ other).bit_count() for one in train for other in bench)
    assert closest > NEAR_DUPLICATE_BITS


def test_the_build_refuses_a_near_duplicate():
    sprites = drawn_catalogue().sprites
    plan = charts.plan_word(Random(3), "dog", held_out=True)
    other = charts.plan_word(Random(4), "house", held_out=True)
    painter = BenchPainter(sprites, keep_off=[difference_hash(paint(plan, sprites)) ^ 0b101])
    assert painter.paint(lambda: other).number == 1
    with pytest.raises(RuntimeError, match="nearly equal a train picture"):
        painter.paint(lambda: plan)


def test_a_blind_guesser_stays_at_chance(drawn_sets):
    _check_blind(drawn_sets)


@pytest.mark.network
def test_a_blind_guesser_stays_at_chance_on_real_pictures(real_set):
    _check_blind([real_set])


def _check_blind(sets):
    """Guess from the text alone, with what train teaches; allow three standard deviations."""
    hits = defaultdict(list)
    for each in sets:
        guessers, guess_yes = _learn_to_guess(each)
        for row in each.base_rows().to_dict("records"):
            options = [row[letter] for letter in "ABCD"]
            for name, guess in guessers.items():
                hits[name].append(guess(row["question"], options) == row[row["answer"]])
        for rows in each.pope.values():
            right = sum(guess_yes(row["text"]) == (row["label"] == "yes") for row in rows)
            assert right == len(rows) / 2
    for name, found in hits.items():
        limit = 0.25 + 3 * math.sqrt(0.25 * 0.75 / len(found))
        assert sum(found) / len(found) <= limit, name


def _learn_to_guess(built):
    """Return guessers of options by name, and one of yes or no by the object asked for."""
    right, words, yes_minus_no = Counter(), defaultdict(Counter), Counter()
    for _, kind, question, answer in built.train_turns():
        right[answer] += 1
        for word in set(question.lower().split()):
            words[word][answer] += 1
        if kind == "existence":
            yes_minus_no[question] += 1 if answer == "Yes" else -1

    def fit(question, text):
        return sum(
            math.log((words[word][text] + 0.1) / (right[text] + 1))
            for word in question.lower().split()
        )

    guessers = {
        "most frequent": lambda _, options: max(options, key=lambda text: right[text]),
        "naive Bayes": lambda question, options: max(options, key=lambda text: fit(question, text)),
        "longest option": lambda _, options: max(options, key=len),
        "shortest option": lambda _, options: min(options, key=len),
    }
    return guessers, lambda question: yes_minus_no[question] >= 0


def test_denials_share_no_head_word_and_no_tag(built):
    concepts = built.concepts
    denied = 0
    for rows in built.pope.values():
        for row in rows:
            if row["label"] == "no":
                present = [concepts[each["name"]] for each in built.bench_objects[row["image"]]]
                assert may_deny(concepts[POPE_TEXT.fullmatch(row["text"])[1]], present)
                denied += 1
    for row in built.base_rows().to_dict("records"):
        if row["category"] in ("naming photos", "naming drawings", "presence"):
            answer = row[row["answer"]]
            wrong = [row[letter] for letter in "ABCD" if row[letter] != answer]
            assert all(may_deny(concepts[name], [concepts[answer]]) for name in wrong)
    assert denied > 10
    mates = {
        name: {other.name for other in concepts.values() if other.subgroup == one.subgroup}
        for name, one in concepts.items()
    }
    for row in built.pope["adversarial"]:
        if row["label"] == "no":
            names = {each["name"] for each in built.bench_objects[row["image"]]}
            assert names & mates[POPE_TEXT.fullmatch(row["text"])[1]]
