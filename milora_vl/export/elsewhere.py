"""Start an adapter here, train it with any trainer that knows PEFT, and finish it here.

``init_start`` writes a start folder::

    adapter/     plain LoRA of rank r with (A0, B0): where the other trainer starts
    anchor/      plain LoRA of rank r with (A0, -B0): stays frozen
    base/        the checkpoint with W_p = W - s B0 A0; only for target "residual"
    start.json   what ``finish_adapter`` needs

Target "residual" trains ``adapter/`` on ``base/``, which every trainer can do. Target "lora" trains
``adapter/`` on the original base beside the frozen anchor: exact in every dtype, for trainers whose
model you build yourself (``load_start``). Both compute W x + s B A x - s B0 A0 x, and end as the
portable adapter of rank 2r on the original base.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.certificate import Certificate
from milora_vl.adapter.checkpoint import check_adapter, check_writable, describe, write_adapter
from milora_vl.adapter.portable import (
    MILORA_FILE,
    PEFT_CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    MiloraFile,
    check_finite,
    portable_tensors,
    processor_reference,
)
from milora_vl.adapter.state import (
    ANCHOR,
    PLAIN_INITS,
    recall,
    trainable_config,
    unload_,
)
from milora_vl.adapter.tuned import describe_inputs, load_plain_adapter
from milora_vl.config import MiloraConfig
from milora_vl.errors import MiloraError
from milora_vl.export.forms import model_card
from milora_vl.export.logits_check import (
    TOLERANCES,
    LogitsCheck,
    check_batches,
    compare_logits,
    drawn_picture,
    logits_of,
)
from milora_vl.files import (
    check_new_folder,
    replace_folder,
    sha256_of,
    write_json_atomic,
    write_text_atomic,
)
from milora_vl.model.load import VLM, load_vlm

Target = Literal["residual", "lora"]
START_FILE = "start.json"
TRAINABLE = "default"  # PEFT's own name, under which trainers save into the folder itself
QUESTION = "What is in the picture?"
SAME_KEYS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")


class FinishError(MiloraError, RuntimeError):
    """A start or a finished adapter that does not compute what it must; nothing was written."""


class StartFile(BaseModel):
    """The content of ``start.json``.

    Attributes:
        target: What the other trainer trains on.
        adapter: ``milora.json`` of the adapter that will be finished; its digest is the anchor's.
    """

    model_config = ConfigDict(extra="forbid")

    target: Target
    adapter: MiloraFile


@dataclass(frozen=True)
class Start:
    """What ``init_start`` made.

    Attributes:
        folder: Where it is.
        base: What the other trainer loads as the base model: a folder or an id.
        certificate: What the start did, with the rounding loss of W_p.
        checks: Logits at step 0, of the written files, against the original base.
    """

    folder: Path
    base: str
    certificate: Certificate
    checks: tuple[LogitsCheck, ...]


@dataclass(frozen=True)
class Finished:
    """What ``finish_adapter`` made.

    Attributes:
        folder: The portable adapter.
        checks: Its logits on the original base against the model that was trained.
    """

    folder: Path
    checks: tuple[LogitsCheck, ...]


def init_start(
    model: str,
    out: Path | str,
    config: MiloraConfig,
    *,
    target: Target = "residual",
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    progress: bool = True,
) -> Start:
    """Write what another trainer needs to train MiLoRA on a model.

    Args:
        model: Hub id or folder of the base.
        out: A new folder.
        config: Rank, layers and slice; ``residual`` follows from ``target``.
        target: "residual" or "lora", see the top of this file.
        device: Where the weights are decomposed.
        dtype: Of the loaded weights, and so of W_p; "auto" keeps the checkpoint's.
        progress: Show a progress bar.

    Raises:
        FinishError: If what was written does not compute what the base computes.
        FileExistsError: If ``out`` holds something.
        ValueError: If the method has no start of its own, or no layer can be adapted.
        milora_vl.model.load_errors.LoadError: If the model cannot be loaded.
    """
    out = check_new_folder(out)
    if config.init in PLAIN_INITS:
        raise ValueError(
            f"init={config.init} starts from zero, so every trainer makes it by itself; use milora"
        )
    if config.experts in ("all", "shared"):
        raise ValueError(
            f"adapter.experts={config.experts}: other trainers go on from linear layers only; "
            "leave it at auto, which adapts no experts here"
        )
    vlm = load_vlm(model, dtype=dtype, device=device)
    held = vlm.model.dtype
    batches = _batches_for(vlm)
    wanted = logits_of(vlm.model, batches)
    residual = "subtract" if target == "residual" else "anchor"
    config = config.model_copy(update={"residual": residual, "experts": "none"})
    peft_model, certificate = attach_milora(vlm.model, config, progress=progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        draft = workspace / "start"
        _write_start(draft, out, vlm, peft_model, target)
        certificate.to_json(draft / "certificate.json")
        if target == "residual":
            plain = unload_(peft_model, [recall(peft_model).projector])  # its weights are W_p
            plain.save_pretrained(draft / "base")
            vlm.processor.save_pretrained(draft / "base")
            del plain
        del vlm, peft_model  # the check loads the model once more
        trained_on = str(draft / "base") if target == "residual" else model
        again = load_vlm(trained_on, dtype=held, device=device)
        checks = compare_logits(
            wanted,
            logits_of(load_start(again.model, draft), batches),
            # W_p loses something in 8 or 11 bits, which is reported but not judged
            None if target == "residual" and held != torch.float32 else TOLERANCES[held],
        )
        _refuse_failed(checks, out, "the start does not compute what the base computes")
        draft.chmod(0o755)
        replace_folder(draft, out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    base = str(out / "base") if target == "residual" else str(model)
    return Start(out, base, certificate, tuple(checks))


def _batches_for(vlm: VLM) -> dict[str, dict[str, Tensor]]:
    place = (vlm.model.device, vlm.model.dtype)
    return check_batches(vlm.processor, *place, drawn_picture(), QUESTION)


def _write_start(draft: Path, out: Path, vlm: VLM, peft_model: PeftModel, target: Target) -> None:
    """Write both adapters and ``start.json``."""
    state, both = recall(peft_model), portable_tensors(peft_model)
    metadata = describe(peft_model, state, base=vlm.path, revision=None, extra=None)
    metadata = metadata.model_copy(
        update={
            "processor": processor_reference(vlm.processor),
            "inputs": describe_inputs(vlm),
        }
    )
    halves = {key: _halves(key, value) for key, value in both.items()}
    config = trainable_config(state)
    config.init_lora_weights = True  # unused: the weights are in the file
    config.base_model_name_or_path = (
        str(out / "base") if target == "residual" else metadata.base["name_or_path"]
    )
    _write_lora(draft / "adapter", {key: first for key, (first, _) in halves.items()}, config)
    frozen = trainable_config(state)
    frozen.init_lora_weights, frozen.modules_to_save, frozen.lora_dropout = True, None, 0.0
    frozen.base_model_name_or_path = metadata.base["name_or_path"]
    anchors = {key: second for key, (_, second) in halves.items() if second is not None}
    _write_lora(draft / "anchor", anchors, frozen)
    digest = sha256_of(draft / "anchor" / WEIGHTS_FILE)
    start = StartFile(target=target, adapter=metadata.model_copy(update={"weights_sha256": digest}))
    write_json_atomic(draft / START_FILE, start.model_dump())


def _halves(key: str, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split [A; A0] or [B, -B0] into the trainable factor and the anchor's; others have no anchor.

    At the start A = A0 and B = B0.
    """
    if key.endswith(".lora_A.weight"):
        first, second = value.chunk(2, dim=0)
    elif key.endswith(".lora_B.weight"):
        first, second = value.chunk(2, dim=1)
    else:
        return value, None
    return first.contiguous(), second.contiguous()


