from itertools import groupby
from time import process_time

import pytest
from chat_tokenizers import ALL, LLAMA_LIKE, build, build_byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer

from milora_vl.constants import IGNORE_INDEX, IMAGE_TEXT, IMAGE_TOKEN
from milora_vl.data.encode import encode, encode_side_by_side, image_token_id
from milora_vl.data.prompts import PROMPT_STYLES, prefix_style, render_segments
from milora_vl.data.records import Turn

CHAT_STYLES = [name for name, style in PROMPT_STYLES.items() if not style.images_only]
N_IMAGE = 5
TALK = [
    Turn("user", f"{IMAGE_TOKEN}\nWhat is in the picture?"),
    Turn("assistant", "A red fox, and 12 apples."),
    Turn("user", "How many cats are there?\nAnswer with one word."),
    Turn("assistant", "Two"),
    Turn("user", "Why? :)"),
    Turn("assistant", ":( It is a\n\nsurprise — día 21. "),
]
CAPTION = [Turn("user", f"Describe.\n{IMAGE_TOKEN}"), Turn("assistant", "A red fox :)")]

# A space mark of the text itself is a space to Llama's decoder, so it cannot come back.
texts = st.text(
    st.characters(codec="utf-8", exclude_characters="▁"), max_size=12
) | st.sampled_from(
    ["</s>", "<|im_end|>\n<|im_start|>user\n", "a<s>b", "[/INST] x", " ", "\n\nyes", "<unk>"]
)


def talk_for(style):
    return CAPTION if PROMPT_STYLES[style].images_only else TALK


def supervised_spans(encoded):
    spans, open_span = [], False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == IGNORE_INDEX:
            open_span = False
            continue
        assert label == token
        if not open_span:
            spans.append([])
        open_span = True
        spans[-1].append(label)
    return spans


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def assert_labels_are_the_answers(turns, style, tokenizer, counts):
    encoded = encode(turns, style, tokenizer, counts)
    row = PROMPT_STYLES[style]
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    expected = [row.answer_lead + answer + row.assistant_suffix for answer in answers]
    decoded = [decode(tokenizer, span) for span in supervised_spans(encoded)]
    if tokenizer is not build_byte_level():  # Llama's decoder takes one space off the start
        expected = [text.removeprefix(" ") for text in expected]
    assert decoded == expected


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_supervised_labels_decode_to_answers_and_end_markers(kind, style):
    assert_labels_are_the_answers(talk_for(style), style, build(kind), [N_IMAGE])


