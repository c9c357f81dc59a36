"""One bench from its items to its part of ``results.json`` and ``predictions.jsonl``."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_vl.eval import statistics
from milora_vl.eval.benches import BENCHES, Bench
from milora_vl.eval.items import Answer, EvaluationError, Item, Request, Row
from milora_vl.eval.journal import AnswerJournal
from milora_vl.eval.judge import Judge
from milora_vl.eval.runner import Answerer

_REPRESENTATIVE_STEP = 7919  # a prime: spreads the questions of a parity check over the bench


@dataclass(frozen=True)
class Conditions:
    """How the benches of one evaluation are run.

    Attributes:
        out_dir: Where submissions go.
        data_dir: Folder of the official files, or None.
        journal: Answers of an earlier, interrupted call.
        blind: Also ask without the picture.
        max_new_tokens: Limit of an answer; None: the bench's own.
        allow_errors: Samples of a bench that may fail.
        parity_check: Questions asked again one by one.
        judge: Scores free answers, or None.
        progress: Whether to show progress bars.
    """

    out_dir: Path
    data_dir: Path | None
    journal: AnswerJournal
    blind: bool
    max_new_tokens: int | None
    allow_errors: int
    parity_check: int
    judge: Judge | None
    progress: bool


def run_bench(
    name: str, items: Sequence[Item], answerer: Answerer, conditions: Conditions
) -> tuple[dict[str, Any], list[str]]:
    """Return the bench's part of the results and its lines of ``predictions.jsonl``.

    Raises:
        EvaluationError: If more samples failed than allowed, or the judge did.
    """
    if not items:
        raise ValueError(f"{name}: no question left to ask")
    bench = BENCHES[name]
    is_published = all(item.answers for item in items)
    options = {
        "max_new_tokens": conditions.max_new_tokens or bench.MAX_NEW_TOKENS,
        "allow_errors": conditions.allow_errors,
        "progress": conditions.progress,
        "journal": conditions.journal,
    }
    started, resumed_s = time.perf_counter(), conditions.journal.served_seconds
    answers = answerer.answer(_requests(items), label=name, **options)
    seconds = time.perf_counter() - started + conditions.journal.served_seconds - resumed_s
    rows = judge_all(bench, items, answers)
    blind_rows: list[Row] | None = None
    result: dict[str, Any] = {"blind": None, "blind_interval_95": None, "majority": None}
    if is_published:
        result = {**bench.summarise(rows), **result, "majority": bench.majority(items)}
    else:
        result |= {"metric": bench.METRIC, "score": None, "interval_95": None, "by_category": {}}
        result["n"] = len(items)
    if is_published and conditions.blind and any(item.image for item in items):
        requests = [Request(item.id, item.prompt, choices=item.choices) for item in items]
        blind_answers = answerer.answer(requests, label=f"{name}, no picture", **options)
        blind_rows = judge_all(bench, items, blind_answers)
        result |= _against_blind(bench, rows, blind_rows)
    if not is_published:
        texts = {row.id: row.text for row in rows}
        paths = bench.write_submission(items, texts, conditions.out_dir, conditions.data_dir)
        result["submission"] = [str(path) for path in paths]
        if conditions.judge is not None and hasattr(bench, "judge_prompt"):
            rows = _grade(name, items, rows, conditions.judge, conditions)
            result |= bench.summarise(rows)
            result |= {"judge": conditions.judge.model, "judge_prompt": bench.JUDGE_PROMPT}
    result |= _how_it_went(items, rows, answers)
    result |= {
        "seconds_per_item": seconds / len(items),
        "version": bench.VERSION,
        "max_new_tokens": options["max_new_tokens"],
    }
    if conditions.parity_check:
        result["parity"] = check_parity(
            bench, answerer, items, answers, conditions.parity_check, options["max_new_tokens"]
        )
    result["note"] = _note(result, is_judged=hasattr(bench, "judge_prompt"))
    return result, _lines(name, items, answers, rows, blind_rows)


def _requests(items: Sequence[Item]) -> list[Request]:
    return [Request(item.id, item.prompt, item.image, item.choices) for item in items]


def _how_it_went(
    items: Sequence[Item], rows: Sequence[Row], answers: Mapping[str, Answer]
) -> dict[str, Any]:
    """Return the rates that tell a broken template or adapter from a bad one."""
    asked = [one for one in answers.values() if one.error is None]
    ended = [one.ended for one in asked if one.ended is not None]
    expects_choice = [row for item, row in zip(items, rows, strict=True) if item.choices]
    off = sum(not row.well_formed for row in expects_choice)
    return {
        "eos_rate": sum(ended) / len(ended) if ended else None,
        "one_forward_rate": 1 - len(ended) / len(asked) if asked else None,
        "off_letter_rate": off / len(expects_choice) if expects_choice else None,
        "n_errors": sum(answer.error is not None for answer in answers.values()),
    }


def judge_all(bench: Bench, items: Sequence[Item], answers: Mapping[str, Answer]) -> list[Row]:
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


def _grade(
    name: str, items: Sequence[Item], rows: Sequence[Row], judge: Judge, conditions: Conditions
) -> list[Row]:
    """Return the rows with the judge's scores; a failed sample keeps its zero."""
    bench = BENCHES[name]
    prompts = {
        item.id: bench.judge_prompt(item, row.text)
        for item, row in zip(items, rows, strict=True)
        if row.text is not None
    }
    replies = judge.ask_all(
        prompts,
        bench.is_usable,
        conditions.out_dir / f"{name}_judge_replies.jsonl",
        progress=conditions.progress,
    )
    return [bench.with_reply(row, replies[row.id]) if row.id in replies else row for row in rows]


