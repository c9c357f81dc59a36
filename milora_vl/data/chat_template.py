"""A model's own chat template -> a ``PromptStyle``, so that labels come from segments as always."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from milora_vl.data.prompts import PromptStyle, render_segments
from milora_vl.data.records import Turn

STYLE_NAME = "chat_template"

# Words that no template contains; long, so that a template's own text cannot complete one.
_SYSTEM, _Q1, _A1, _Q2, _A2 = (f"probe{word}text" for word in ("zero", "one", "two", "six", "ten"))


class ChatTemplateError(ValueError):
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
