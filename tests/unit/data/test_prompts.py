from pathlib import Path

import pytest
from chat_tokenizers import build_byte_level

from milora_vl.constants import IGNORE_INDEX, IMAGE_TOKEN
from milora_vl.data.encode import encode
from milora_vl.data.prompts import PROMPT_STYLES, get_style, render_segments
from milora_vl.data.records import Turn

GOLDEN = Path(__file__).parents[2] / "golden"
N_IMAGE = 4
IMAGE_TALK = [
    Turn("user", f"{IMAGE_TOKEN}\nWhat is in the picture?"),
    Turn("assistant", "A red fox."),
    Turn("user", "How many foxes are there?\nAnswer the question using a single word or phrase."),
    Turn("assistant", "1"),
]
TEXT_TALK = [Turn("user", "What is the capital of France?"), Turn("assistant", "Paris.")]


def rendered(turns, style):
    return "".join(segment.text for segment in render_segments(turns, style))


def marked(turns, style, counts):
    """Render ids and labels as text: [[ ]] around what is learnt, ⏎ before a line break."""
    tokenizer = build_byte_level(trained=False)
    encoded = encode(turns, style, tokenizer, counts)
    spans = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        learnt = label != IGNORE_INDEX
        if not spans or spans[-1][0] != learnt:
            spans.append((learnt, []))
        spans[-1][1].append(token)
    text = ""
    for learnt, ids in spans:
        part = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text += f"[[{part}]]" if learnt else part
    n_learnt = sum(label != IGNORE_INDEX for label in encoded.labels)
    text = text.replace(IMAGE_TOKEN * N_IMAGE, f"{IMAGE_TOKEN}*{N_IMAGE}").replace("\n", "⏎\n")
    counts_line = f"{len(encoded.labels)} tokens, {n_learnt} supervised, one token a byte"
    return f"{counts_line}\n{text.rstrip()}\n"


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_prompt_and_mask_equal_the_golden_file(style, golden):
    if PROMPT_STYLES[style].images_only:
        parts = {"image and caption": marked(IMAGE_TALK[:2], style, [N_IMAGE])}
    else:
        parts = {
            "image, two turns": marked(IMAGE_TALK, style, [N_IMAGE]),
            "text only": marked(TEXT_TALK, style, []),
        }
    golden(
        GOLDEN / f"prompt_{style}.txt",
        "\n".join(f"=== {title}: {text}" for title, text in parts.items()),
    )


def test_vicuna_prompt_is_the_published_one():
    segments = render_segments(IMAGE_TALK[:1], "vicuna_v1", add_generation_prompt=True)
    assert "".join(segment.text for segment in segments) == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat is in the picture? ASSISTANT:"
    )


def test_vicuna_turns_follow_the_end_token_without_a_space():
    assert "ASSISTANT: A red fox.</s>USER: How many" in rendered(IMAGE_TALK, "vicuna_v1")


CHATML_TEMPLATE = (  # SmolLM2's, without its default system text
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("system", [[], [Turn("system", "Be brief.")]])
@pytest.mark.parametrize("generate", [False, True])
def test_chatml_equals_the_chat_template_of_such_models(system, generate):
    tokenizer = build_byte_level()
    turns = [*system, *TEXT_TALK, *(TEXT_TALK[:1] if generate else [])]
    expected = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns],
        chat_template=CHATML_TEMPLATE,
        add_generation_prompt=generate,
        return_dict=False,
    )
    assert encode(turns, "chatml", tokenizer, [], None, generate).input_ids == expected


def test_llama_2_puts_the_system_text_into_the_first_instruction_only():
    text = rendered(IMAGE_TALK, "llava_llama_2")
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful language and vision assistant. ")
    assert "of tasks using natural language.\n<</SYS>>\n\n<image>\nWhat" in text
    assert text.endswith(
        "picture? [/INST] A red fox. </s><s>[INST] How many foxes are there?\n"
        "Answer the question using a single word or phrase. [/INST] 1 </s>"
    )


def test_mistral_has_no_system_text_and_no_second_bos():
    text = rendered(IMAGE_TALK, "mistral")
    assert text.startswith(
        "[INST] <image>\nWhat is in the picture? [/INST] A red fox. </s>[INST] H"
    )


def test_plain_keeps_image_and_caption_only():
    assert rendered(IMAGE_TALK[:2], "plain") == f"{IMAGE_TOKEN}A red fox.\n"
    with pytest.raises(ValueError, match="2 exchanges"):
        render_segments(IMAGE_TALK, "plain")
    with pytest.raises(ValueError, match="0 image marks"):
        render_segments(TEXT_TALK, "plain")


@pytest.mark.parametrize("style", PROMPT_STYLES.values(), ids=lambda style: style.name)
def test_every_style_has_an_end_marker_and_lists_its_special_tokens(style):
    assert style.assistant_suffix
    assert not style.assistant_prefix.endswith(" ")
    assert not style.user_prefix.startswith(" ")
    template = "".join(value for value in vars(style).values() if isinstance(value, str))
    assert all(token in template for token in style.special_tokens)


def test_unknown_style_lists_the_known_ones():
    with pytest.raises(ValueError, match="vicuna_v1"):
        get_style("vicuna_v9")


@pytest.mark.parametrize(
    "roles",
    [["assistant"], ["user", "user"], ["user", "assistant", "assistant"], ["user", "system"], []],
)
def test_turns_must_alternate(roles):
    with pytest.raises(ValueError, match=r"expected|no user turn"):
        render_segments([Turn(role, "x") for role in roles], "chatml")


def test_generation_prompt_needs_an_open_question():
    with pytest.raises(ValueError, match="ends with a user turn"):
        render_segments(TEXT_TALK, "chatml", add_generation_prompt=True)
