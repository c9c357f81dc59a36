"""Small real models shared by the tests: random weights, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub client

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from chat_tokenizers import build_byte_level
from small_models import build_llama
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from milora_vl.model.compose import compose_llava

IMAGE_TOKEN_ID = 63
IMAGE_SIZE_PX = 28
PATCH_SIZE_PX = 14


def build_tiny_vlm(tower: str = "clip", seed: int = 0) -> LlavaForConditionalGeneration:
    """Build a random two-layer LLaVA: float32, CPU, 64 tokens, 28-pixel images."""
    shared = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE_PX,
        "patch_size": PATCH_SIZE_PX,
    }
    vision_config = {
        "clip": lambda: CLIPVisionConfig(intermediate_size=48, projection_dim=24, **shared),
        "dinov2": lambda: Dinov2Config(mlp_ratio=2, **shared),
    }[tower]()
    text_config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=IMAGE_TOKEN_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE_PX // PATCH_SIZE_PX) ** 2,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="session", autouse=True)
def factors_of_shared_fixtures(tmp_path_factory) -> Iterator[None]:
    """Keep factors of fixtures that outlive a test away from the user's cache too."""
    folder = tmp_path_factory.mktemp("shared_factors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("milora_vl.adapter.attach.factors_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def factors_of_this_test(tmp_path_factory, monkeypatch) -> Path:
    """Keep SVD factors in a folder of the test, away from the user's cache; return it."""
    folder = tmp_path_factory.mktemp("factors")
    monkeypatch.setattr("milora_vl.adapter.attach.factors_folder", lambda: folder)
    return folder


@pytest.fixture
def make_tiny_vlm() -> Callable[..., LlavaForConditionalGeneration]:
    """Return the builder, for tests that need a second copy or another tower."""
    return build_tiny_vlm


@pytest.fixture
def tiny_vlm() -> LlavaForConditionalGeneration:
    """A random two-layer LLaVA with a CLIP tower."""
    return build_tiny_vlm()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two samples with one image each: input_ids [2, 12], pixel_values [2, 3, 28, 28], labels."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(3, IMAGE_TOKEN_ID, (2, 12), generator=generator)
    input_ids[:, 1:5] = IMAGE_TOKEN_ID
    pixel_values = torch.randn(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixel_values,
        "labels": input_ids.clone(),
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden``: write the golden files instead of comparing with them."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden on purpose")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compare a text with a golden file, or write the file with ``--update-golden``."""

    def check(path: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing; make it with pytest --update-golden"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed LLaVA checkpoint on disk with processor and tokenizer: random, 28-px images."""
    tokenizer = build_byte_level()
    torch.manual_seed(1)
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=IMAGE_SIZE_PX,
            patch_size=PATCH_SIZE_PX,
        )
    )
    language_model = build_llama(tokenizer, max_position_embeddings=512, tie_word_embeddings=True)
    return compose_llava(
        tower,
        language_model,
        tokenizer,
        tmp_path_factory.mktemp("tiny") / "checkpoint",
        image_size_px=IMAGE_SIZE_PX,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.2, 0.2],
        vision_feature_layer=-1,
    )