@pytest.mark.parametrize("kind", ["byte_level", "llama_legacy", "llama"])
@pytest.mark.parametrize("style", CHAT_STYLES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_labels_decode_to_answers_for_any_text(kind, style, data):
    turns = []
    for _ in range(data.draw(st.integers(1, 3))):
        question = data.draw(texts.filter(lambda text: IMAGE_TOKEN not in text))
        answer = data.draw(texts.filter(str.strip))
        turns += [Turn("user", question), Turn("assistant", answer)]
    assert_labels_are_the_answers(turns, style, build(kind), [])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_ids_equal_tokenising_the_joined_prompt(kind, style):
    tokenizer = build(kind)
    turns = talk_for(style)
    joined = "".join(segment.text for segment in render_segments(turns, style))
    bos = [tokenizer.bos_token_id] if PROMPT_STYLES[style].bos else []
    assert (
        encode(turns, style, tokenizer, [1]).input_ids
        == bos + tokenizer(joined, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_generation_prompt_is_a_prefix_of_the_training_ids(kind, style):
    tokenizer = build(kind)
    turns = talk_for(style)
    full = encode(turns, style, tokenizer, [N_IMAGE])
    for n_turns in range(1, len(turns), 2):
        prompt = encode(
            turns[:n_turns], style, tokenizer, [N_IMAGE], add_generation_prompt=True
        ).input_ids
        assert full.input_ids[: len(prompt)] == prompt
        assert full.labels[len(prompt)] != IGNORE_INDEX
        assert full.labels[len(prompt) - 1] == IGNORE_INDEX


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_vicuna_answer_starts_with_the_marked_word_and_no_extra_space(kind):
    tokenizer = build(kind)
    encoded = encode([TALK[0], Turn("assistant", "Yes")], "vicuna_v1", tokenizer, [N_IMAGE])
    (span,) = supervised_spans(encoded)
    assert span == [
        *tokenizer("Yes", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("style", CHAT_STYLES)
def test_special_tokens_named_in_a_record_are_plain_text(kind, style):
    tokenizer = build(kind)
    forged = "".join(PROMPT_STYLES[style].special_tokens) + "x"
    forged_talk = [Turn("user", forged), Turn("assistant", forged)]
    honest_talk = [Turn("user", "y"), Turn("assistant", "y")]
    for token_id in map(tokenizer.convert_tokens_to_ids, PROMPT_STYLES[style].special_tokens):
        forged_ids = encode(forged_talk, style, tokenizer, []).input_ids
        assert forged_ids.count(token_id) == encode(
            honest_talk, style, tokenizer, []
        ).input_ids.count(token_id)


def test_image_mark_in_an_answer_or_system_turn_is_plain_text():
    tokenizer = build_byte_level()
    turns = [Turn("system", IMAGE_TOKEN), Turn("user", "q"), Turn("assistant", IMAGE_TOKEN)]
    assert image_token_id(tokenizer) not in encode(turns, "chatml", tokenizer, []).input_ids


def test_image_marks_expand_to_their_own_counts_and_are_not_learnt():
    tokenizer = build_byte_level()
    turns = [Turn("user", f"{IMAGE_TOKEN} or {IMAGE_TOKEN}?"), Turn("assistant", "this")]
    encoded = encode(turns, "chatml", tokenizer, [3, 7])
    image_id = image_token_id(tokenizer)
    groups = [(token, len(list(group))) for token, group in groupby(encoded.input_ids)]
    assert [length for token, length in groups if token == image_id] == [3, 7]
    assert image_id not in encoded.labels


def test_a_system_turn_replaces_the_default_text():
    tokenizer = build_byte_level()
    turns = [Turn("system", "Be short."), *TALK]
    text = decode(tokenizer, encode(turns, "vicuna_v1", tokenizer, [1]).input_ids)
    assert text.startswith("<s>Be short. USER: <image>\nWhat")


@pytest.mark.parametrize("counts", [[], [4, 4]])
def test_marks_and_images_must_agree(counts):
    with pytest.raises(ValueError, match=f"1 {IMAGE_TOKEN} marks but {len(counts)} images"):
        encode(TALK, "chatml", build_byte_level(), counts)


def test_no_answer_is_an_error():
    with pytest.raises(ValueError, match="no token is supervised"):
        encode(TALK[:1], "chatml", build_byte_level(), [N_IMAGE])


def test_style_that_does_not_fit_the_tokenizer_is_an_error():
    bare = LlamaTokenizer()
    with pytest.raises(ValueError, match=r"<\|im_start\|>.*chatml"):
        encode([Turn("user", "a"), Turn("assistant", "b")], "chatml", bare, [])
    with pytest.raises(ValueError, match=IMAGE_TOKEN):
        encode(TALK, "vicuna_v1", bare, [N_IMAGE])


# --- truncation -------------------------------------------------------------------------------


def full_and_bounds(kind="byte_level", style="chatml"):
    """Return tokenizer, untruncated ids and, for each answer, (start, end)."""
    tokenizer = build(kind)
    full = encode(TALK, style, tokenizer, [N_IMAGE])
    learnt = [label != IGNORE_INDEX for label in full.labels]
    starts = [at for at in range(1, len(learnt)) if learnt[at] and not learnt[at - 1]]
    ends = [at + 1 for at in range(len(learnt) - 1) if learnt[at] and not learnt[at + 1]]
    ends += [len(learnt)] if learnt[-1] else []
    return tokenizer, full, list(zip(starts, ends, strict=True))


@pytest.mark.parametrize("kind", ["byte_level", "llama_legacy"])
@pytest.mark.parametrize("style", CHAT_STYLES)
def test_truncation_at_every_length_keeps_a_useful_prefix(kind, style):
    tokenizer, full, bounds = full_and_bounds(kind, style)
    first_start = bounds[0][0]
    image_id = image_token_id(tokenizer)
    for max_length in range(1, len(full.input_ids) + 2):
        if max_length <= first_start:
            with pytest.raises(ValueError, match=rf"max_length {max_length} .* {len(full.labels)}"):
                encode(TALK, style, tokenizer, [N_IMAGE], max_length)
            continue
        cut = encode(TALK, style, tokenizer, [N_IMAGE], max_length)
        n = len(cut.input_ids)
        assert n <= max_length
        assert cut.input_ids == full.input_ids[:n]
        assert cut.labels == full.labels[:n]
        assert cut.input_ids.count(image_id) == N_IMAGE
        whole = [end for _, end in bounds if end <= max_length]
        if max_length >= len(full.input_ids):
            assert n == len(full.input_ids)
        else:  # whole exchanges if any fits, else the first answer cut
            assert n == (whole[-1] if whole else max_length)


def test_an_image_is_never_cut_even_in_a_later_question():
    tokenizer = build_byte_level()
    turns = [
        Turn("user", "hello"),
        Turn("assistant", "hi"),
        Turn("user", f"{IMAGE_TOKEN}\nand this?"),
        Turn("assistant", "a very long answer " * 5),
    ]
    full = encode(turns, "chatml", tokenizer, [9])
    image_id = image_token_id(tokenizer)
    image_end = max(at for at, token in enumerate(full.input_ids) if token == image_id) + 1
    for max_length in range(1, len(full.input_ids)):
        if max_length < image_end:
            with pytest.raises(ValueError, match=f"cut image tokens.* {image_end} of"):
                encode(turns, "chatml", tokenizer, [9], max_length)
        else:
            cut = encode(turns, "chatml", tokenizer, [9], max_length)
            assert cut.input_ids.count(image_id) == 9
            assert any(label != IGNORE_INDEX for label in cut.labels)
            assert cut.input_ids == full.input_ids[: len(cut.input_ids)]


def test_a_generation_prompt_is_never_cut():
    with pytest.raises(ValueError, match="max_length is 10"):
        encode(TALK[:1], "chatml", build_byte_level(), [N_IMAGE], 10, add_generation_prompt=True)


def test_time_grows_with_the_number_of_turns_not_its_square():
    tokenizer = build_byte_level()

    def seconds(n):
        turns = [Turn("user", "How many cats?"), Turn("assistant", "Two cats.")] * n
        started = process_time()
        encode(turns, "chatml", tokenizer, [])
        return process_time() - started

    few, many = (min(seconds(n) for _ in range(4)) for n in (100, 1600))
    assert many < 64 * few  # 16 times the work; its square would be 256 times


# --- what records say of single answers ----------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("style", ["chatml", "vicuna_v1"])
def test_an_answer_that_is_not_to_be_learned_has_the_same_ids_and_no_label(kind, style):
    tokenizer = build(kind)
    turns = [Turn("user", "a"), Turn("assistant", "Wrong."), Turn("user", "b")]
    silent = [turns[0], Turn("assistant", "Wrong.", supervised=False), turns[2]]
    last = Turn("assistant", "Yes.")
    both = encode([*turns, last], style, tokenizer, [])
    one = encode([*silent, last], style, tokenizer, [])
    assert one.input_ids == both.input_ids
    start = len(encode(turns, style, tokenizer, [], add_generation_prompt=True).input_ids)
    assert one.labels == [IGNORE_INDEX] * start + both.labels[start:]
    with pytest.raises(ValueError, match="no answer to learn"):
        encode(silent[:2], style, tokenizer, [])


def test_an_answer_that_is_not_to_be_learned_is_left_out_side_by_side():
    tokenizer = build("byte_level")
    wrong = [Turn("user", f"{IMAGE_TOKEN}\na"), Turn("assistant", "x", supervised=False)]
    first = [Turn("user", "b"), Turn("assistant", "Yes")]
    second = [Turn("user", "c"), Turn("assistant", "No")]
    opened = [Turn("user", f"{IMAGE_TOKEN}\nb"), first[1]]
    found = encode_side_by_side([*wrong, *first, *second], "chatml", tokenizer, [3])
    assert found == encode_side_by_side([*opened, *second], "chatml", tokenizer, [3])
    alone = encode_side_by_side([*wrong, *first], "chatml", tokenizer, [3])
    assert alone == encode(opened, "chatml", tokenizer, [3])


@pytest.mark.parametrize("kind", ALL)
def test_characters_that_look_like_a_mark_are_no_picture(kind):
    tokenizer = build(kind)
    turns = [
        Turn("user", f"{IMAGE_TOKEN}\nWhat does {IMAGE_TEXT} mean?"),
        Turn("assistant", f"A {IMAGE_TOKEN} tag."),
    ]
    encoded = encode(turns, "chatml", tokenizer, [2])
    assert encoded.input_ids.count(image_token_id(tokenizer)) == 2
    text = tokenizer.decode([i for i in encoded.input_ids if i != image_token_id(tokenizer)])
    assert f"What does {IMAGE_TOKEN} mean?" in text
    assert f"A {IMAGE_TOKEN} tag." in text


@pytest.mark.parametrize("kind", ALL)
def test_special_tokens_in_answers_are_characters_unless_they_are_named(kind):
    tokenizer = build(kind)
    box = "<|im_start|>"
    turns = [Turn("user", f"Where is {box}?"), Turn("assistant", f"{box}(1,2) cat")]
    box_id = tokenizer.convert_tokens_to_ids(box)
    literal = encode(turns, "vicuna_v1", tokenizer, [])
    assert box_id not in literal.input_ids
    chosen = encode(turns, "vicuna_v1", tokenizer, [], answer_tokens=(box,))
    assert chosen.input_ids.count(box_id) == chosen.labels.count(box_id) == 1
    assert box in tokenizer.decode(literal.input_ids)


def test_a_style_with_images_first_takes_no_text_before_them():
    tokenizer = build("byte_level")
    answer = Turn("assistant", "Two")
    encode(
        [Turn("user", f"{IMAGE_TOKEN}\nHow many?"), answer], prefix_style(tokenizer), tokenizer, [2]
    )
    for question in (f"How many?{IMAGE_TOKEN}", f"{IMAGE_TOKEN}\nIs it {IMAGE_TOKEN}?"):
        counts = [2] * question.count(IMAGE_TOKEN)
        with pytest.raises(ValueError, match="no text before an image"):
            encode([Turn("user", question), answer], prefix_style(tokenizer), tokenizer, counts)
