"""Time our evaluation against a plain batch-1 generate loop, alternating, on the same questions.

    python scripts/bench/eval.py                          the demo's run on StickerVQA
    python scripts/bench/eval.py --adapter DIR --data DIR     another adapter, other files
    python scripts/bench/eval.py --arithmetic 576         only the bound, LLaVA-1.5's image tokens

Three workloads, a line of JSON each: MMBench format with every rotation; POPE format with 18
questions a picture of which 10 are distinct, as POPE's 9,000 rows are 5,127 questions on 500
pictures; and the same with all 18 distinct. Then the bound that counting prompt tokens gives.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.adapter.tuned import read_adapter
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.generate_shared import SharedAnswerer
from milora_vl.eval.items import Item, Request
from milora_vl.files import cache_folder
from milora_vl.model.load import load_vlm
from milora_vl.runtime import keep_freed_memory

DEMO_ADAPTER = Path("runs/demo/adapter")
N_ASKED = 18
N_DISTINCT = 10
WAYS = ("ours", "one_by_one")


def mmbench_requests(data: Path, n_questions: int) -> list[Request]:
    """Return questions of the official files, each with all its rotations."""
    items = BENCHES["mmbench"].sample(BENCHES["mmbench"].load(data), n_questions)
    return [Request(one.id, one.prompt, one.image) for one in items]


def pope_requests(data: Path, n_pictures: int, n_distinct: int) -> list[Request]:
    """Return 18 questions a picture: its own, filled up with those of other pictures."""
    items = BENCHES["pope"].load(data)
    by_picture: dict[str, list[Item]] = {}
    for item in items:
        by_picture.setdefault(item.group, []).append(item)
    texts = list(dict.fromkeys(item.prompt for item in items))
    requests = []
    for number, own in enumerate(list(by_picture.values())[:n_pictures]):
        others = texts[number * N_ASKED % len(texts) :] + texts
        asked = list(dict.fromkeys([*(item.prompt for item in own), *others]))[:n_distinct]
        requests += [
            Request(f"{number}/{place}", asked[place % n_distinct], own[0].image)
            for place in range(N_ASKED)
        ]
    return requests


def measure(vlm: Any, requests: list[Request], repeats: int, max_new_tokens: int) -> dict[str, Any]:
    """Ask all requests both ways in turn; a new answerer each time, so that nothing is kept."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    texts: dict[str, dict[str, str | None]] = {}
    for repeat in range(repeats):
        for way in WAYS if repeat % 2 == 0 else reversed(WAYS):
            answerer = SharedAnswerer(vlm)
            started = time.perf_counter()
            if way == "ours":
                said = answerer.answer(requests, max_new_tokens=max_new_tokens, progress=False)
            else:
                said = answerer.answer_one_by_one(requests, max_new_tokens=max_new_tokens)
            seconds[way].append(time.perf_counter() - started)
            texts[way] = {name: answer.text for name, answer in said.items()}
            print(f"  {way}: {seconds[way][-1]:.1f} s", file=sys.stderr, flush=True)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    differing = sum(texts["ours"][one.id] != texts["one_by_one"][one.id] for one in requests)
    return {
        "n": len(requests),
        "n_pictures": len({one.image.encoded or one.image.path for one in requests}),
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
        "pope, 10 of 18 distinct": (N_ASKED * (prefix + 20), prefix + N_DISTINCT * 20),
        "pope, 18 distinct": (N_ASKED * (prefix + 20), prefix + N_ASKED * 20),
        "gqa, 31.6 questions": (31.6 * (prefix + 20), prefix + 31.6 * 20),
        "mme, 2 questions": (2 * (prefix + 20), prefix + 2 * 20),
    }
    for name, (alone, shared) in rows.items():
        line = {"bound_of": name, "image_tokens": image_tokens, "tokens_alone": round(alone)}
        ratio = round(alone / shared, 1)
        print(json.dumps({**line, "tokens_shared": round(shared), "bound": ratio}))


def main() -> None:
    """Parse the arguments and print one line per workload."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, default=DEMO_ADAPTER, help="default: %(default)s")
    parser.add_argument("--model", help="default: the base that the adapter names")
    parser.add_argument("--no-adapter", action="store_true", help="ask --model as it is")
    parser.add_argument("--data", type=Path, help="MMBench and POPE files; default: StickerVQA")
    parser.add_argument("--questions", type=int, default=40, help="MMBench questions (%(default)s)")
    parser.add_argument("--pictures", type=int, default=12, help="POPE pictures (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--arithmetic", type=int, metavar="N", help="print the bound at N image tokens and stop"
    )
    arguments = parser.parse_args()
    if arguments.arithmetic:
        arithmetic(arguments.arithmetic)
        return
    data = arguments.data or cache_folder() / "stickervqa" / "core"
    if arguments.no_adapter and not arguments.model:
        parser.error("--no-adapter needs --model")
    adapter = None if arguments.no_adapter else arguments.adapter
    if adapter is not None and not adapter.is_dir():
        parser.error(f"{adapter}: no such folder; finetune the demo first, or --no-adapter")
    vlm = load_vlm(arguments.model or read_adapter(adapter).base, device=arguments.device)
    if adapter is not None:
        vlm = vlm.with_model(load_adapter(vlm.model, adapter))
    workloads = {
        "mmbench format, all rotations": mmbench_requests(data, arguments.questions),
        "pope format, 10 of 18 distinct": pope_requests(data, arguments.pictures, N_DISTINCT),
        "pope format, 18 distinct": pope_requests(data, arguments.pictures, N_ASKED),
    }
    for name, requests in workloads.items():
        line = {"workload": name, "device": arguments.device}
        result = measure(vlm, requests, arguments.repeats, arguments.max_new_tokens)
        print(json.dumps({**line, **result}), flush=True)
    for image_tokens in (SharedAnswerer(vlm).n_image_tokens, 576):
        arithmetic(image_tokens)


if __name__ == "__main__":
    keep_freed_memory()  # as python -m milora_vl.eval does; both ways profit
    main()
