import json
from pathlib import Path

import pytest
from chat_tokenizers import build_byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from milora_vl.constants import IMAGE_TEXT, IMAGE_TOKEN
from milora_vl.data.encode import encode
from milora_vl.data.record_keys import PART_KEYS, RECORD_KEYS, TURN_KEYS, key_tables
from milora_vl.data.records import RecordError, Turn, parse_record, read_records


def llava(question=f"{IMAGE_TOKEN}\nWhat?", answer="A fox.", **fields):
    return {
        "id": "a",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **fields,
    }


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8)).save(images / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    return images


def write(tmp_path, records, name="train.json"):
    path = tmp_path / name
    lines = "\n".join(json.dumps(record) for record in records) + "\n"
    path.write_text(lines if name.endswith("l") else json.dumps(records), encoding="utf-8")
    return path


GOOD = [
    llava(image="a.png"),
    llava("Hello", "Hi."),
    llava(f"{IMAGE_TOKEN}{IMAGE_TOKEN} same?", "No.", image=["a.png", "sub/b.png"]),
    llava(images=["a.png"]),
    llava("hi", image=None),
]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "list.jsonl.json"])
def test_list_and_lines_give_the_same_conversations(tmp_path, folder, name):
    conversations, skipped = read_records(write(tmp_path, GOOD, name), folder)
    assert [c.images for c in conversations] == [
        ("a.png",),
        (),
        ("a.png", "sub/b.png"),
        ("a.png",),
        (),
    ]
    assert conversations[0].turns == (
        Turn("user", f"{IMAGE_TOKEN}\nWhat?"),
        Turn("assistant", "A fox."),
    )
    assert not skipped
    place = f"{name} line 3" if name == "train.jsonl" else f"{name}[2]"
    assert conversations[2].where.endswith(place)


def test_messages_records_equal_llava_records(tmp_path, folder):
    plain = {
        "id": "a",
        "messages": [
            {"role": "user", "content": f"{IMAGE_TOKEN}\nWhat?"},
            {"role": "assistant", "content": "A fox."},
        ],
        "images": ["a.png"],
    }
    parts = {
        "id": "a",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A fox."}]},
        ],
    }
    unnamed = json.loads(json.dumps(parts))
    unnamed["messages"][0]["content"][0] = {"type": "image"}
    unnamed["image"] = "a.png"
    conversations, _ = read_records(write(tmp_path, [GOOD[0], plain, parts, unnamed]), folder)
    assert len({(c.id, c.turns, c.images) for c in conversations}) == 1


@pytest.mark.parametrize("question", ["What?\n<image>", "<image>What?", " <image>\nWhat? "])
def test_the_one_image_mark_goes_to_the_start_as_in_llava(question):
    conversation = parse_record(llava(question, image="a.png"), "x")
    assert conversation.turns[0].text == f"{IMAGE_TOKEN}\nWhat?"


def test_several_marks_keep_their_places():
    record = llava(f"From {IMAGE_TOKEN} to {IMAGE_TOKEN}?", image=["a", "b"])
    assert parse_record(record, "x").turns[0].text == f"From {IMAGE_TOKEN} to {IMAGE_TOKEN}?"


def test_turns_before_the_first_question_are_left_out_and_a_system_turn_is_kept():
    record = llava("q", "a")
    record["conversations"][:0] = [{"from": "system", "value": "s"}, {"from": "gpt", "value": "x"}]
    assert [turn.role for turn in parse_record(record, "x").turns] == [
        "system",
        "user",
        "assistant",
    ]


def with_turns(*pairs):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


