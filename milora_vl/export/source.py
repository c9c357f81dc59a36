"""A saved adapter together with the base model it goes on."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image

from milora_vl.adapter.certificate import Certificate
from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.adapter.portable import (
    MILORA_FILE,
    MiloraFile,
    processor_reference,
    read_milora_file,
)
from milora_vl.adapter.state import Residual
from milora_vl.adapter.tuned import apply_inputs, find_adapter
from milora_vl.adapter.update_size import summarize_update
from milora_vl.config import load_config
from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.images import load_image
from milora_vl.data.records import read_records
from milora_vl.export.strength import scale_update_
from milora_vl.model.load import VLM, load_vlm

logger = logging.getLogger(__name__)

NF4_CLASS = "Params4bit"


@dataclass(frozen=True)
class Source:
    """A saved adapter and the base it goes on.

    Attributes:
        folder: The adapter folder.
        metadata: Its ``milora.json``.
        base: Id or path of the base model.
        device: Where models run.
        dtype: Dtype of loaded weights; "auto" keeps the checkpoint's.
        strength: Of what training added, see ``strength.py``; 1 is what was trained.
    """

    folder: Path
    metadata: MiloraFile
    base: str
    device: str
    dtype: torch.dtype | str
    strength: float = 1.0

    def load(self, *, quantized: bool) -> VLM:
        """Load the base, in 4 bits if the adapter was trained so and ``quantized`` says so."""
        kinds = self.metadata.base.get("quantized")
        if kinds not in (None, NF4_CLASS):
            raise ValueError(f"{self.folder}: its base is quantized as {kinds}; only NF4 can be")
        inputs, dtype = self.metadata.inputs or {}, self.dtype
        if dtype == "auto" and self.metadata.dtype:
            dtype = getattr(torch, self.metadata.dtype)
        vlm = load_vlm(
            self.base,
            dtype=dtype,
            device=self.device,
            revision=self.metadata.base["revision"],
            quantization="nf4" if kinds and quantized else None,
            prompt_style=inputs.get("prompt_style"),
        )
        return apply_inputs(vlm, inputs, self.folder)

    def attach(
        self, vlm: VLM, *, residual: Residual | None = "anchor", strict_base: bool = True
    ) -> PeftModel:
        """Put the adapter on a loaded base, whose weights stay as they are with "anchor"."""
        peft_model = load_adapter(
            vlm.model,
            self.folder,
            residual=residual,
            strict_base=strict_base,
            weights=vlm.float_weights,
        )
        scale_update_(peft_model, self.strength)
        return peft_model


def read_source(
    path: Path | str,
    base: str | None,
    device: str,
    dtype: torch.dtype | str,
    strength: float = 1.0,
) -> Source:
    """Read what a run, checkpoint or adapter folder says of itself.

    Args:
        path: See ``find_adapter``.
        base: Id or path of the base model; default: as recorded.
        device: Where models will run.
        dtype: Dtype of loaded weights; "auto" keeps the checkpoint's.
        strength: Of what training added; 1 is what was trained.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If its description is damaged, no base is known, or the strength is not finite.
    """
    if not math.isfinite(strength):
        raise ValueError(f"--strength {strength}: a finite number is needed; 1 is what was trained")
    folder = find_adapter(path)
    if not (folder / MILORA_FILE).exists():
        raise ValueError(f"{folder} is a PEFT adapter that this package did not make")
    metadata = read_milora_file(folder)
    base = name_base(base or metadata.base["name_or_path"], folder)
    if strength != 1:
        extra = {**metadata.extra, "strength": strength * metadata.extra.get("strength", 1.0)}
        metadata = metadata.model_copy(update={"extra": extra})
    return Source(folder, metadata, base, device, dtype, strength)


def name_base(base: str | None, adapter: Path | str) -> str:
    """Return the id or full path of a base.

    Raises:
        ValueError: If none is known.
    """
    if not base:
        raise ValueError(f"{adapter} does not say which base it was made on; pass --model")
    # a relative path means nothing elsewhere
    return str(Path(base).resolve()) if Path(base).exists() else base


def example_of_run(folder: Path) -> tuple[Image.Image, str] | None:
    """Return the first validation image of an adapter's run and its question, if both exist.

    Args:
        folder: The adapter folder, inside a run folder or not.
    """
    for parent in list(folder.resolve().parents)[:3]:
        file = parent / "config.yaml"
        if not file.exists():
            continue
        try:
            data = load_config(file).data
            file_of_records = data.validation or data.train[0]
            records, _ = read_records(file_of_records, data.image_folder, "skip", data.ignore_keys)
            record = next(item for item in records if item.images)
            picture = load_image(Path(data.image_folder) / record.images[0])
        except (OSError, ValueError, StopIteration) as error:
            logger.info("no example from %s (%s); a drawn image is used", file, error)
            return None
        question = next(turn.text for turn in record.turns if turn.role == "user")
        return picture, question.replace(IMAGE_TOKEN, "").strip()
    return None


def warn_of_another_processor(metadata: MiloraFile, processor: Any) -> None:
    """Log a warning if a tokenizer is not the one the adapter was trained with."""
    before, now = metadata.processor, processor_reference(processor)
    if before and before["tokenizer_sha256"] != now["tokenizer_sha256"]:
        logger.warning(
            "the tokenizer of the base differs from the one the adapter was trained with (%s); "
            "token numbers may mean other words",
            before["name_or_path"],
        )


def certificate_summary(folder: Path) -> str | None:
    """Return the summary of the certificate that the adapter's run kept, if it is in one."""
    for parent in list(folder.resolve().parents)[:3]:
        file = parent / "certificate.json"
        if file.exists() and (parent / "config.yaml").exists():
            certificate = Certificate.from_json(file.read_text(encoding="utf-8"))
            return "\n".join([certificate.summary(), *_update_line(parent, certificate)])
    return None


def _update_line(run_folder: Path, certificate: Certificate) -> list[str]:
    """Say how far training moved the weights, if the run's metrics hold it."""
    metrics = run_folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    last = next((line for line in reversed(lines) if "update_norm_ratio" in line), None)
    if last is None:
        return []
    names = [layer.name for layer in certificate.layers]
    return [f"at the end of training {summarize_update(json.loads(last), names)[0]}"]
