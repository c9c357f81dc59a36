"""Prompt styles as data, and the one function that turns a conversation into segments.

A style is a row of ``PROMPT_STYLES``. Text that comes from a record is marked ``literal``: a
special token's name inside it is ordinary text, so data cannot forge a turn. Only the style's own
text may name special tokens, and only those it lists in ``special_tokens``.

A model's own chat template -> a ``PromptStyle``, so that labels come from segments as always.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.records import Turn
from milora_vl.errors import MiloraError


@dataclass(frozen=True)
class PromptStyle:
    """How turns become text.

    One exchange is ``user_prefix Q user_suffix assistant_prefix`` (context) then
    ``answer_lead A assistant_suffix`` (supervised) then ``assistant_tail`` (context).

    Attributes:
        name: Key in ``PROMPT_STYLES``.
        system: Default system text; a system turn replaces it; empty means no system block.
        system_prefix: Before the system text.
        system_suffix: After the system text.
        system_in_first_user: The system block follows the first ``user_prefix`` (Llama-2).
        user_prefix: Before a question.
        user_suffix: After a question.
        assistant_prefix: Last text the model reads before it answers.
        answer_lead: Supervised text between the prefix and the answer; a SentencePiece space
            belongs to the word after it, so it is learnt with the answer and not prompted.
        assistant_suffix: End marker, supervised.
        assistant_tail: Text after the end marker, not supervised.
        between: Text between two exchanges, not supervised.
        bos: Whether the tokenizer's BOS token (if it has one) opens the sequence, once.
        images_only: Of a question only its image marks are kept, and there is one exchange.
        special_tokens: Names in the style's own text that are single tokens.
        image_frame: Text before and after an image mark; it takes the place of one line break after
            the mark. None: the mark stands in the question as the record has it.
        bos_after_image: BOS stands in ``image_frame`` and does not open a sequence with images.
        takes_system: Whether a system turn can be written.
    """

    name: str
    system: str = ""
    system_prefix: str = ""
    system_suffix: str = ""
    system_in_first_user: bool = False
    user_prefix: str = ""
    user_suffix: str = ""
    assistant_prefix: str = ""
    answer_lead: str = ""
    assistant_suffix: str = ""
    assistant_tail: str = ""
    between: str = ""
    bos: bool = True
    images_only: bool = False
    special_tokens: tuple[str, ...] = ()
    image_frame: tuple[str, str] | None = None
    bos_after_image: bool = False
    takes_system: bool = True


@dataclass(frozen=True)
class Segment:
    """A stretch of prompt text.

    Attributes:
        text: The text; image marks are still single marks.
        supervised: Whether its tokens are learnt.
        literal: It comes from a record, so special tokens' names in it are ordinary text.
        has_images: Image marks in it stand for images (questions only).
    """

    text: str
    supervised: bool = False
    literal: bool = False
    has_images: bool = False


_STYLES = (
    PromptStyle(  # LLaVA conv_vicuna_v1: separator style TWO, sep " ", sep2 "</s>"
        name="vicuna_v1",
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        system_suffix=" ",
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        answer_lead=" ",
        assistant_suffix="</s>",
        special_tokens=("</s>",),
    ),
    PromptStyle(  # the ChatML form of SmolLM2, Qwen and others; BOS is not part of it
        name="chatml",
        system_prefix="<|im_start|>system\n",
        system_suffix="<|im_end|>\n",
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>\n",
        assistant_prefix="<|im_start|>assistant\n",
        assistant_suffix="<|im_end|>",
        assistant_tail="\n",
        bos=False,
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
    PromptStyle(  # LLaVA conv_llava_llama_2; the space before </s> is LLaVA's
        name="llava_llama_2",
        system=(
            "You are a helpful language and vision assistant. "
            "You are able to understand the visual content that the user provides, "
            "and assist the user with a variety of tasks using natural language."
        ),
        system_prefix="<<SYS>>\n",
        system_suffix="\n<</SYS>>\n\n",
        system_in_first_user=True,
        user_prefix="[INST] ",
        user_suffix=" [/INST]",
        answer_lead=" ",
        assistant_suffix=" </s>",
        between="<s>",
        special_tokens=("<s>", "</s>"),
    ),
    PromptStyle(  # LLaVA conv_mistral_instruct: as llama_2 without system text and without <s>
        name="mistral",
        system_suffix="\n\n",
        system_in_first_user=True,
        user_prefix="[INST] ",
        user_suffix=" [/INST]",
        answer_lead=" ",
        assistant_suffix=" </s>",
        special_tokens=("</s>",),
    ),
    PromptStyle(  # Alpaca's prompt for instruction records; meant for one exchange
        name="alpaca",
        system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
        system_suffix="\n\n",
        user_prefix="### Instruction:\n",
        user_suffix="\n\n",
        assistant_prefix="### Response:",
        answer_lead="\n",
        assistant_suffix="</s>",
        between="\n\n",
        special_tokens=("</s>",),
    ),
    PromptStyle(  # LLaVA stage 1: image, then its caption
        name="plain",
        assistant_suffix="\n",
        images_only=True,
    ),
)

PROMPT_STYLES: dict[str, PromptStyle] = {style.name: style for style in _STYLES}
"""Every prompt style by name. A new style is one more row above."""


def get_style(style: PromptStyle | str) -> PromptStyle:
    """Return the style of that name; a ``PromptStyle`` is returned as it is.

    Raises:
        ValueError: If no style has that name; the message lists the names.
    """
    if isinstance(style, PromptStyle):
        return style
    if style not in PROMPT_STYLES:
        raise ValueError(f"no prompt style {style!r}; choose from {', '.join(PROMPT_STYLES)}")
    return PROMPT_STYLES[style]


def prefix_style(tokenizer: PreTrainedTokenizerBase) -> PromptStyle:
    """Return PaliGemma's form: pictures, BOS, question, line break, answer, end token."""
    return PromptStyle(
        name="prefix",
        user_suffix="\n",
        assistant_suffix=tokenizer.eos_token,
        special_tokens=(tokenizer.bos_token, tokenizer.eos_token),
        image_frame=("", tokenizer.bos_token),
        bos_after_image=True,
        takes_system=False,
    )