BAD = {
    "not an object": [["a list"], "text", 3, None],
    "no turns": [{}, {"conversations": []}, {"conversations": "hi"}, {"messages": {"a": 1}}],
    "bad turn": [
        {"conversations": ["hi"]},
        with_turns(("human", 3)),
        with_turns(("human", [{"type": "sound"}])),
        with_turns(("human", [{"type": "image", "image": 7}])),
        with_turns(("human", ["hi"])),
    ],
    "unknown role": [with_turns(("robot", "hi")), with_turns((["human"], "hi"))],
    "no answer": [
        with_turns(("human", "a")),
        with_turns(("gpt", "a")),
        with_turns(("system", "s")),
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "weight": 0},
            ]
        },
    ],
    "turns do not alternate": [
        with_turns(("human", "a"), ("human", "b")),
        with_turns(("human", "a"), ("gpt", "b"), ("system", "c"), ("gpt", "d")),
    ],
    "empty answer": [llava("hi", ""), llava("hi", " \n")],
    "image mark outside a question": [
        with_turns(("human", "hi"), ("gpt", [{"type": "image", "image": "a.png"}])),
    ],
    "more image marks than images": [
        llava(),
        llava(f"{IMAGE_TOKEN}{IMAGE_TOKEN}", image="a.png"),
        llava(image=""),
        llava(image=[None]),
    ],
    "more images than image marks": [llava("hi", image="a.png"), llava(image=["a.png"] * 2)],
    "bad image field": [
        llava(image=3),
        llava(image=[["a.png"]]),
        llava(image=[{"path": 3}]),
        llava(image={"path": "a.png", "url": "sub/b.png"}),
        llava(image="a.png", images=["a.png"]),
        llava(img="a.png", image_path="a.png"),
        llava([{"type": "image", "image": "a.png"}], image="a.png"),
        with_turns(("human", "hi"), ("gpt", "a")) | {"image": True},
    ],
    "unknown key": [
        llava("hi", picture="a.png"),
        llava("hi", image={"a": 1}),
        {"conversations": [{"from": "human", "value": "q", "mood": "x"}]},
        with_turns(("human", [{"type": "text", "text": "q", "style": "bold"}])),
    ],
    "unsupported key": [
        llava("hi", audio="v.wav"),
        llava("hi", audios=["v.wav"]),
        llava("hi", audios=["v.wav"]),
        llava("hi", tools="[{}]"),
        llava("hi", chosen="a", rejected="b"),
        llava("hi", weight=0.5),
        llava("hi", loss=False),
        llava("hi", objects={"ref": ["a"], "bbox": [[0, 0, 1, 1]]}),
        llava(image={"path": "a.png", "bytes": "iVBORw0KGgo="}),
        {"messages": [{"role": "assistant", "content": "42", "reasoning_content": "6*7"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [1]}]},
        with_turns(("human", [{"type": "audio", "audio": "v.wav"}])),
        with_turns(("human", [{"type": "image", "image": "a.png", "max_pixels": 5}])),
    ],
    "unsupported role": [
        with_turns(("human", "a"), ("function_call", "{}"), ("observation", "b"), ("gpt", "c")),
        {"messages": [{"role": "tool", "content": "3"}]},
    ],
    "two conversations": [
        llava(instruction="x", output="y", image="a.png"),
        llava(messages=[{"role": "user", "content": "x"}]),
        llava("hi", history=[["a", "b"]]),
        {"instruction": "x", "query": "y", "output": "z"},
        {"instruction": "x", "output": "y", "response": "z"},
    ],
    "bad instruction": [
        {"instruction": "", "output": "x"},
        {"output": "x"},
        {"instruction": 3, "output": "x"},
        {"instruction": "x", "output": ["y"]},
        {"query": "x", "input": "y", "output": "z"},
        {"instruction": "x", "output": "y", "history": [["a"]]},
        {"instruction": "x", "output": "y", "history": [["a", 3]]},
        {"instruction": "x", "output": "y", "history": {"a": "b"}},
        {"prompt": [{"role": "user", "content": "x"}], "completion": "y"},
        {"prompt": [{"role": "user", "content": "x"}]},
    ],
    "bad loss switch": [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", name: v}]}
        for name, v in [
            ("weight", 0.5),
            ("weight", -1),
            ("loss", "false"),
            ("train", [0]),
            ("weight", 1e999),
        ]
    ]
    + [{"messages": [{"role": "user", "content": "q", "train": True}]}]
    + [{"messages": [{"role": "assistant", "content": "q", "train": True, "weight": 0}] * 2}],
    "bad system text": [
        llava("hi", system=3),
        llava("hi", system="a", system_prompt="b"),
        with_turns(("system", "s"), ("human", "a"), ("gpt", "b")) | {"system": "t"},
    ],
    "bad id": [llava("hi", id={"a": 1}), llava("hi", id=10**400), llava("hi", id=1e999)],
    "not Unicode text": [
        llava("hi \ud83d"),
        llava("hi", "\ude00"),
        llava("hi", system="\ud800"),
        llava("hi", id="\udfff"),
        llava("hi", image="\ud83d.png"),
        {"instruction": "\ud83d", "output": "x"},
        with_turns(("human", [{"type": "text", "text": "\udc00"}])),
    ],
    "bad image path": [
        llava(image="../secret.png"),
        llava(image="sub/../../secret.png"),
        llava(image="/etc/passwd"),
        llava(image="https://example.org/a.png"),
        llava(image="file:///etc/passwd"),
        llava(image="data:image/png;base64,AAAA"),
        llava(image="a.png\0.txt"),
        llava(image="a" * 5000),
        llava(image=" "),
        llava(image="."),
    ],
    "image file missing": [llava(image="none.png"), llava(image="sub")],
}
CASES = [(reason, record) for reason, records in BAD.items() for record in records]


