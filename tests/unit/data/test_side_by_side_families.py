"""Law of exchanges side by side for every family: the sum of the exchanges alone, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from chat_tokenizers import build_byte_level
from family_models import BUILDERS, TEXT, build_checkpoint
from PIL import Image

from milora_vl.config import ConfigError, DataSection, parse_config
from milora_vl.data.records import read_records
from milora_vl.model.families import CAUSAL_TEXT, FamilyError, check_side_by_side, find_family
from milora_vl.model.load import VLM, load_vlm
from milora_vl.pipeline import check_names
from milora_vl.training.inputs import build_collate, build_dataset
from milora_vl.training.trainer import token_loss_sum

EXCHANGES = [("What is it?", "A fox."), ("Is it red?", "Yes"), ("Where?", "Left, up.")]
FAR = 1000


def read_data(vlm: VLM, folder: Path, picture: str | None, turns: str) -> Any:
    """The exchanges as one record to be learnt side by side, or each as a record of its own."""
    groups = [EXCHANGES, EXCHANGES[:1]] if turns == "side_by_side" else [[x] for x in EXCHANGES]
    if turns != "side_by_side":
        groups.append(EXCHANGES[:1])
    records = []
    for group in groups:
        talk = []
        for place, (question, answer) in enumerate(group):
            mark = "<image>\n" if picture and place == 0 else ""
            talk += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        records.append({"conversations": talk} | ({"image": picture} if picture else {}))
    (folder / f"{turns}.json").write_text(json.dumps(records))
    conversations, _ = read_records(folder / f"{turns}.json", folder)
    section = DataSection(train=["x.json"], image_folder=str(folder), max_length=FAR, turns=turns)
    return build_dataset(vlm, section, conversations)


def assert_the_sum_of_the_exchanges(vlm: VLM, folder: Path, picture: str | None) -> None:
    together = read_data(vlm, folder, picture, "side_by_side")
    alone = read_data(vlm, folder, picture, "running")
    collate = build_collate(vlm)
    batch = collate([together[0], together[1]])  # the second is padded
    assert batch["attention_mask"].dim() == 4
    with torch.no_grad():
        loss, n_tokens = token_loss_sum(vlm.model, batch)
        parts = [token_loss_sum(vlm.model, collate([alone[i]])) for i in range(len(alone))]
    assert n_tokens == sum(n for _, n in parts)
    torch.testing.assert_close(loss, sum(part for part, _ in parts), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_family_learns_exchanges_as_if_alone_or_says_that_it_cannot(
    name: str, tmp_path: Path
) -> None:
    try:
        folder = build_checkpoint(name, tmp_path / "model")
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{name} cannot be built here: {error}")
    vlm = load_vlm(folder, dtype=torch.float32)
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    text = vlm.model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if find_family(vlm.model).side_by_side and window and window < FAR:
        with pytest.raises(FamilyError, match=rf"slides over {window} tokens.*data.max_length"):
            read_data(vlm, tmp_path, "a.png", "side_by_side")
        text.sliding_window = 2 * FAR
    if not find_family(vlm.model).side_by_side:
        with pytest.raises(FamilyError, match="not known to be right for"):
            read_data(vlm, tmp_path, "a.png", "side_by_side")
        return
    assert_the_sum_of_the_exchanges(vlm, tmp_path, "a.png")


@pytest.mark.parametrize("kind", CAUSAL_TEXT)
def test_text_models_learn_exchanges_as_if_alone(kind: str, tmp_path: Path) -> None:
    tokenizer = build_byte_level()
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(
        kind, **TEXT, vocab_size=len(tokenizer), head_dim=8, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, sliding_window=None,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    vlm = load_vlm(tmp_path / "model", prompt_style="chatml", dtype=torch.float32)
    assert_the_sum_of_the_exchanges(vlm, tmp_path, None)


def test_other_text_models_and_attentions_are_refused() -> None:
    config = tf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(FamilyError, match="not known to be right for 'mamba'"):
        check_side_by_side(tf.MambaForCausalLM(config), 10)
    raw = {
        "model": {
            "path": "x",
            "prompt_style": "chatml",
            "attn_implementation": "flash_attention_2",
        },
        "data": {"train": "x.json", "image_folder": "x", "turns": "side_by_side"},
    }
    with pytest.raises(ConfigError, match="takes a mask"):
        check_names(parse_config(raw))


def test_low_precision_weights_take_the_mask(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    build_checkpoint("llava", tmp_path / "model")
    for attention in ("sdpa", "eager"):
        vlm = load_vlm(tmp_path / "model", dtype=torch.bfloat16, attn_implementation=attention)
        data = read_data(vlm, tmp_path, "a.png", "side_by_side")
        with torch.no_grad():
            loss, _ = token_loss_sum(vlm.model, build_collate(vlm)([data[0], data[1]]))
        assert torch.isfinite(loss)
