"""Exports of a saved adapter: plain LoRA, smaller LoRA, merged model, each checked at once.

Everything is written beside the target first, loaded again the stock way and compared with the
live model; only what passes is moved into place.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from milora_vl.adapter.checkpoint import check_writable, write_adapter
from milora_vl.adapter.convert import dequantised_model, merge_adapter
from milora_vl.adapter.logits_check import (
    TOLERANCES,
    LogitsCheck,
    check_batches,
    compare_logits,
    drawn_picture,
    logits_of,
)
from milora_vl.adapter.model_card import model_card
from milora_vl.adapter.portable import MiloraFile, portable_tensors
from milora_vl.adapter.quantize import is_quantised
from milora_vl.adapter.recompress import recompress_tensors, summarise, truncation_report
from milora_vl.adapter.source import (
    Source,
    certificate_summary,
    example_of_run,
    read_source,
    warn_of_another_processor,
)
from milora_vl.adapter.state import recall
from milora_vl.files import replace_folder, write_json_atomic, write_text_atomic

Form = Literal["lora", "lora-small", "merged"]
MergeOnto = Literal["original", "dequantised"]


class ExportError(RuntimeError):
    """An export that does not compute what the live model computes; nothing was put in place."""


@dataclass(frozen=True)
class Exported:
    """What ``export_adapter`` did.

    Attributes:
        folder: Where it is.
        checks: The logits checks, one a batch.
        notes: More lines for people: what was cut off, distance to the 4-bit model.
    """

    folder: Path
    checks: tuple[LogitsCheck, ...]
    notes: tuple[str, ...]


def export_adapter(  # noqa: PLR0913  settings by keyword
    path: Path | str,
    out: Path | str,
    form: Form,
    *,
    base: str | None = None,
    r: int | None = None,
    merge_onto: MergeOnto | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    picture: Image.Image | None = None,
    question: str | None = None,
) -> Exported:
    """Export a saved adapter, check it against the live model and write a model card.

    Args:
        path: Run, checkpoint or adapter folder.
        out: Folder of the export; replaced only if it is empty or an earlier export.
        form: "lora": the plain LoRA (rank 2r); "lora-small": a plain LoRA of rank ``r``; "merged":
            a transformers checkpoint with its processor.
        base: Id or path of the original base; default: as recorded in the adapter.
        r: Rank for "lora-small"; default: the rank that was trained.
        merge_onto: For "merged" from a 4-bit base: its "original" weights, or the "dequantised"
            ones that training saw.
        device: Where models run.
        dtype: Dtype of loaded weights; "auto" keeps the checkpoint's.
        picture: For the check; default: the run's first validation picture, else a drawn one.
        question: For the check; default: the one that goes with the picture.

    Raises:
        ExportError: If the export does not compute what the live model computes.
        FileNotFoundError: If there is no adapter.
        ValueError: If the adapter is damaged or belongs to another base, ``out`` holds something
            else, or arguments do not fit.
        milora_vl.model.load.LoadError: If the base cannot be loaded.
    """
    out, source = Path(out), read_source(path, base, device, dtype)
    _check_out(out)
    _check_arguments(source.facts, form, r, merge_onto)
    vlm = source.load(quantised=True)
    warn_of_another_processor(source.facts, vlm.processor)
    # the 4-bit residual that was trained can be merged, but not reached by a LoRA on NF4(W)
    trained = form == "merged" and vlm.float_weights is not None
    live = source.attach(vlm, residual=None if trained else "anchor")
    example = None if picture else example_of_run(source.folder)
    shown, asked = example or (picture or drawn_picture(), "What is in the picture?")
    batches = check_batches(vlm.processor, live.device, live.dtype, shown, question or asked)
    wanted, processor = logits_of(live, batches), vlm.processor
    del vlm  # the checks load a second model: let the first one go as early as possible
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        draft = workspace / "export"
        if form == "merged":
            exported = _merge(source, live, processor, draft, merge_onto, batches, wanted)
        else:
            exported = _write_lora(source, live, draft, form, r)
            del live
            checks = _check_lora(source, draft, batches, wanted, judged=form == "lora")
            exported = Exported(out, tuple(checks), exported.notes)
        _refuse_failed(exported.checks, out)
        write_text_atomic(
            draft / "README.md", _card(source, processor, draft, form, exported, merge_onto)
        )
        draft.chmod(0o755)
        replace_folder(draft, out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return Exported(out, exported.checks, exported.notes)


def _check_out(out: Path) -> None:
    is_model = (out / "config.json").exists() and (out / "README.md").exists()
    if not is_model:
        check_writable(out)


def _check_arguments(
    facts: MiloraFile, form: Form, r: int | None, merge_onto: MergeOnto | None
) -> None:
    if r is not None and form != "lora-small":
        raise ValueError(f"--rank belongs to --form lora-small, not {form}")
    quantised = form == "merged" and bool(facts.base.get("quantised"))
    if quantised and merge_onto is None:
        raise ValueError(
            "the base of this adapter was quantised to 4 bits: say --merge-onto original or "
            "--merge-onto dequantised (see milora-vl export --help for the difference)"
        )
    if merge_onto == "dequantised" and not quantised:
        raise ValueError("--merge-onto dequantised needs --form merged and a 4-bit base")


def _write_lora(
    source: Source, live: PeftModel, draft: Path, form: Form, r: int | None
) -> Exported:
    tensors, state, facts, notes = portable_tensors(live), recall(live), source.facts, []
    class_names = {
        "base_model_class": type(live.get_base_model()).__name__,
        "parent_library": type(live.get_base_model()).__module__,
    }
    reference = {**facts.base, "name_or_path": source.base}
    facts = facts.model_copy(update={"base": reference})
    report = None
    if form == "lora-small":
        before = state.widening * state.r
        tensors, state, losses = recompress_tensors(tensors, state, r or state.r)
        report = truncation_report(losses, state.r, before)
        notes.append(summarise(report))
        kept = {key: value for key, value in vars(state).items() if key != "modules"}
        facts = facts.model_copy(update={**kept, "extra": {"recompressed_from": before}})
    write_adapter(draft, tensors, facts, class_names=class_names)
    if report:
        write_json_atomic(draft / "truncation.json", report)
    return Exported(draft, (), tuple(notes))


def _check_lora(
    source: Source,
    draft: Path,
    batches: Mapping[str, Mapping[str, Tensor]],
    wanted: Mapping[str, Tensor],
    *,
    judged: bool,
) -> list[LogitsCheck]:
    base = source.load(quantised=True).model
    tolerance = _tolerance(base) if judged else None
    stock = PeftModel.from_pretrained(base, draft)
    return compare_logits(wanted, logits_of(stock, batches), tolerance)


def _merge(
    source: Source,
    live: PeftModel,
    processor: Any,
    draft: Path,
    merge_onto: MergeOnto | None,
    batches: Mapping[str, Mapping[str, Tensor]],
    wanted: Mapping[str, Tensor],
) -> Exported:
    notes, reference, tolerance = [], wanted, _tolerance(live.get_base_model())
    is_nf4 = bool(source.facts.base.get("quantised"))
    if is_nf4 and merge_onto == "original":
        full = source.load(quantised=False)
        live = source.attach(full, strict_base=False)
        reference, tolerance = logits_of(live, batches), _tolerance(live.get_base_model())
    model = dequantised_model(live) if merge_onto == "dequantised" else merge_adapter(live)
    model.save_pretrained(draft)
    processor.save_pretrained(draft)
    dtype, kind = model.dtype, type(model)
    del live, model
    found = logits_of(_load_plain(kind, draft, dtype, source.device), batches)
    if reference is not wanted:
        lines = compare_logits(wanted, found, None)
        notes += [f"against the 4-bit model that was trained, {line}" for line in lines]
    return Exported(draft, tuple(compare_logits(reference, found, tolerance)), tuple(notes))


def _load_plain(
    kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    return kind.from_pretrained(folder, dtype=dtype).to(device).eval()


def _tolerance(model: PreTrainedModel) -> float:
    """Return the tolerance for a model's dtype; 4-bit layers multiply in bfloat16."""
    quantised = any(is_quantised(parameter) for parameter in model.parameters())
    return TOLERANCES[torch.bfloat16 if quantised else model.dtype]


