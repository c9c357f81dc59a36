"""Exports of a saved adapter: plain or smaller LoRA, merged, for servers, each checked at once.

An export is written beside its target, loaded again the stock way and compared with the live
model. Only what passes is moved into place, with a model card that says what it is, where it came
from and how to load it.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from milora_vl.adapter.checkpoint import check_writable, write_adapter
from milora_vl.adapter.portable import MiloraFile, portable_tensors
from milora_vl.adapter.state import recall
from milora_vl.adapter.tuned import read_adapter
from milora_vl.errors import MiloraError
from milora_vl.export.gguf import TEXT_FILE, check_model, read_back_, write_gguf
from milora_vl.export.logits_check import (
    LogitsCheck,
    check_batches,
    compare_logits,
    drawn_picture,
    logits_of,
    tolerance_of,
)
from milora_vl.export.merge import (
    dequantized_model,
    merge_adapter,
    recompress_tensors,
    summarize,
    truncation_report,
)
from milora_vl.export.plain import PlainSource, write_card, write_plain, write_whole
from milora_vl.export.serve import LORA, write_serve
from milora_vl.export.source import (
    Source,
    certificate_summary,
    example_of_run,
    name_base,
    read_source,
    warn_of_another_processor,
)
from milora_vl.files import replace_folder, write_json_atomic, write_text_atomic

MERGED_ONTO = {
    "original": (
        "Merged onto the **original** weights. Training ran on a 4-bit copy of them (NF4), so this "
        "model differs from the trained one by the quantization error of the base. The original "
        "weights carry more of what the base learned, yet the adapter never saw them."
    ),
    "dequantized": (
        "Merged onto the **dequantized** 4-bit weights (NF4), those the adapter was trained on: "
        "the model computes what was trained, and keeps the quantization error of the base in "
        "full precision."
    ),
}
SLICES = {
    "minor": "the minor singular components of each weight (MiLoRA)",
    "principal": "the principal singular components of each weight (PiSSA)",
    "middle": "the middle of each weight's spectrum",
    "random": "random singular components of each weight",
}
LOAD_ADAPTER = """from peft import PeftModel
from transformers import {auto}, AutoProcessor
model = {auto}.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
processor = AutoProcessor.from_pretrained({base!r})"""
LOAD_SERVE = """from peft import PeftModel
from transformers import {auto}, AutoProcessor
model = {auto}.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "path/to/this/folder/lora")
processor = AutoProcessor.from_pretrained({base!r})"""
LOAD_GGUF = """llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf --image IMAGE -p QUESTION
llama-server -m model.gguf --mmproj mmproj.gguf
# without images: llama-cli -m model.gguf. Other precisions: llama-quantize model.gguf OUT Q4_K_M"""
LOAD_MERGED = """from transformers import {auto}, AutoProcessor
model = {auto}.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")"""


