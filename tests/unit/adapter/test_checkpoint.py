"""Laws of saving and loading: plain PEFT, nothing lost, nothing half-written, no wrong base."""

# ruff: noqa: N806 - A, B as in the paper

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import train
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.state import ANCHOR, MILORA, factors, recall
from milora_vl.config import MiloraConfig
from milora_vl.files import sha256_of

RESIDUALS = ["subtract", "anchor"]
CLOSE = {"atol": 1e-4, "rtol": 0}


def attach(model, **settings):
    settings = {"r": 6, "lora_alpha": 12, **settings}
    return attach_milora(model, MiloraConfig(**settings), progress=False)[0]


def trainable_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_stock_peft_loads_it_on_the_original_base(
    make_tiny_vlm, batch, tmp_path, residual, tower, recwarn
):
    peft_model = train(attach(make_tiny_vlm(tower), residual=residual), batch)
    live = compute_logits(peft_model, batch)
    save_adapter(peft_model, tmp_path / "a")
    recwarn.clear()
    stock = PeftModel.from_pretrained(make_tiny_vlm(tower), tmp_path / "a")
    assert not [str(w.message) for w in recwarn if "adapter keys" in str(w.message)]
    assert_close(compute_logits(stock, batch), live, **CLOSE)
    assert (compute_logits(make_tiny_vlm(tower), batch) - live).abs().max() > 1e-2
    projector = stock.get_submodule("base_model.model.model.multi_modal_projector")
    trained = peft_model.get_submodule("base_model.model.model.multi_modal_projector")
    for (_, got), (_, wanted) in zip(
        projector.modules_to_save["default"].named_parameters(),
        trained.modules_to_save[MILORA].named_parameters(),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_stock_peft_switches_between_two_of_them_on_one_base(make_tiny_vlm, batch, tmp_path):
    live = {}
    for name in ("minor", "principal"):
        peft_model = train(attach(make_tiny_vlm(), slice=name), batch)
        live[name] = compute_logits(peft_model, batch)
        save_adapter(peft_model, tmp_path / name)
    stock = PeftModel.from_pretrained(make_tiny_vlm(), tmp_path / "minor", adapter_name="minor")
    stock.load_adapter(tmp_path / "principal", adapter_name="principal")
    for name in ("principal", "minor"):
        stock.set_adapter(name)
        assert_close(compute_logits(stock, batch), live[name], **CLOSE)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_loading_restores_every_tensor_and_the_function(make_tiny_vlm, batch, tmp_path, residual):
    peft_model = train(attach(make_tiny_vlm(), residual=residual), batch)
    save_adapter(peft_model, tmp_path / "a")
    loaded = load_adapter(make_tiny_vlm(), tmp_path / "a", trainable=True)
    saved, restored = peft_model.state_dict(), loaded.state_dict()
    assert saved.keys() == restored.keys()
    assert all(torch.equal(value, restored[name]) for name, value in saved.items())
    assert recall(loaded) == recall(peft_model)
    assert trainable_names(loaded) == trainable_names(peft_model)
    assert torch.equal(compute_logits(loaded, batch), compute_logits(peft_model, batch))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_four_steps_are_two_and_two_after_a_resume(make_tiny_vlm, batch, tmp_path, residual):
    whole = train(attach(make_tiny_vlm(), residual=residual), batch, steps=4)
    half = train(attach(make_tiny_vlm(), residual=residual), batch, steps=2)
    save_adapter(half, tmp_path / "a")
    resumed = train(load_adapter(make_tiny_vlm(), tmp_path / "a", trainable=True), batch, steps=2)
    assert torch.equal(compute_logits(resumed, batch), compute_logits(whole, batch))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_saving_does_not_touch_the_live_model(make_tiny_vlm, batch, tmp_path, residual):
    peft_model = train(attach(make_tiny_vlm(), residual=residual), batch)
    peft_model.train()
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    names, active = trainable_names(peft_model), list(peft_model.active_adapters)
    save_adapter(peft_model, tmp_path / "a")
    assert trainable_names(peft_model) == names
    assert peft_model.active_adapters == active
    assert peft_model.training
    after = peft_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    peft_model(**batch).loss.backward()
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trainable)
    assert any(p.grad.abs().max() > 0 for p in trainable)
    twin = train(attach(make_tiny_vlm(), residual=residual), batch, steps=4)
    peft_model.zero_grad()
    assert torch.equal(compute_logits(train(peft_model, batch), batch), compute_logits(twin, batch))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_start_factors_survive_training_saving_and_resuming(
    make_tiny_vlm, batch, tmp_path, residual
):
    peft_model = attach(make_tiny_vlm(), residual=residual)
    name = recall(peft_model).modules[0]
    A0, B0 = (factor.detach().clone() for factor in factors(peft_model, name, MILORA))
    for index in range(3):
        train(peft_model, batch)
        save_adapter(peft_model, tmp_path / "a")
        stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert torch.equal(stored[f"base_model.model.{name}.lora_A.weight"][6:], A0)
        assert torch.equal(stored[f"base_model.model.{name}.lora_B.weight"][:, 6:], -B0)
        assert not torch.equal(stored[f"base_model.model.{name}.lora_A.weight"][:6], A0)
        if index == 1:
            peft_model = load_adapter(make_tiny_vlm(), tmp_path / "a", trainable=True)


