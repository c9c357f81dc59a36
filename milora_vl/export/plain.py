"""Exports of PEFT adapters that others made: the same three forms, where each is exact.

* ``lora``: the same LoRA under the names of this transformers version.
* ``lora-small``: linear LoRA factors recompressed to one rank; saved modules and biases stay.
* ``merged``: every kind that PEFT itself can merge, each layer in float32 and rounded once.

What a form cannot express is refused by name before the model is run.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_vl.adapter.portable import PREFIX, WEIGHTS_FILE
from milora_vl.adapter.quantized import is_quantized
from milora_vl.adapter.tuned import Found, PlainAdapter, put_plain_adapter_on, read_plain_adapter
from milora_vl.export.logits_check import (
    LogitsCheck,
    check_batches,
    compare_logits,
    drawn_picture,
    logits_of,
    tolerance_of,
)
from milora_vl.export.merge import (
    Truncation,
    check_merged_values,
    recompress,
    summarize,
    truncation_report,
)
from milora_vl.files import replace_folder, write_json_atomic, write_text_atomic
from milora_vl.model.load import VLM, load_vlm

NAME = "default"  # PEFT's name of a model's only adapter


@dataclass(frozen=True)
class PlainSource:
    """A PEFT adapter of others and the base it goes on.

    Attributes:
        found: What it says of itself.
        base: Id or path of the base model.
        device: Where models run.
        dtype: Of loaded weights; "auto" keeps the checkpoint's.
    """

    found: Found
    base: str
    device: str
    dtype: torch.dtype | str

    def load(self) -> VLM:
        """Load the base."""
        revision = self.found.revision if self.found.base == self.base else None
        return load_vlm(self.base, dtype=self.dtype, device=self.device, revision=revision)

    def attach(self, vlm: VLM) -> tuple[PeftModel, PlainAdapter]:
        """Put the adapter on a loaded base; also return it as it was read for that base."""
        adapter = read_plain_adapter(vlm.model, self.found.folder)
        return put_plain_adapter_on(vlm.model, adapter), adapter


def check_form(live: PeftModel, adapter: PlainAdapter, form: str, r: int | None) -> None:
    """Refuse what a form cannot express, before anything is computed.

    Raises:
        ValueError: Naming the kind or the setting, and the form that can.
    """
    folder, config = adapter.folder, adapter.config
    kind = getattr(config.peft_type, "value", config.peft_type)
    if form == "merged":
        _check_mergeable(live, folder, kind)
        if getattr(config, "lora_bias", False):
            raise ValueError(f"{folder} has lora_bias: the base has no biases to add it to")
        return
    if not isinstance(config, LoraConfig) or kind != "LORA":
        raise ValueError(f"{folder} is {kind}, not LORA: --form merged is the one for it")
    if form == "lora":
        return
    start = str(config.init_lora_weights).lower()
    for name, is_there in {
        "DoRA, which rescales the rows of the weights": config.use_dora,
        f"{start}, whose start changed the base": start in ("pissa", "olora"),
        "lora_bias": config.lora_bias,
    }.items():
        if is_there:
            raise ValueError(
                f"{folder} has {name}: no LoRA of smaller rank expresses it; use --form lora or "
                "merged"
            )
    pairs = _factor_pairs(adapter.tensors)
    if odd := [name for name in adapter.tensors if ".lora_" in name and name not in _keys(pairs)]:
        raise ValueError(f"{folder}: {odd[0]} is no factor of a linear layer; use --form lora")
    largest = max(len(lora_A) for lora_A, _ in pairs.values())
    if r is not None and not 1 <= r <= largest:
        raise ValueError(f"--rank {r} is out of range: this adapter has rank {largest}")


def _check_mergeable(live: PeftModel, folder: Path, kind: str) -> None:
    base = live.get_base_model()
    layers = {name: one for name, one in live.named_modules() if isinstance(one, BaseTunerLayer)}
    for name, layer in layers.items():
        # OSF replaces its base weight by parts of it, and PEFT's merge puts back other values
        is_bias = kind == "BEFT" and layer.get_base_layer().bias is None
        if type(layer).merge is BaseTunerLayer.merge or kind == "OSF" or is_bias:
            raise ValueError(f"{folder}: PEFT cannot merge {kind} ({name})")
        if any(is_quantized(parameter) for parameter in layer.parameters()):
            raise ValueError(
                f"{folder}: {name} is quantized, so a merge would round the adapter away; give the "
                "float base with --model"
            )
    read, written = base.get_input_embeddings(), base.get_output_embeddings()
    trained = [one for one in (read, written) if not isinstance(one, nn.Embedding | nn.Linear)]
    if trained and written is not None and base.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            f"{folder} changes an embedding that the base ties to its other one: merged weights "
            "would change both; use --form lora"
        )


def write_lora(adapter: PlainAdapter, base: str, draft: Path) -> dict[str, Any]:
    """Write the adapter as it is, under the names of this model; return rank and alpha."""
    draft.mkdir(parents=True)
    save_file(dict(adapter.tensors), draft / WEIGHTS_FILE, metadata={"format": "pt"})
    adapter.config.base_model_name_or_path = base
    adapter.config.save_pretrained(str(draft))
    return {"r": adapter.config.r, "lora_alpha": adapter.config.lora_alpha}


def write_small_lora(
    live: PeftModel, adapter: PlainAdapter, base: str, r: int | None, draft: Path
) -> tuple[dict[str, Any], list[Truncation], int]:
    """Write a LoRA of one smaller rank; return rank and alpha, the losses and the largest rank."""
    pairs, tensors, losses = _factor_pairs(adapter.tensors), dict(adapter.tensors), []
    r, before = r or adapter.config.r, max(len(lora_A) for lora_A, _ in pairs.values())
    for name, (lora_A, lora_B) in pairs.items():
        scaling = _layer(live, name).scaling[NAME]
        A, B, S = recompress(lora_A.float(), lora_B.float(), scaling, r)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous()
        norm, error = float(S.norm()), float(S[r:].norm())
        losses.append(Truncation(name, norm, error, error / norm if norm > 0 else 0.0))
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(pairs),
        modules_to_save=adapter.config.modules_to_save,
        bias=adapter.config.bias,
        trainable_token_indices=adapter.config.trainable_token_indices,
    )
    return write_lora(PlainAdapter(config, tensors, adapter.folder), base, draft), losses, before


def _layer(live: PeftModel, name: str) -> LoraLayer:
    return live.get_base_model().get_submodule(name)


def _factor_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer name -> lora_A [r, d_in] and lora_B [d_out, r] of linear layers."""
    pairs = {}
    for key, lora_A in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        lora_B = tensors.get(f"{PREFIX}{name}.lora_B.weight")
        if key.endswith(".lora_A.weight") and lora_B is not None and lora_A.ndim == 2:
            pairs[name] = (lora_A, lora_B)
    return pairs