def model_card(  # noqa: PLR0913  values by keyword
    metadata: MiloraFile,
    *,
    form: str,
    r: int,
    lora_alpha: float,
    auto_class: str,
    checks: Sequence[str],
    certificate: str | None,
    merged_onto: str | None = None,
    truncation: str | None = None,
    commands: Sequence[str] = (),
) -> str:
    """Return the card as Markdown with the front matter that hubs read.

    Args:
        metadata: ``milora.json`` of the adapter that was exported.
        form: See ``export_adapter``.
        r: Rank of the exported LoRA, or of the one that was merged.
        lora_alpha: Its alpha.
        auto_class: Name of the transformers class that loads the base.
        checks: Lines of the logits check.
        certificate: Summary of the init certificate, if the run kept it.
        merged_onto: "original" or "dequantized" if the base was quantized.
        truncation: What was cut off, for a smaller rank.
        commands: How servers are started with it, for "serve".
    """
    base = metadata.base["name_or_path"] or "the base model"
    is_local = Path(base).is_absolute()
    shown = Path(base).name if is_local else base
    head = {
        "library_name": "transformers" if form == "merged" else "peft",
        "pipeline_tag": "image-text-to-text" if "ImageText" in auto_class else "text-generation",
        "tags": ["lora", metadata.init.replace(":", "-")],
    }
    if not is_local and metadata.base["name_or_path"]:
        head = {"base_model": base, **head}
    title = {
        "lora": f"LoRA of rank {r} for {shown}",
        "lora-small": f"LoRA of rank {r} for {shown}, recompressed",
        "merged": f"{shown} with a merged adapter",
        "serve": f"LoRA of rank {r} for servers, beside {shown}",
        "gguf": f"{shown} with a merged adapter, for llama.cpp",
    }[form]
    loads = {"merged": LOAD_MERGED, "serve": LOAD_SERVE, "gguf": LOAD_GGUF}
    load = loads.get(form, LOAD_ADAPTER)
    loaded = "path/to/this/folder/base" if form == "serve" and metadata.projector else shown
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}",
        _metadata_table(metadata, shown, r, lora_alpha),
        "## Load",
        f"```python\n{load.format(auto=auto_class, base=loaded)}\n```",
    ]
    if form in ("lora", "serve") and r == 2 * metadata.r:
        parts.append(
            f"Rank {r} is twice the trained rank {metadata.r}: the second half of the factors "
            "subtracts what the adapter started from, so that it belongs on the original base, "
            "which stays as it is."
        )
    if commands:
        parts += ["## Serve", "```text\n" + "\n".join(commands) + "\n```"]
    if truncation:
        parts += ["## What was cut off", truncation, "Per layer: `truncation.json`."]
    if merged_onto:
        parts += ["## Base", MERGED_ONTO[merged_onto]]
    parts += ["## Check against the trained model", "\n".join(f"* {line}" for line in checks)]
    if certificate:
        parts += ["## Start of training", f"```text\n{certificate}\n```"]
    parts += [
        "## License",
        "Not set: choose one, and add `license:` to the head of this file. The terms of the base "
        "model and of the training data hold beside it.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata_table(metadata: MiloraFile, shown: str, r: int, lora_alpha: float) -> str:
    method = metadata.init
    if metadata.slice in SLICES:
        method += f", started from {SLICES[metadata.slice]}"
    revision = metadata.base["revision"]
    rows = {
        "Base model": f"{shown}, revision {revision}" if revision else shown,
        "Weights of the base (SHA-256 over the adapted layers)": metadata.fingerprint["exact"],
        "Method": method,
        "r, lora_alpha": f"{r}, {lora_alpha:g} (trained with {metadata.r}, "
        f"{metadata.lora_alpha:g})",
        "Adapted layers": f"{len(metadata.modules)}: "
        + ", ".join(sorted({name.rpartition(".")[2] for name in metadata.modules})),
        **(
            {"Strength": f"{metadata.extra['strength']:g} of what was trained"}
            if "strength" in metadata.extra
            else {}
        ),
        "Projector": "trained in full" if metadata.projector else "as in the base",
        "Made with": ", ".join(f"{name} {found}" for name, found in metadata.packages.items()),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


Form = Literal["lora", "lora-small", "merged", "serve", "gguf"]
MergeOnto = Literal["original", "dequantized"]


class ExportError(MiloraError, RuntimeError):
    """An export that does not compute what the live model computes; nothing was put in place."""


@dataclass(frozen=True)
class Exported:
    """What ``export_adapter`` did.

    Attributes:
        folder: Where it is.
        checks: The logits checks, one a batch.
        notes: More lines for people: what was cut off, distance to the 4-bit model.
        commands: How servers are started with the export.
    """

    folder: Path
    checks: tuple[LogitsCheck, ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...] = ()


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
    strength: float = 1.0,
) -> Exported:
    """Export a saved adapter, check it against the live model and write a model card.

    Args:
        path: Run, checkpoint or adapter folder.
        out: Folder of the export; replaced only if it is empty or an earlier export.
        form: "lora": the plain LoRA (rank 2r); "lora-small": a plain LoRA of rank ``r``; "merged":
            a transformers checkpoint with its processor; "serve": the base with the trained
            projector in ``base/``, and a LoRA without it in ``lora/``; "gguf": merged, for
            llama.cpp, see ``gguf.py``.
        base: Id or path of the original base; default: as recorded in the adapter.
        r: Rank for "lora-small" (default: the rank that was trained) or "serve" (default: rank
            2r, exact).
        merge_onto: For "merged" from a 4-bit base: its "original" weights, or the "dequantized"
            ones that training saw.
        device: Where models run.
        dtype: Dtype of loaded weights; "auto" keeps the checkpoint's.
        picture: Image for the check; default: the run's first validation image, else a drawn one.
        question: For the check; default: the one of that image.
        strength: Export W + strength * (what training added to W); 0 is the base.

    Raises:
        ExportError: If the export does not compute what the live model computes.
        FileNotFoundError: If there is no adapter.
        ValueError: If the adapter is damaged or belongs to another base, ``out`` holds something
            else, or arguments do not fit.
        milora_vl.model.load.LoadError: If the base cannot be loaded.
    """
    if merge_onto == "dequantised":  # the older spelling
        merge_onto = "dequantized"
    out, found = Path(out), read_adapter(path)
    if not _is_earlier_export(out):
        check_writable(out)
    if not found.is_ours:
        plain = PlainSource(found, name_base(base or found.base, path), device, dtype)
        _check_plain_arguments(form, r, merge_onto, strength)
        return _export_plain(plain, out, form, r, picture, question)
    source = read_source(path, base, device, dtype, strength)
    _check_arguments(source.metadata, form, r, merge_onto)
    if strength != 1 and merge_onto == "dequantized":
        raise ValueError(
            "--strength needs the weights of the base, and those in 4 bits hold the residual; use "
            "--merge-onto original"
        )
    vlm = source.load(quantized=True)
    if form == "gguf":
        check_model(vlm.model)
    warn_of_another_processor(source.metadata, vlm.processor)
    # the 4-bit residual that was trained can be merged, but not reached by a LoRA on NF4(W)
    trained = (
        form in ("merged", "serve", "gguf") and vlm.float_weights is not None and strength == 1
    )
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
        if form in ("merged", "gguf"):
            exported = _merge(source, live, processor, draft, merge_onto, batches, wanted, form)
        elif form == "serve":
            parts = write_serve(source, live, processor, draft, out, r, batches, wanted)
            exported = Exported(out, *map(tuple, parts))
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
    return replace(exported, folder=out)


def _is_earlier_export(out: Path) -> bool:
    """Tell whether a folder is an earlier export other than an adapter, which may be replaced."""
    inside = (out / "config.json", out / TEXT_FILE, out / LORA / "adapter_config.json")
    return (out / "README.md").exists() and any(file.exists() for file in inside)


def _export_plain(
    source: PlainSource,
    out: Path,
    form: Form,
    r: int | None,
    image: Image.Image | None,
    question: str | None,
) -> Exported:
    """Export a PEFT adapter that others made."""
    found: list[Exported] = []

    def write(draft: Path) -> None:
        checks, notes, rows = write_plain(source, draft, form, r=r, image=image, question=question)
        _refuse_failed(checks, out)
        load = LOAD_MERGED if form == "merged" else LOAD_ADAPTER
        lines = "\n".join(f"* {line}" for line in (*notes, *checks))
        parts = [f"## Check against the adapter as it was\n\n{lines}"]
        write_card(source, draft, form, load, parts, rows)
        found.append(Exported(out, checks, notes))

    write_whole(out, write)
    return found[0]


def _check_plain_arguments(
    form: Form, r: int | None, merge_onto: MergeOnto | None, strength: float
) -> None:
    if form == "serve" or merge_onto or strength != 1:
        raise ValueError(
            "--form serve, --merge-onto and --strength need an adapter of this package, and this "
            "is PEFT's; --form lora, lora-small and merged take it"
        )
    if r is not None and form != "lora-small":
        raise ValueError(f"--rank belongs to --form lora-small, not {form}")


def _check_arguments(
    metadata: MiloraFile, form: Form, r: int | None, merge_onto: MergeOnto | None
) -> None:
    if r is not None and form not in ("lora-small", "serve"):
        raise ValueError(f"--rank belongs to --form lora-small or serve, not {form}")
    if form == "serve" and metadata.init == "dora":
        raise ValueError(
            "no server takes a DoRA (vLLM refuses it); export it merged (--form merged)"
        )
    quantized = form in ("merged", "gguf") and bool(metadata.base.get("quantized"))
    if quantized and merge_onto is None:
        raise ValueError(
            "the base of this adapter was quantized to 4 bits: say --merge-onto original or "
            "--merge-onto dequantized (see milora-vl export --help for the difference)"
        )
    if merge_onto == "dequantized" and not quantized:
        raise ValueError("--merge-onto dequantized needs --form merged or gguf and a 4-bit base")


def _write_lora(
    source: Source, live: PeftModel, draft: Path, form: Form, r: int | None
) -> Exported:
    tensors, state, metadata, notes = portable_tensors(live), recall(live), source.metadata, []
    class_names = {
        "base_model_class": type(live.get_base_model()).__name__,
        "parent_library": type(live.get_base_model()).__module__,
    }
    reference = {**metadata.base, "name_or_path": source.base}
    metadata = metadata.model_copy(update={"base": reference})
    report = None
    if form == "lora-small":
        before = state.widening * max(map(state.rank_of, state.modules))
        tensors, state, losses = recompress_tensors(tensors, state, r or state.r)
        report = truncation_report(losses, state.r, before)
        notes.append(summarize(report))
        kept = {key: value for key, value in vars(state).items() if key != "modules"}
        metadata = metadata.model_copy(
            update={**kept, "extra": {**metadata.extra, "recompressed_from": before}}
        )
    write_adapter(draft, tensors, metadata, class_names=class_names)
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
    base = source.load(quantized=True).model
    tolerance = tolerance_of(base) if judged else None
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
    form: Form,
) -> Exported:
    notes, reference, tolerance = [], wanted, tolerance_of(live.get_base_model())
    is_nf4 = bool(source.metadata.base.get("quantized"))
    if is_nf4 and merge_onto == "original":
        full = source.load(quantized=False)
        live = source.attach(full, strict_base=False)
        reference, tolerance = logits_of(live, batches), tolerance_of(live.get_base_model())
    model = dequantized_model(live) if merge_onto == "dequantized" else merge_adapter(live)
    if form == "gguf":
        write_gguf(model, processor, draft)
        plain = _read_gguf(source, model, draft)
    else:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
        dtype, kind = model.dtype, type(model)
        del live, model
        plain = kind.from_pretrained(draft, dtype=dtype).to(source.device).eval()
    found = logits_of(plain, batches)
    if reference is not wanted:
        lines = compare_logits(wanted, found, None)
        notes += [f"against the 4-bit model that was trained, {line}" for line in lines]
    return Exported(draft, tuple(compare_logits(reference, found, tolerance)), tuple(notes))


def _read_gguf(source: Source, merged: PreTrainedModel, draft: Path) -> PreTrainedModel:
    """Return the original base, filled from the files alone: what they lack would show."""
    plain = source.load(quantized=False).model.to(merged.dtype)
    read_back_(plain, draft)
    return plain.eval()


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
    metadata, r, alpha = source.metadata, source.metadata.r, source.metadata.lora_alpha
    truncation = None
    if form not in ("merged", "gguf"):
        folder = draft / LORA if form == "serve" else draft
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        r, alpha = config["r"], config["lora_alpha"]
        if form != "serve" or (draft / "truncation.json").exists():
            truncation = "\n".join(exported.notes) or None
    takes_images = getattr(processor, "image_processor", None) is not None
    checks = [str(check) for check in exported.checks]
    return model_card(
        metadata.model_copy(update={"base": {**metadata.base, "name_or_path": source.base}}),
        form=form,
        r=r,
        lora_alpha=alpha,
        auto_class="AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM",
        checks=checks if truncation else [*checks, *exported.notes],
        certificate=certificate_summary(source.folder),
        merged_onto=merge_onto if metadata.base.get("quantized") else None,
        truncation=truncation,
        commands=exported.commands,
    )