def _write_lora(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)
    config.save_pretrained(str(folder))


def read_start(folder: Path | str) -> StartFile:
    """Read ``start.json`` and check that the anchor is the one it was written with.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged or was changed.
    """
    path = Path(folder) / START_FILE
    anchor = Path(folder) / "anchor" / WEIGHTS_FILE
    for file in (path, anchor):
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: {folder} was not written by milora-vl init"
            )
    try:
        start = StartFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy the folder again") from error
    if sha256_of(anchor) != start.adapter.weights_sha256:
        raise ValueError(f"{anchor} is damaged or was changed; copy the folder again")
    return start


def load_start(model: PreTrainedModel, folder: Path | str, *, trainable: bool = False) -> PeftModel:
    """Put the start on the model that it is for, as a stock PEFT model, for a trainer of your own.

    Args:
        model: For target "residual" the model in ``base/``, for "lora" the original base; wrapped
            in place.
        folder: Of ``init_start``.
        trainable: Whether the adapter trains; the anchor never does.

    Raises:
        FileNotFoundError: If ``init_start`` did not write the folder.
        ValueError: If it is damaged.
    """
    folder, start = Path(folder), read_start(folder)
    peft_model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=trainable)
    if start.target == "lora":
        add_frozen_anchor_(peft_model, folder)
    return peft_model


