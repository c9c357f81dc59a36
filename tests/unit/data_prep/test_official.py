"""Public sets in their official layout: every record is written or named, nothing is changed."""

import http.server
import json
import threading
from typing import ClassVar

import pytest
from official_layouts import write_all
from PIL import Image

from data_prep import (
    gqa,
    llava_mix665k,
    llava_pretrain_558k,
    mmbench,
    mme,
    official,
    pope,
    scienceqa,
    seed_bench,
    textvqa,
    vizwiz,
    vqav2,
)
from milora_vl.data.records import read_records


def put_image(path, kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path, kind)


def put_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def llava(name, image=None):
    mark = "" if image is None else "<image>\n"
    turns = [{"from": "human", "value": f"{mark}What?"}, {"from": "gpt", "value": "A fox."}]
    record = {"id": name, "conversations": turns}
    return record if image is None else record | {"image": image}


def mix665k(raw):
    images = ["coco/train2017/1.jpg", "gqa/images/2.jpg", "ocr_vqa/images/3.jpg"]
    images += ["textvqa/train_images/4.jpg", "vg/VG_100K/5.jpg", "vg/VG_100K_2/6.jpg"]
    for image in images:
        put_image(raw / image)
    (raw / images[2]).unlink()
    put_image(raw / "ocr_vqa/images/3.gif", "GIF")  # what its servers give
    records = [llava(image, image) for image in images]
    records += [llava("text"), llava("gone", "ocr_vqa/images/7.jpg")]
    (raw / "ocr_vqa/images/8.jpg").write_bytes(b"<html>404</html>")
    records += [llava("page", "ocr_vqa/images/8.jpg"), llava("out", "../secret.jpg")]
    records.append({"id": "empty", "conversations": []})
    put_json(raw / "llava_v1_5_mix665k.json", records)
    return 7


def pretrain_558k(raw):
    put_image(raw / "00000/000000010.jpg")
    put_json(raw / "blip_laion_cc_sbu_558k.json", [llava("000000010", "00000/000000010.jpg")])
    return 1


def science_qa(raw):
    question = {
        "question": "Which?",
        "choices": ["cat", "dog"],
        "answer": 1,
        "hint": "",
        "image": None,
    }
    shown = question | {"image": "image.png", "hint": "Look.", "answer": 0}
    put_json(raw / "problems.json", {"1": question, "2": shown, "3": question})
    put_json(raw / "pid_splits.json", {"train": ["2", "1"], "test": ["3"]})
    put_image(raw / "images/train/2/image.png", "PNG")
    return 2


