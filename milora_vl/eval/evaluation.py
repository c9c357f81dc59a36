"""Ask a model all questions of some benches, with and without pictures, and write the results."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from milora_vl.eval import statistics
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.items import (
    Answer,
    EvaluationError,
    Item,
    Request,
    Row,
    read_json_object,
)
from milora_vl.eval.plain_answerer import build_answerer
from milora_vl.eval.runner import Answerer
from milora_vl.files import write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

_REPRESENTATIVE_STEP = 7919  # a prime: spreads the questions of a parity check over the bench


def evaluate(  # noqa: PLR0913 - the public entry, all keyword-only after the four places
    vlm: Any,
    benches: str | Sequence[str],
    data_dir: Path | str,
    out_dir: Path | str,
    *,
    batch_size: int = 32,
    limit: int | Mapping[str, int] | None = None,
    blind: bool = True,
    max_new_tokens: int | None = None,
    model_name: str | None = None,
    adapter_name: str | None = None,
    allow_errors: int = 0,
    parity_check: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model; write ``results.json`` and ``predictions.jsonl`` into ``out_dir``.

    Args:
        vlm: Has ``model``, ``processor`` and ``prompt_style``; see ``load_vlm``.
        benches: Names in ``BENCHES``, as a list or joined by commas, or "all".
        data_dir: Folder with the official files of the benches.
        out_dir: Where results go; made if need be.
        batch_size: Most questions in one forward pass.
        limit: Most questions of a bench (MMBench: base questions), or that by bench name.
        blind: Also ask the same prompts without the picture.
        max_new_tokens: Limit of an answer; None: the bench's own.
        model_name: Recorded in the results; None: ``vlm.path``.
        adapter_name: Recorded in the results.
        allow_errors: Samples of a bench that may fail; they count as wrong.
        parity_check: Ask so many questions of each bench again, one by one with plain ``generate``,
            and record how many answers differ.
        progress: Whether to show progress bars.

    Returns:
        What is written to ``results.json``.

    Raises:
        EvaluationError: If more samples failed than allowed; nothing failed is scored as "".
        ValueError: If a bench is unknown or a file malformed (before the model runs).
        FileNotFoundError: If a bench's files are not in ``data_dir``.
    """
    names = bench_names(benches)
    out_dir = Path(out_dir)
    limits = limit if isinstance(limit, Mapping) else dict.fromkeys(names, limit)
    items = {name: BENCHES[name].load(Path(data_dir), limit=limits.get(name)) for name in names}
    answerer = build_answerer(vlm, batch_size=batch_size)
    results: dict[str, Any] = {
        "model": str(model_name or getattr(vlm, "path", "") or ""),
        "adapter": None if adapter_name is None else str(adapter_name),
        "prompt_style": answerer.style.name,
        "data": str(data_dir),
        "data_set": _data_set_name(Path(data_dir)),
        "limit": {name: limits.get(name) for name in names},
        "benches": {},
    }
    lines: list[str] = []
    for name in names:
        options = {
            "max_new_tokens": max_new_tokens or BENCHES[name].MAX_NEW_TOKENS,
            "allow_errors": allow_errors,
            "progress": progress,
        }
        results["benches"][name], new_lines = _run_bench(
            name, items[name], answerer, options, blind=blind, out_dir=out_dir
        )
        if parity_check:
            results["benches"][name]["parity"] = check_parity(
                answerer, items[name], parity_check, options["max_new_tokens"]
            )
        lines += new_lines
        write_text_atomic(out_dir / "predictions.jsonl", "".join(lines))
    write_json_atomic(out_dir / "results.json", results)
    return results


def _data_set_name(data_dir: Path) -> str | None:
    """Return the name in the data's manifest: its questions are not the published benches."""
    file = (data_dir.parent if data_dir.name == "val" else data_dir) / "manifest.json"
    return read_json_object(file).get("name") if file.is_file() else None


def bench_names(benches: str | Sequence[str]) -> list[str]:
    """Return bench names in the order given.

    Raises:
        ValueError: If one is unknown, naming the known ones, or none is given.
    """
    names = benches.split(",") if isinstance(benches, str) else list(benches)
    names = [name.strip().lower() for name in names if name.strip()]
    if names == ["all"]:
        return list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown or not names:
        raise ValueError(
            f"unknown bench {unknown or benches!r}; choose from {', '.join(BENCHES)}, all"
        )
    return list(dict.fromkeys(names))


