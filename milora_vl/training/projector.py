"""Stage 1: the projector alone. The result is a plain checkpoint, the base model of stage 2."""

import hashlib
import json
import logging
import random
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from milora_vl.adapter.state import (
    keep_master_weights_,
    load_trained_state_,
    remove_master_weights_,
    trained_state,
)
from milora_vl.config import AlignmentSection, DataSection, ModelSection, ProjectorSection
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.images import ImageTransform, load_image, resolve_image
from milora_vl.data.records import RecordError
from milora_vl.files import cache_folder, replace_folder
from milora_vl.model.families import find_family
from milora_vl.model.load import VLM
from milora_vl.runtime import process_count
from milora_vl.training.align import LabeledImage, align_patches_
from milora_vl.training.resume import (
    FACTS_FILE,
    check_finite_file,
    choose_checkpoint,
    compare_facts,
    describe_base,
    describe_data,
)
from milora_vl.training.run import train
from milora_vl.training.watch import NonFiniteError, all_finite

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "projector.safetensors"


def read_objects(section: DataSection, file: str) -> list[LabeledImage]:
    """Read images with named boxes from the ``objects`` field of LLaVA records.

    Raises:
        ValueError: If the file is no JSON list, or a record lacks a name, a box or its image
            (``RecordError``, unless bad records are skipped).
    """
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: patch alignment reads a JSON list: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{file}: patch alignment reads a JSON list of records")
    labeled = []
    n_skipped = 0
    for index, record in enumerate(records):
        try:
            if record.get("objects"):
                labeled.append(_read_boxes(section, record, f"{file}[{index}]"))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if section.on_bad_record == "error":
                detail = "an image in the record, a name and a box of four fractions each"
                raise RecordError(
                    f"{file}[{index}]",
                    "bad objects",
                    f"needs {detail}: {type(error).__name__} {error}",
                ) from error
            n_skipped += 1
    if n_skipped:
        logger.warning("%s: %d records skipped: bad objects", file, n_skipped)
    return labeled


def _read_boxes(section: DataSection, record: dict[str, Any], where: str) -> LabeledImage:
    names = tuple(item["name"] for item in record["objects"])
    boxes = tuple(tuple(item["box"]) for item in record["objects"])
    for name, box in zip(names, boxes, strict=True):
        left, top, right, bottom = box
        if not isinstance(name, str) or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"{name!r} has the box {box!r}")
    path = resolve_image(section.image_folder, record["image"])
    return LabeledImage(str(path), names, boxes, where)


def aligned_base_folder(
    base: Path, model: ModelSection, alignment: AlignmentSection, data: DataSection, seed: int
) -> Path:
    """Return the cache folder of an aligned base, named by a digest of all it depends on."""
    # how bad records and images are handled may change when a run is resumed
    without = {"prepare", "on_bad_record", "on_bad_image"}
    sections = [model.model_dump(exclude={"device", "prompt_day"}), alignment.model_dump()]
    sections.append(data.model_dump(exclude=without))
    facts: list[Any] = [str(base), *sections, seed]
    for file in sorted(base.glob("*.safetensors")) if base.is_dir() else []:
        facts.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    for file in [*data.train, *alignment.train]:
        facts.append(hashlib.sha256(Path(file).read_bytes()).hexdigest())
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "models" / f"{base.name}-aligned-{digest[:12]}"


def align_projector(
    vlm: VLM,
    section: AlignmentSection,
    data: DataSection,
    dataset: ConversationDataset,
    arguments: TrainingArguments,
    *,
    metrics_file: Path,
) -> None:
    """Train the projector in place: patch alignment, then captions through the frozen model.

    Raises:
        ValueError: If the model has no projector.
    """
    model = vlm.model
    model.requires_grad_(False)
    name = find_family(model).projector
    if name is None:
        raise ValueError(f"{vlm.path} has no projector, so there is nothing to align")
    projector = model.get_submodule(name)
    projector.requires_grad_(True)
    keep_master_weights_(projector)  # small updates would vanish in bfloat16
    checkpoints = Path(arguments.output_dir)
    regardless = getattr(arguments, "resume_regardless", False)
    checkpoint = choose_checkpoint(
        checkpoints,
        lambda folder: check_finite_file(folder / WEIGHTS_FILE),
        n_processes=process_count(),
        regardless=regardless,
    )
    facts = {"data": describe_data([dataset]), "base": describe_base(model)}
    compare_facts(checkpoints / FACTS_FILE, facts, checkpoint is not None, regardless)
    if checkpoint:
        load_trained_state_(projector, load_file(checkpoint / "adapter" / WEIGHTS_FILE))
    elif section.patch_steps:  # a checkpoint already contains the patch alignment
        labeled = [one for file in section.train or data.train for one in read_objects(data, file)]
        random.Random(arguments.seed).shuffle(labeled)
        align_patches_(
            model,
            vlm.processor.tokenizer,
            ImageTransform(vlm.processor.image_processor, data.pad_to_square),
            load_image,
            labeled[: section.patch_pictures],
            steps=section.patch_steps,
            learning_rate=section.patch_learning_rate,
            seed=arguments.seed,
            skip_unreadable=data.on_bad_image == "skip",
        )

    def save_weights(folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "adapter"
            made.mkdir()
            state = trained_state(projector)
            weights = {name: value.contiguous() for name, value in state.items()}
            save_file(weights, made / WEIGHTS_FILE, metadata={"format": "pt"})
            replace_folder(made, folder)

    if section.training:  # else the stage is patch alignment alone
        train(
            model,
            vlm,
            dataset,
            None,
            arguments,
            save_weights=save_weights,
            metrics_file=metrics_file,
            stage="align",
            projector=ProjectorSection(),
            checkpoint=checkpoint,
        )
    if not all_finite(projector.parameters()):
        raise NonFiniteError(
            f"{vlm.path}: the aligned projector holds NaN or infinity; lower "
            "alignment.patch_learning_rate"
        )
    remove_master_weights_(projector)
    model.requires_grad_(False)


def save_base(vlm: VLM, folder: Path) -> Path:
    """Write model and processor as a plain transformers checkpoint, whole or not at all.

    Raises:
        NonFiniteError: If a weight is not finite: every later run would begin with it.
    """
    for name, value in vlm.model.named_parameters():
        if not all_finite([value]):
            raise NonFiniteError(f"{vlm.path}: {name} holds NaN or infinity; no base is kept")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        vlm.model.save_pretrained(made)
        vlm.processor.save_pretrained(made)
        replace_folder(made, folder)
    return folder
