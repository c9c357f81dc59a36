"""The model card of an exported folder: what it is, where it came from and how to load it."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from milora_vl.adapter.portable import MiloraFile

MERGED_ONTO = {
    "original": (
        "Merged onto the **original** weights. Training ran on a 4-bit copy of them (NF4), so this "
        "model differs from the trained one by the quantisation error of the base. The original "
        "weights carry more of what the base learnt, yet the adapter never saw them."
    ),
    "dequantised": (
        "Merged onto the **dequantised** 4-bit weights (NF4), those the adapter was trained on: "
        "the model computes what was trained, and keeps the quantisation error of the base in "
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
LOAD_MERGED = """from transformers import {auto}, AutoProcessor
model = {auto}.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")"""


def model_card(  # noqa: PLR0913  facts by keyword
    facts: MiloraFile,
    *,
    form: str,
    r: int,
    lora_alpha: float,
    auto_class: str,
    checks: Sequence[str],
    certificate: str | None,
    merged_onto: str | None = None,
    truncation: str | None = None,
) -> str:
    """Return the card as Markdown with the front matter that hubs read.

    Args:
        facts: ``milora.json`` of the adapter that was exported.
        form: "lora", "lora-small" or "merged".
        r: Rank of the exported LoRA, or of the one that was merged.
        lora_alpha: Its alpha.
        auto_class: Name of the transformers class that loads the base.
        checks: Lines of the logits check.
        certificate: Summary of the init certificate, if the run kept it.
        merged_onto: "original" or "dequantised" if the base was quantised.
        truncation: What was cut off, for "lora-small".
    """
    base = facts.base["name_or_path"] or "the base model"
    is_local = Path(base).is_absolute()
    shown = Path(base).name if is_local else base
    head = {
        "library_name": "transformers" if form == "merged" else "peft",
        "pipeline_tag": "image-text-to-text" if "ImageText" in auto_class else "text-generation",
        "tags": ["lora", facts.init.replace(":", "-")],
    }
    if not is_local and facts.base["name_or_path"]:
        head = {"base_model": base, **head}
    title = {
        "lora": f"LoRA of rank {r} for {shown}",
        "lora-small": f"LoRA of rank {r} for {shown}, recompressed",
        "merged": f"{shown} with a merged adapter",
    }[form]
    load = LOAD_MERGED if form == "merged" else LOAD_ADAPTER
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}",
        _facts_table(facts, shown, r, lora_alpha),
        "## Load",
        f"```python\n{load.format(auto=auto_class, base=shown)}\n```",
    ]
    if form == "lora" and r != facts.r:
        parts.append(
            f"Rank {r} is twice the trained rank {facts.r}: the second half of the factors "
            "subtracts what the adapter started from, so that it belongs on the original base, "
            "which stays as it is."
        )
    if truncation:
        parts += ["## What was cut off", truncation, "Per layer: `truncation.json`."]
    if merged_onto:
        parts += ["## Base", MERGED_ONTO[merged_onto]]
    parts += ["## Check against the trained model", "\n".join(f"* {line}" for line in checks)]
    if certificate:
        parts += ["## Start of training", f"```text\n{certificate}\n```"]
    parts += [
        "## Licence",
        "Not set: choose one, and add `license:` to the head of this file. The terms of the base "
        "model and of the training data hold beside it.",
    ]
    return "\n\n".join(parts) + "\n"


def _facts_table(facts: MiloraFile, shown: str, r: int, lora_alpha: float) -> str:
    method = facts.init
    if facts.slice in SLICES:
        method += f", started from {SLICES[facts.slice]}"
    revision = facts.base["revision"]
    rows = {
        "Base model": f"{shown}, revision {revision}" if revision else shown,
        "Weights of the base (SHA-256 over the adapted layers)": facts.fingerprint["exact"],
        "Method": method,
        "r, lora_alpha": f"{r}, {lora_alpha:g} (trained with {facts.r}, {facts.lora_alpha:g})",
        "Adapted layers": f"{len(facts.modules)}: "
        + ", ".join(sorted({name.rpartition(".")[2] for name in facts.modules})),
        "Projector": "trained in full" if facts.projector else "as in the base",
        "Made with": ", ".join(f"{name} {found}" for name, found in facts.packages.items()),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
