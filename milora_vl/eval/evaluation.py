"""Evaluate a model on benches: from their questions to ``results.json`` and ``predictions.jsonl``.

``evaluate`` is the entry, ``run_bench`` takes one bench the whole way: ask all questions with and
without their images, judge the answers, sum them up.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from milora_vl.data.prompts import get_style
from milora_vl.eval import statistics
from milora_vl.eval.answering import AnswerJournal, Asker, fingerprint_weights
from milora_vl.eval.bench_files import BenchError, read_json_object, shorten
from milora_vl.eval.benches import BENCHES, Bench
from milora_vl.eval.endpoint import PROMPT_STYLE, EndpointAnswerer
from milora_vl.eval.forgetting import measure_text_loss
from milora_vl.eval.generate_shared import build_answerer
from milora_vl.eval.items import Answer, EvaluationError, Item, Request, Row
from milora_vl.eval.judge import Judge
from milora_vl.eval.published import published_scores
from milora_vl.eval.scoring import write_submission
from milora_vl.eval.text_tasks import run_text_tasks
from milora_vl.files import write_json_atomic, write_text_atomic
from milora_vl.runtime import process_count, process_rank, wait_for_all

logger = logging.getLogger(__name__)

_REPRESENTATIVE_STEP = 7919  # a prime: spreads the questions of a parity check over the bench


@dataclass(frozen=True)
class Conditions:
    """How the benches of one evaluation are run.

    Attributes:
        out_dir: Where submissions go.
        data_dir: Folder of the official files, or None.
        journal: Answers of an earlier, interrupted call.
        blind: Also ask without the image.
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

    def longest(self, name: str) -> int:
        """Return the limit of a bench's answers, in tokens."""
        return self.max_new_tokens or BENCHES[name].MAX_NEW_TOKENS

    def ask(
        self, answerer: Asker, name: str, requests: Sequence[Request], note: str = ""
    ) -> dict[str, Answer]:
        """Ask a bench's questions; ``note`` is added to its name on the progress bar."""
        return answerer.answer(
            requests,
            label=f"{name}{note}",
            max_new_tokens=self.longest(name),
            allow_errors=self.allow_errors,
            progress=self.progress,
            journal=self.journal,
        )


def run_bench(
    name: str, items: Sequence[Item], answerer: Asker, conditions: Conditions
) -> tuple[dict[str, Any], list[str]]:
    """Return the bench's part of the results and its lines of ``predictions.jsonl``.

    Raises:
        EvaluationError: If more samples failed than allowed, or the judge did.
    """
    if not items:
        raise ValueError(f"{name}: no question left to ask")
    bench = BENCHES[name]
    is_judged = hasattr(bench, "judge_prompt")
    labeled = [item for item in items if item.answers]
    asked, asked_blind = _requests(items, blind=conditions.blind)
    started, resumed_s = time.perf_counter(), conditions.journal.served_seconds
    answers = conditions.ask(answerer, name, asked)
    # answers kept by an interrupted call count with the time they took then
    seconds = time.perf_counter() - started + conditions.journal.served_seconds - resumed_s
    rows = judge_all(bench, items, answers)
    blind_rows: dict[str, Row] = {}
    result: dict[str, Any] = {"blind": None, "blind_interval_95": None, "majority": None}
    if labeled:
        # a question without a label is neither right nor wrong
        scored = [row for row in rows if row.answers]
        result = {**bench.summarize(scored), **result, "majority": bench.majority(labeled)}
    else:
        result |= {"metric": bench.METRIC, "score": None, "interval_95": None, "by_category": {}}
        result["n"] = len(items)
    if asked_blind:
        blind_answers = conditions.ask(answerer, name, asked_blind, note=", no image")
        blind_rows = {row.id: row for row in judge_all(bench, labeled, blind_answers)}
        result |= _against_blind(bench, scored, list(blind_rows.values()))
    if not labeled:
        texts = {row.id: row.text for row in rows}
        files = bench.submission(items, texts, conditions.data_dir)
        paths = write_submission(files, conditions.out_dir)
        result["submission"] = [str(path) for path in paths]
        if conditions.judge is not None and is_judged:
            rows = _grade(name, items, rows, conditions.judge, conditions)
            result |= bench.summarize(rows)
            result |= {"judge": conditions.judge.model, "judge_prompt": bench.JUDGE_PROMPT}
    if not is_judged:
        result["n_unlabeled"] = len(items) - len(labeled)
    result |= _how_it_went(items, rows, answers)
    result |= {
        "seconds_per_item": seconds / len(items),
        "version": bench.VERSION,
        "max_new_tokens": conditions.longest(name),
    }
    if conditions.parity_check:
        n = conditions.parity_check
        result["parity"] = check_parity(
            bench, answerer, items, answers, n, conditions.longest(name)
        )
    result["note"] = _note(result, is_judged=is_judged)
    return result, _lines(name, items, answers, rows, blind_rows)