@pytest.mark.parametrize(("reason", "record"), CASES)
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_a_bad_record_is_named_or_skipped_and_counted(tmp_path, folder, reason, record, name):
    path = write(tmp_path, [GOOD[0], record, GOOD[1]], name)
    with pytest.raises(RecordError) as caught:
        read_records(path, folder)
    place = f"{path}[1]" if name == "train.json" else f"{path} line 2"
    assert str(caught.value).startswith(place)
    assert caught.value.reason == reason
    conversations, skipped = read_records(path, folder, on_bad="skip")
    assert len(conversations) == 2
    assert skipped == {reason: 1}


def test_images_are_not_looked_for_without_a_folder(tmp_path):
    conversations, _ = read_records(write(tmp_path, [llava(image="none.png")]), None)
    assert conversations[0].images == ("none.png",)
    with pytest.raises(RecordError, match="bad image path"):
        read_records(write(tmp_path, [llava(image="../none.png")]), None)


def test_malformed_json_names_file_and_line(tmp_path, folder):
    path = tmp_path / "bad.json"
    path.write_text('[\n{"id": 1},\n{"id": }\n]')
    for on_bad in ("error", "skip"):
        with pytest.raises(ValueError, match=r"bad\.json: malformed JSON.*line 3 column 8"):
            read_records(path, folder, on_bad)


def test_a_malformed_line_names_file_and_line_or_is_skipped(tmp_path, folder):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD[0]) + "\n\n{broken\n" + json.dumps(GOOD[1]))
    with pytest.raises(RecordError, match=r"bad\.jsonl line 3: malformed JSON"):
        read_records(path, folder)
    conversations, skipped = read_records(path, folder, "skip")
    assert (len(conversations), skipped) == (2, {"malformed JSON": 1})


@pytest.mark.parametrize("content", [b"", b"[]", b"\n\n", b"\xff\xfe[\x00", b"[" * 100_000])
def test_files_without_records_or_text_are_errors_naming_the_file(tmp_path, content):
    path = tmp_path / "odd.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.json"):
        read_records(path, None)


def test_all_records_bad_is_an_error_even_when_skipping(tmp_path, folder):
    with pytest.raises(ValueError, match="empty answer"):
        read_records(write(tmp_path, [llava("hi", "")]), folder, "skip")


def test_byte_order_mark_and_unicode_line_separators_inside_text(tmp_path):
    path = tmp_path / "bom.jsonl"
    record = llava("q\u2028r\x85", "día")
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8-sig")
    conversations, _ = read_records(path, None)
    assert conversations[0].turns[0].text == "q\u2028r\x85"


def test_unknown_on_bad_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="on_bad"):
        read_records(write(tmp_path, GOOD), None, on_bad="ignore")


# --- what the formats' keys mean ------------------------------------------------------------------


def texts(record, **options):
    return [turn.text for turn in parse_record(record, "x", **options).turns]


def messages(*pairs, **fields):
    return {"messages": [{"role": role, "content": text} for role, text in pairs], **fields}


