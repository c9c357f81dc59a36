import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from milora_vl.constants import IMAGE_TOKEN
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
        with_turns(("human", [{"type": "video"}])),
        with_turns(("human", [{"type": "image", "image": 7}])),
        with_turns(("human", ["hi"])),
    ],
    "unknown role": [with_turns(("robot", "hi")), with_turns((["human"], "hi"))],
    "no answer": [
        with_turns(("human", "a")),
        with_turns(("gpt", "a")),
        with_turns(("system", "s")),
    ],
    "turns do not alternate": [
        with_turns(("human", "a"), ("human", "b")),
        with_turns(("human", "a"), ("gpt", "b"), ("system", "c"), ("gpt", "d")),
    ],
    "empty answer": [llava("hi", ""), llava("hi", " \n")],
    "image mark outside a question": [
        llava("hi", IMAGE_TOKEN),
        llava(image="a.png", answer="<image>"),
    ],
    "more image marks than images": [llava(), llava(f"{IMAGE_TOKEN}{IMAGE_TOKEN}", image="a.png")],
    "more images than image marks": [llava("hi", image="a.png"), llava(image=["a.png"] * 2)],
    "bad image field": [
        llava(image=3),
        llava(image=[None]),
        llava(image=""),
        llava(image={"a": 1}),
        llava(image="a.png", images=["a.png"]),
    ],
    "bad image path": [
        llava(image="../secret.png"),
        llava(image="sub/../../secret.png"),
        llava(image="/etc/passwd"),
        llava(image="https://example.org/a.png"),
        llava(image="file:///etc/passwd"),
        llava(image="data:image/png;base64,AAAA"),
        llava(image="a.png\0.txt"),
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


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.sampled_from(["human", "gpt", "user", IMAGE_TOKEN]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "conversations",
                    "messages",
                    "from",
                    "role",
                    "value",
                    "content",
                    "image",
                    "images",
                    "type",
                    "text",
                    "url",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(record=json_values)
def test_any_json_gives_a_valid_conversation_or_a_record_error(record):
    try:
        conversation = parse_record(record, "x")
    except RecordError:
        return
    marks = sum(turn.text.count(IMAGE_TOKEN) for turn in conversation.turns)
    assert marks == len(conversation.images)
    assert conversation.turns[-1].role == "assistant"
