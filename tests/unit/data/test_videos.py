"""Videos in records: their frames, their place in the prompt, and what cannot be shown."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import build_checkpoint
from official_layouts import seed, video_bytes
from PIL import Image

from milora_vl.adapter.tuned import apply_inputs, describe_inputs
from milora_vl.constants import VIDEO_TOKEN
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.images import BadImageError
from milora_vl.data.records import DataError, RecordError, parse_record
from milora_vl.data.videos import FrameSampling, load_frames, read_video_shape
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.evaluation import evaluate
from milora_vl.eval.generate_shared import build_answerer
from milora_vl.eval.items import EvaluationError, Request, VideoSource
from milora_vl.inference import ask
from milora_vl.model.load import load_vlm
from milora_vl.training.inputs import build_collate

FAMILIES = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")


def record(**changes):
    turns = [
        {"from": "human", "value": "<video>\nWhat happens?"},
        {"from": "gpt", "value": "It gets lighter."},
    ]
    return {"id": "one", "videos": ["clip.mp4"], "conversations": turns} | changes


def build(vlm, folder, *records, **options):
    return ConversationDataset(
        [parse_record(one, f"record {number}") for number, one in enumerate(records)],
        folder,
        None,
        vlm.prompt_style,
        vlm.tokenizer,
        0,
        image_reader=vlm.image_reader,
        video_sampling=options.pop("sampling", FrameSampling(4)),
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(video_bytes())
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path


@pytest.mark.parametrize(
    ("sampling", "indices"),
    [
        (FrameSampling(4), (0, 5, 10, 15)),
        (FrameSampling(30), tuple(at * 20 // 30 for at in range(30))),  # some are shown twice
        (FrameSampling(100, per_second=2), (0, 5, 10, 15)),  # 20 frames are two seconds
        (FrameSampling(3, per_second=5), (0, 6, 13)),
        (FrameSampling(8, per_second=0.1), (0,)),
        (FrameSampling(2, span_s=(0.5, 1.5)), (5, 10)),
        (FrameSampling(9, per_second=2, span_s=(1.0, 99.0)), (10, 15)),
        (FrameSampling(1, span_s=(7.0, 8.0)), (19,)),  # behind the end: the last frame
    ],
)
def test_the_frames_are_those_that_the_sampling_names(folder, sampling, indices):
    video = load_frames(folder / "clip.mp4", sampling)
    whole = load_frames(folder / "clip.mp4", FrameSampling(20)).frames
    assert video.indices == indices
    np.testing.assert_array_equal(video.frames, whole[list(indices)])
    assert all(np.diff(whole.mean(axis=(1, 2, 3))) > 5)  # every one of them is another frame
    shape = read_video_shape(folder / "clip.mp4", sampling)
    assert shape.shape() == video.shape()
    assert shape.frames.shape == video.frames.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_tensors_are_those_of_the_stock_processor_and_a_step_learns(family, folder):
    vlm = load_vlm(build_checkpoint(family, folder / family))
    data = build(vlm, folder, record())
    sample = data[0]
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It gets lighter."}]},
    ]
    video = load_frames(folder / "clip.mp4", FrameSampling(4))
    stock = vlm.processor(
        text=[vlm.processor.apply_chat_template(messages, tokenize=False)],
        videos=[video.frames],
        video_metadata=[video.metadata()],
        do_sample_frames=False,
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert sample["input_ids"] == stock["input_ids"][0].tolist()
    assert data.lengths == [len(sample["input_ids"])]
    assert data.has_image == [True]
    for name, value in sample["image_inputs"].items():
        torch.testing.assert_close(value, torch.as_tensor(stock[name]))
    if "mm_token_type_ids" in stock:
        types = sample["token_inputs"]["mm_token_type_ids"]
        assert types.tolist() == stock["mm_token_type_ids"][0].tolist()
    batch = build_collate(vlm)([sample, sample])
    loss = vlm.model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    # what the frames show reaches the answer
    other = build(vlm, folder, record(), sampling=FrameSampling(4))[0]
    name = next(name for name in other["image_inputs"] if name.startswith("pixel_values"))
    other["image_inputs"][name] = -other["image_inputs"][name]
    assert (
        vlm.model(**build_collate(vlm)([other])).loss
        != vlm.model(**build_collate(vlm)([sample])).loss
    )


def test_images_and_videos_stand_where_their_marks_are(folder):
    vlm = load_vlm(build_checkpoint("qwen3_vl", folder / "model"))
    turns = [
        {"from": "human", "value": "<video>First this.\n<image>Then <video> and what?"},
        {"from": "gpt", "value": "Light."},
    ]
    one = record(image="red.png", videos=["clip.mp4", "clip.mp4"], conversations=turns)
    sample = build(vlm, folder, one)[0]
    tokenizer = vlm.tokenizer
    marks = [tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")]
    order = [marks.index(token) for token in sample["input_ids"] if token in marks]
    changes = [kind for at, kind in enumerate(order) if at == 0 or kind != order[at - 1]]
    assert changes == [0, 1]  # LLaVA's rule moves the one image to the start of its question
    n_frames = sample["image_inputs"]["video_grid_thw"][:, 0].sum().item()
    assert tokenizer.decode(sample["input_ids"]).count(" seconds>") == n_frames


@pytest.mark.parametrize(
    "one",
    [
        record(),
        record(videos=None, video="clip.mp4"),  # ms-swift and LLaMA-Factory have lists
        record(  # LLaVA-NeXT
            videos=None,
            video="clip.mp4",
            conversations=[
                {"from": "human", "value": "<image>\nWhat happens?"},
                {"from": "gpt", "value": "It gets lighter."},
            ],
        ),
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": "clip.mp4"},
                        {"type": "text", "text": "What happens?"},
                    ],
                },
                {"role": "assistant", "content": "It gets lighter."},
            ]
        },
        {"query": "What happens?", "response": "It gets lighter.", "videos": ["clip.mp4"]},
    ],
    ids=["marks", "one name", "llava-next", "parts", "one exchange"],
)
def test_every_format_says_the_same(one):
    conversation = parse_record(one, "here")
    assert conversation.videos == ("clip.mp4",)
    assert conversation.images == ()
    assert [turn.text for turn in conversation.turns] == [
        f"{VIDEO_TOKEN}\nWhat happens?",
        "It gets lighter.",
    ]


def test_without_videos_the_mark_is_text(folder):
    vlm = load_vlm(build_checkpoint("qwen3_vl", folder / "model"))
    sample = build(vlm, folder, record(videos=[]))[0]
    assert "<video>\nWhat happens?" in vlm.tokenizer.decode(sample["input_ids"])
    assert sample["image_inputs"] == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": ["a.mp4", "b.mp4"]}, "more videos than video marks: 1 <video> marks, 2 videos"),
        ({"videos": None, "image": "a.png"}, "more images than image marks"),
        ({"videos": [5]}, "needs a name or a list of names"),
        ({"video": "other.mp4"}, "'video' and 'videos' are given"),
    ],
)
def test_videos_that_do_not_fit_their_marks_are_refused(changes, message):
    with pytest.raises(RecordError, match=message):
        parse_record(record(**changes), "here")


def test_a_model_without_video_says_so_by_name_before_anything_is_read(folder):
    for family in ("llava", "gemma3"):
        vlm = load_vlm(build_checkpoint(family, folder / family))
        with pytest.raises(DataError, match="record 0: has a video, and this model takes none"):
            build(vlm, folder, record(videos=["missing.mp4"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a video"),
        (b"no video at all" * 99, "cannot be read as a video"),
        (b"#EXTM3U\n#EXTINF:1,\nclip.mp4\n", "a list of other files"),
        (b"ffconcat version 1.0\nfile clip.mp4\n", "a list of other files"),
        ("half", "cannot be read as a video"),
    ],
    ids=["empty", "text", "m3u8", "ffconcat", "half"],
)
def test_a_damaged_video_is_an_error_or_left_out_and_counted(folder, content, message):
    whole = (folder / "clip.mp4").read_bytes()
    (folder / "bad.mp4").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    vlm = load_vlm(build_checkpoint("qwen3_vl", folder / "model"))
    bad = record(videos=["bad.mp4"])
    with pytest.raises(BadImageError, match=rf"record 0: bad.mp4: .*{message}"):
        build(vlm, folder, bad)[0]
    kept = build(vlm, folder, bad, record(), on_bad_image="skip")
    assert len(kept) == 1
    assert kept.skipped == {"unreadable image": 1}


def test_videos_of_different_length_are_not_padded_with_black_frames(folder):
    vlm = load_vlm(build_checkpoint("llava_onevision", folder / "model"))
    (folder / "short.mp4").write_bytes(video_bytes(5))
    rate = FrameSampling(8, per_second=2)
    data = build(vlm, folder, record(), record(videos=["short.mp4"]), sampling=rate)
    with pytest.raises(ValueError, match=r"videos of one batch .* data.video_fps"):
        build_collate(vlm)([data[0], data[1]])
    same = build(vlm, folder, record(), record(videos=["short.mp4"]))
    assert torch.isfinite(vlm.model(**build_collate(vlm)([same[0], same[1]])).loss)


def test_a_video_is_asked_about_and_its_frames_decide_the_answer(folder):
    vlm = load_vlm(build_checkpoint("qwen3_vl", folder / "model"))
    question = Request("1", "What happens?", video=VideoSource("row 1", folder / "clip.mp4"))
    part = replace(question, id="2", video=VideoSource("row 2", folder / "clip.mp4", (1.0, 2.0)))
    nothing = replace(question, id="3", video=None)
    answerer = build_answerer(vlm)
    answers = answerer.answer([question, part, nothing], max_new_tokens=6, progress=False)
    assert len({answer.text for answer in answers.values()}) == 3
    assert ask(vlm, folder / "clip.mp4", "What happens?", 6) == answers["1"].text
    seen = describe_inputs(vlm, video_sampling=FrameSampling(3, per_second=1.0))
    as_trained = apply_inputs(vlm, json.loads(json.dumps(seen)), folder)
    assert as_trained.video_sampling == FrameSampling(3, per_second=1.0)
    assert ask(as_trained, folder / "clip.mp4", "What happens?", 6) != answers["1"].text
    assert ask(as_trained, folder / "clip.mp4", "What happens?", 6, 8) == answers["1"].text
    assert "video" not in describe_inputs(vlm)
    with pytest.raises(ValueError, match="takes no video"):
        ask(load_vlm(build_checkpoint("gemma3", folder / "other")), folder / "clip.mp4", "What?")


def test_seed_video_asks_about_the_videos_themselves(tmp_path):
    seed(tmp_path)
    (item,) = BENCHES["seed-video"].load(tmp_path)
    assert (item.id, item.image, item.video.path.name) == ("v2", None, "v.webm")
    vlm = load_vlm(build_checkpoint("qwen2_5_vl", tmp_path / "model"))
    results = evaluate(vlm, ["seed-video"], tmp_path, tmp_path / "out", text_probe=False)
    assert results["benches"]["seed-video"]["n"] == 1
    (tmp_path / "seed_bench/SEED-Bench-video/t/v.webm").unlink()
    with pytest.raises(EvaluationError, match=r"SEED-Bench.json .*cannot read .*v.webm"):
        evaluate(vlm, ["seed-video"], tmp_path, tmp_path / "out2", text_probe=False)