def render_segments(
    turns: Sequence[Turn], style: PromptStyle | str, add_generation_prompt: bool = False
) -> list[Segment]:
    """Turn a conversation into segments whose texts, joined, are the full prompt.

    Args:
        turns: An optional system turn, then user and assistant turns in alternation, user first.
        style: A style or its name.
        add_generation_prompt: End with what the model reads before it answers; the last turn must
            then be the user's.

    Returns:
        Segments in order; supervised ones are the answers with their end markers. BOS is not among
        them, ``encode`` adds it.

    Raises:
        ValueError: If the turns do not alternate, or the style cannot hold them.
    """
    style = get_style(style)
    system, exchanges = _split_turns(turns, style)
    last_is_open = bool(exchanges) and exchanges[-1][1] is None
    if add_generation_prompt and not last_is_open:
        raise ValueError("a generation prompt needs a conversation that ends with a user turn")

    system_block: list[Segment] = []
    if system:
        system_block = [
            Segment(style.system_prefix),
            Segment(system, literal=True),
            Segment(style.system_suffix),
        ]
    segments = [] if style.system_in_first_user else system_block
    for index, (question, answer) in enumerate(exchanges):
        if index:
            segments.append(Segment(style.between))
        segments.append(Segment(style.user_prefix))
        if index == 0 and style.system_in_first_user:
            segments += system_block
        segments += _question_segments(question, style)
        segments.append(Segment(style.user_suffix))
        if answer is not None or add_generation_prompt:
            segments.append(Segment(style.assistant_prefix))
        if answer is not None:
            segments += [
                Segment(style.answer_lead, supervised=True),
                Segment(answer, supervised=True, literal=True),
                Segment(style.assistant_suffix, supervised=True),
                Segment(style.assistant_tail),
            ]
    return [segment for segment in segments if segment.text]


