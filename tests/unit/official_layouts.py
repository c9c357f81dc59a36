"""A few questions of every bench in its official layout, all below one folder."""

import io
import json

import av
import numpy as np
import pandas as pd
from eval_data import write_mmbench
from eval_models import picture_bytes

PEOPLE = ["red"] * 4 + ["dark red"] * 6


def write_all(folder):
    """Write LLaVA's folder names: gqa, vizwiz, scienceqa, textvqa, MME, seed_bench, ..."""
    for write in (gqa, vizwiz, sqa, textvqa, mme, seed, mmmu, mmvet, llava_w, custom, pope, vqav2):
        write(folder)
    (folder / "mmbench").mkdir()
    write_mmbench(folder / "mmbench/mmbench_dev_20230712.tsv")
    (folder / "mmbench_cn").mkdir()
    write_mmbench(folder / "mmbench_cn/mmbench_dev_cn_20231003.tsv")
    return folder


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def gqa_row(answer, structural="query", image="n1", question="What color is it?", **more):
    types = {"structural": structural, "semantic": "attr", "detailed": "d"}
    row = {"question": question, "imageId": image, "answer": answer, "types": types}
    groups = {"global": "color", "local": None}
    return {**row, "groups": groups, "isBalanced": True, "semantic": [{}, {}], **more}


def gqa(folder):
    rows = {
        "07": gqa_row("red"),
        "08": gqa_row("blue"),
        "09": gqa_row("yes", "verify", "n2", "Is it red?", groups={"global": None}),
        "10": gqa_row("no", isBalanced=False),
    }
    put(folder / "gqa/data/testdev_balanced_questions.json", rows)
    for name in ("n1", "n2"):
        put(folder / f"gqa/data/images/{name}.jpg", picture_bytes(1))


def people(answers):
    return [{"answer": one, "answer_confidence": "yes"} for one in answers]


def vizwiz(folder):
    rows = [
        {"image": "VizWiz_val_0.jpg", "question": "Color?", "answers": people(PEOPLE)},
        {
            "image": "VizWiz_val_1.jpg",
            "question": "What?",
            "answers": people(["unanswerable"] * 10),
        },
    ]
    for row, kind in zip(rows, ("other", "unanswerable"), strict=True):
        row |= {"answer_type": kind, "answerable": int(kind == "other")}
        put(folder / "vizwiz/val" / row["image"], picture_bytes(2))
    put(folder / "vizwiz/val.json", rows)


