"""Time our evaluation against a plain batch-1 generate loop, alternating, on the same questions.

    python scripts/bench/eval.py                       the embedded demo model, drawn pictures
    python scripts/bench/eval.py --model FOLDER --data DIR    another model, official files
    python scripts/bench/eval.py --arithmetic          the bound of sharing at 576 image tokens

Two workloads: MMBench format, four rotations a question, and POPE format with 18 questions a
picture (10 distinct, as POPE's 9,000 rows are 5,127 questions on 500 pictures). One line each.
"""

import argparse
import base64
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from milora_vl.eval.benches import BENCHES
from milora_vl.eval.items import ImageSource, Request
from milora_vl.eval.runner import Answerer
from milora_vl.model.embedded import cached_demo_base
from milora_vl.model.load import load_vlm

WORDS = [
    "cat",
    "dog",
    "fox",
    "owl",
    "car",
    "bus",
    "cup",
    "hat",
    "key",
    "map",
    "pen",
    "sun",
    "tree",
    "fish",
    "bird",
    "ship",
    "book",
    "lamp",
]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
N_DISTINCT = 10
N_ASKED = 18


def drawn_picture(number: int) -> ImageSource:
    """Return a picture of a few shapes, different for each number."""
    image = Image.new("RGB", (224, 168), (40 * number % 256, 90, 160))
    pen = ImageDraw.Draw(image)
    for place in range(4):
        left = (37 * number + 53 * place) % 180
        pen.ellipse((left, 20 + 30 * place, left + 40, 60 + 30 * place), fill=(255, 60 * place, 20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return ImageSource(f"picture {number}", encoded=encoded)


def mmbench_requests(n_questions: int) -> list[Request]:
    """Return four rotations of each question, a picture a question."""
    requests = []
    for base in range(n_questions):
        options = [WORDS[(base + 5 * place) % len(WORDS)] for place in range(4)]
        for turn in range(4):
            turned = options[turn:] + options[:turn]
            lettered = [f"{letter}. {text}" for letter, text in zip("ABCD", turned, strict=True)]
            lines = ["Which of these is in the middle of the picture?", *lettered, LETTER]
            name = f"{base}/{turn}"
            requests.append(Request(name, "\n".join(lines), drawn_picture(base), tuple("ABCD")))
    return requests


def pope_requests(n_pictures: int) -> list[Request]:
    """Return 18 questions a picture, 10 of them distinct."""
    yes_no = ("Yes", "No", "yes", "no")
    return [
        Request(
            f"{number}/{place}",
            f"Is there a {WORDS[(number + place % N_DISTINCT) % 18]} in the image?\n{SHORT}",
            drawn_picture(number),
            yes_no,
        )
        for number in range(n_pictures)
        for place in range(N_ASKED)
    ]


def file_requests(bench: str, folder: Path, n: int) -> list[Request]:
    """Return the first ``n`` questions of official files."""
    items = BENCHES[bench].load(folder)[:n]
    return [Request(one.id, one.prompt, one.image, one.choices) for one in items]


def measure(vlm: Any, requests: list[Request], repeats: int, max_new_tokens: int) -> dict[str, Any]:
    """Ask all requests both ways in turn; a new answerer each time, so that nothing is kept."""
    seconds: dict[str, list[float]] = {"ours": [], "one_by_one": []}
    texts: dict[str, dict[str, str | None]] = {}
    for _ in range(repeats):
        for way, times in seconds.items():
            answerer = Answerer(vlm)
            started = time.perf_counter()
            if way == "ours":
                said = answerer.answer(requests, max_new_tokens=max_new_tokens, progress=False)
            else:
                said = answerer.answer_one_by_one(requests, max_new_tokens=max_new_tokens)
            times.append(time.perf_counter() - started)
            texts[way] = {name: answer.text for name, answer in said.items()}
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    differing = sum(texts["ours"][one.id] != texts["one_by_one"][one.id] for one in requests)
    return {
        "n": len(requests),
        "seconds_ours": round(medians["ours"], 3),
        "seconds_one_by_one": round(medians["one_by_one"], 3),
        "speedup": round(medians["one_by_one"] / medians["ours"], 2),
        "n_different_answers": differing,
        "n_distinct_answers": len(set(texts["ours"].values())),
    }


def arithmetic(image_tokens: int, system: int = 35, stem: int = 30, options: int = 50) -> None:
    """Print how many prompt tokens each workload needs with and without sharing."""
    prefix = system + image_tokens
    rows = {
        "mmbench, 4 rotations": (4 * (prefix + stem + options), prefix + stem + 4 * options),
        "pope, 18 questions": (N_ASKED * (prefix + 20), prefix + N_DISTINCT * 20),
        "gqa, 31.6 questions": (31.6 * (prefix + 20), prefix + 31.6 * 20),
        "mme, 2 questions": (2 * (prefix + 20), prefix + 2 * 20),
    }
    for name, (alone, shared) in rows.items():
        line = {"workload": name, "image_tokens": image_tokens, "tokens_alone": round(alone)}
        print(
            json.dumps({**line, "tokens_shared": round(shared), "bound": round(alone / shared, 1)})
        )


def main() -> None:
    """Parse the arguments and print one line per workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder; default: the embedded demo model")
    parser.add_argument("--data", type=Path, help="folder with MMBench and POPE files")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetic", action="store_true", help="print the bound and stop")
    arguments = parser.parse_args()
    if arguments.arithmetic:
        arithmetic(576)
        return
    vlm = load_vlm(arguments.model or cached_demo_base(112, 9), device=arguments.device)
    for bench, build, n in (
        ("mmbench", mmbench_requests, 4 * 4 * arguments.pictures),
        ("pope", pope_requests, N_ASKED * arguments.pictures),
    ):
        if arguments.data:
            requests = file_requests(bench, arguments.data, n)
        else:
            requests = build(n // (4 if bench == "mmbench" else N_ASKED))
        line = {"workload": f"{bench} format", "device": arguments.device}
        result = measure(vlm, requests, arguments.repeats, arguments.max_new_tokens)
        print(json.dumps({**line, **result}), flush=True)


if __name__ == "__main__":
    main()
