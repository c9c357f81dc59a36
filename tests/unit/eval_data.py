"""A bench folder of a few questions in each official format, with real pictures."""

import base64
import json

from eval_models import picture_bytes


def write_benches(folder, n_pictures=6):
    """MMBench: two questions, four rotations each; POPE: three files; VQA: a question a picture."""
    (folder / "images/bench").mkdir(parents=True)
    for part in ("pope", "vqa"):
        (folder / part).mkdir()
    names = [f"p{index}.png" for index in range(n_pictures)]
    for index, name in enumerate(names):
        (folder / "images/bench" / name).write_bytes(picture_bytes(index))
    write_mmbench(folder / "mmbench.tsv")
    for place, category in enumerate(("random", "popular", "adversarial")):
        rows = [
            {
                "question_id": index,
                "image": name,
                "text": "Is there a fox in the image?",
                "label": "yes" if (index + place) % 2 else "no",
            }
            for index, name in enumerate(names)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "pope" / f"{category}.jsonl").write_text(text)
    questions, annotations = [], []
    for index, name in enumerate(names):
        key = {"question_id": index, "image_id": index}
        questions.append({**key, "image": name, "question": "What <colour> is it?"})
        people = [{"answer": "red", "answer_id": place} for place in range(10)]
        types = {"answer_type": "other", "question_type": "what is"}
        annotations.append({**key, **types, "answers": people})
    (folder / "vqa/questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "vqa/annotations.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def write_mmbench(path):
    columns = ["index", "question", *"ABCD", "answer", "category", "image", "l2-category"]
    lines = ["\t".join(columns)]
    for base, options in enumerate((["cat", "dog", "fox", "owl"], ["red", "blue", "green", "4"])):
        image = base64.b64encode(picture_bytes(base)).decode()
        for turn in range(4):
            turned = options[turn:] + options[:turn]
            letter = "ABCD"[turned.index(options[0])]
            shown = str(base) if turn else image
            index = str(base + turn * 1_000_000)
            lines.append(
                "\t".join(
                    [index, f"Question {base}?", *turned, letter, f"kind {base}", shown, "CP"]
                )
            )
    path.write_text("\n".join(lines) + "\n")
