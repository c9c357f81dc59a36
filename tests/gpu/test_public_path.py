# ruff: noqa: N806 - U, S, Vh as in the paper
"""The public path on a GPU: attach, step, save, load, generate; in bfloat16 and on NF4.

Not run on a GPU yet. ``pytest -m gpu tests/gpu`` runs them; ``MILORA_GPU_TESTS_ON=cpu`` in front of
it walks the same lines on a CPU, which is how they were tried.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from quantized_models import build_whole_checkpoint

from milora_vl import MiloraConfig, attach_milora, load_adapter, load_vlm, merge_adapter, minor_svd
from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.cli import main
from milora_vl.inference import ask
from milora_vl.runtime import full_precision
from milora_vl.training.trainer import token_loss_sum

DEVICE = os.environ.get("MILORA_GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_whole_checkpoint(tmp_path_factory.mktemp("gpu") / "model")


def batch_on(device: str, vlm) -> dict[str, torch.Tensor]:
    image_id = vlm.model.config.image_token_id
    ids = torch.tensor([[1, *[image_id] * 4, 10, 11, 12, 13, 14]], device=device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 28, 28, device=device, dtype=vlm.model.dtype),
        "labels": ids.clone().masked_fill(ids == image_id, -100),
    }


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_attach_step_save_load_generate(checkpoint, quantization, tmp_path):
    def load():
        return load_vlm(
            checkpoint,
            dtype=torch.bfloat16,
            device=DEVICE,
            quantization=quantization,
            prompt_style="chatml",
        )

    vlm = load()
    assert {p.device.type for p in vlm.model.parameters()} == {DEVICE}
    batch = batch_on(DEVICE, vlm)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    peft_model, certificate = attach_milora(
        vlm.model,
        MiloraConfig(r=4, factor_cache=False),
        batch=dict(inputs),
        weights=vlm.float_weights,
        progress=False,
    )
    assert certificate.residual == ("subtract" if quantization else "anchor")
    assert (certificate.peak_cuda_memory_gib is not None) == (DEVICE == "cuda")
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert {p.device.type for p in trained} == {DEVICE}
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(3):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss_sum, n_tokens = token_loss_sum(peft_model, batch)
        (loss_sum / n_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in trained)
    save_adapter(peft_model, tmp_path / "adapter")
    with torch.no_grad():
        before = peft_model.eval()(**inputs).logits.float()
    again = load()
    loaded = load_adapter(again.model, tmp_path / "adapter", weights=again.float_weights).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits.float(), before, atol=5e-2, rtol=5e-2)
    answer = ask(again.with_model(loaded), Image.new("RGB", (40, 28), "red"), "What is it?", 4)
    assert isinstance(answer, str)
    if not quantization:
        merged = merge_adapter(loaded)
        with torch.no_grad():
            torch.testing.assert_close(merged(**inputs).logits.float(), before, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("shape", "method"), [((512, 384), "exact"), ((1024, 1024), "krylov")])
@pytest.mark.parametrize("tf32", [False, True])
def test_minor_svd_is_that_of_float64_whatever_tf32_is_set_to(shape, method, tf32):
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(shape[0], shape[1], dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64)).Q
    values = torch.linspace(1, 0.1, shape[1], dtype=torch.float64)
    weight = (left * values) @ right.T
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32" if tf32 else "ieee"
        with torch.autocast(DEVICE, torch.bfloat16), full_precision():
            U, S, Vh = minor_svd(weight.float().to(DEVICE), 16, method)
    finally:
        torch.backends.fp32_precision = before
    torch.testing.assert_close(S.cpu().double(), values[-16:], atol=1e-5, rtol=1e-4)
    product = (U * S).cpu().double() @ Vh.cpu().double()
    expected = (left[:, -16:] * values[-16:]) @ right[:, -16:].T
    torch.testing.assert_close(product, expected, atol=1e-4, rtol=0)


def test_the_main_job_runs_from_its_command_to_a_merged_model(checkpoint, tmp_path):
    records = []
    for index in range(8):
        Image.new("RGB", (30, 30), (20 * index, 90, 90)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A box."}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(records))
    run, on = tmp_path / "run", ["cpu"] if DEVICE == "cpu" else ["auto"]
    values = {
        "model.path": checkpoint, "model.prompt_style": "chatml", "model.device": on[0],
        "model.prepare": "null", "data.train": tmp_path / "train.json",
        "data.image_folder": tmp_path, "data.max_length": 256, "adapter.r": 4,
        "adapter.lora_alpha": 4, "eval.benches": "[]", "training.report_to": "none",
        "training.global_batch_size": 2, "training.per_device_train_batch_size": 2,
        "training.tf32": "false" if DEVICE == "cpu" else "true", "training.save_steps": 2,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in values.items()]
    config = Path(__file__).parents[2] / "configs/llava15_7b_milora.yaml"
    assert main(["train", str(config), *words, "--run-folder", str(run)]) == 0
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ("peak_cuda_memory_gib" in log[-1]) == (DEVICE == "cuda")
    words = ["export", str(run), "--form", "merged", "--out", str(tmp_path / "merged")]
    assert main(words) == 0