def vqa_v2(raw):
    asked = [{"image_id": 9, "question_id": n, "question": f"Q{n}?"} for n in (90, 91)]
    told = [{"question_id": 90, "multiple_choice_answer": "yes"}]
    told.append({"question_id": 91, "answers": [{"answer": one} for one in ("2", "two", "2")]})
    put_json(raw / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": asked})
    put_json(raw / "v2_mscoco_train2014_annotations.json", {"annotations": told})
    put_image(raw / "train2014/COCO_train2014_000000000009.jpg")
    return 1


def gqa_(raw):
    row = {"question": "Is it red?", "imageId": "n12", "answer": "yes"}
    put_json(raw / "questions1.2/train_balanced_questions.json", {"1": row, "2": row})
    put_image(raw / "images/n12.jpg")
    return 1


def text_vqa(raw):
    row = {"question_id": 1, "question": "Brand?", "image_id": "aa", "answers": ["ford"] * 10}
    put_json(raw / "TextVQA_0.5.1_train.json", {"data": [row]})
    put_image(raw / "train_images/aa.jpg")
    return 1


def viz_wiz(raw):
    answers = [{"answer": "unanswerable"}] * 6 + [{"answer": "can"}] * 4
    row = {"image": "VizWiz_train_00000000.jpg", "question": "What?", "answers": answers}
    put_json(raw / "Annotations/train.json", [row])
    put_image(raw / "train/VizWiz_train_00000000.jpg")
    return 1


SETS = {
    llava_mix665k: mix665k,
    llava_pretrain_558k: pretrain_558k,
    scienceqa: science_qa,
    vqav2: vqa_v2,
    gqa: gqa_,
    textvqa: text_vqa,
    vizwiz: viz_wiz,
}


@pytest.mark.parametrize("module", SETS, ids=lambda module: module.OFFICIAL.name)
def test_a_set_in_its_official_layout_becomes_records_that_the_package_reads(module, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    expected = SETS[module](raw)
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    assert module.main(["--raw", str(raw), "--out", str(out), "--decode"]) == 0
    conversations, skipped = read_records(out / "train.json", raw)
    assert len(conversations) == expected
    assert not skipped
    manifest = json.loads((out / "manifest.json").read_text())
    left_out = (out / "left_out.jsonl").read_text().splitlines()
    assert sum(part["read"] for part in manifest["parts"].values()) == expected + len(left_out)
    assert manifest["records"] == expected
    assert {path: path.read_bytes() for path in before} == before


def test_oddities_of_the_mixture_are_handled_or_named(tmp_path):
    mix665k(tmp_path / "raw")
    llava_mix665k.main(["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out/left_out.jsonl").read_text().splitlines()
    reasons = {one["id"]: one["reason"] for one in map(json.loads, lines)}
    unusable = "image missing or unreadable"
    assert reasons == {"gone": unusable, "page": unusable, "out": unusable, "empty": "no turns"}
    written = json.loads((tmp_path / "out/train.json").read_text())
    assert "ocr_vqa/images/3.gif" in [one.get("image") for one in written]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["found_under_another_suffix"] == 1
    assert manifest["parts"]["ocr_vqa"] == {"read": 3, "published": 80_000, "written": 1}


def test_the_published_counts_of_the_mixture_add_up_to_its_name():
    assert sum(llava_mix665k.OFFICIAL.published.values()) == 665_298


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        ("{", "cannot be read as JSON"),
        ('{"a": 1}', "a list of records was expected"),
        ("[]", "no record of llava_mix665k can be used"),
    ],
)
def test_files_that_are_not_the_official_ones_are_refused_and_nothing_is_written(
    tmp_path, content, message, caplog
):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    if content is not None:
        (raw / "llava_v1_5_mix665k.json").write_text(content)
    assert llava_mix665k.main(["--raw", str(raw), "--out", str(out)]) == 1
    assert message in caplog.text
    assert not out.exists() or not list(out.iterdir())


def test_a_row_without_its_key_is_no_traceback(tmp_path, caplog):
    put_json(tmp_path / "TextVQA_0.5.1_train.json", {"data": [{"question": "?"}]})
    assert textvqa.main(["--raw", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "not in the official layout of textvqa: KeyError: 'answers'" in caplog.text


@pytest.mark.parametrize("module", [pope, mmbench, mme, seed_bench])
def test_a_bench_is_counted_and_an_image_that_is_missing_is_named(module, tmp_path, caplog):
    write_all(tmp_path / "raw")
    out = tmp_path / "out"
    assert module.main(["--raw", str(tmp_path / "raw"), "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["questions"] == sum(manifest["categories"].values()) > 0
    assert module.main(["--raw", str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert "cannot be used" in caplog.text
    if module is seed_bench:
        (tmp_path / "raw/seed_bench/SEED-Bench-image/im_1").unlink()
        assert module.main(["--raw", str(tmp_path / "raw"), "--out", str(out)]) == 1
        (problem,) = json.loads((out / "manifest.json").read_text())["problems"]
        assert problem["id"] == "1"


@pytest.fixture
def server():
    """A server that knows ranges, cuts its first answer short and counts what it is asked."""
    content = bytes(range(256)) * 4096

    class Handler(http.server.BaseHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def do_GET(self):
            if self.path != "/file.zip":
                self.send_error(404)
                return
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.asked.append(self.headers["Range"])
            self.send_response(206)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            is_first = len(self.asked) == 1
            self.wfile.write(content[start : len(content) // 2 if is_first else None])

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", content, Handler.asked
    running.shutdown()
    running.server_close()


def test_a_download_that_is_cut_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    address, content, asked = server
    monkeypatch.setattr(official.time, "sleep", lambda _: None)
    remote = official.Remote(f"{address}/file.zip", "sub/file.zip", len(content))
    path = official.download(remote, tmp_path)
    assert path.read_bytes() == content
    assert asked == ["bytes=0-", f"bytes={len(content) // 2}-"]
    official.download(remote, tmp_path)  # it is there
    assert len(asked) == 2
    with pytest.raises(official.OfficialSetError, match="published 7; remove it"):
        official.download(official.Remote(remote.url, remote.path, 7), tmp_path)
    with pytest.raises(official.OfficialSetError, match="SHA-256 is not the published one"):
        official.download(official.Remote(remote.url, remote.path, None, "0" * 64), tmp_path)
    with pytest.raises(official.OfficialSetError, match="404"):
        official.download(official.Remote(f"{address}/other", "other"), tmp_path)
