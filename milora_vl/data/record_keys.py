"""What each key of a record, of a turn and of a content part means here.

One table a level. A key is read, ignored or refused; an unknown key is an error, because it may
change what the record means. ``docs/data.md`` shows the tables as ``key_tables`` renders them.
"""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Key:
    """How a key is treated.

    Attributes:
        names: The key and its synonyms.
        use: Read it; ignore it, logged once a file; or refuse the record.
        formats: Who writes it.
        meaning: What it stands for here, or why it is refused.
    """

    names: tuple[str, ...]
    use: Literal["read", "ignored", "refused"]
    formats: str
    meaning: str


def _by_name(*keys: Key) -> dict[str, Key]:
    return {name: key for key in keys for name in key.names}


TURN_LISTS = ("conversations", "messages")
QUESTIONS = ("instruction", "query", "prompt")
ANSWERS = ("output", "response", "completion")
IMAGES = ("image", "images", "img", "imgs", "image_path", "image_paths", "img_path")
VIDEOS = ("video", "videos", "video_path")
SYSTEMS = ("system", "system_prompt")
LOSS_SWITCHES = ("loss", "weight", "train")
IMAGE_SOURCES = ("image", "image_url", "url", "path")
VIDEO_SOURCES = ("url", "path", "video", "video_url")

_ANNOTATIONS = Key(
    (
        "source", "sources", "meta", "metadata", "dataset", "dataset_name", "data_source", "subset",
        "split", "category", "type", "task", "task_type", "task_name", "domain", "topic", "tag",
        "tags", "kind", "kinds", "lang", "language", "license", "model", "score", "scores",
        "rating", "quality", "difficulty", "width", "height", "num_turns", "num_tokens",
        "timestamp", "date", "created", "created_at", "version", "author", "comment", "note",
        "notes", "answer", "solution", "original_question", "text", "__index_level_0__",
    ),
    "ignored",
    "many",
    "says where a record comes from or how it was made, or repeats a part of it",
)  # fmt: skip
_SOUND = Key(
    ("audio", "audios", "speech", "input_audio"),
    "refused",
    "ms-swift, LLaMA-Factory",
    "only images and videos are read; an answer about anything else would be learned blind",
)
_TOOLS = Key(
    ("tools", "tool_calls", "tool_call_id", "tool_choice", "functions", "function_call"),
    "refused",
    "OpenAI, TRL, ms-swift, LLaMA-Factory",
    "tool calls are not written into the prompt",
)
_REASONING = Key(
    ("reasoning_content", "reasoning", "thinking", "think", "thought"),
    "refused",
    "DeepSeek, Qwen, TRL",
    "reasoning is not a separate field here; write it into the answer, in the marks that the "
    "model's template uses",
)

RECORD_KEYS = _by_name(
    Key(("id",), "read", "all", "name of the record; its position where there is none"),
    Key(("conversations",), "read", "LLaVA, ShareGPT", "the turns"),
    Key(("messages",), "read", "OpenAI, TRL, ms-swift, LLaMA-Factory", "the turns"),
    Key(
        IMAGES,
        "read",
        "LLaVA (`image`), TRL, ms-swift, LLaMA-Factory (`images`)",
        "file names below the image folder, one or a list, in the order of the image marks; a name "
        'may be written as `{"path": ...}` or `{"url": ...}`; one of these keys at most',
    ),
    Key(
        VIDEOS,
        "read",
        "LLaVA-NeXT (`video`), ms-swift, LLaMA-Factory (`videos`)",
        "file names below the image folder, one or a list, in the order of the marks `<video>`; "
        "in a record without images `<image>` marks may stand for them, as in LLaVA-NeXT; a text "
        "of a record without videos means the characters `<video>`",
    ),
    Key(
        SYSTEMS,
        "read",
        "ShareGPT, Alpaca of LLaMA-Factory, ms-swift",
        "a system turn before all others",
    ),
    Key(
        ("instruction", "query"),
        "read",
        "Alpaca, ms-swift",
        "the question of a record with one exchange",
    ),
    Key(("input",), "read", "Alpaca", "follows the instruction under Alpaca's heading for it"),
    Key(("output", "response"), "read", "Alpaca, ms-swift", "the answer to it"),
    Key(
        ("history",),
        "read",
        "Alpaca of LLaMA-Factory, ms-swift",
        "pairs of question and answer before the question; their answers are learned too",
    ),
    Key(
        ("prompt", "completion"),
        "read",
        "TRL",
        "question and answer, as texts or as lists of messages; answers in the prompt are not "
        "learned",
    ),
    Key(
        ("objects",),
        "read",
        "StickerVQA",
        'a list of `{"name", "box"}` for patch alignment, no part of the conversation; the '
        "`objects` of ms-swift (`ref`, `bbox`) are refused",
    ),
    _ANNOTATIONS,
    _SOUND,
    _TOOLS,
    _REASONING,
    Key(
        (
            "chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images",
            "kto_tag", "label", "margin", "positive_messages", "negative_messages",
        ),
        "refused",
        "TRL, ms-swift, LLaMA-Factory",
        "preferences and rewards are not trained on",
    ),
    Key(
        (*LOSS_SWITCHES, "loss_scale", "channel"),
        "refused",
        "ms-swift",
        "the loss is weighted by turn, not by record, see below",
    ),
    Key(("context",), "refused", "Dolly", "text that the question needs; write it under `input`"),
    Key(
        ("input_ids", "labels", "attention_mask"),
        "refused",
        "datasets",
        "tokens are made here, from text",
    ),
    Key(
        ("chat_template", "chat_template_kwargs"),
        "refused",
        "TRL",
        "all records are written in one prompt style, see `model.prompt_style`",
    ),
)  # fmt: skip