@pytest.mark.parametrize("saved_as", RESIDUALS)
@pytest.mark.parametrize("loaded_as", RESIDUALS)
def test_residual_mode_may_change_between_save_and_load(
    make_tiny_vlm, batch, tmp_path, saved_as, loaded_as
):
    peft_model = train(attach(make_tiny_vlm(), residual=saved_as), batch)
    save_adapter(peft_model, tmp_path / "a")
    base = make_tiny_vlm()
    loaded = load_adapter(base, tmp_path / "a", residual=loaded_as)
    assert recall(loaded).residual == loaded_as
    assert trainable_names(loaded) == []
    assert_close(compute_logits(loaded, batch), compute_logits(peft_model, batch), **CLOSE)


def test_bfloat16_copy_of_the_base_is_recognised_and_anchored(make_tiny_vlm, batch, tmp_path):
    peft_model = train(attach(make_tiny_vlm(), residual="subtract"), batch)
    live = compute_logits(peft_model, batch)
    save_adapter(peft_model, tmp_path / "a")
    base = make_tiny_vlm().bfloat16()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    low = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    loaded = load_adapter(base, tmp_path / "a")
    assert recall(loaded).residual == "anchor"
    assert (compute_logits(loaded, low) - live).abs().max() < 0.1 * live.abs().max()
    unloaded = loaded.unload().state_dict()
    names = [name for name in before if "multi_modal_projector" not in name]
    assert all(torch.equal(unloaded[name], before[name]) for name in names)


def test_another_base_is_refused_with_both_fingerprints(make_tiny_vlm, tmp_path):
    peft_model = attach(make_tiny_vlm())
    save_adapter(peft_model, tmp_path / "a", base="org/model", revision="abc")
    with pytest.raises(ValueError, match="made on other weights") as caught:
        load_adapter(make_tiny_vlm(seed=1), tmp_path / "a")
    other = recall(attach(make_tiny_vlm(seed=1))).fingerprint["exact"]
    for wanted in ("org/model", recall(peft_model).fingerprint["exact"][:16], other[:16]):
        assert wanted in str(caught.value)
    load_adapter(make_tiny_vlm(seed=1), tmp_path / "a", strict_base=False)


def test_one_changed_bit_of_the_base_is_noticed(make_tiny_vlm, tmp_path):
    save_adapter(attach(make_tiny_vlm()), tmp_path / "a")
    base = make_tiny_vlm()
    weight = base.model.language_model.layers[0].mlp.down_proj.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(ValueError, match="made on other weights"):
        load_adapter(base, tmp_path / "a")


def test_subtracted_base_is_refused(make_tiny_vlm, tmp_path):
    peft_model = attach(make_tiny_vlm(), residual="subtract", train_projector=False)
    save_adapter(peft_model, tmp_path / "a")
    with pytest.raises(ValueError, match="made on other weights"):
        load_adapter(peft_model.unload(), tmp_path / "a")


def test_truncated_and_changed_files_are_refused(make_tiny_vlm, tmp_path):
    folder = save_adapter(attach(make_tiny_vlm()), tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="damaged or was changed"):
        load_adapter(make_tiny_vlm(), folder)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged or was changed"):
        load_adapter(make_tiny_vlm(), folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_adapter(make_tiny_vlm(), folder)


def test_damaged_description_is_refused(make_tiny_vlm, tmp_path):
    folder = save_adapter(attach(make_tiny_vlm()), tmp_path / "a")
    path = folder / "milora.json"
    facts = json.loads(path.read_text())
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(make_tiny_vlm(), folder)
    path.write_text(json.dumps({**facts, "format_version": 99}))
    with pytest.raises(ValueError, match="newer than"):
        load_adapter(make_tiny_vlm(), folder)
    path.write_text(json.dumps({**facts, "lora_alpha": 99.0}))
    with pytest.raises(ValueError, match="lora_alpha=24"):
        load_adapter(make_tiny_vlm(), folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"PeftModel\.from_pretrained"):
        load_adapter(make_tiny_vlm(), folder)


def test_wrong_shape_is_named_and_leaves_the_base_whole(make_tiny_vlm, tmp_path):
    folder = save_adapter(attach(make_tiny_vlm()), tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, weights)
    facts = json.loads((folder / "milora.json").read_text())
    facts["weights_sha256"] = sha256_of(weights)
    (folder / "milora.json").write_text(json.dumps(facts))
    base = make_tiny_vlm()
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=r"lora_A\.weight has shape \[11, "):
        load_adapter(base, folder)
    assert list(base.state_dict()) == names


def test_description_says_what_is_needed_to_use_it(make_tiny_vlm, tmp_path, monkeypatch):
    base = make_tiny_vlm()
    base.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = type(base).from_pretrained("base", dtype=torch.float32)
    folder = save_adapter(attach(model), tmp_path / "a", revision="main", extra={"step": 7})
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["r"], config["lora_alpha"], config["revision"]) == (12, 24, "main")
    facts = json.loads((folder / "milora.json").read_text())
    assert facts["base"] == {"name_or_path": str(tmp_path / "base"), "revision": "main"}
    assert facts["extra"] == {"step": 7}
    assert (facts["r"], facts["lora_alpha"], facts["slice"]) == (6, 12, "minor")
    assert facts["packages"]["peft"]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors"]


def test_foreign_models_are_refused(make_tiny_vlm, tmp_path):
    with pytest.raises(ValueError, match="not made by attach_milora"):
        save_adapter(make_tiny_vlm(), tmp_path / "a")
    peft_model = attach(make_tiny_vlm())
    save_adapter(peft_model, tmp_path / "a")
    with pytest.raises(ValueError, match="already carries"):
        load_adapter(peft_model, tmp_path / "a")
    assert factors(peft_model, recall(peft_model).modules[0], ANCHOR)[0].requires_grad is False
