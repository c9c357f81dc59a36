"""Laws of the configuration: what is written is what runs, and a slip is an error that helps."""

from pathlib import Path

import pytest
from transformers import TrainingArguments

from milora_vl.config import ConfigError, dump_config, load_config, parse_config
from milora_vl.pipeline import check_names

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
def test_every_shipped_config_is_valid(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    hardware = {"bf16", "tf32", "fp16"}  # refused on a machine without them, right elsewhere
    training = {k: v for k, v in config.training.items() if k not in hardware}
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **training)


def test_the_published_recipe_is_kept() -> None:
    config = load_config("configs/llava15_7b_milora.yaml")
    assert (config.adapter.r, config.adapter.lora_dropout) == (128, 0.05)
    assert config.adapter.target_modules == "all-linear"
    assert config.projector.learning_rate == 2e-5
    assert config.training["learning_rate"] == 2e-4
    assert config.training["per_device_train_batch_size"] * 8 == 128
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
