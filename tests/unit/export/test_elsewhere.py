"""Laws of starts for other trainers: step 0 is the base, the finished adapter what was trained."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from family_models import build_checkpoint
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments, default_data_collator

from milora_vl.adapter.attach import compute_logits
from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.cli import main
from milora_vl.config import MiloraConfig
from milora_vl.export.elsewhere import finish_adapter, init_start, load_start
from milora_vl.export.logits_check import check_batches, drawn_picture
from milora_vl.model.load import load_vlm

CLOSE = {"atol": 1e-4, "rtol": 0}
CONFIG = MiloraConfig(r=4, train_projector=False)


@pytest.fixture(scope="module")
def start(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts") / "start"
    return init_start(str(tiny_checkpoint), folder, CONFIG, target="lora", progress=False)


def picture_batch(vlm):
    place = (vlm.model.device, vlm.model.dtype)
    found = check_batches(vlm.processor, *place, drawn_picture(), "What is this?")
    return found["picture and text"]


def load_trained_on(start, checkpoint, **options):
    """The base that another trainer loads."""
    is_residual = (start.folder / "base").exists()
    return load_vlm(start.folder / "base" if is_residual else checkpoint, **options)


def train_two_steps(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def finished_logits(checkpoint, out, batch):
    """Logits of the finished adapter by stock PEFT and by our own loader, on the original base."""
    stock = PeftModel.from_pretrained(load_vlm(checkpoint).model, out)
    own = load_adapter(load_vlm(checkpoint).model, out)
    assert_close(compute_logits(own, batch), compute_logits(stock, batch), **CLOSE)
    return compute_logits(stock, batch)


@pytest.mark.parametrize(
    ("family", "target"),
    [("llava", "residual"), ("qwen3_vl", "lora"), ("gemma3", "residual"), ("mllama", "lora")],
)
def test_a_start_is_the_base_and_its_finish_is_what_was_trained(tmp_path, family, target):
    checkpoint = build_checkpoint(family, tmp_path / "base")
    start = init_start(str(checkpoint), tmp_path / "start", CONFIG, target=target, progress=False)
    vlm = load_trained_on(start, checkpoint)
    batch = picture_batch(vlm)
    base = compute_logits(load_vlm(checkpoint).model, batch)
    model = load_start(vlm.model, start.folder, trainable=True)
    assert_close(compute_logits(model, batch), base, **CLOSE)
    trained = compute_logits(train_two_steps(model, batch), batch)
    assert (trained - base).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "trained")
    out = finish_adapter(start.folder, tmp_path / "trained", tmp_path / "out").folder
    assert_close(finished_logits(checkpoint, out, batch), trained, **CLOSE)


def test_bfloat16_loses_nothing_with_the_anchor_and_says_what_w_p_loses(tiny_checkpoint, tmp_path):
    options = {"dtype": torch.bfloat16, "progress": False}
    starts = {
        target: init_start(
            str(tiny_checkpoint), tmp_path / target, CONFIG, target=target, **options
        )
        for target in ("lora", "residual")
    }
    assert [check.difference for check in starts["lora"].checks] == [0.0, 0.0]
    lost = {
        target: max(layer.rounding_loss_ratio for layer in start.certificate.layers)
        for target, start in starts.items()
    }
    assert lost["lora"] == 0 < lost["residual"] < 0.01
    assert all(check.tolerance is None for check in starts["residual"].checks)
    stored = load_file(tmp_path / "residual" / "base" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert not (tmp_path / "lora" / "base").exists()


def texts(vlm):
    ids = [vlm.tokenizer(text)["input_ids"] for text in ("How many cats are there?", "Two dogs.")]
    return [{"input_ids": one, "labels": one} for one in ids] * 4


def run_trainer(model, vlm, folder, steps, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=1, learning_rate=0.05,
        save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = texts(vlm)
    trainer = Trainer(model, arguments, default_data_collator, train_dataset=rows, **options)
    trainer.train()
    return trainer


def test_plain_trainer_of_transformers(start, tiny_checkpoint, tmp_path):
    vlm = load_trained_on(start, tiny_checkpoint)
    batch, base = picture_batch(vlm), load_vlm(tiny_checkpoint).model
    model = load_start(vlm.model, start.folder, trainable=True)
    anchor = load_file(start.folder / "anchor" / "adapter_model.safetensors")
    before = compute_logits(base, batch)
    assert_close(compute_logits(model, batch), before, **CLOSE)
    trainer = run_trainer(model, vlm, tmp_path / "run", 4)
    trained = compute_logits(trainer.model, batch)
    assert (trained - before).abs().max() > 1e-2
    # frozen, although the trainer saves it beside the other
    kept = load_file(tmp_path / "run" / "checkpoint-4" / "anchor" / "adapter_model.safetensors")
    assert all(torch.equal(kept[key], anchor[key]) for key in anchor)
    words = ["finish", str(start.folder), "--adapter", str(tmp_path / "run" / "checkpoint-4")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert_close(finished_logits(tiny_checkpoint, tmp_path / "out", batch), trained, **CLOSE)


def test_trl(tiny_checkpoint, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install milora-vl[dev]")
    start = init_start(str(tiny_checkpoint), tmp_path / "start", CONFIG, progress=False)
    vlm = load_trained_on(start, tiny_checkpoint)
    batch = picture_batch(vlm)
    before = compute_logits(load_vlm(tiny_checkpoint).model, batch)
    model = PeftModel.from_pretrained(vlm.model, start.folder / "adapter", is_trainable=True)
    assert_close(compute_logits(model, batch), before, **CLOSE)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=1, learning_rate=0.05,
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"text": ["How many cats are there?", "Two dogs."] * 4}),
        processing_class=vlm.tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trained = compute_logits(trainer.model, batch)
    assert (trained - before).abs().max() > 1e-2
    out = finish_adapter(start.folder, tmp_path / "run", tmp_path / "out").folder
    assert_close(finished_logits(tiny_checkpoint, out, batch), trained, **CLOSE)


def edited_copy(start, folder, edit):
    """The start's adapter as a trainer could have saved it, with its configuration or tensors
    changed."""
    folder.mkdir()
    config = json.loads((start.folder / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(start.folder / "adapter" / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config, _: config.update(lora_alpha=8), "lora_alpha=8, but the start has 4"),
        (lambda config, _: config.update(r=8), "r=8, but the start has 4"),
        (lambda config, _: config.update(use_rslora=True), "use_rslora=True"),
        (lambda _, tensors: tensors.pop(sorted(tensors)[0]), "is missing|has no place"),
        (lambda _, tensors: tensors[sorted(tensors)[0]].fill_(float("nan")), "NaN"),
    ],
)
def test_what_does_not_fit_the_start_is_refused(start, tmp_path, edit, message):
    trained = edited_copy(start, tmp_path / "trained", edit)
    with pytest.raises(ValueError, match=message):
        finish_adapter(start.folder, trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapter_of_another_start_is_refused_and_that_of_a_copy_is_not(
    start, tiny_checkpoint, tmp_path
):
    words = ["init", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "other")]
    assert main([*words, "adapter.r=4", "adapter.init=pissa"]) == 0
    with pytest.raises(ValueError, match="the base of another start"):
        finish_adapter(start.folder, tmp_path / "other" / "adapter", tmp_path / "out")
    shutil.copytree(start.folder, tmp_path / "copy")
    finish_adapter(tmp_path / "copy", start.folder / "adapter", tmp_path / "out")


def test_another_base_is_refused(start, tmp_path):
    other = build_checkpoint("llava", tmp_path / "other")
    vlm = load_vlm(start.base)
    name = start.certificate.layers[0].name
    vlm.model.get_submodule(name).weight.data.mul_(1.5)
    changed = tmp_path / "changed"
    vlm.model.save_pretrained(changed)
    vlm.processor.save_pretrained(changed)
    for base in (other, changed):
        with pytest.raises(ValueError, match=r"(?i)made on other weights|shape|no layer|no place"):
            finish_adapter(start.folder, start.folder / "adapter", tmp_path / "out", base=str(base))


def test_methods_that_start_from_zero_need_no_start(tiny_checkpoint, tmp_path, capsys):
    words = ["init", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "start")]
    assert main([*words, "adapter.init=lora"]) == 1
    assert "starts from zero" in capsys.readouterr().err
    assert main([*words, "training.max_steps=1"]) == 1
    assert "only adapter.key=value" in capsys.readouterr().err
    assert main([*words, "adapter.r=4", "--target", "lora"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"step 0: text: .*: ok", printed)
    assert main([*words, "adapter.r=4"]) == 1  # nothing is overwritten
    assert "exists already" in capsys.readouterr().err


def test_the_projector_trains_elsewhere_if_asked_for(tiny_checkpoint, tmp_path):
    config = MiloraConfig(r=4, train_projector=True)
    start = init_start(str(tiny_checkpoint), tmp_path / "start", config, progress=False)
    vlm = load_trained_on(start, tiny_checkpoint)
    batch = picture_batch(vlm)
    model = load_start(vlm.model, start.folder, trainable=True)
    trained = compute_logits(train_two_steps(model, batch), batch)
    model.save_pretrained(tmp_path / "trained")
    out = finish_adapter(start.folder, tmp_path / "trained", tmp_path / "out").folder
    assert_close(finished_logits(tiny_checkpoint, out, batch), trained, **CLOSE)