def _refuse_failed(checks: tuple[LogitsCheck, ...], out: Path) -> None:
    failed = [str(check) for check in checks if not check.passed]
    if failed:
        raise ExportError(
            f"{out} was not written: the export does not compute what the live model computes. "
            + "; ".join(failed)
            + ". With --dtype float32 rounding is no reason; if it still fails, please report it"
        )


def _card(
    source: Source,
    processor: Any,
    draft: Path,
    form: Form,
    exported: Exported,
    merge_onto: MergeOnto | None,
) -> str:
    facts, r, alpha = source.facts, source.facts.r, source.facts.lora_alpha
    truncation = None
    if form != "merged":
        config = json.loads((draft / "adapter_config.json").read_text(encoding="utf-8"))
        r, alpha = config["r"], config["lora_alpha"]
        truncation = "\n".join(exported.notes) or None
    has_pictures = getattr(processor, "image_processor", None) is not None
    checks = [str(check) for check in exported.checks]
    return model_card(
        facts.model_copy(update={"base": {**facts.base, "name_or_path": source.base}}),
        form=form,
        r=r,
        lora_alpha=alpha,
        auto_class="AutoModelForImageTextToText" if has_pictures else "AutoModelForCausalLM",
        checks=checks if truncation else [*checks, *exported.notes],
        certificate=certificate_summary(source.folder),
        merged_onto=merge_onto if facts.base.get("quantised") else None,
        truncation=truncation,
    )