def add_frozen_anchor_(peft_model: PeftModel, folder: Path | str) -> None:
    """Put a start's anchor beside the one adapter of a stock PEFT model, active and frozen."""
    frozen = not any(parameter.requires_grad for parameter in peft_model.parameters())
    peft_model.load_adapter(str(Path(folder) / "anchor"), ANCHOR)
    activate_anchor_(peft_model, trainable=not frozen)


def activate_anchor_(peft_model: PeftModel, *, trainable: bool = True) -> None:
    """Make both adapters of a start active, the anchor frozen; a Trainer that resumes undoes it.

    Raises:
        ValueError: If the model does not carry both.
    """
    others = [name for name in peft_model.peft_config if name != ANCHOR]
    if ANCHOR not in peft_model.peft_config or len(others) != 1:
        raise ValueError(
            f"the model carries {list(peft_model.peft_config)}; a start of target lora needs its "
            "adapter and its anchor: build the model with load_start"
        )
    peft_model.base_model.set_adapter([*others, ANCHOR], inference_mode=not trainable)
    peft_model.set_requires_grad(ANCHOR, requires_grad=False)


def finish_adapter(
    folder: Path | str,
    trained: Path | str,
    out: Path | str,
    *,
    base: str | None = None,
    device: str = "cpu",
) -> Finished:
    """Turn what another trainer made of a start into a portable adapter for the original base.

    Args:
        folder: Of ``init_start``.
        trained: The trainer's adapter or checkpoint folder.
        out: Where to write; replaced only if it is empty or an adapter.
        base: Id or path of the original base; default: as recorded.
        device: Where models run for the check.

    Raises:
        FinishError: If the finished adapter does not compute what the trained model computes.
        FileNotFoundError: If a folder or file is missing.
        ValueError: If the trained adapter does not fit the start, or the base is another one.
        milora_vl.model.load_errors.LoadError: If a model cannot be loaded.
    """
    folder, out = Path(folder), Path(out)
    check_writable(out)
    start = read_start(folder)
    adapter = _find_trained(Path(trained))
    _check_config(adapter, start)
    _refuse_other_start(adapter, folder)
    original = base or start.adapter.base["name_or_path"]
    if start.target == "residual" and not (folder / "base").is_dir():
        raise FileNotFoundError(
            f"{folder / 'base'} is missing, on which the adapter was trained; milora-vl init makes "
            "the same one again"
        )
    dtype = getattr(torch, start.adapter.dtype or "float32")
    place = {"dtype": dtype, "device": device}
    vlm = load_vlm(str(folder / "base") if start.target == "residual" else original, **place)
    live = load_plain_adapter(vlm.model, adapter)
    tensors = get_peft_model_state_dict(live, save_embedding_layers=False)
    if start.target == "lora":
        add_frozen_anchor_(live, folder)
    batches = _batches_for(vlm)
    wanted = logits_of(live.eval(), batches)
    tensors = _joined(tensors, load_file(folder / "anchor" / WEIGHTS_FILE), start, adapter)
    del vlm, live  # the check loads the original base
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        draft = workspace / "adapter"
        metadata = _finished_metadata(start, original, adapter)
        write_adapter(draft, tensors, metadata)
        vlm = load_vlm(original, **place)
        check_adapter(vlm.model, draft, "anchor", strict_base=True)
        stock = PeftModel.from_pretrained(vlm.model, draft)
        checks = compare_logits(wanted, logits_of(stock, batches), TOLERANCES[dtype])
        _refuse_failed(checks, out, "the adapter does not compute what the trained model computes")
        write_text_atomic(draft / "README.md", _card(metadata, checks))
        draft.chmod(0o755)
        replace_folder(draft, out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return Finished(out, tuple(checks))


def save_from_start(
    folder: Path | str, peft_model: PeftModel, out: Path | str, *, base: str | None = None
) -> Path:
    """Save the portable adapter of a live model that was trained from a start, without the check.

    Args:
        folder: Of ``init_start``.
        peft_model: From ``load_start``, or PEFT's own loading of the start's adapter.
        out: Where to write; replaced only if it is empty or an adapter.
        base: Id or path of the original base; default: as recorded.

    Raises:
        ValueError: If the adapter does not fit the start, or holds NaN.
    """
    check_writable(Path(out))
    folder, start = Path(folder), read_start(folder)
    name = next(name for name in peft_model.peft_config if name != ANCHOR)
    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    anchors = load_file(folder / "anchor" / WEIGHTS_FILE)
    joined = _joined(tensors, anchors, start, Path(out))
    for key, value in joined.items():
        check_finite(key, value)
    return write_adapter(Path(out), joined, _finished_metadata(start, base, Path(out)))


def _finished_metadata(start: StartFile, base: str | None, trained: Path) -> MiloraFile:
    reference = {**start.adapter.base, "name_or_path": base or start.adapter.base["name_or_path"]}
    extra = {"trained_elsewhere": {"target": start.target, "from": str(trained.resolve())}}
    return start.adapter.model_copy(update={"base": reference, "extra": extra})


def _find_trained(path: Path) -> Path:
    """Return the folder with the trained adapter; PEFT puts named adapters a folder below."""
    below = sorted(file.parent for file in path.glob(f"*/{PEFT_CONFIG_FILE}"))
    below = [one for one in below if one.name != ANCHOR]
    for folder in (path, *(below if len(below) == 1 else [])):
        if (folder / PEFT_CONFIG_FILE).exists():
            return folder
    raise FileNotFoundError(
        f"{path} holds no adapter ({PEFT_CONFIG_FILE}); give the trainer's output folder or one of "
        "its checkpoints"
    )


def _check_config(adapter: Path, start: StartFile) -> None:
    """Compare what the trainer wrote with the start.

    Raises:
        ValueError: Naming the first setting that would give the factors another meaning.
    """
    try:
        actual = LoraConfig.from_pretrained(str(adapter))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{adapter / PEFT_CONFIG_FILE} cannot be read: {error}") from error
    expected = trainable_config(start.adapter.state())
    if (adapter / MILORA_FILE).exists():
        raise ValueError(f"{adapter} is a portable adapter already; nothing is left to finish")
    for key in SAME_KEYS:
        if (getattr(actual, key) or None) != (getattr(expected, key) or None):
            raise ValueError(
                f"{adapter / PEFT_CONFIG_FILE}: {key}={getattr(actual, key)}, but the start has "
                f"{getattr(expected, key)}: the trainer made a new adapter instead of going on "
                "from adapter/ of the start; docs/train_elsewhere.md names its option for that"
            )


def _refuse_other_start(adapter: Path, folder: Path) -> None:
    """Check that the trained adapter does not name the base of another start.

    Its config and shapes are those of any start of the same settings, so only the path tells.
    """
    recorded = LoraConfig.from_pretrained(str(adapter)).base_model_name_or_path or ""
    other = Path(recorded).parent / START_FILE
    # a start that was copied is the same start
    if other.is_file() and other.read_bytes() != (folder / START_FILE).read_bytes():
        raise ValueError(
            f"{adapter} was trained on {recorded}, the base of another start than {folder}; finish "
            f"it with milora-vl finish {other.parent}"
        )


def _joined(
    tensors: dict[str, Tensor], anchors: dict[str, Tensor], start: StartFile, adapter: Path
) -> dict[str, Tensor]:
    """Return the tensors of the portable adapter: [A; A0] and [B, -B0], float32.

    Raises:
        ValueError: Naming the first tensor that is missing, was trained besides, or has another
            shape than the start.
    """
    joined = {}
    for key, anchor in anchors.items():
        value = tensors.get(key)
        if value is None or value.shape != anchor.shape:
            found = "missing" if value is None else f"of shape {list(value.shape)}"
            raise ValueError(
                f"{adapter / WEIGHTS_FILE}: {key} is {found}, the start has {list(anchor.shape)}; "
                "was it trained from this start?"
            )
        pair = [value.detach().to("cpu", torch.float32), anchor]
        joined[key] = torch.cat(pair, dim=0 if key.endswith(".lora_A.weight") else 1)
    projector = start.adapter.projector
    for key in sorted(tensors.keys() - joined.keys()):
        if not projector or not key.startswith(f"{PREFIX}{projector}."):
            raise ValueError(
                f"{adapter / WEIGHTS_FILE}: {key} was trained too, and the start has no place for "
                "it; leave modules_to_save of the trainer empty (milora-vl init has "
                "adapter.train_projector=true for the projector)"
            )
        joined[key] = tensors[key].detach().to("cpu", torch.float32).clone()
    return joined


def _refuse_failed(checks: Any, out: Path, reason: str) -> None:
    failed = [str(check) for check in checks if not check.passed]
    if failed:
        raise FinishError(f"{out} was not written: {reason}. {'; '.join(failed)}")


def _card(metadata: MiloraFile, checks: Any) -> str:
    r = metadata.state().widening * metadata.r
    return model_card(
        metadata,
        form="lora",
        r=r,
        lora_alpha=metadata.state().widening * metadata.lora_alpha,
        auto_class="AutoModelForImageTextToText"
        if (metadata.processor or {}).get("image_processor")
        else "AutoModelForCausalLM",
        checks=[str(check) for check in checks],
        certificate=None,
    )