def _run_bench(
    name: str,
    items: Sequence[Item],
    answerer: Answerer,
    options: Mapping[str, Any],
    *,
    blind: bool,
    out_dir: Path,
) -> tuple[dict[str, Any], list[str]]:
    """Return the bench's part of the results and its lines of ``predictions.jsonl``."""
    if not items:
        raise ValueError(f"{name}: no question left to ask")
    bench = BENCHES[name]
    started = time.perf_counter()
    requests = [Request(item.id, item.prompt, item.image) for item in items]
    answers = answerer.answer(requests, label=name, **options)
    seconds = time.perf_counter() - started
    rows = judge_all(bench, items, answers)
    result = _summary(bench, items, rows)
    result |= {
        "seconds_per_item": seconds / len(items),
        "version": bench.VERSION,
        "eos_rate": sum(answer.ended for answer in answers.values()) / len(answers),
        "n_errors": sum(answer.error is not None for answer in answers.values()),
        "max_new_tokens": options["max_new_tokens"],
    }
    blind_rows: list[Row] | None = None
    if blind:
        requests = [Request(item.id, item.prompt) for item in items]
        blind_answers = answerer.answer(requests, label=f"{name}, no picture", **options)
        blind_rows = judge_all(bench, items, blind_answers)
        result |= _against_blind(bench, items, rows, blind_rows)
    if not all(item.answers for item in items):
        texts = {row.id: row.text for row in rows}
        result["submission"] = [str(path) for path in bench.write_submission(items, texts, out_dir)]
    result["note"] = _note(result)
    return result, _lines(name, items, answers, rows, blind_rows)


def judge_all(bench: ModuleType, items: Sequence[Item], answers: Mapping[str, Answer]) -> list[Row]:
    """Judge the answer to every item.

    Raises:
        EvaluationError: If an item has no prediction; absent is not empty.
    """
    missing = [item.id for item in items if item.id not in answers]
    if missing:
        raise EvaluationError(
            f"{len(missing)} items without a prediction, the first: {missing[:5]}"
        )
    return [bench.judge(item, answers[item.id].text) for item in items]


def _summary(bench: ModuleType, items: Sequence[Item], rows: Sequence[Row]) -> dict[str, Any]:
    """Score, or the same keys without a score where the answers are not published."""
    empty = {"blind": None, "blind_interval_95": None, "majority": None}
    if not all(item.answers for item in items):
        unknown = {"metric": bench.METRIC, "score": None, "interval_95": None, "by_category": {}}
        return {**unknown, "n": len(items), **empty}
    return {**bench.summarise(rows), **empty, "majority": bench.majority(items)}


def _against_blind(
    bench: ModuleType, items: Sequence[Item], rows: Sequence[Row], blind_rows: Sequence[Row]
) -> dict[str, Any]:
    """Return the blind score, and what the picture adds with its paired interval."""
    if not all(item.answers for item in items):
        return {}
    summary = bench.summarise(blind_rows)
    before, after = bench.headline_sums(blind_rows), bench.headline_sums(rows)
    totals = [bench.headline(sums.sum(axis=0, keepdims=True))[0] for sums in (before, after)]
    interval = statistics.difference_interval(before, after, bench.headline)
    return {
        "blind": summary["score"],
        "blind_interval_95": summary["interval_95"],
        "blind_by_category": summary["by_category"],
        "gain_over_blind": float(totals[1] - totals[0]),
        "gain_over_blind_interval_95": list(interval),
    }


def _note(result: Mapping[str, Any]) -> str:
    """Say in words what a reader of the score should know first."""
    notes = []
    gain = result.get("gain_over_blind_interval_95")
    if gain and gain[0] <= 0:
        notes.append("not clearly above the score without pictures")
    if result["eos_rate"] < 1:
        notes.append(f"{1 - result['eos_rate']:.0%} of the answers were cut at the token limit")
    if result["n_errors"]:
        notes.append(f"{result['n_errors']} failed samples count as wrong")
    return "; ".join(notes)


def _lines(
    name: str,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    rows: Sequence[Row],
    blind_rows: Sequence[Row] | None,
) -> list[str]:
    lines = []
    for place, (item, row) in enumerate(zip(items, rows, strict=True)):
        answer = answers[item.id]
        entry = {
            "bench": name,
            "id": item.id,
            "group": item.group,
            "category": item.category,
            "image": None if item.image is None else item.image.where,
            "question": item.question,
            "options": list(item.options),
            "answers": list(item.answers),
            "text": row.text,
            "parsed": row.parsed,
            "score": row.score,
            "well_formed": row.well_formed,
            "ended": answer.ended,
            "n_tokens": answer.n_tokens,
            "error": answer.error,
            "details": row.details,
        }
        if blind_rows is not None:
            other = blind_rows[place]
            entry |= {"blind_text": other.text, "blind_parsed": other.parsed}
            entry["blind_score"] = other.score
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return lines


def check_parity(
    answerer: Answerer, items: Sequence[Item], n: int, max_new_tokens: int
) -> dict[str, Any]:
    """Compare batched answers with plain one-by-one generation on ``n`` spread items.

    Returns:
        How many were compared, how many differ, and up to ten pairs that do.
    """
    step = _REPRESENTATIVE_STEP
    chosen = {(place * step) % len(items) for place in range(min(n, len(items)))}
    requests = [
        Request(items[place].id, items[place].prompt, items[place].image) for place in chosen
    ]
    batched = answerer.answer(requests, max_new_tokens=max_new_tokens, progress=False)
    single = answerer.answer_one_by_one(requests, max_new_tokens=max_new_tokens)
    flips = [
        {"id": name, "batched": batched[name].text, "single": single[name].text}
        for name in batched
        if batched[name].text != single[name].text
    ]
    return {"n": len(requests), "n_different": len(flips), "examples": flips[:10]}