@pytest.mark.parametrize(
    "field",
    [
        {"image": "a.png"},
        {"images": ["a.png"]},
        {"img": "a.png"},
        {"image_path": "a.png"},
        {"images": [{"path": "a.png"}]},
        {"images": [{"path": "a.png", "bytes": None}, None]},
        {"image": {"url": "a.png"}},
    ],
)
def test_an_image_is_taken_under_every_name_in_every_format(field):
    for record in (
        llava(**field),
        messages(("user", "<image>What?"), ("assistant", "A fox.")) | field,
        messages(("user", [{"type": "image"}, {"text": "What?"}]), ("assistant", "A fox.")) | field,
        {"instruction": "<image>What?", "input": "", "output": "A fox.", **field},
        {"instruction": "What?", "output": "A fox.", **field},
        {"query": "What?", "response": "A fox.", **field},
        {"prompt": "<image>What?", "completion": "A fox.", **field},
    ):
        conversation = parse_record(record, "x")
        assert conversation.images == ("a.png",)
        assert [turn.text for turn in conversation.turns] == [f"{IMAGE_TOKEN}\nWhat?", "A fox."]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png", "url": None},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"image": "a.png"},
    ],
)
def test_a_content_list_names_its_images(part):
    record = messages(("user", [part, {"type": "text", "text": "What?"}]), ("assistant", "A fox."))
    assert parse_record(record, "x").images == ("a.png",)


def test_images_of_a_turn_stand_before_its_text_or_at_its_marks():
    turns = [
        {"role": "user", "content": "What?", "images": ["a.png", "b.png"]},
        {"role": "assistant", "content": "A fox."},
        {"role": "user", "content": "And <image>?", "image": "c.png"},
        {"role": "assistant", "content": "A cat."},
    ]
    conversation = parse_record({"messages": turns}, "x")
    assert conversation.images == ("a.png", "b.png", "c.png")
    assert conversation.turns[0].text == "<image>\n<image>\nWhat?"
    turns[2]["image"] = ["c.png", "d.png"]
    with pytest.raises(RecordError, match="turn 2: bad image field"):
        parse_record({"messages": turns}, "x")


def test_a_content_list_is_taken_as_it_stands():
    parts = [
        {"type": "text", "text": "From "},
        {"type": "image"},
        {"type": "text", "text": " to the end. "},
        {"type": "text", "text": "Why?"},
    ]
    record = messages(("user", parts), ("assistant", [{"type": "text", "text": " a "}]), image="i")
    assert texts(record) == [f"From {IMAGE_TOKEN}\n to the end. Why?", " a "]


def test_what_looks_like_a_mark_is_text_where_the_record_says_so():
    parts = [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]
    record = messages(("system", "s <image>"), ("user", parts), ("assistant", "A <image> tag."))
    conversation = parse_record(record | {"image": "a.png"}, "x")
    assert conversation.turns == (
        Turn("system", "s <image>"),
        Turn("user", f"{IMAGE_TOKEN}\nWhat is {IMAGE_TEXT}?"),
        Turn("assistant", "A <image> tag."),
    )
    instruction = {"instruction": "What is <image>?", "input": "<image>", "output": "<image> x"}
    assert texts(instruction) == [f"What is {IMAGE_TEXT}?\n\n### Input:\n{IMAGE_TEXT}", "<image> x"]
    assert texts(llava("hi", "Write <image>.")) == ["hi", "Write <image>."]


def test_a_system_text_of_the_record_is_a_system_turn():
    system = Turn("system", "Be brief.")
    for record in (
        llava("q", "a", system="Be brief."),
        messages(("user", "q"), ("assistant", "a"), system="Be brief."),
        messages(("system", "Be brief."), ("user", "q"), ("assistant", "a"), system="Be brief."),
        {"instruction": "q", "output": "a", "system": "Be brief."},
        {"query": "q", "response": "a", "system_prompt": "Be brief."},
    ):
        expected = (system, Turn("user", "q"), Turn("assistant", "a"))
        assert parse_record(record, "x").turns == expected


