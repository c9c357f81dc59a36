"""Laws of training: token-normalised loss, groups, resume, complete checkpoints, finite loss."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import bind
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import slice_logits_to_keep

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.config import MiloraConfig, ProjectorSection
from milora_vl.data.collate import pad_batch
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.records import Conversation, Turn
from milora_vl.eval.report import write_report
from milora_vl.model.load import VLM, load_vlm
from milora_vl.training.arguments import build_arguments
from milora_vl.training.callbacks import MetricsWriter
from milora_vl.training.resume import checkpoint_folders, is_finished
from milora_vl.training.run import finetune, train
from milora_vl.training.trainer import VlmTrainer, token_loss_sum, with_positions


@pytest.fixture
def dataset(tiny_checkpoint: Path, tmp_path: Path) -> ConversationDataset:
    from PIL import Image

    vlm = load_vlm(tiny_checkpoint)
    conversations = []
    for index in range(8):
        Image.new("RGB", (20 + index, 30), (index * 20, 50, 90)).save(tmp_path / f"{index}.png")
        has_image = index % 4 != 3
        mark = "<image>\n" if has_image else ""
        turns = (
            Turn("user", f"{mark}How many cats are there?"),
            Turn("assistant", "Two cats." if index % 2 else f"It is {index}."),
        )
        images = (f"{index}.png",) if has_image else ()
        conversations.append(Conversation(str(index), turns, images, f"made[{index}]"))
    return bind(vlm, conversations, tmp_path)


def collate(dataset: ConversationDataset, indices: list[int]) -> dict[str, torch.Tensor]:
    return pad_batch([dataset[index] for index in indices], pad_token_id=0)


def run(
    vlm: VLM,
    dataset: ConversationDataset,
    folder: Path,
    steps: int,
    adapter: MiloraConfig = MiloraConfig(r=4),  # noqa: B008  frozen
    **training: Any,
) -> dict[str, torch.Tensor]:
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "logging_steps": 1,
    } | training
    finetune(
        vlm,
        adapter,
        dataset,
        None,
        build_arguments(settings, folder / "checkpoints", 0),
        run_folder=folder,
        projector=ProjectorSection(learning_rate=1e-3),
    )
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_loss_equals_the_models_own(tiny_checkpoint: Path, dataset: ConversationDataset) -> None:
    vlm = load_vlm(tiny_checkpoint)
    batch = collate(dataset, [0, 1, 3])
    loss_sum, n_tokens = token_loss_sum(vlm.model, batch)
    assert torch.isclose(loss_sum / n_tokens, vlm.model(**batch).loss, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_positions_found_before_the_copy_give_the_same_loss_and_gradient(
    tiny_checkpoint: Path, dataset: ConversationDataset, smoothing: float
) -> None:
    model = load_vlm(tiny_checkpoint).model.train()
    samples = [dataset[index] for index in (0, 1, 3)]  # answers of several lengths
    samples[1]["labels"] = [-100] * len(samples[1]["labels"])  # and one without any
    batches = [pad_batch(samples, 0), with_positions(partial(pad_batch, pad_token_id=0), samples)]
    found = []
    for batch in batches:
        loss, n_tokens = token_loss_sum(model, batch, smoothing)
        model.zero_grad()
        loss.backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        found.append((loss, n_tokens, gradients))
    assert found[0][1] == found[1][1] > 0
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-4, atol=1e-6)


def test_metrics_hold_the_size_of_the_update_and_decay_to_start_makes_it_smaller(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    sizes = {}
    for rate in (0.0, 20.0):
        adapter = MiloraConfig(r=4, decay_to_start=rate)
        folder = tmp_path / f"rate{rate:g}"
        run(load_vlm(tiny_checkpoint), dataset, folder, 3, adapter, save_strategy="no")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines if "update_norm_ratio" in line]
        layers = json.loads((folder / "certificate.json").read_text())["layers"]
        assert [entry["step"] for entry in entries] == [1, 2, 3, 3]
        assert len(entries[-1]["update_norm_ratios"]) == len(layers)
        assert 0 < entries[0]["update_norm_ratio"] < entries[-1]["update_norm_ratio"]
        assert 0 < entries[-1]["update_principal_share"] < 1
        sizes[rate] = entries[-1]["update_norm_ratio"]
        report = write_report(folder).read_text()
        assert "Size of the update" in report
        assert "cannot be shown" not in report
    assert sizes[20.0] < 0.95 * sizes[0.0]


def test_no_step_on_a_device_asks_for_a_value(
    tiny_checkpoint: Path,
    dataset: ConversationDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = load_vlm(tiny_checkpoint)
    trainer = VlmTrainer(
        model=vlm.model,
        args=build_arguments({}, tmp_path, 0),
        train_dataset=dataset,
        data_collator=partial(pad_batch, pad_token_id=0),
        save_weights=lambda _: None,
    )
    # stands for a GPU
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    batch = trainer.loader_options()["collate_fn"]([dataset[0], dataset[3]])
    # tensors without values: whatever has to know one raises
    on_device = {name: value.to("meta") for name, value in batch.items()}
    head = nn.Linear(8, 64, device="meta")

    def model(input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> SimpleNamespace:
        hidden = torch.zeros(*input_ids.shape, 8, device="meta")
        return SimpleNamespace(logits=head(slice_logits_to_keep(hidden, logits_to_keep)))

    loss = trainer.compute_loss(model, on_device, num_items_in_batch=torch.ones((), device="meta"))
    loss.backward()
    assert loss.is_meta
    with pytest.raises(NotImplementedError):  # the mask is such a question
        token_loss_sum(model, {k: v for k, v in on_device.items() if k != "positions"})


def test_micro_batches_give_the_gradient_of_one_batch(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    trained = [
        run(
            load_vlm(tiny_checkpoint),
            dataset,
            tmp_path / f"micro{size}",
            1,
            optim="sgd",
            max_grad_norm=1e9,
            save_strategy="no",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        for size in (8, 2)  # all records in one step, in one piece and in four
    ]
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-6, rtol=1e-4)


def test_two_steps_and_two_more_after_a_stop_are_four(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    whole = run(load_vlm(tiny_checkpoint), dataset, tmp_path / "whole", 4)
    first = run(load_vlm(tiny_checkpoint), dataset, tmp_path / "stopped", 2)
    (tmp_path / "stopped" / "adapter" / "milora.json").unlink()  # as if stopped before the end
    again = run(load_vlm(tiny_checkpoint), dataset, tmp_path / "stopped", 4)
    assert any(not torch.equal(first[name], again[name]) for name in first)
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize(("init", "is_told"), [("milora", True), ("lora", False)])
def test_weight_decay_of_a_pretrained_part_is_told(
    tiny_checkpoint: Path,
    dataset: ConversationDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    init: str,
    is_told: bool,
) -> None:
    adapter = MiloraConfig(r=4, init=init)
    run(load_vlm(tiny_checkpoint), dataset, tmp_path, 1, adapter, weight_decay=0.1)
    assert ("training.weight_decay: 0.1 pulls" in caplog.text) == is_told


def test_only_adapter_and_projector_change(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    vlm = load_vlm(tiny_checkpoint)
    peft_model, _ = attach_milora(vlm.model, MiloraConfig(r=4), progress=False)
    before = {name: value.clone() for name, value in peft_model.named_parameters()}
    train(
        peft_model,
        vlm,
        dataset,
        dataset,
        build_arguments({"max_steps": 2, "disable_tqdm": True}, tmp_path / "c", 0),
        save_weights=lambda folder: save_adapter(peft_model, folder, base="base"),
        metrics_file=tmp_path / "metrics.jsonl",
        stage="finetune",
        projector=ProjectorSection(),
    )
    for name, value in peft_model.named_parameters():
        is_trained = "milora" in name  # the adapter and the projector's trained copy
        assert torch.equal(before[name], value) != is_trained, name


def test_the_projector_has_its_own_rate(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    fast = run(load_vlm(tiny_checkpoint), dataset, tmp_path / "a", 1, optim="sgd")
    start, _ = attach_milora(load_vlm(tiny_checkpoint).model, MiloraConfig(r=4), progress=False)
    save_adapter(start, tmp_path / "start", base="base")
    zero = load_file(tmp_path / "start" / "adapter_model.safetensors")
    moved = {name: (fast[name] - zero[name]).abs().max() for name in fast}
    assert max(v for k, v in moved.items() if "projector" in k) > 0
    assert max(v for k, v in moved.items() if "lora_A" in k) > 0


def test_mid_run_checkpoints_are_whole_adapters(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    run(load_vlm(tiny_checkpoint), dataset, tmp_path, 2)
    loaded = load_adapter(
        load_vlm(tiny_checkpoint).model, tmp_path / "checkpoints" / "checkpoint-2" / "adapter"
    )
    final = load_adapter(load_vlm(tiny_checkpoint).model, tmp_path / "adapter")
    batch = collate(dataset, [0, 1])
    torch.testing.assert_close(loaded(**batch).logits, final(**batch).logits)


def test_every_checkpoint_holds_the_first_factors_also_after_a_stop(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    start, _ = attach_milora(load_vlm(tiny_checkpoint).model, MiloraConfig(r=4), progress=False)
    save_adapter(start, tmp_path / "start", base="base")
    first = load_file(tmp_path / "start" / "adapter_model.safetensors")
    for steps in (4, 8):  # stopped after four, then gone on
        run(load_vlm(tiny_checkpoint), dataset, tmp_path / "run", steps, save_total_limit=9)
        (tmp_path / "run" / "adapter" / "milora.json").unlink()
    for step in (2, 4, 6, 8):
        folder = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "adapter"
        stored = load_file(folder / "adapter_model.safetensors")
        assert stored.keys() == first.keys()
        assert sum("multi_modal_projector" in name for name in stored) == 4
        for name, value in stored.items():
            if name.endswith("lora_A.weight"):
                assert torch.equal(value[4:], first[name][4:])
                assert not torch.equal(value[:4], first[name][:4])
            elif name.endswith("lora_B.weight"):
                assert torch.equal(value[:, 4:], first[name][:, 4:])
        facts = json.loads((folder / "milora.json").read_text())
        assert facts["base"]["name_or_path"] == str(tiny_checkpoint)
        assert facts["processor"]["name_or_path"] == str(tiny_checkpoint)
        assert len(facts["processor"]["tokenizer_sha256"]) == 64
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("init", ["null_space", "dora", "mica", "olora"])
def test_other_methods_go_the_same_way(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path, init: str
) -> None:
    adapter = MiloraConfig(r=4, init=init, calibration_batches=2)
    whole = run(load_vlm(tiny_checkpoint), dataset, tmp_path / "whole", 4, adapter)
    certificate = json.loads((tmp_path / "whole" / "certificate.json").read_text())
    assert certificate["init"] == init
    assert certificate["step0_max_abs_logit_difference"] < 1e-4
    if init == "dora":  # its first A is random, so only the way through is checked
        return
    run(load_vlm(tiny_checkpoint), dataset, tmp_path / "stopped", 2, adapter)
    (tmp_path / "stopped" / "adapter" / "milora.json").unlink()
    again = run(load_vlm(tiny_checkpoint), dataset, tmp_path / "stopped", 4, adapter)
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    found = checkpoint_folders(tmp_path)
    assert [is_finished(one) for one in found] == [True, False, False]
    assert checkpoint_folders(tmp_path / "nowhere") == []


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", "finetune")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=7)
    writer.on_log(arguments, state, TrainerControl(), logs={"loss": 1.5})
    with pytest.raises(FloatingPointError, match="step 7"):
        writer.on_log(arguments, state, TrainerControl(), logs={"loss": float("nan")})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"stage": "finetune", "step": 7, "loss_nats_per_token": 1.5}


def test_the_last_line_of_a_training_says_how_much_memory_it_took(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", "finetune")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    logs = {"train_runtime": 9.0}
    writer.on_log(arguments, TrainerState(global_step=7), TrainerControl(), logs=logs)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["train_runtime"] == 9
    assert 0.05 < line["peak_memory_gib"] < 100


def test_metrics_beyond_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [("align", 9), ("finetune", 1), ("finetune", 2), ("finetune", 3)]
    text = "".join(json.dumps({"stage": s, "step": n}) + "\n" for s, n in rows)
    file.write_text(text + '{"stage": "fine')
    writer = MetricsWriter(file, "finetune")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    writer.on_train_begin(arguments, TrainerState(global_step=2), TrainerControl())
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in kept] == rows[:3]
