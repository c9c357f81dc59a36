"""Laws of the configuration: what is written is what runs, and a slip is an error that helps."""

from pathlib import Path

import pytest
import torch

from milora_vl.cli import main
from milora_vl.config import (
    ConfigError,
    arguments_for,
    dump_config,
    load_config,
    parse_config,
    variants,
)
from milora_vl.data.records import DataError
from milora_vl.pipeline import check_names
from milora_vl.stages import prepare_model

CONFIGS = sorted(Path("configs").glob("*.yaml"))
MINIMAL = """
model: {path: some/model, prompt_style: chatml}
data: {train: train.json, image_folder: pictures}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_load_of_dump_is_the_same_config(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["adapter.r=7", "training.learning_rate=2e-4", "seed=3"])
    dump_config(config, tmp_path / "dumped.yaml")
    assert load_config(tmp_path / "dumped.yaml") == config


def test_overrides_are_typed_and_win(minimal: Path) -> None:
    config = load_config(minimal, ["adapter.r=7", "training.learning_rate=2e-4", "model.path=x"])
    assert config.adapter.r == 7
    assert config.training["learning_rate"] == 2e-4
    assert config.model.path == "x"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("adapter.lora_alhpa=3", "did you mean 'lora_alpha'"),
        ("adaptor.r=3", "did you mean 'adapter'"),
        ("training.learning_rat=1", "did you mean 'learning_rate'"),
        ("adapter.r=many", "adapter.r"),
        ("adapter.r", "section.key=value"),
        ("model.path.deeper=1", "is a value, not a section"),
        ("data.max_length=0", "data.max_length"),
        ("data.train=[]", "data.train"),
        ("training.learning_rate=abc", "learning_rate: a number is needed"),
    ],
)
def test_slips_are_errors_that_name_the_key(minimal: Path, override: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint.replace(".", r"\.")):
        load_config(minimal, [override])


def test_a_key_written_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(MINIMAL + "seed: 1\nseed: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="twice"):
        load_config(tmp_path / "a.yaml")


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")


def test_the_cache_folder_is_filled_in(monkeypatch: pytest.MonkeyPatch, minimal: Path) -> None:
    monkeypatch.setenv("MILORA_CACHE", "/somewhere")
    config = load_config(minimal, ["data.image_folder=${MILORA_CACHE}/x"])
    assert config.data.image_folder == "/somewhere/x"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = load_config(path)
    size = config.training.get("global_batch_size")
    if size and "7b" in path.name and "qmilora" not in path.name:
        assert config.training["per_device_train_batch_size"] * 8 == size


def test_the_published_recipe_is_kept() -> None:
    config = load_config("configs/llava15_7b_milora.yaml")
    assert (config.adapter.r, config.adapter.lora_dropout) == (128, 0.05)
    assert config.adapter.target_modules == "all-linear"
    assert config.projector.learning_rate == 2e-5
    assert config.training["learning_rate"] == 2e-4
    assert config.training["global_batch_size"] == 128
    assert config.eval.benches
    assert config.training["weight_decay"] == 0
    assert config.data.max_length == 2048
    assert config.data.pad_to_square


def test_unknown_section_values_are_explained() -> None:
    with pytest.raises(ConfigError, match="model"):
        parse_config({"data": {"train": "x", "image_folder": "y"}})


@pytest.mark.parametrize("setting", ["math", "commonsense", "instruct"])
def test_text_recipes_are_the_authors_math_script_and_say_what_is_assumed(setting):
    file = Path(f"configs/llama2_7b_{setting}_milora.yaml")
    config = load_config(file)
    adapter, training = config.adapter, config.training
    r, length = {"math": (64, 2048), "commonsense": (32, 512), "instruct": (64, 2048)}[setting]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (r, r, 0.05)
    assert set(adapter.target_modules) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert config.data.max_length == length
    assert training["per_device_train_batch_size"] * 8 == 16
    known = {"learning_rate": 3e-4, "num_train_epochs": 3, "warmup_steps": 100, "weight_decay": 0.0}
    known |= {"lr_scheduler_type": "linear", "bf16": True, "tf32": True}
    assert {key: training[key] for key in known} == known
    text = file.read_text(encoding="utf-8")
    assert ("ASSUMPTION throughout" in text) == (setting != "math")
    assert "assumption" in text.lower()


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_passes_the_checks_of_a_start(path):
    check_names(load_config(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.save_strategy=no", r"""YAML reads no as false, write "'no'"""),
        (
            "training.save_strategy=step",
            "save_strategy: unknown choice 'step'; did you mean 'steps'",
        ),
        ("training.optim=adamw_torc", "optim: unknown choice"),
        ("training.lr_scheduler_type=cosin", "did you mean 'cosine'"),
        ("training.tf32=maybe", "tf32: true or false"),
        ("training.gradient_checkpointing=flase", "gradient_checkpointing: true or false"),
        ("training.report_to=tensorbord", "did you mean 'tensorboard'"),
        ("training.max_steps=1.5", "max_steps: a whole number"),
        ("training.learning_rate=.nan", "learning_rate: a finite number"),
        ("training.per_device_train_batch_size=0", "the least is 1"),
        ("training.global_batch_size=0", "global_batch_size"),
        ("training.save_steps=0", "set save_strategy to"),
        ("training.save_total_limit=0", "the least is 1"),
        ("training.global_batch=8", "did you mean 'global_batch_size'"),
        ("training.warmup_steps=-1", "warmup_steps"),
        ("training.bf16=maybe", "true, false or auto"),
        ("adapter.target_modules='(q_proj'", "is no regular expression: missing )"),
        ("adapter.target_modules=[]", "no layer is named"),
    ],
)
def test_values_of_training_are_checked_before_anything_is_written(
    minimal: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str
) -> None:
    run = tmp_path / "run"
    for verb in (["check"], ["train", "--run", str(run)]):
        assert main([verb[0], str(minimal), override, *verb[1:]]) == 1
        assert message in capsys.readouterr().err
    assert not run.exists()


