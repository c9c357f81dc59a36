"""The form that inference servers accept: a base with the trained projector, and a LoRA without it.

Servers take LoRA factors and nothing else. vLLM refuses an adapter with ``modules_to_save``, SGLang
drops its content silently, and llama.cpp's converter stops at it. A projector that was
trained in full therefore goes where it is used anyway, into the checkpoint that the server loads.
The LoRA beside it holds factors only, with a whole alpha and plain scaling.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from milora_vl.adapter.checkpoint import write_adapter
from milora_vl.adapter.portable import PREFIX, MiloraFile, portable_tensors
from milora_vl.adapter.state import (
    MiloraState,
    current_adapter,
    recall,
    remove_master_weights_,
    trained_projector,
)
from milora_vl.export.logits_check import LogitsCheck, compare_logits, logits_of, tolerance_of
from milora_vl.export.merge import recompress_tensors, summarize, truncation_report
from milora_vl.export.source import Source
from milora_vl.files import write_json_atomic

BASE, LORA = "base", "lora"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be (``MaxLoRARanks`` in vllm/config/lora.py); its default is 16."""


def vllm_rank(rank: int) -> int | None:
    """Return the smallest ``--max-lora-rank`` of vLLM that admits a rank; None if none does."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)


def serve_commands(base: Path | str, lora: Path, rank: int, name: str) -> list[str]:
    """Return one line a server: how it is started with this base and this LoRA.

    Args:
        base: Folder or id of the checkpoint to load.
        lora: Folder of the LoRA.
        rank: Its rank.
        name: By which requests ask for it.
    """
    limit = vllm_rank(rank)
    flags = f"--enable-lora --max-lora-rank {limit} --lora-modules {name}={lora}"
    if limit is None:
        flags = (
            f"refuses rank {rank}, its largest is {VLLM_RANKS[-1]}: export again with "
            f"--rank {VLLM_RANKS[-1]} or less"
        )
    return [
        f"vLLM: {f'vllm serve {base} ' if limit else ''}{flags}",
        f"SGLang: python -m sglang.launch_server --model-path {base} --enable-lora "
        f"--max-lora-rank {rank} --lora-paths {name}={lora}",
        f"llama.cpp: python convert_lora_to_gguf.py {lora} --base {base}",
        f"here: milora-vl serve --model {base} --adapter {name}={lora}",
    ]


def split_for_serving(
    tensors: Mapping[str, Tensor], state: MiloraState
) -> tuple[dict[str, Tensor], int, int]:
    """Return the factors alone, one rank for all and a whole alpha; scaling is alpha / rank.

    Servers read one rank and one alpha. Layers of smaller rank get rows and columns of zeros. An
    alpha that is not whole (rsLoRA's mostly), or not the same for all layers, is multiplied into
    ``lora_B``.

    Args:
        tensors: As ``portable_tensors`` returns them.
        state: Of the same adapter.

    Raises:
        ValueError: If the adapter holds tensors of experts.
    """
    if state.experts:
        raise ValueError(
            f"{next(iter(state.experts))} holds all experts in one tensor, which servers do not "
            "read as a LoRA; export it merged (--form merged)"
        )
    rank = state.widening * max(map(state.rank_of, state.modules))
    ranks = state.peft_ranks(state.widening, plain=True)
    alpha = ranks["lora_alpha"]
    is_uniform = not ranks["rank_pattern"] and not ranks["alpha_pattern"]
    kept = {}
    for name in state.modules:
        key_A, key_B = (f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
        missing = rank - tensors[key_A].shape[0]
        kept[key_A] = pad(tensors[key_A], (0, 0, 0, missing))  # [rank, d_in]
        kept[key_B] = pad(tensors[key_B], (0, missing))  # [d_out, rank]
        if not (is_uniform and isinstance(alpha, int)):
            kept[key_B] = kept[key_B] * state.scaling_of(name)
    return kept, rank, alpha if is_uniform and isinstance(alpha, int) else rank


def fold_projector(peft_model: PeftModel) -> PreTrainedModel:
    """Return the base with the trained projector in place; its other weights are as they were.

    Args:
        peft_model: With residual "anchor"; used up.
    """
    state = recall(peft_model)
    if state.projector:
        trained = trained_projector(peft_model, state.projector, current_adapter(peft_model))
        remove_master_weights_(trained)  # what is saved is what the model computed with
    return peft_model.unload()


def write_serve(
    source: Source,
    live: PeftModel,
    processor: Any,
    draft: Path,
    out: Path,
    r: int | None,
    batches: Mapping[str, Mapping[str, Tensor]],
    wanted: Mapping[str, Tensor],
) -> tuple[list[LogitsCheck], list[str], list[str]]:
    """Write ``base/`` (if a projector was trained) and ``lora/``, and check the two together.

    An adapter of a 4-bit base is split on the original weights: servers quantize by themselves.

    Args:
        source: The adapter and its base.
        live: The model with it, residual "anchor"; used up.
        processor: Goes into ``base/``.
        draft: Folder to write into.
        out: Where it will be.
        r: Rank to recompress to; None keeps it.
        batches: For the check.
        wanted: Logits of the live model on them.

    Returns:
        The checks; lines for people, such as what was cut off; how servers are started.

    Raises:
        ValueError: If the rank is out of range.
    """
    notes, reference = [], wanted
    is_nf4 = bool(source.metadata.base.get("quantized"))
    if is_nf4:
        live = source.attach(source.load(quantized=False), strict_base=False)
        reference = logits_of(live, batches)
    tensors, state = portable_tensors(live), recall(live)
    class_names = {
        "base_model_class": type(live.get_base_model()).__name__,
        "parent_library": type(live.get_base_model()).__module__,
    }
    draft.mkdir(parents=True)
    if r is not None:
        before = state.widening * max(map(state.rank_of, state.modules))
        tensors, state, losses = recompress_tensors(tensors, state, r)
        report = truncation_report(losses, r, before)
        write_json_atomic(draft / "truncation.json", report)
        notes.append(summarize(report))
    tensors, rank, alpha = split_for_serving(tensors, state)
    base = out.resolve() / BASE if state.projector else source.base
    metadata = _describe(source, rank, alpha, str(base), folded=state.projector is not None)
    model = fold_projector(live)
    tolerance = tolerance_of(model) if r is None else None
    if state.projector:
        model.save_pretrained(draft / BASE)
        processor.save_pretrained(draft / BASE)
    dtype, kind = model.dtype, type(model)
    del live, model
    write_adapter(draft / LORA, tensors, metadata, class_names=class_names)
    if state.projector:
        plain = kind.from_pretrained(draft / BASE, dtype=dtype).to(source.device).eval()
    else:
        plain = source.load(quantized=False).model
    found = logits_of(PeftModel.from_pretrained(plain, draft / LORA), batches)
    if is_nf4:
        lines = compare_logits(wanted, found, None)
        notes += [f"against the 4-bit model that was trained, {line}" for line in lines]
    commands = serve_commands(base, out.resolve() / LORA, rank, out.name)
    return compare_logits(reference, found, tolerance), notes, commands


def _describe(source: Source, rank: int, alpha: int, base: str, *, folded: bool) -> MiloraFile:
    """Return ``milora.json`` of the LoRA: plain, so without an anchor and without a projector."""
    metadata = source.metadata
    revision = None if folded else metadata.base["revision"]
    return metadata.model_copy(
        update={
            "r": rank,
            "lora_alpha": float(alpha),
            "rank_pattern": {},
            "alpha_pattern": {},
            "blocks": {},
            "init": "lora",
            "slice": "none",
            "residual": "anchor",
            "quantization_correction": "none",
            "projector": None,
            "base": {"name_or_path": base, "revision": revision},
            "extra": {**metadata.extra, "served_from": {"init": metadata.init, "r": metadata.r}},
        }
    )