def _keys(pairs: Mapping[str, Any]) -> set[str]:
    return {f"{PREFIX}{name}.lora_{part}.weight" for name in pairs for part in "AB"}


def merge(live: PeftModel) -> PreTrainedModel:
    """Fold the adapter into the weights by PEFT's own merge and return the plain model.

    PEFT adds in the dtype of the weights; here each layer is merged in float32 and rounded once.

    Raises:
        ValueError: If a merged value does not fit the dtype.
    """
    for name, layer in live.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        dtypes = {key: parameter.dtype for key, parameter in base.named_parameters()}
        layer.to(torch.float32)
        layer.merge(safe_merge=True)
        merged = dict(base.named_parameters())
        check_merged_values((f"{name}.{key}", merged[key], dtype) for key, dtype in dtypes.items())
        for key, dtype in dtypes.items():
            merged[key].data = merged[key].data.to(dtype)
    return live.merge_and_unload(safe_merge=True).eval()


def describe_kind(adapter: PlainAdapter) -> dict[str, str]:
    """Return rows of the model card: the kind of adapter and where it acts."""
    settings = asdict(adapter.config)
    kind = str(getattr(adapter.config.peft_type, "value", adapter.config.peft_type))
    options = [key for key in ("use_rslora", "use_dora", "lora_bias") if settings.get(key)]
    targets = settings.get("target_modules") or ()
    layers = sorted({str(name).rpartition(".")[2] for name in targets})
    saved = ", ".join(settings.get("modules_to_save") or ()) or "none"
    return {
        "Method": " ".join([kind, *options]),
        "Adapted layers": f"{len(targets)}: {', '.join(layers)}"
        if isinstance(targets, set | list | tuple)
        else str(targets),
        "Modules trained in full": saved,
    }


