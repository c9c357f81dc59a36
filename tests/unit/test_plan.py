"""Laws of the plan: the numbers of the real thing, no weights read, and the same refusals."""

import json

import pytest
import torch
import yaml
from quantized_models import build_whole_checkpoint

from milora_vl import plan
from milora_vl.adapter.attach import attach_milora
from milora_vl.cli import main
from milora_vl.config import parse_config
from milora_vl.files import cache_folder
from milora_vl.model.embedded import demo_config
from milora_vl.model.load import LoadError, load_vlm
from milora_vl.plan import empty_model, plan_run


def config_of(path, adapter=None, training=None, **data):
    return parse_config(
        {
            "model": {"path": str(path), "prompt_style": "chatml", "device": "cpu"},
            "data": {"train": "nowhere.json", "image_folder": "nowhere", **data},
            "adapter": adapter or {"r": 4},
            "training": training or {},
        }
    )


@pytest.fixture
def only_config(tiny_checkpoint, tmp_path):
    """A folder with nothing but config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("init", ["milora", "lora", "dora", "mica"])
@pytest.mark.parametrize("projector", [True, False])
def test_counts_are_those_of_the_attached_adapter(only_config, tiny_checkpoint, init, projector):
    config = config_of(only_config, {"r": 4, "init": init, "train_projector": projector})
    plan = plan_run(config)
    _, certificate = attach_milora(load_vlm(tiny_checkpoint).model, config.adapter, progress=False)
    assert plan.trainable == certificate.trainable_parameters
    assert plan.total == certificate.total_parameters
    assert sum(group.shape.count for group in plan.groups) == len(certificate.layers)
    planned = {(group.kind, group.shape.d_out, group.shape.d_in) for group in plan.groups}
    made = {(layer.name.rpartition(".")[2], *layer.shape) for layer in certificate.layers}
    assert planned == made
    assert plan.residual == certificate.residual
    for text in (*(group.kind for group in plan.groups), f"{plan.trainable:,}", "GiB"):
        assert text in plan.summary()


def test_no_weight_is_held(only_config):
    model = empty_model(config_of(only_config).model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tower_and_head_are_refused_unless_asked_for(only_config, capsys, tmp_path):
    file = tmp_path / "run.yaml"
    values = config_of(only_config).model_dump(mode="json")
    file.write_text(yaml.safe_dump(values))
    for pattern in (".*q_proj", "lm_head"):
        words = ["plan", str(file), f"adapter.target_modules={pattern}"]
        assert main(words) == 1
        assert "outside the language model" in capsys.readouterr().err
    words = ["plan", str(file), "adapter.target_modules=.*q_proj"]
    assert main([*words, "adapter.allow_outside_language_model=true"]) == 0
    assert "vision tower" in capsys.readouterr().out
    assert main(["plan", str(file), "adapter.r=17"]) == 1
    assert "r=17 is out of range" in capsys.readouterr().err


def test_demo_config_is_planned_offline(capsys):
    assert main(["plan", "configs/demo_cpu.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "trainable" in printed
    assert "230 steps" in printed or "steps" in printed


def test_the_written_sides_are_those_of_the_demo_model():
    found = list((cache_folder() / "models").glob("demo-*/config.json"))
    if not found:
        pytest.skip("the demo model is not in the cache")
    real = json.loads(found[0].read_text())
    written = demo_config(112, 9).to_dict()
    for part in ("text_config", "vision_config"):
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
            if key in real[part]:
                assert written[part][key] == real[part][key], key
    for key in ("vocab_size", "intermediate_size", "num_key_value_heads"):
        assert written["text_config"][key] == real["text_config"][key], key


def test_a_hub_id_without_a_network_is_explained():
    with pytest.raises(LoadError, match=r"no config\.json.*set model\.path to its folder"):
        plan_run(config_of("some-org/some-model"))


def test_steps_come_from_the_records(only_config, tmp_path):
    turns = [
        {"from": "human", "value": "<image>\n" + "x" * 95},
        {"from": "gpt", "value": "y" * 100},
    ]
    records = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(10)]
    file = tmp_path / "train.json"
    training = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    found = []
    for content in (json.dumps(records), "\n".join(json.dumps(x) for x in records)):
        file.write_text(content)
        found.append(plan_run(config_of(only_config, None, training, train=str(file))))
    assert [plan.steps for plan in found] == [6, 6]  # 3 steps an epoch, the last one half full
    assert "10 samples of about 65 tokens" in found[0].summary()  # 51 + 10 marks + 4 image tokens
    assert plan_run(config_of(only_config)).steps is None
    assert plan_run(config_of(only_config, None, {"max_steps": 7})).steps == 7


def test_estimates_grow_with_the_work():
    small, large = plan.LayerShape(512, 512, 1), plan.LayerShape(2048, 2048, 1)
    seconds = [plan.init_seconds([s], 32, "auto", 1e11) for s in (small, large)]
    assert seconds[0] < seconds[1]
    exact = plan.init_seconds([large], 32, "exact", 1e11)
    assert exact > 3 * seconds[1]
    assert plan.init_seconds([large], 32, "none", 1e11) < seconds[1]
    size = plan.ModelSize(10**6, 0, 10**6, 10**4, 0, 0, 2, 64, 128)
    one, two = (plan.TrainingLoad(samples, 1000, 0, 0) for samples in (1, 2))
    assert plan.step_flops(size, two) == 2 * plan.step_flops(size, one)
    memory = [
        plan.training_gib(size, two, 4, low=low, checkpointing=checkpointing)
        for low, checkpointing in ((False, False), (True, False), (True, True))
    ]
    assert memory == sorted(memory, reverse=True)
    heads = plan.ModelSize(10**6, 0, 10**6, 10**4, 0, 0, 2, 64, 128, heads=4)
    plain, eager = (
        plan.training_gib(heads, two, 4, low=False, checkpointing=False, eager=eager)
        for eager in (False, True)
    )
    # two samples, four heads, 1000 x 1000 probabilities in two layers, kept twice in float32
    assert (eager - plain) * plan.GIB == pytest.approx(2 * 4 * 1000**2 * 2 * 8)


def test_rate_is_measured_here():
    rate = plan.measure_flops(torch.float32)
    assert 1e8 < rate < 1e16


@pytest.mark.parametrize("stored", [False, True])  # whether the checkpoint itself is in 4 bits
def test_a_plan_in_4_bits_is_that_of_the_attached_adapter(tmp_path, stored):
    pytest.importorskip("bitsandbytes")
    checkpoint = build_whole_checkpoint(tmp_path / "model")
    vlm = load_vlm(checkpoint, quantization="nf4", prompt_style="chatml")
    weights = vlm.float_weights
    config = config_of(checkpoint, {"r": 4})
    in_float = plan_run(config)
    if stored:
        file, weights = checkpoint / "config.json", None
        values = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "x"}}
        file.write_text(json.dumps(values))
    else:
        model = config.model.model_copy(update={"quantization": "nf4"})
        config = config.model_copy(update={"model": model})
    plan = plan_run(config)
    _, certificate = attach_milora(vlm.model, config.adapter, progress=False, weights=weights)
    assert plan.residual == certificate.residual == ("anchor" if stored else "subtract")
    assert plan.trainable == certificate.trainable_parameters
    assert plan.total == certificate.total_parameters == in_float.total
    assert plan.training_gib < in_float.training_gib


@pytest.mark.parametrize(
    ("name", "device", "lines"),
    [
        ("llava15_7b_milora", "8x80GB", ["it fits", "128 = 8 devices x 16 x 1"]),
        (
            "llava15_7b_milora",
            "8xA100-40GB",
            ["per_device_train_batch_size=8", "8 devices x 8 x 2"],
        ),
        ("llava15_7b_milora", "1x24GB", ["NOT fit", "per_device_train_batch_size=1", "1 x 128"]),
        ("llava15_7b_milora", "1x16GB", ["NOT fit", "model.quantization=nf4"]),
        ("llava15_7b_qmilora", "1xL4", ["it fits", "128 = 1 devices x 4 x 32", "a step"]),
        ("llava15_7b_milora", "8xV100-32GB", ["does not compute in bfloat16"]),
    ],
)
def test_the_7b_recipes_are_planned_for_a_machine_that_is_not_here(
    name, device, lines, capsys, monkeypatch
):
    def measure(*words, **named):
        raise AssertionError("this machine was timed")

    monkeypatch.setattr(plan, "measure_flops", measure)
    assert main(["plan", f"configs/{name}.yaml", "--device", device]) == 0
    printed = capsys.readouterr().out
    for line in lines:
        assert line in printed, printed
    assert ("a step" in printed) == any(gpu in device for gpu in ("A100", "L4", "V100"))


def test_a_cpu_is_not_timed_for_a_model_that_wants_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["plan", "configs/llava15_7b_milora.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "name the machine that will train: --device" in printed
    assert "GFLOP" not in printed
    assert main(["plan", "configs/llava15_7b_milora.yaml", "--device", "H10"]) == 1
    assert "RTX4090" in capsys.readouterr().err


def test_the_optimizer_and_checkpointing_count():
    size = plan.ModelSize(10**9, 0, 10**9, 10**8, 0, 0, 32, 4096, 11008, vocabulary=32000)
    load = plan.TrainingLoad(4, 2048, 1, 576)

    def gib(**more):
        return plan.training_gib(size, load, 2, low=True, **{"checkpointing": True, **more})

    assert (gib() - gib(optimizer="adamw_8bit")) * plan.GIB == pytest.approx(6 * 10**8)
    assert gib(checkpointing=False) > gib(dropout=True) > gib() > gib(optimizer="paged_adamw_8bit")
    again = plan.step_flops(size, load, checkpointing=True) / plan.step_flops(size, load)
    assert 1.3 < again < 1.5
