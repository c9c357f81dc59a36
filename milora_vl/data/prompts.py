"""Prompt styles as data, and the one function that turns a conversation into segments.

A style is a row of ``PROMPT_STYLES``. Text that comes from a record is marked ``literal``: a
special token's name inside it is ordinary text, so data cannot forge a turn. Only the style's own
text may name special tokens, and only those it lists in ``special_tokens``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.records import Turn


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