def write_plain(
    source: PlainSource,
    draft: Path,
    form: str,
    *,
    r: int | None,
    image: Image.Image | None,
    question: str | None,
) -> tuple[tuple[LogitsCheck, ...], tuple[str, ...], dict[str, str]]:
    """Write an export of a PEFT adapter and compare it, loaded the stock way, with the live model.

    Args:
        source: The adapter and its base.
        draft: A new folder.
        form: "lora", "lora-small" or "merged".
        r: Rank for "lora-small".
        image: For the check; default: a drawn one.
        question: For the check.

    Returns:
        The checks, notes for people, and rows for the model card.

    Raises:
        ValueError: If the form cannot express the adapter, or merged values are not finite.
    """
    vlm = source.load()
    live, adapter = source.attach(vlm)
    check_form(live, adapter, form, r)
    rows, notes, processor = describe_kind(adapter), [], vlm.processor
    asked = question or "What is in the picture?"
    batches = check_batches(processor, live.device, live.dtype, image or drawn_picture(), asked)
    wanted, tolerance = logits_of(live, batches), tolerance_of(live.get_base_model())
    del vlm  # the check loads a second model: let the first one go as early as possible
    if form == "merged":
        model = merge(live)
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
        dtype, kind = model.dtype, type(model)
        del live, model
        stock: nn.Module = kind.from_pretrained(draft, dtype=dtype).to(source.device).eval()
    else:
        if form == "lora-small":
            numbers, losses, before = write_small_lora(live, adapter, source.base, r, draft)
            report, tolerance = truncation_report(losses, numbers["r"], before), None
            write_json_atomic(draft / "truncation.json", report)
            notes.append(summarize(report))
        else:
            numbers = write_lora(adapter, source.base, draft)
        rows["r, lora_alpha"] = "{r}, {lora_alpha:g}".format(**numbers)
        del live
        stock = PeftModel.from_pretrained(source.load().model, draft)
    checks = compare_logits(wanted, logits_of(stock, batches), tolerance)
    rows["Images"] = "yes" if getattr(processor, "image_processor", None) is not None else "no"
    return tuple(checks), tuple(notes), rows


def write_card(
    source: PlainSource, draft: Path, form: str, load: str, parts: Sequence[str], rows: dict
) -> None:
    """Write the model card beside an export.

    Args:
        source: The adapter and its base.
        draft: Where the export is.
        form: "lora", "lora-small" or "merged".
        load: Code that loads it, with places for ``auto`` and ``base``.
        parts: Of the text below the table.
        rows: Of the table.
    """
    is_local = Path(source.base).is_absolute()
    shown = Path(source.base).name if is_local else source.base
    has_images = rows.pop("Images") == "yes"
    head = {
        **({} if is_local else {"base_model": source.base}),
        "library_name": "transformers" if form == "merged" else "peft",
        "pipeline_tag": "image-text-to-text" if has_images else "text-generation",
    }
    auto = "AutoModelForImageTextToText" if has_images else "AutoModelForCausalLM"
    lines = [f"| {name} | {value} |" for name, value in {"Base model": shown, **rows}.items()]
    title = f"{shown} with a merged adapter" if form == "merged" else f"LoRA for {shown}"
    text = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}",
        "\n".join(["| | |", "|---|---|", *lines]),
        f"## Load\n\n```python\n{load.format(auto=auto, base=shown)}\n```",
        *parts,
    ]
    write_text_atomic(draft / "README.md", "\n\n".join(text) + "\n")


def write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Let a function write a folder beside ``out``, which takes its place if that ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write(workspace / "export")
        (workspace / "export").chmod(0o755)
        replace_folder(workspace / "export", out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
