"""Ask a model all questions of some benches, with and without pictures, and write the results."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from milora_vl.data.prompts import get_style
from milora_vl.eval.bench_run import Conditions, run_bench
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.forgetting import measure_text_loss
from milora_vl.eval.items import Item, read_json_object
from milora_vl.eval.journal import AnswerJournal, fingerprint_weights
from milora_vl.eval.judge import Judge
from milora_vl.eval.plain_answerer import build_answerer
from milora_vl.eval.published import published_scores
from milora_vl.eval.text_tasks import run_text_tasks
from milora_vl.files import write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

JOURNAL = "answers.partial.jsonl"
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
        vlm: Has ``model``, ``processor`` and ``prompt_style``; see ``load_vlm``.
        benches: Names in ``BENCHES``, as a list or joined by commas; "all" (with ``data_dir``: all
            whose files are there); "stickervqa" for the three of that set; "lm:" and a name for a
            text-only task of lm-eval-harness, or of a task file (``*.yaml``) in ``data_dir``.
        data_dir: Folder with the official files of the benches; None: their hub mirrors.
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
        judge: Scores the benches of free text; without it they get prediction files only.
        text_probe: Also measure the loss on fixed texts, which shows forgetting (``forgetting``).
        items: From ``load_items`` of the same benches, folder and limit; None: called here.
        progress: Whether to show progress bars.

    An interrupted call leaves its answers in ``out_dir``; the same call again goes on from there.

    Returns:
        What is written to ``results.json``.

    Raises:
        EvaluationError: If more samples failed than allowed; nothing failed is scored as "".
        ValueError: If a bench is unknown or a file malformed (before the model runs).
        FileNotFoundError: If a bench's files are not in ``data_dir``.
    """
    names = bench_names(benches)
    out_dir = Path(out_dir)
    data_dir = None if data_dir is None else Path(data_dir)
    items = load_items(benches, data_dir, limit) if items is None else items
    answerer = build_answerer(vlm, batch_size=batch_size) if items else None
    style_name = get_style(vlm.prompt_style).name
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
    journal = AnswerJournal(out_dir / JOURNAL, _identity(vlm.model, style_name, model_name))
    conditions = Conditions(
        out_dir=out_dir,
        data_dir=data_dir,
        journal=journal,
        blind=blind,
        max_new_tokens=max_new_tokens,
        allow_errors=allow_errors,
        parity_check=parity_check,
        judge=judge,
        progress=progress,
    )
    lines: list[str] = []
    for name in items:
        result, new_lines = run_bench(name, items[name], answerer, conditions)
        published = {} if data_set else published_scores(model_name, name)
        results["benches"][name] = {**result, **({"published": published} if published else {})}
        lines += new_lines
        write_text_atomic(out_dir / "predictions.jsonl", "".join(lines))
    if text_tasks:
        task_limit = limit if isinstance(limit, int) else None
        results["benches"] |= run_text_tasks(
            vlm,
            text_tasks,
            batch_size=batch_size,
            limit=task_limit,
            include_path=data_dir if data_dir and any(data_dir.glob("*.yaml")) else None,
        )
    results["text_probe"] = measure_text_loss(vlm) if text_probe else None
    write_json_atomic(out_dir / "results.json", results)
    journal.remove()
    return results


def _limit_of(limit: int | Mapping[str, int] | None, name: str) -> int | None:
    return limit.get(name) if isinstance(limit, Mapping) else limit


def load_items(
    benches: str | Sequence[str],
    data_dir: Path | None,
    limit: int | Mapping[str, int] | None = None,
) -> dict[str, list[Item]]:
    """Read the questions of all benches, so that a slip shows before a model is loaded or asked.

    Args:
        benches: As in ``evaluate``; text-only tasks are left out.
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
        try:
            items[name] = BENCHES[name].load(data_dir, limit=_limit_of(limit, name))
        except FileNotFoundError:
            if not is_all:
                raise
            absent.append(name)
    if is_all and not items:
        raise FileNotFoundError(f"{data_dir}: no files of any bench ({', '.join(absent)})")
    if absent:
        logger.warning("no files, left out: %s", ", ".join(absent))
    return items


def _identity(model: Any, style_name: str, model_name: str) -> dict[str, Any]:
    """Return what an answer depends on besides the question."""
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
            f"unknown bench {unknown or benches!r}; choose from {', '.join(BENCHES)}, all, "
            "stickervqa, lm:TASK"
        )
    return list(dict.fromkeys(found))
