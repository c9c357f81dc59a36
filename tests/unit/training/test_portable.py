"""Laws of the callback: what another Trainer's checkpoint holds is the live model, portably."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments, default_data_collator

from milora_vl import MiloraConfig, SavePortableAdapter, attach_milora, load_adapter, load_vlm
from milora_vl.adapter.attach import compute_logits
from milora_vl.export.elsewhere import init_start, load_start
from milora_vl.export.logits_check import check_batches, drawn_picture

CLOSE = {"atol": 1e-4, "rtol": 0}
DOCS = Path(__file__).parents[3] / "docs" / "train_elsewhere.md"


def picture_batch(vlm):
    place = (vlm.model.device, vlm.model.dtype)
    found = check_batches(vlm.processor, *place, drawn_picture(), "What is this?")
    return found["picture and text"]


def rows(vlm):
    return [{"input_ids": ids, "labels": ids} for ids in vlm.tokenizer(["Two dogs."])["input_ids"]]


def run_trainer(model, vlm, folder, steps, callback, resume=None):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=1, learning_rate=0.02,
        lr_scheduler_type="constant", save_steps=2, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, default_data_collator, train_dataset=rows(vlm), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return compute_logits(trainer.model, picture_batch(vlm))


def portable_logits(checkpoint, folder):
    """By stock PEFT and by our own loader, on the original base."""
    found = [load_vlm(checkpoint) for _ in range(2)]
    stock = PeftModel.from_pretrained(found[0].model, folder / "portable" / "adapter")
    own = load_adapter(found[1].model, folder / "portable" / "adapter")
    assert_close(*(compute_logits(m, picture_batch(found[0])) for m in (stock, own)), **CLOSE)
    return compute_logits(stock, picture_batch(found[0]))


@pytest.mark.parametrize("residual", ["anchor", "subtract"])
def test_attached_model_in_a_plain_trainer(tiny_checkpoint, tmp_path, residual):
    def attached():
        vlm = load_vlm(tiny_checkpoint)
        config = MiloraConfig(r=4, residual=residual)
        return attach_milora(vlm.model, config, progress=False)[0], vlm

    model, vlm = attached()
    callback = SavePortableAdapter(processor=vlm.processor)
    live = run_trainer(model, vlm, tmp_path, 4, callback)
    last = tmp_path / "checkpoint-4"
    assert_close(portable_logits(tiny_checkpoint, last), live, **CLOSE)
    first = portable_logits(tiny_checkpoint, tmp_path / "checkpoint-2")
    assert (first - live).abs().max() > 1e-3
    if residual == "anchor":  # a Trainer that resumes leaves one adapter active; the anchor is back
        model, vlm = attached()
        resumed = run_trainer(model, vlm, tmp_path, 4, callback, str(tmp_path / "checkpoint-2"))
        assert_close(resumed, live, atol=1e-3, rtol=0)
        assert_close(portable_logits(tiny_checkpoint, last), resumed, **CLOSE)


def test_start_with_its_anchor_in_a_plain_trainer(tiny_checkpoint, tmp_path):
    config = MiloraConfig(r=4, train_projector=False)
    start = init_start(
        str(tiny_checkpoint), tmp_path / "start", config, target="lora", progress=False
    )
    vlm = load_vlm(tiny_checkpoint)
    model = load_start(vlm.model, start.folder, trainable=True)
    live = run_trainer(model, vlm, tmp_path / "run", 2, SavePortableAdapter(start.folder))
    assert_close(portable_logits(tiny_checkpoint, tmp_path / "run" / "checkpoint-2"), live, **CLOSE)
    plain = PeftModel.from_pretrained(load_vlm(tiny_checkpoint).model, start.folder / "adapter")
    with pytest.raises(ValueError, match="build the model with load_start"):
        SavePortableAdapter(start.folder).on_train_begin(None, None, None, model=plain)


def test_the_loop_in_the_docs_runs(tiny_checkpoint, tmp_path):
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    loop = next(text for text in code if "optimizer.step()" in text)
    vlm = load_vlm(tiny_checkpoint)
    ids = torch.tensor([row["input_ids"] for row in rows(vlm)])
    names = {"batches": [{"input_ids": ids, "labels": ids}] * 2}
    loop = loop.replace("llava-hf/llava-1.5-7b-hf", str(tiny_checkpoint))
    loop = loop.replace('"adapter"', repr(str(tmp_path / "adapter"))).replace("r=64", "r=4")
    exec(compile(loop, str(DOCS), "exec"), names)
    assert (tmp_path / "adapter" / "milora.json").exists()