def _question_segments(question: str, style: PromptStyle) -> list[Segment]:
    if style.image_frame is None:
        return [Segment(question, literal=True, has_images=True)]
    before, after = style.image_frame
    start, *rest = question.split(IMAGE_TOKEN)
    segments = [Segment(start, literal=True)]
    for text in rest:
        segments += [
            Segment(before),
            Segment(IMAGE_TOKEN, literal=True, has_images=True),
            Segment(after),
            Segment(text.removeprefix("\n"), literal=True),
        ]
    return segments


def _split_turns(
    turns: Sequence[Turn], style: PromptStyle
) -> tuple[str, list[tuple[str, str | None]]]:
    """Return the system text and (question, answer) pairs; an unanswered last question has None."""
    system = style.system
    start = 0
    if turns and turns[0].role == "system":
        if not style.takes_system:
            raise ValueError(f"prompt style {style.name!r} holds no system turn; remove it")
        system, start = turns[0].text, 1
    exchanges: list[tuple[str, str | None]] = []
    for position, turn in enumerate(turns[start:]):
        expected = "user" if position % 2 == 0 else "assistant"
        if turn.role != expected:
            raise ValueError(f"turn {start + position} is {turn.role!r}, expected {expected!r}")
        if turn.role == "user":
            exchanges.append((turn.text, None))
        else:
            exchanges[-1] = (exchanges[-1][0], turn.text)
    if not exchanges:
        raise ValueError("the conversation has no user turn")
    if style.images_only:
        exchanges = _keep_images(exchanges, style)
    return system, exchanges


def _keep_images(
    exchanges: list[tuple[str, str | None]], style: PromptStyle
) -> list[tuple[str, str | None]]:
    """Reduce the one question of an ``images_only`` style to its image marks."""
    question, answer = exchanges[0]
    marks = question.count(IMAGE_TOKEN)
    if len(exchanges) > 1 or not marks:
        raise ValueError(
            f"style {style.name!r} holds one exchange with an image, got {len(exchanges)} "
            f"exchanges and {marks} image marks in the first; use another style for conversations"
        )
    return [(IMAGE_TOKEN * marks, answer)]


STYLE_NAME = "chat_template"

# Words that no template contains; long, so that a template's own text cannot complete one.
_SYSTEM, _Q1, _A1, _Q2, _A2 = (f"probe{word}text" for word in ("zero", "one", "two", "six", "ten"))


class ChatTemplateError(MiloraError, ValueError):
    """A chat template that cannot be written as segments; choose a prompt style by name."""


def derive_style(processor: Any, image_token: str | None = None) -> PromptStyle:
    """Read a prompt style off a chat template by rendering probe conversations.

    Args:
        processor: A processor or tokenizer with a chat template.
        image_token: The processor's mark of a picture; None for a text model.

    Returns:
        A style whose rendering equals the template's, with and without a system turn where the
        template takes one.

    Raises:
        ChatTemplateError: If there is no template, or it does something a style cannot hold.
    """
    tokenizer: PreTrainedTokenizerBase = getattr(processor, "tokenizer", processor)
    if not getattr(processor, "chat_template", None):
        raise ChatTemplateError("there is no chat template")
    render = _renderer(processor, in_parts=image_token is not None)
    turns = [Turn("user", _Q1), Turn("assistant", _A1), Turn("user", _Q2), Turn("assistant", _A2)]
    opening, first, between, second, ending = _cut(render(turns), (_Q1, _A1, _Q2, _A2))
    _, prompt_end = _cut(render(turns[:1], prompt=True), (_Q1,))
    if first != second or not first.startswith(prompt_end) or not between.startswith(ending):
        raise ChatTemplateError("its turns are written differently at different places")
    between = between[len(ending) :]
    user_prefix = _common_end(opening, between)
    bos = tokenizer.bos_token or ""
    head = opening[: len(opening) - len(user_prefix)]
    has_bos = bool(bos) and head.startswith(bos)
    marker, tail = _split_end_marker(ending, tokenizer)
    style = PromptStyle(
        name=STYLE_NAME,
        system=head[len(bos) :] if has_bos else head,
        user_prefix=user_prefix,
        user_suffix="",
        assistant_prefix=prompt_end,
        answer_lead=first[len(prompt_end) :],
        assistant_suffix=marker,
        assistant_tail=tail,
        between=between[: len(between) - len(user_prefix)],
        bos=has_bos,
        takes_system=False,
    )
    style = _with_system(style, render, turns, bos if has_bos else "")
    if image_token:
        style = replace(style, image_frame=_image_frame(processor, user_prefix, image_token))
    own_text = "".join(
        str(part) for value in vars(style).values() for part in _parts(value) if part
    )
    names = [name for name in tokenizer.get_added_vocab() if name in own_text]
    style = replace(style, special_tokens=tuple(sorted(names, key=len, reverse=True)))
    _check(style, render, turns, bos if has_bos else "")
    return style


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def _renderer(processor: Any, in_parts: bool) -> Callable[..., str]:
    def render(turns: Sequence[Turn], prompt: bool = False, images: int = 0) -> str:
        messages = []
        for turn in turns:
            content: Any = turn.text
            if in_parts:
                pictures = images if turn.role == "user" and not messages else 0
                content = [{"type": "image"}] * pictures + [{"type": "text", "text": turn.text}]
            messages.append({"role": turn.role, "content": content})
        try:
            return processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # whatever a template raises: jinja2's own, KeyError, TypeError
            raise ChatTemplateError(f"it fails: {error}") from error

    return render


