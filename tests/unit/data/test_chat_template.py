"""Laws of prompt styles read off chat templates: same text, or a refusal that says why."""

import pytest
from chat_tokenizers import build_extended

from milora_vl.data.prompts import ChatTemplateError, derive_style, render_segments
from milora_vl.data.records import Turn

TURNS = [
    Turn("user", "How many?"),
    Turn("assistant", "Two.\n\nOr three"),
    Turn("user", "Why?"),
    Turn("assistant", "So."),
]
HEAD = "{% for m in messages %}"
CHATML = (
    HEAD + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + CHATML
    ),
    "instruct": (
        "{{ bos_token }}"
        + HEAD
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
        " {{ m.content }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    ),
    "system in the first question": (
        "{{ bos_token }}{% set start = 0 %}{% if messages[0].role == 'system' %}"
        "{% set start = 1 %}{% endif %}{% for m in messages[start:] %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if loop.first and start %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}


def with_template(template: str):
    tokenizer = build_extended()
    tokenizer.chat_template = template
    return tokenizer


def text(turns: list[Turn], style, prompt: bool = False) -> str:
    joined = "".join(part.text for part in render_segments(turns, style, prompt))
    return ("<s>" if style.bos else "") + joined


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_style_writes_what_the_template_writes(name: str) -> None:
    tokenizer = with_template(TEMPLATES[name])
    style = derive_style(tokenizer)
    for turns, prompt in [(TURNS, False), (TURNS[:2], False), (TURNS[:3], True)]:
        cases = [turns]
        if style.takes_system:
            cases.append([Turn("system", "Be brief."), *turns])
        for case in cases:
            messages = [{"role": turn.role, "content": turn.text} for turn in case]
            stock = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert text(case, style, prompt) == stock
    assert style.takes_system == (name != "instruct")


def test_a_style_without_a_system_turn_refuses_one() -> None:
    style = derive_style(with_template(TEMPLATES["instruct"]))
    with pytest.raises(ValueError, match="holds no system turn"):
        render_segments([Turn("system", "Be brief."), *TURNS], style)


def test_only_the_answer_and_its_end_marker_are_supervised() -> None:
    style = derive_style(with_template(CHATML))
    parts = render_segments(TURNS, style)
    learnt = "|".join(part.text for part in parts if part.supervised)
    assert learnt == "Two.\n\nOr three|<|im_end|>|So.|<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('never') }}", "it fails"),
        (HEAD + "{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token ends an answer"),
        (HEAD + "{{ m.role }}<s>{% endfor %}", "leaves out the text of a turn"),
        (HEAD + "{{ loop.index }} {{ m.content }}</s>{% endfor %}", "written differently"),
    ],
)
def test_a_template_that_no_style_holds_is_refused(template: str | None, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason):
        derive_style(with_template(template))