TURN_KEYS = _by_name(
    Key(
        ("from", "role"),
        "read",
        "all",
        "`human`, `user`; `gpt`, `assistant`, `bot`, `model`; `system`, `developer`; in any case",
    ),
    Key(
        ("value", "content"),
        "read",
        "all",
        "a text, in which `<image>` marks an image if the turn is a question; or a list of parts",
    ),
    Key(
        ("image", "images"),
        "read",
        "Ollama",
        "images of this turn, before its text unless it holds a mark for each",
    ),
    Key(
        LOSS_SWITCHES,
        "read",
        "ms-swift (`loss`), OpenAI, Mistral (`weight`), axolotl (`train`)",
        "true or 1: the answer is learned, as all are; false or 0: it is context only; other "
        "weights are refused",
    ),
    Key(("name",), "ignored", "OpenAI", "name of a speaker"),
    Key(
        ("video", "videos"),
        "refused",
        "Ollama, ms-swift",
        "videos are named in the record or in a part of the content, not beside a text",
    ),
    _ANNOTATIONS,
    _SOUND,
    _TOOLS,
    _REASONING,
    Key(
        ("loss_scale", "train_detail", "prefix", "channel", "recipient"),
        "refused",
        "ms-swift, axolotl, Mistral, Harmony",
        "an answer is learned whole or not at all",
    ),
)

PART_KEYS = _by_name(
    Key(("type",), "read", "all", "`text`, `image`, `image_url`, `video` or `video_url`"),
    Key(("text",), "read", "all", "text; `<image>` in it is text as well"),
    Key(
        IMAGE_SOURCES,
        "read",
        "OpenAI, TRL, transformers",
        "name of the image; without one the record's `images` give it",
    ),
    Key(
        ("video", "video_url"),
        "read",
        "TRL, transformers, ms-swift",
        "name of the video; without one the record's `videos` give it",
    ),
    Key(("detail", "cache_control", "index"), "ignored", "OpenAI, Anthropic", "notes for a server"),
    Key(
        ("bytes", "base64", "data"),
        "refused",
        "datasets, Anthropic",
        "images inside records are not read; save them as files and give their names",
    ),
    Key(
        ("min_pixels", "max_pixels", "resized_height", "resized_width"),
        "refused",
        "Qwen-VL",
        "the model's processor decides how large an image is",
    ),
    Key(
        ("fps", "nframes", "num_frames", "max_frames", "video_start", "video_end"),
        "refused",
        "Qwen-VL",
        "all videos are sampled alike, see `data.video_frames`",
    ),
    _SOUND,
)

UNREAD_ROLES = (
    "tool", "tool_call", "tool_calls", "tool_response", "function", "function_call",
    "function_response", "observation", "ipython",
)  # fmt: skip
"""Speakers of tool calls, which are refused by name."""

ID_LIKE = re.compile(r"(.*_)?(id|ids|idx|index|uid|uuid|guid|hash|md5|sha1|sha256)|[a-z]\w*(Id|ID)")
"""Keys that name something (``question_id``, ``imageId``); they are ignored like annotations."""


def find_key(name: str, level: dict[str, Key]) -> Key | None:
    """Return what a level's table says of a key, or None if it does not have it."""
    if name in level:
        return level[name]
    return _ANNOTATIONS if ID_LIKE.fullmatch(name) else None


def key_tables() -> str:
    """Return the tables in Markdown, as they stand in ``docs/data.md``."""
    lines = []
    for title, level in (
        ("Keys of a record", RECORD_KEYS),
        ("Keys of a turn", TURN_KEYS),
        ("Keys of a content part, or of an image written as an object", PART_KEYS),
    ):
        lines += [f"### {title}", "", "| Keys | Written by | Here | Meaning or reason |"]
        lines += ["|---|---|---|---|"]
        for key in dict.fromkeys(level.values()):
            names = ", ".join(f"`{name}`" for name in key.names)
            lines.append(f"| {names} | {key.formats} | {key.use} | {key.meaning} |")
        lines.append("")
    return "\n".join(lines)