def test_a_history_comes_first_and_is_learned():
    record = {"instruction": "and now?", "output": "3", "history": [["1+1?", "2"], ["ok?", "yes"]]}
    assert texts(record) == ["1+1?", "2", "ok?", "yes", "and now?", "3"]
    assert all(turn.supervised for turn in parse_record(record, "x").turns)
    assert texts(record | {"image": "a.png"})[0] == "<image>\n1+1?"


def test_an_input_without_an_instruction_is_the_question():
    assert texts({"instruction": None, "input": "q", "output": "a"}) == ["q", "a"]


def test_a_prompt_and_its_completion():
    assert texts({"prompt": "q", "completion": "a"}) == ["q", "a"]
    prompt = [("user", "a"), ("assistant", "b"), ("user", "c")]
    record = {
        "prompt": messages(*prompt)["messages"],
        "completion": messages(("assistant", "d"))["messages"],
    }
    assert [turn.supervised for turn in parse_record(record, "x").turns][1::2] == [False, True]
    assert texts(record) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("switch", [{"loss": False}, {"weight": 0}, {"weight": 0.0}, {"train": 0}])
def test_an_answer_can_be_marked_as_not_to_be_learned(switch):
    name = next(iter(switch))
    turns = [
        {"from": "human", "value": "a", "loss": False},
        {"from": "gpt", "value": "WRONG", **switch},
        {"from": "human", "value": "b", name: None},
        {"from": "gpt", "value": "RIGHT", name: 1},
    ]
    conversation = parse_record({"conversations": turns}, "x")
    assert [turn.supervised for turn in conversation.turns[1::2]] == [False, True]
    assert conversation.turns[1].text == "WRONG"


@pytest.mark.parametrize("role", ["user", "USER", "Human", " user "])
def test_roles_are_read_in_any_case(role):
    assert texts(messages((role, "q"), ("Assistant", "a"))) == ["q", "a"]


FULL = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}],
}


@pytest.mark.parametrize("empty", [None, "", [], {}, [None], {"path": None, "bytes": None}])
def test_what_is_null_or_empty_is_absent_in_every_place(empty):
    names = [name for level in (RECORD_KEYS, TURN_KEYS, PART_KEYS) for name in level]
    filled = dict.fromkeys([*names, "of_another_set"], empty)
    turns = [
        {**filled, "from": "human", "value": "<image>\nWhat?"},
        {**filled, "role": "assistant", "content": [{**filled, "type": "text", "text": "x"}]},
        filled,
    ]
    expected = parse_record(FULL, "x")
    for record in (
        {**filled, **FULL, "conversations": turns},
        {**filled, "id": "a", "images": ["a.png", empty], "messages": turns},
        {**filled, "id": "a", "images": ["a.png"], "instruction": "<image>What?", "output": "x"},
    ):
        assert parse_record(record, "x") == expected


def test_tools_of_a_record_without_tools_are_absent():
    assert texts(llava("q", "a", tools="[]")) == ["q", "a"]


# --- keys that nobody reads -----------------------------------------------------------------------


def test_ignored_keys_are_told_once_a_file_with_their_counts(tmp_path, caplog):
    records = [
        llava("a", "b", source="web", meta={"x": 1}),
        llava("c", "d", source="web", question_id=7, meta=None),
        llava("e", "f", mood="x", video="v.mp4"),
    ]
    path = write(tmp_path, records)
    conversations, _ = read_records(path, None, ignore_keys=["mood", "video"])
    assert len(conversations) == 3
    (line,) = caplog.messages
    assert str(path) in line
    expected = "of 3: meta (1), mood (1), question_id (1), source (2), video (1)"
    assert line.endswith(expected)


def test_an_unknown_key_names_the_record_and_the_three_ways_out(tmp_path):
    with pytest.raises(RecordError) as caught:
        read_records(write(tmp_path, [llava("a", "b"), llava("a", "b", pictures=["x"])]), None)
    for words in ("train.json[1]", "'pictures'", "remove", "data.ignore_keys", "on_bad_record"):
        assert words in str(caught.value)