def _against_blind(bench: Bench, rows: Sequence[Row], blind_rows: Sequence[Row]) -> dict[str, Any]:
    """Return the blind score, and what the picture adds with its paired interval."""
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


def _note(result: Mapping[str, Any], *, is_judged: bool) -> str:
    """Say in words what a reader of the score should know first."""
    notes = []
    if result.get("judge"):
        notes.append(
            f"scored by the judge {result['judge']} with the prompt {result['judge_prompt']!r}"
        )
    elif is_judged:
        notes.append("no score without a judge: see the predictions and the judge's prompts")
    elif result["score"] is None:
        notes.append("answers not published: see the submission file")
    gain = result.get("gain_over_blind_interval_95")
    if gain and gain[0] <= 0:
        notes.append("not clearly above the score without pictures")
    if result["eos_rate"] is not None and result["eos_rate"] < 1:
        notes.append(f"{1 - result['eos_rate']:.0%} of the answers were cut at the token limit")
    if result["n_errors"]:
        notes.append(f"{result['n_errors']} failed samples count as wrong")
    if parity := result.get("parity"):
        notes.append(f"{parity['n_flips']} of {parity['n']} answers differ when asked one by one")
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
            "prompt": item.prompt,
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
    bench: Bench,
    answerer: Answerer,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    n: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Ask ``n`` spread items again, one by one with plain generation, and compare.

    Returns:
        How many were compared, how many texts differ, how many differ in what is read out of them
        (``n_flips``), and up to ten pairs that do.
    """
    chosen = {(place * _REPRESENTATIVE_STEP) % len(items) for place in range(min(n, len(items)))}
    spread = [items[place] for place in sorted(chosen) if answers[items[place].id].error is None]
    single = answerer.answer_one_by_one(_requests(spread), max_new_tokens=max_new_tokens)
    texts = {item.id: (answers[item.id].text or "", single[item.id].text or "") for item in spread}
    differing = [item for item in spread if texts[item.id][0] != texts[item.id][1]]
    flips = [
        item for item in differing if len({bench.parse(item, text) for text in texts[item.id]}) > 1
    ]
    return {
        "n": len(spread),
        "n_different": len(differing),
        "n_flips": len(flips),
        "examples": [
            {"id": item.id, "batched": texts[item.id][0], "single": texts[item.id][1]}
            for item in differing[:10]
        ],
    }