def sqa(folder):
    shared = {"subject": "natural science", "grade": "grade2", "lecture": "", "task": ""}
    problems = {
        "4": {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look."},
        "5": {"question": "Why?", "choices": ["a", "b", "c"], "answer": 0, "hint": ""},
        "6": {"question": "Train?", "choices": ["a", "b"], "answer": 0, "hint": ""},
    }
    for key, row in problems.items():
        row |= {**shared, "image": "image.png" if key == "4" else None}
    put(folder / "scienceqa/problems.json", problems)
    put(folder / "scienceqa/pid_splits.json", {"train": ["6"], "test": ["4", "5"]})
    put(folder / "scienceqa/images/test/4/image.png", picture_bytes(3))


def textvqa(folder):
    rows = [
        {"question_id": 7, "image_id": "aa", "question": "What brand?", "answers": PEOPLE},
        {"question_id": 8, "image_id": "aa", "question": "Year?", "answers": ["1998"] * 10},
    ]
    put(folder / "textvqa/TextVQA_0.5.1_val.json", {"data": rows})
    words = {"data": [{"image_id": "aa", "ocr_tokens": ["Ford", "1998"]}]}
    put(folder / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", words)
    put(folder / "textvqa/train_images/aa.jpg", picture_bytes(4))


def mme(folder, pairs=(("existence", "000"), ("OCR", "001"), ("code_reasoning", "002"))):
    root = folder / "MME/MME_Benchmark_release_version"
    for place, (category, stem) in enumerate(pairs):
        nested = place % 2 == 0  # both official layouts
        text = root / category / ("questions_answers_YN" if nested else ".") / f"{stem}.txt"
        ending = "  Please answer yes or no." if place else " Please answer yes or no."
        put(text, f"Is it a cat?{ending}\tYes\nIs it a dog?{ending}\tNo\n")
        image = root / category / ("images" if nested else ".") / f"{stem}.jpg"
        put(image, picture_bytes(5))


def video_bytes(n_frames=20, fps=10):
    """A video of gray frames, each lighter than the one before."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(n_frames):
            gray = np.full((32, 48, 3), number * 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def seed(folder):
    base = {"choice_a": "cat", "choice_b": "dog", "choice_c": "fox", "choice_d": "owl"}
    rows = [
        {"question_id": "1", "question_type_id": 1, "data_type": "image", "data_id": "im_1"},
        {"question_id": "v2", "question_type_id": 2, "data_type": "video", "data_id": "t/v.webm"},
    ]
    rows = [{**row, **base, "question": "What is it?", "answer": "B"} for row in rows]
    kinds = {"Scene Understanding": 1, "Action Recognition": 2}
    put(folder / "seed_bench/SEED-Bench.json", {"question_type": kinds, "questions": rows})
    put(folder / "seed_bench/SEED-Bench-image/im_1", picture_bytes(6))
    put(folder / "seed_bench/SEED-Bench-video-image/v2.png", picture_bytes(7))
    put(folder / "seed_bench/SEED-Bench-video/t/v.webm", video_bytes())


def mmmu(folder):
    image = {"bytes": picture_bytes(8), "path": None}
    shared = {"question_type": "multiple-choice", "image_1": image, "image_2": None}
    rows = [
        {
            **{"id": "validation_Art_Theory_1", "question": "Which <image 1>?", **shared},
            **{"options": "['cat', 'it\\'s a dog']", "answer": "B"},
        },
        {
            **{"id": "validation_Math_2", "question": "How many?", **shared, "options": "[]"},
            **{"question_type": "open", "answer": "['3', 'three']"},
            "image_2": {"bytes": picture_bytes(12), "path": None},
        },
    ]
    path = folder / "mmmu/Mixed/validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(path)


def mmvet(folder):
    row = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1 <AND> -5"}
    put(folder / "mm-vet/mm-vet.json", {"v1_0": {**row, "capability": ["ocr", "math"]}})
    put(folder / "mm-vet/images/v1_0.png", picture_bytes(9))


def llava_w(folder):
    root = folder / "llava-bench-in-the-wild"
    rows = [
        {"question_id": place, "image": "001.jpg", "text": f"Question {place}?", "category": kind}
        for place, kind in enumerate(("llava_bench_conv", "llava_bench_detail"))
    ]
    put(root / "questions.jsonl", lines(rows))
    put(root / "context.jsonl", lines([{"image": "001.jpg", "caption": "A lake."}]))
    answers = [{"question_id": place, "text": f"Reference {place}."} for place in (1, 0)]
    put(root / "answers_gpt4.jsonl", lines(answers))
    put(root / "images/001.jpg", picture_bytes(10))


def custom(folder):
    rows = [
        {"id": "a", "question": "Which?", "image": "x.png", "choices": ["cat", "dog"]},
        {"id": "b", "question": "Colour?", "image": "x.png", "answers": ["Red", "crimson"]},
        {"id": "c", "question": "2 + 2?", "answers": ["4"], "category": "text"},
    ]
    rows[0]["answer"] = "dog"
    put(folder / "custom/custom.jsonl", lines(rows))
    put(folder / "custom/x.png", picture_bytes(11))


def pope(folder):
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": place, "image": "p.jpg", "text": f"Is there a {what} in the image?"}
            for place, what in enumerate(("cat", "dog"))
        ]
        rows = [{**row, "label": "yes" if row["question_id"] else "no"} for row in rows]
        put(folder / f"pope/coco/coco_pope_{category}.json", lines(rows))
    put(folder / "pope/val2014/p.jpg", picture_bytes(12))


def vqav2(folder):
    key = {"question_id": 1, "image_id": 5}
    content = {"data_subtype": "val2014", "questions": [{**key, "question": "Color?"}]}
    put(folder / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", content)
    row = {**key, "answers": people(PEOPLE), "answer_type": "other", "question_type": "what"}
    put(folder / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [row]})
    put(folder / "vqav2/val2014/COCO_val2014_000000000005.jpg", picture_bytes(13))