def _cut(text: str, words: Sequence[str]) -> list[str]:
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            raise ChatTemplateError("it changes or leaves out the text of a turn")
        parts.append(before)
    return [*parts, text]


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _split_end_marker(ending: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Split what follows an answer after its last special token: the end marker, and the tail."""
    cut = max(
        (ending.rfind(name) + len(name) for name in tokenizer.get_added_vocab() if name in ending),
        default=0,
    )
    if not cut:
        raise ChatTemplateError("no special token ends an answer, so a model could not stop")
    return ending[:cut], ending[cut:]


def _with_system(
    style: PromptStyle, render: Callable[..., str], turns: list[Turn], bos: str
) -> PromptStyle:
    """Return the style with the template's system block, if the template has one."""
    try:
        rendered = render([Turn("system", _SYSTEM), *turns])
        before, after, _ = _cut(rendered, (_SYSTEM, _Q1))
    except ChatTemplateError:
        return style
    before = before.removeprefix(bos)
    in_user = not after.endswith(style.user_prefix) or not style.user_prefix
    if in_user:
        if style.system or before != style.user_prefix:
            return style
        changes = {"system_prefix": "", "system_suffix": after, "system_in_first_user": True}
    else:
        suffix = after[: len(after) - len(style.user_prefix)]
        default = style.system
        if default and not (default.startswith(before) and default.endswith(suffix)):
            return style
        text = default[len(before) : len(default) - len(suffix)] if default else ""
        changes = {"system": text, "system_prefix": before, "system_suffix": suffix}
    return replace(style, takes_system=True, **changes)


def _image_frame(processor: Any, user_prefix: str, image_token: str) -> tuple[str, str]:
    """Return the text that the template writes before and after a picture."""
    render = _renderer(processor, in_parts=True)
    before, _ = _cut(render([Turn("user", _Q1)], images=1), (_Q1,))
    left, found, right = before.rpartition(image_token)
    start = left.rfind(user_prefix)
    if not found or start < 0:
        raise ChatTemplateError(f"it does not write {image_token!r} for a picture in a question")
    return left[start + len(user_prefix) :], right


def _check(style: PromptStyle, render: Callable[..., str], turns: list[Turn], bos: str) -> None:
    """Compare the style's rendering with the template's.

    Raises:
        ChatTemplateError: If they differ.
    """
    cases = [(turns[:2], False), (turns, False), (turns[:3], True)]
    if style.takes_system:
        cases += [([Turn("system", _SYSTEM), *turns], False)]
    for conversation, prompt in cases:
        ours = "".join(part.text for part in render_segments(conversation, style, prompt))
        if bos + ours != render(conversation, prompt=prompt):
            raise ChatTemplateError("its rendering depends on more than the text of the turns")
