"""How a conversation becomes prompt text: named styles, and a model's own chat template.

``render_segments`` turns a conversation into segments, each of which says whether it is learned and
whether it comes from a record. Text of a record is ``literal``: a special token's name inside it is
ordinary text, so data cannot forge a turn. Only the style's own text may name special tokens, and
only those listed in its ``special_tokens``.

A style is a ``PromptStyle``, such as the rows of ``PROMPT_STYLES``, or a ``ChatTemplate``, which
lets the model's template write the conversation and cuts the result into segments. Labels come from
segments, never from searching for an answer in tokens.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from milora_vl.constants import IMAGE_TOKEN, VIDEO_TOKEN
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
            belongs to the word after it, so it is learned with the answer and not prompted.
        assistant_suffix: End marker, supervised.
        assistant_tail: Text after the end marker, not supervised.
        between: Text between two exchanges, not supervised.
        bos: Whether the tokenizer's BOS token (if it has one) opens the sequence, once.
        images_only: Keep only the image marks of a question; there is one exchange.
        special_tokens: Names in the style's own text that are single tokens.
        image_frame: Text before and after an image mark; it replaces one line break after the mark.
            None: the mark stays as the record has it.
        bos_after_image: BOS is part of ``image_frame`` and does not open a sequence with images.
        takes_system: Whether the style can hold a system turn.
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
        supervised: Whether its tokens are learned.
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


def get_style(style: "PromptStyle | ChatTemplate | str") -> "PromptStyle | ChatTemplate":
    """Return the style of that name; a style is returned as it is.

    Raises:
        ValueError: If no style has that name; the message lists the names.
    """
    if isinstance(style, PromptStyle | ChatTemplate):
        return style
    if style not in PROMPT_STYLES:
        known = ", ".join([*PROMPT_STYLES, STYLE_NAME])
        raise ValueError(f"no prompt style {style!r}; choose from {known} (the model's own)")
    return PROMPT_STYLES[style]


def prefix_style(tokenizer: PreTrainedTokenizerBase) -> PromptStyle:
    """Return PaliGemma's form: images, BOS, question, line break, answer, end token."""
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
    turns: Sequence[Turn],
    style: "PromptStyle | ChatTemplate | str",
    add_generation_prompt: bool = False,
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
    plain = style if isinstance(style, PromptStyle) else _ANY_TURNS
    if isinstance(style, PromptStyle) and any(VIDEO_TOKEN in turn.text for turn in turns):
        raise ValueError(
            f"prompt style {style.name!r} has no place for a video; set "
            "model.prompt_style: chat_template"
        )
    system, exchanges = _split_turns(turns, plain)
    last_is_open = bool(exchanges) and exchanges[-1][1] is None
    if add_generation_prompt and not last_is_open:
        raise ValueError("a generation prompt needs a conversation that ends with a user turn")
    if isinstance(style, ChatTemplate):
        return style.segments(turns, add_generation_prompt)

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