def _requests(items: Sequence[Item], *, blind: bool) -> tuple[list[Request], list[Request]]:
    """Return what is asked, and what is asked again without images, to score what they add."""
    asked = [Request(x.id, x.prompt, x.image, x.more_images, x.video) for x in items]
    labeled = [item for item in items if item.answers]
    if not blind or not any(item.image or item.video for item in labeled):
        return asked, []
    return asked, [Request(item.id, item.prompt) for item in labeled]


def _how_it_went(
    items: Sequence[Item], rows: Sequence[Row], answers: Mapping[str, Answer]
) -> dict[str, Any]:
    """Return the rates that tell a broken template or adapter from a bad one."""
    asked = [one for one in answers.values() if one.error is None]
    ended = [one.ended for one in asked]
    expects_choice = [row for item, row in zip(items, rows, strict=True) if item.choices]
    off = sum(not row.well_formed for row in expects_choice)
    return {
        "eos_rate": sum(ended) / len(ended) if ended else None,
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
    """Return the blind score, and what the image adds with its paired interval."""
    summary = bench.summarize(blind_rows)
    # sums of the same questions, so that the difference is paired
    before, after = bench.headline_sums(blind_rows), bench.headline_sums(rows)
    interval = statistics.difference_interval(before, after, bench.headline)
    return {
        "blind": summary["score"],
        "blind_interval_95": summary["interval_95"],
        "blind_by_category": summary["by_category"],
        "gain_over_blind": statistics.total(after, bench.headline)
        - statistics.total(before, bench.headline),
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
    elif result.get("n_unlabeled"):
        notes.append(f"{result['n_unlabeled']} questions have no label and are not scored")
    gain = result.get("gain_over_blind_interval_95")
    if gain and gain[0] <= 0:
        notes.append("not clearly above the score without images")
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
    blind_rows: Mapping[str, Row],
) -> list[str]:
    lines = []
    for item, row in zip(items, rows, strict=True):
        answer = answers[item.id]
        entry = {
            "bench": name,
            "id": item.id,
            "group": item.group,
            "category": item.category,
            "image": None if item.image is None else item.image.where,
            **({} if item.video is None else {"video": str(item.video.path)}),
            "question": item.question,
            "prompt": item.prompt,
            "options": list(item.options),
            "answers": list(item.answers),
            "text": row.text,
            "parsed": row.parsed,
            "score": row.score if row.answers or "judge_reply" in row.details else None,
            "well_formed": row.well_formed,
            "ended": answer.ended,
            "n_tokens": answer.n_tokens,
            "error": answer.error,
            "details": row.details,
        }
        if (other := blind_rows.get(item.id)) is not None:
            entry |= {"blind_text": other.text, "blind_parsed": other.parsed}
            entry["blind_score"] = other.score
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return lines


def check_parity(
    bench: Bench,
    answerer: Asker,
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
    requests, _ = _requests(spread, blind=False)
    single = answerer.answer_one_by_one(requests, max_new_tokens=max_new_tokens)
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


JOURNAL = "answers.partial.jsonl"
SHARED_JOURNALS = "answers.partial.*.jsonl"
"""Answers of the other processes of a job, one file each."""
STICKERVQA = ("mmbench", "pope", "vqav2")
"""Benches whose formats StickerVQA is written in."""
TEXT_PREFIX = "lm:"


def evaluate(  # noqa: PLR0913 - the public entry, all keyword-only after the four places
    vlm: Any,
    benches: str | Sequence[str],
    data_dir: Path | str | None,
    out_dir: Path | str,
    *,
    batch_size: int = 16,
    limit: int | Mapping[str, int] | None = None,
    blind: bool = True,
    max_new_tokens: int | None = None,
    model_name: str | None = None,
    adapter_name: str | None = None,
    allow_errors: int = 0,
    parity_check: int = 0,
    judge: Judge | None = None,
    text_probe: bool = True,
    items: Mapping[str, Sequence[Item]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model; write ``results.json`` and ``predictions.jsonl`` into ``out_dir``.

    Args:
        vlm: Has ``model``, ``processor`` and ``prompt_style``, see ``load_vlm``; or a served model,
            see ``EndpointAnswerer``, whose text loss cannot be measured.
        benches: Names in ``BENCHES``, as a list or joined by commas; "all" (with ``data_dir``: all
            whose files are there); "stickervqa" for the three of that set; "lm:" and a name for a
            text-only task of lm-eval-harness, or of a task file (``*.yaml``) in ``data_dir``.
        data_dir: Folder with the official files of the benches; None: their hub mirrors.
        out_dir: Where results go; made if need be.
        batch_size: Most questions in one forward pass.
        limit: Most questions of a bench (MMBench: base questions), or that by bench name.
        blind: Also ask the same prompts without the image.
        max_new_tokens: Limit of an answer; None: the bench's own.
        model_name: Recorded in the results; None: ``vlm.path``.
        adapter_name: Recorded in the results.
        allow_errors: Samples of a bench that may fail; they count as wrong.
        parity_check: Ask so many questions of each bench again, one by one with plain ``generate``,
            and record how many answers differ.
        judge: Scores the benches of free text; without it they get prediction files only.
        text_probe: Also measure the loss on fixed texts, which shows forgetting (``forgetting``).
        items: From ``load_items`` of the same benches, folder and limit; None: called here.
        progress: Whether to show progress bars.

    An interrupted call leaves its answers in ``out_dir``; the same call again goes on from there.
    In a job of several processes all of them call this, and each answers a share of the questions.

    Returns:
        What is written to ``results.json``; nothing in processes other than the main one.

    Raises:
        EvaluationError: If more samples failed than allowed; nothing failed is scored as "".
        ValueError: If a bench is unknown or a file malformed (before the model runs).
        FileNotFoundError: If a bench's files are not in ``data_dir``.
    """
    names = bench_names(benches)
    out_dir = Path(out_dir)
    data_dir = None if data_dir is None else Path(data_dir)
    items = load_items(benches, data_dir, limit) if items is None else items
    answerer = _choose_answerer(vlm, batch_size) if items else None
    is_remote = isinstance(vlm, EndpointAnswerer)
    style_name = PROMPT_STYLE if is_remote else get_style(vlm.prompt_style).name
    model_name = str(model_name or getattr(vlm, "path", "") or "")
    data_set = None if data_dir is None else _data_set_name(data_dir)
    text_tasks = [name.removeprefix(TEXT_PREFIX) for name in names if name.startswith(TEXT_PREFIX)]
    results: dict[str, Any] = {
        "model": model_name,
        "adapter": None if adapter_name is None else str(adapter_name),
        "prompt_style": style_name,
        "data": None if data_dir is None else str(data_dir),
        "data_set": data_set,
        "limit": {name: _limit_of(limit, name) for name in items},
        "benches": {},
    }
    rank = process_rank()
    file = JOURNAL if rank == 0 else SHARED_JOURNALS.replace("*", str(rank))
    journal = AnswerJournal(out_dir / file, _identity(vlm, style_name, model_name))
    conditions = Conditions(
        out_dir=out_dir,
        data_dir=data_dir,
        journal=journal,
        blind=blind,
        max_new_tokens=max_new_tokens,
        allow_errors=allow_errors,
        parity_check=parity_check,
        judge=judge,
        progress=progress and rank == 0,
    )
    if answerer is not None:
        _answer_together(items, answerer, conditions)
    if rank > 0:
        return {}
    lines: list[str] = []
    for name in items:
        result, new_lines = run_bench(name, items[name], answerer, conditions)
        published = {} if data_set else published_scores(model_name, name)
        results["benches"][name] = {**result, **({"published": published} if published else {})}
        lines += new_lines
        # after every bench, so that a crash loses one at the most
        write_text_atomic(out_dir / "predictions.jsonl", "".join(lines))
    if is_remote:  # a server gives no logits of a text
        text_probe = False
    # lm-eval scores a model whose logits are NaN like any other, so the probe comes first
    probe = measure_text_loss(vlm) if text_probe or text_tasks else None
    if text_tasks:
        results["benches"] |= run_text_tasks(
            vlm,
            text_tasks,
            batch_size=batch_size,
            limit=limit if isinstance(limit, int) else None,
            include_path=data_dir if data_dir and any(data_dir.glob("*.yaml")) else None,
        )
    results["text_probe"] = probe if text_probe else None
    write_json_atomic(out_dir / "results.json", results)
    # only now: until the results are written, the journal is what an interrupted call goes on from
    journal.remove()
    return results


def _answer_together(
    items: Mapping[str, Sequence[Item]], answerer: Asker, conditions: Conditions
) -> None:
    """Answer this process's share of all questions; the main process gets those of the others.

    What a process cannot answer is left to the main one, which counts its failures.
    """
    rank, count = process_rank(), process_count()
    for name, all_items in items.items() if count > 1 else ():
        for asked in _requests(share_of(all_items, rank, count), blind=conditions.blind):
            # failures are counted by the main process, which asks again what has no answer
            lenient = replace(conditions, allow_errors=len(asked))
            lenient.ask(answerer, name, asked)
    wait_for_all()
    if rank == 0:  # with one process: what an interrupted job of several left
        for file in sorted(conditions.out_dir.glob(SHARED_JOURNALS)):
            conditions.journal.take_over(file)


def share_of(items: Sequence[Item], rank: int, count: int) -> list[Item]:
    """Return one process's share of a bench; questions on one image stay together."""
    places: dict[str, int] = {}
    for item in items:
        places.setdefault(item.group, len(places))
    return [item for item in items if places[item.group] % count == rank]


def _limit_of(limit: int | Mapping[str, int] | None, name: str) -> int | None:
    return limit.get(name) if isinstance(limit, Mapping) else limit


def load_items(
    benches: str | Sequence[str],
    data_dir: Path | None,
    limit: int | Mapping[str, int] | None = None,
) -> dict[str, list[Item]]:
    """Read the questions of all benches, so that a slip shows before a model is loaded or asked.

    Args:
        benches: As in ``evaluate``; text-only tasks have no items here.
        data_dir: As there.
        limit: As there.

    Raises:
        ValueError: If a bench is unknown or a file malformed.
        FileNotFoundError: If a bench's files are not in ``data_dir``.
    """
    names = bench_names(benches)
    is_all = benches in ("all", ["all"])
    if is_all and data_dir is not None and data_dir.is_file():
        raise ValueError(f"{data_dir} is one file: name its bench, or the folder of all benches")
    items = {}
    absent = []
    for name in names:
        if name.startswith(TEXT_PREFIX) or (is_all and data_dir is None and name == "custom"):
            continue
        bench = BENCHES[name]
        try:
            items[name] = bench.sample(bench.load(data_dir), _limit_of(limit, name))
        except FileNotFoundError:
            if not is_all:
                raise
            absent.append(name)
        else:
            if not items[name]:
                raise BenchError(f"{name}: no question in {data_dir or 'its hub mirror'}")
    if is_all and not items:
        raise FileNotFoundError(f"{data_dir}: no files of any bench ({', '.join(absent)})")
    if absent:
        logger.warning("skipped, since their files are not there: %s", ", ".join(absent))
    return items


def _choose_answerer(vlm: Any, batch_size: int) -> Any:
    if isinstance(vlm, EndpointAnswerer):
        return vlm
    return build_answerer(vlm, batch_size=batch_size)


def _identity(vlm: Any, style_name: str, model_name: str) -> dict[str, Any]:
    """Return what an answer depends on besides the question."""
    if isinstance(vlm, EndpointAnswerer):
        return vlm.identity()
    model = vlm.model
    is_autocast = torch.is_autocast_enabled(model.device.type)
    return {
        "model": model_name,
        "weights": fingerprint_weights(model),
        "prompt_style": style_name,
        "dtype": str(model.dtype),
        "autocast": str(torch.get_autocast_dtype(model.device.type)) if is_autocast else None,
    }


def _data_set_name(data_dir: Path) -> str | None:
    """Return the name in the data's manifest: its questions are not the published benches."""
    # also of one file of the set, or of one of its folders
    for folder in (data_dir, *data_dir.resolve().parents[:2]):
        file = folder / "manifest.json"
        if file.is_file() and (name := read_json_object(file).get("name")):
            return str(name)
    return None


def bench_names(benches: str | Sequence[str]) -> list[str]:
    """Return bench names in the order given, text-only tasks each with "lm:" before its name.

    "lm:" holds for the names after it too, up to a bench: "lm:arc_easy,gsm8k,pope".

    Raises:
        ValueError: If one is unknown, naming the known ones, or none is given.
    """
    names = benches.split(",") if isinstance(benches, str) else list(benches)
    names = [name.strip() for name in names if name.strip()]
    found: list[str] = []
    unknown: list[str] = []
    is_text = False
    for name in names:
        lowered = name.lower()
        is_text = name.startswith(TEXT_PREFIX) or (is_text and lowered not in BENCHES)
        if is_text:
            found.append(TEXT_PREFIX + name.removeprefix(TEXT_PREFIX))
        elif lowered in ("all", "stickervqa"):
            found += BENCHES if lowered == "all" else STICKERVQA
        elif lowered in BENCHES:
            found.append(lowered)
        else:
            unknown.append(name)
    if unknown or not found:
        raise ValueError(
            f"unknown bench {shorten(repr(unknown or benches))}; choose from "
            f"{', '.join(BENCHES)}, all, stickervqa, lm:TASK"
        )
    return list(dict.fromkeys(found))