def test_hardware_of_another_machine_passes_the_check(minimal: Path) -> None:
    before = torch.backends.fp32_precision
    words = ["training.tf32=true", "training.bf16=true", "training.save_strategy='no'"]
    assert load_config(minimal, words).training["save_strategy"] == "no"
    assert torch.backends.fp32_precision == before, "a check switched TF32 on"


@pytest.mark.parametrize(
    ("devices", "batch", "steps", "kept"), [(8, 16, 1, True), (1, 4, 32, True), (3, 16, 3, False)]
)
def test_the_global_batch_gives_the_accumulation(caplog, devices, batch, steps, kept):
    training = {"global_batch_size": 128, "per_device_train_batch_size": batch}
    found = arguments_for(training, devices)
    assert found == {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
    assert ("not the 128" in caplog.text) is not kept
    caplog.clear()
    arguments_for({**training, "gradient_accumulation_steps": 5}, devices)
    assert "not the 128" in caplog.text


def test_a_comparison_needs_two_names_and_right_keys():
    values = {"model": {"path": "x", "prompt_style": "chatml"}, "data": {"train": "x"}}
    sides = [{"name": "lora", "adapter": {"init": "lora"}}, {"name": "milora"}]
    made = variants(parse_config(values | {"compare": sides}))
    assert [made[name].adapter.init for name in ("lora", "milora")] == ["lora", "milora"]
    for wrong, text in (
        (sides[:1], "two names"),
        ([sides[0], sides[0]], "two names"),
        ([sides[0], {"name": "../up"}], "name"),
        ([sides[0], {"name": "m", "adapter": {"rank": 3}}], "compare: m.*adapter.rank"),
        ([sides[0], {"name": "m", "training": {"lerning_rate": 3}}], "compare: m.*lerning_rate"),
    ):
        with pytest.raises(ConfigError, match=text):
            parse_config(values | {"compare": wrong})


def test_the_comparison_of_the_demo_is_the_demo():
    demo, compared = load_config("configs/demo_cpu.yaml"), load_config("configs/demo_compare.yaml")
    assert [one.name for one in compared.compare] == ["lora", "milora"]
    both = [one.model_dump(exclude={"compare", "run_folder"}) for one in (demo, compared)]
    assert both[0] == both[1], "copy what changed in demo_cpu.yaml into demo_compare.yaml"
    assert variants(compared)["milora"].training == demo.training


def test_the_base_model_is_made_by_the_command_of_the_config(minimal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_model(None, "some/hub-id")
    make = "python -c \"import pathlib; pathlib.Path('base').mkdir()\""
    for _ in range(2):  # the second call would fail if it ran the command again
        prepare_model(make, "base")
    with pytest.raises(DataError, match=r"model\.path: other is not what"):
        prepare_model("python -c pass", "other")
    with pytest.raises(DataError, match=r"model\.prepare: `milora-vl nonsense` ended with code 2"):
        prepare_model("milora-vl nonsense", "other")