def test_a_key_written_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.jsonl"
    turns = json.dumps(llava("q", "a")["conversations"])
    path.write_text(f'{{"conversations": {turns}, "image": "a.png", "image": "b.png"}}\n')
    with pytest.raises(RecordError, match=r"line 1: malformed JSON: .* key twice"):
        read_records(path, None)


def test_an_endless_number_is_an_error_of_its_record(tmp_path, folder):
    path = tmp_path / "numbers.jsonl"
    path.write_text(f'{{"id": {"9" * 5000}}}\n{json.dumps(GOOD[1])}\n')
    with pytest.raises(RecordError, match="line 1: malformed JSON"):
        read_records(path, folder)
    assert read_records(path, folder, "skip")[1] == {"malformed JSON": 1}


def test_the_documented_tables_are_those_of_the_code():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert key_tables().strip() in text


@pytest.mark.parametrize(("name", "key"), RECORD_KEYS.items())
def test_a_key_of_the_table_is_treated_as_the_table_says(name, key):
    ignored = set()
    record = FULL | {name: [{"name": "a", "box": [0, 0, 1, 1]}] if name == "objects" else "some"}
    reason = None
    try:
        parse_record(record, "x", ignored=ignored)
    except RecordError as error:
        reason = error.reason
    assert (reason == "unsupported key") == (key.use == "refused")
    assert (name in ignored) == (key.use == "ignored")
    assert reason != "unknown key"


# --- any structure at all -------------------------------------------------------------------------

NAMES = [name for level in (RECORD_KEYS, TURN_KEYS, PART_KEYS) for name in level]
scalars = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([10**400, -1, "", " ", IMAGE_TOKEN, "\ud83d", "a\0b", "a.png"])
    | st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "text", "image"])
)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*NAMES, "unknown"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def replaced(value, path, new):
    """Return a JSON value with one place, chosen by a list of numbers, put to ``new``."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[path[0] % len(value)]
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[key] = replaced(value[key], path[1:], new)
    return changed


PATTERNS = [
    FULL | {"system": "s"},
    messages(
        ("system", "s"),
        ("user", [{"type": "image", "image": {"path": "a.png"}}, {"type": "text", "text": "q"}]),
        ("assistant", [{"type": "text", "text": "a"}]),
    ),
    {"instruction": "q", "input": "i", "output": "a", "history": [["b", "c"]], "images": ["a.png"]},
    {
        "prompt": [{"role": "user", "content": "q", "images": ["a.png"]}],
        "completion": [{"role": "assistant", "content": "a", "weight": 1}],
    },
]
damaged_records = st.builds(
    replaced, st.sampled_from(PATTERNS), st.lists(st.integers(0, 20), max_size=5), json_values
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(record=json_values | damaged_records)
def test_any_structure_gives_a_valid_conversation_or_a_record_error(record):
    try:
        conversation = parse_record(record, "file.json[3]")
    except RecordError as error:
        message = str(error)
        assert message.encode().startswith(b"file.json[3]")
        return
    questions = [turn.text for turn in conversation.turns if turn.role == "user"]
    assert sum(text.count(IMAGE_TOKEN) for text in questions) == len(conversation.images)
    assert conversation.turns[-1].role == "assistant"
    tokenizer = build_byte_level()
    encode(conversation.turns, "chatml", tokenizer, [2] * len(conversation.images))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(records=st.lists(json_values | damaged_records, min_size=1, max_size=5))
def test_any_file_is_read_with_every_record_used_or_counted(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, FULL]))
    (folder / "a.png").touch()
    conversations, skipped = read_records(path, folder, "skip")
    assert len(conversations) + skipped.total() == len(records) + 1


@pytest.mark.parametrize("key", ["id", "image", "system", "instruction", "conversations"])
def test_a_number_too_long_to_be_written_is_an_error_of_its_record(key):
    with pytest.raises(RecordError):
        parse_record({key: 10**5000}, "x")


@pytest.mark.parametrize("key", ["conversations", "image", "system", "history", "source", "x"])
def test_depth_is_no_way_around(key):
    value = "a"
    for level in range(3000):
        value = [value] if level % 2 else {"content": value}
    with pytest.raises(RecordError):
        parse_record({key: value}, "x")
