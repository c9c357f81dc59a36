"""Laws of several adapters on one base: each computes its own, and the base stays as it was."""

import pytest
import torch
from small_models import train
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import (
    add_adapter_from,
    load_adapter,
    remove_adapter,
    save_adapter,
    unload_adapters,
    use_adapter,
)
from milora_vl.adapter.state import adapter_states, current_adapter, pretrained_function, recall
from milora_vl.config import MiloraConfig
from milora_vl.export.merge import merge_adapter

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def saved(make_tiny_vlm, batch, tmp_path):
    """Adapter name -> (folder, logits alone on the base), of unlike kinds."""
    kinds = {
        "minor": {"r": 6},
        "wide": {"r": 4, "init": "pissa", "train_projector": False},
        "plain": {"r": 3, "init": "lora", "target_modules": r".*language_model.*v_proj"},
        "dora": {"r": 2, "init": "dora"},
    }
    found = {}
    for name, settings in kinds.items():
        model, _ = attach_milora(make_tiny_vlm(), MiloraConfig(**settings), progress=False)
        train(model, batch)
        folder = save_adapter(model, tmp_path / name)
        alone = load_adapter(make_tiny_vlm(), folder, residual="anchor")
        found[name] = folder, compute_logits(alone, batch)
    return found


def with_all(base, saved):
    (first, *rest) = saved
    model = load_adapter(base, saved[first][0], residual="anchor", adapter_name=first)
    for name in rest:
        add_adapter_from(model, saved[name][0], name)
    return model


def test_each_computes_what_it_computes_alone(make_tiny_vlm, batch, saved):
    model = with_all(make_tiny_vlm(), saved)
    assert current_adapter(model) == "dora"
    before = compute_logits(make_tiny_vlm(), batch)
    for name in ("minor", "plain", "wide", "dora", "minor"):
        use_adapter(model, name)
        assert current_adapter(model) == name
        assert torch.equal(compute_logits(model, batch), saved[name][1]), name
        with pretrained_function(model):
            assert torch.equal(compute_logits(model, batch), before)
        assert current_adapter(model) == name


def test_base_is_bit_identical_after_training_switching_and_unloading(make_tiny_vlm, batch, saved):
    base = make_tiny_vlm()
    original = {name: value.clone() for name, value in base.state_dict().items()}
    model = with_all(base, saved)
    for name in ("minor", "wide", "dora"):
        use_adapter(model, name, trainable=True)
        train(model, batch)
    remove_adapter(model, "wide")
    after = unload_adapters(model).state_dict()
    assert after.keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in after.items())


def test_training_one_leaves_the_others_alone(make_tiny_vlm, batch, saved, tmp_path):
    model = with_all(make_tiny_vlm(), saved)
    use_adapter(model, "minor", trainable=True)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".minor." in name for name in trainable)
    train(model, batch)
    trained = compute_logits(model, batch)
    assert not torch.equal(trained, saved["minor"][1])
    use_adapter(model, "wide")
    assert torch.equal(compute_logits(model, batch), saved["wide"][1])
    folder = save_adapter(model, tmp_path / "again", adapter_name="minor")
    alone = load_adapter(make_tiny_vlm(), folder, residual="anchor")
    assert torch.equal(compute_logits(alone, batch), trained)


def test_state_is_kept_per_adapter(make_tiny_vlm, saved):
    model = with_all(make_tiny_vlm(), saved)
    ranks = {name: recall(model, name).r for name in saved}
    assert ranks == {"minor": 6, "wide": 4, "plain": 3, "dora": 2}
    remove_adapter(model, "dora")
    assert list(adapter_states(model)) == ["minor", "wide", "plain"]
    assert current_adapter(model) == "minor"
    assert "dora" not in model.peft_config
    assert not any("dora" in name for name in model.state_dict())
    use_adapter(model, "wide")
    remove_adapter(model, "minor")
    assert current_adapter(model) == "wide"
    assert "minor_anchor" not in model.peft_config


def test_the_active_one_is_merged(make_tiny_vlm, batch, saved):
    model = with_all(make_tiny_vlm(), saved)
    use_adapter(model, "minor")
    assert_close(compute_logits(merge_adapter(model), batch), saved["minor"][1], atol=1e-4, rtol=0)


def test_wrong_uses_are_refused_and_change_nothing(make_tiny_vlm, batch, saved):
    folder = saved["minor"][0]
    model = load_adapter(make_tiny_vlm(), folder, residual="anchor")
    names = list(model.state_dict())
    for taken in ("milora", "anchor", "a.b", "", "half", "items"):
        with pytest.raises(ValueError, match="cannot name a new adapter"):
            add_adapter_from(model, folder, taken)
    base = make_tiny_vlm()
    with pytest.raises(ValueError, match="'half' cannot name a new adapter"):
        load_adapter(base, folder, adapter_name="half")
    assert list(base.state_dict()) == list(make_tiny_vlm().state_dict())
    with pytest.raises(ValueError, match="last adapter"):
        remove_adapter(model, "milora")
    with pytest.raises(ValueError, match=r"no adapter 'other'; this model has \['milora'\]"):
        use_adapter(model, "other")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        add_adapter_from(model, folder, "second")
    assert list(model.state_dict()) == names
    assert torch.equal(compute_logits(model, batch), saved["minor"][1])


def test_a_base_that_was_changed_is_no_base_for_others(make_tiny_vlm, saved):
    model = load_adapter(make_tiny_vlm(), saved["minor"][0], residual="subtract")
    with pytest.raises(ValueError, match="residual='anchor'"):
        add_adapter_from(model, saved["wide"][0], "wide")
    with pytest.raises(ValueError, match="changed the base weights"):
        unload_adapters(model)


def test_another_base_is_refused(make_tiny_vlm, saved, tmp_path):
    other, _ = attach_milora(make_tiny_vlm(seed=1), MiloraConfig(r=2), progress=False)
    folder = save_adapter(other, tmp_path / "other")
    model = load_adapter(make_tiny_vlm(), saved["minor"][0], residual="anchor")
    with pytest.raises(ValueError, match="made on other weights"):
        add_adapter_from(model, folder, "other")
    assert list(adapter_states(model)) == ["milora"]


def test_what_trains_goes_on_training_when_another_fails_or_goes(make_tiny_vlm, saved, monkeypatch):
    model = with_all(make_tiny_vlm(), saved)
    use_adapter(model, "minor", trainable=True)
    model.train()
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("milora_vl.adapter.checkpoint.read_tensors_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_adapter_from(model, saved["wide"][0], "second")
    assert "second" not in model.peft_config
    assert current_adapter(model) == "minor"
    assert model.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == training
    remove_adapter(model, "wide")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == training
    remove_adapter(model, "minor")
    assert not any(p.requires_grad for p in model.parameters())