_ANY_TURNS = PromptStyle(STYLE_NAME)
_CORE = re.compile(r"\S(?:.*\S)?", re.DOTALL)  # a text without its outer spaces
_THINK = re.compile(r"(</?think>)")
_HOLE = "\0"
_MARKS = re.compile(f"({re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)})")
_PART_TYPES = {IMAGE_TOKEN: "image", VIDEO_TOKEN: "video"}
_WORD = re.compile(r"Probe(\d+)eborP")  # of both cases, so that a template that changes case shows
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class ChatTemplateError(MiloraError, ValueError):
    """A chat template that cannot be written as segments, or a conversation that it refuses."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A model's own chat template, used as a prompt style.

    The template writes every conversation with a placeholder word for each text, and the words are
    cut out of the result. So the template may depend on anything but the texts: on the place of a
    turn, on images, on a missing system turn. Outer spaces stay around the words, because some
    templates trim; so do think marks in answers, which Qwen3's template moves or removes.
    Renderings are cached by shape, so a data set needs few of them.

    Attributes:
        processor: A processor or tokenizer of transformers.
        template: The template's source, with the day written out.
        image_token: What it writes for an image; None for a text model.
        video_token: What it writes for a video; None if the model takes no videos.
        day: The day that stands in its prompts, as ISO date; None when it names no day.
        bos: Whether the processor puts BOS before a text that does not begin with it.
        assistant_suffix: The special tokens that end an answer.
        special_tokens: Names in the template's own text that are single tokens.
    """

    processor: Any = field(repr=False)
    template: str = field(repr=False)
    image_token: str | None = None
    video_token: str | None = None
    day: str | None = None
    bos: bool = False
    assistant_suffix: str = ""
    special_tokens: tuple[str, ...] = ()
    name: str = STYLE_NAME
    bos_after_image: bool = False
    _rendered: dict[Any, list[str]] = field(default_factory=dict, repr=False)

    def write(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        """Return what transformers makes of messages.

        Raises:
            ChatTemplateError: With the template's own reason.
        """
        try:
            return self.processor.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # whatever a template raises: jinja2's own, KeyError, TypeError
            raise ChatTemplateError(f"it fails: {error}") from error

    def segments(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        """Return the segments of a conversation; see ``render_segments``.

        An answer is supervised from the end of the generation prompt on. If the template puts words
        between the two, such as Qwen3's empty think block, they are context and end the generation
        prompt, so that prompts in use are those of training.

        Raises:
            ChatTemplateError: If the template refuses the conversation, or does with its texts what
                segments cannot say.
        """
        if add_generation_prompt:
            turns = [*turns, Turn("assistant", "answer")]
        shape, texts, owners = self._take_apart(turns)
        pieces = self._render(shape)
        present = [int(word) for word in pieces[1::2]]
        self._check_words(turns, owners, present)
        segments: list[Segment] = []
        before = None  # the turn of the word before
        for at, word in enumerate([*present, None]):
            static = pieces[2 * at]
            turn = None if word is None else owners[word]
            inside = turn is not None and turn == before and turns[turn].role == "assistant"
            if inside:  # a think mark between the parts of one answer
                segments.append(Segment(static, supervised=True))
            else:
                segments += self._around(at, shape, before, turn, add_generation_prompt)
            if word is not None:
                answer = turns[turn].role == "assistant"
                with_marks = self.image_token is None and turns[turn].role == "user"
                segments.append(Segment(texts[word], answer, True, with_marks))
            before = turn
        segments = [segment for segment in segments if segment.text]
        if add_generation_prompt:  # remove the answer that was put in, and all that follows
            segments = segments[: max(at for at, part in enumerate(segments) if part.supervised)]
            while segments[-1].supervised:
                segments.pop()
        self._check_images(turns, segments)
        return segments

    def _take_apart(self, turns: Sequence[Turn]) -> tuple[Any, list[str], list[int]]:
        """Return roles and parts with holes for words, the words' texts, and the turn of each."""
        shape, texts, owners = [], [], []
        for number, turn in enumerate(turns):
            parts = [turn.text]
            if turn.role == "user" and self.image_token is not None:
                # an image stands in the prompt in place of its mark and the line break after it
                parts = _MARKS.split(turn.text)
                parts[2::2] = [text.removeprefix("\n") for text in parts[2::2]]
                parts = [part for part in parts if part] or [""]
            holes = []
            for part in parts:
                if part in _PART_TYPES:
                    holes.append(part)
                    continue
                pieces = _THINK.split(part) if turn.role == "assistant" else [part]
                for at in range(0, len(pieces), 2):
                    found = _CORE.findall(pieces[at])
                    texts += found
                    owners += [number] * len(found)
                    pieces[at] = _CORE.sub(_HOLE, pieces[at])
                holes.append("".join(pieces))
            shape.append((turn.role, tuple(holes)))
        return tuple(shape), texts, owners

    def _render(self, shape: Any, prompt: bool = False) -> list[str]:
        """Return the template's text for a shape, cut: text, number of a word, text, ..."""
        key = shape, prompt
        if key not in self._rendered:
            numbers = count()
            messages = []
            for role, holes in shape:
                content: Any = [
                    {"type": _PART_TYPES[hole]}
                    if hole in _PART_TYPES
                    else {
                        "type": "text",
                        "text": re.sub(_HOLE, lambda _: f"Probe{next(numbers)}eborP", hole),
                    }
                    for hole in holes
                ]
                if self.image_token is None:
                    content = content[0]["text"]
                messages.append({"role": role, "content": content})
            self._rendered[key] = _WORD.split(self.write(messages, prompt))
        return self._rendered[key]

    def _around(
        self, at: int, shape: Any, before: int | None, turn: int | None, as_prompt: bool
    ) -> list[Segment]:
        """Split the template's text between two words into end marker, context and lead."""
        static, lead, segments = self._render(shape)[2 * at], "", []
        if turn is not None and shape[turn][0] == "assistant":
            static, lead = self._split_before_answer(
                at, shape, turn, as_prompt and turn == len(shape) - 1
            )
        if before is not None and shape[before][0] == "assistant":
            start = static.find(self.assistant_suffix)
            if start < 0 or static[:start].strip():
                raise ChatTemplateError("answers end differently at different places")
            end = start + len(self.assistant_suffix)
            segments.append(Segment(static[:end], supervised=True))
            static = static[end:]
        return [*segments, *self._with_images(static), Segment(lead, supervised=True)]

    def _split_before_answer(
        self, at: int, shape: Any, turn: int, as_prompt: bool
    ) -> tuple[str, str]:
        """Split the text before an answer into what the model reads and what it learns."""
        static, kept = self._render(shape)[2 * at], ""
        role, (hole,) = shape[turn]
        if hole != hole.lstrip():  # spaces that the template keeps are part of the answer
            trimmed = (*shape[:turn], (role, (hole.lstrip(),)), *shape[turn + 1 :])
            bare = self._render(trimmed)[2 * at]
            static, kept = bare, static.removeprefix(bare)
        try:
            prompt = self._render(shape[:turn], prompt=True)[-1]
        except ChatTemplateError:
            prompt = ""
        rest = static.removeprefix(prompt) if static.startswith(prompt) else None
        if as_prompt:  # LLaVA-OneVision's has one space less than what it writes before an answer
            return (static if not prompt or (rest and rest.strip()) else prompt), ""
        # a record's own think block is its answer
        start = len(prompt) if prompt and rest and _THINK.search(hole) else len(static)
        if prompt and rest is not None and not rest.strip():
            start = len(prompt)
        # a space belongs to the word after it
        start = len(static[:start].rstrip(" "))
        return static[:start], static[start:] + kept

    def _with_images(self, static: str) -> list[Segment]:
        """Cut the template's text at what it writes for images and videos."""
        marks = {self.image_token: IMAGE_TOKEN, self.video_token: VIDEO_TOKEN}
        names = [re.escape(name) for name in marks if name]
        if not names:
            return [Segment(static)]
        pieces = re.split(f"({'|'.join(names)})", static)
        return [
            Segment(marks[piece], literal=True, has_images=True) if at % 2 else Segment(piece)
            for at, piece in enumerate(pieces)
        ]

    def _check_words(
        self, turns: Sequence[Turn], owners: Sequence[int], present: Sequence[int]
    ) -> None:
        answers = [word for word in present if turns[owners[word]].role == "assistant"]
        if len(present) > len(set(present)) or answers != sorted(answers):
            raise ChatTemplateError("it repeats or reorders texts")
        found = {owners[word] for word in present}
        for word, turn in enumerate(owners):
            thinks = turns[turn].role == "assistant" and _THINK.search(turns[turn].text)
            # reasoning of earlier answers may be removed, nothing else
            if word not in present and not (thinks and turn in found):
                raise ChatTemplateError(
                    f"it changes or leaves out the text of a turn ({turns[turn].role})"
                )

    def _check_images(self, turns: Sequence[Turn], segments: Sequence[Segment]) -> None:
        if self.image_token is None:
            return
        for mark, kind in _PART_TYPES.items():
            expected = sum(turn.text.count(mark) for turn in turns if turn.role == "user")
            actual = sum(part.has_images and part.text == mark for part in segments)
            if actual != expected:
                detail = f"it writes {actual} {kind}s where the turns have {expected}"
                raise ChatTemplateError(detail)


_QUESTION, _ANSWER = "Is it <b>A & B</b>?\n\n- {{ x }} 'q'", 'Two.\n\nOr "three" {% y %}'


def probe_conversations(with_images: bool) -> dict[str, tuple[list[Turn], bool]]:
    """Return conversations of all shapes by name: the turns, and whether it is a prompt."""

    def talk(*questions: str, system: str | None = None, answer: str = _ANSWER) -> list[Turn]:
        turns = [] if system is None else [Turn("system", system)]
        for question in questions:
            turns += [Turn("user", question), Turn("assistant", answer)]
        return turns

    mark, one, two = IMAGE_TOKEN, _QUESTION, "And the other?"
    shapes = {
        "one exchange": talk(one),
        "several exchanges": talk(one, two, one),
        "outer spaces": talk(f"  {one}\n ", f" {two} ", answer=f" \n{_ANSWER}\n "),
        "a system turn": talk(one, two, system="Be brief."),
        "a system turn with outer spaces": talk(one, system=" Be brief.\n"),
        "an empty system text": talk(one, system=""),
    }
    if with_images:
        shapes |= {
            "an image": talk(f"{mark}\n{one}", two),
            "two images": talk(f"{mark}\n{mark}\n{one}"),
            "an image in a later turn": talk(one, f"{mark}\n{two}"),
            "an image after text": talk(f"{one}{mark}", two),
            "an image and a system turn": talk(f"{mark}\n{one}", system="Be brief."),
            "an image and outer spaces": talk(f"{mark}\n  {one} ", answer=f" {_ANSWER} "),
        }
    prompts = {f"the prompt of {name}": (turns[:-1], True) for name, turns in shapes.items()}
    return {name: (turns, False) for name, turns in shapes.items()} | prompts


def derive_style(
    processor: Any, image_token: str | None = None, day: date | None = None
) -> ChatTemplate:
    """Make a prompt style of a model's own chat template.

    Args:
        processor: A processor or tokenizer with a chat template.
        image_token: The processor's mark of an image; None for a text model.
        day: The date for templates that write it; None: today.

    Returns:
        A style that writes what the template writes. Conversations that the template refuses, for
        instance with a system turn, raise an error when they are encoded.

    Raises:
        ChatTemplateError: If there is no template, or it does something that segments cannot hold;
            the message names the shape of conversation.
    """
    tokenizer: PreTrainedTokenizerBase = getattr(processor, "tokenizer", processor)
    source = getattr(processor, "chat_template", None)
    source = source.get("default") if isinstance(source, dict) else source
    if not source:
        raise ChatTemplateError("there is no chat template")
    day = day or date.today()
    # the clock is read once: a run that is resumed tomorrow keeps its prompts
    template, another = (
        _CLOCK.sub(lambda found: json.dumps(one.strftime(found[2])), source)  # noqa: B023
        for one in (day, date(1987, 12, 31))
    )
    video_token = getattr(processor, "video_token", None) if image_token else None
    style = ChatTemplate(processor, template, image_token, video_token)
    turns = [Turn("user", "question"), Turn("assistant", "answer")]
    shape, _, owners = style._take_apart(turns)
    pieces = style._render(shape)
    style._check_words(turns, owners, [int(word) for word in pieces[1::2]])
    opening, ending = pieces[0], pieces[-1]
    if pieces != replace(style, template=another, _rendered={})._render(shape):
        style = replace(style, day=day.isoformat())
    bos = tokenizer.bos_token
    if bos and processor is not tokenizer and not opening.startswith(bos):
        style = replace(style, bos=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    names = sorted(filter(str.strip, tokenizer.get_added_vocab()), key=len, reverse=True)
    style = replace(style, assistant_suffix=_end_marker(ending, names))
    texts = [template]
    for name, (talk, prompt) in probe_conversations(image_token is not None).items():
        try:
            texts += [part.text for part in style.segments(talk, prompt) if not part.literal]
        except ChatTemplateError as error:
            if "system" not in name:  # templates may refuse a system turn
                raise ChatTemplateError(f"with {name}: {error}") from error
    own_text = "".join(texts)
    return replace(style, special_tokens=tuple(name for name in names if name in own_text))


def _end_marker(ending: str, names: Sequence[str]) -> str:
    """Return what follows an answer up to its last special token."""
    end = max((ending.rfind(name) + len(name) for name in names if name in ending), default=0)
    if not end:
        raise ChatTemplateError("no special token ends an answer, so the model could not stop")
    return ending[:end].strip()
