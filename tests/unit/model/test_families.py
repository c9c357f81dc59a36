"""Laws that hold for every family: a tiny checkpoint goes the whole way, loading to answers."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from family_models import BUILDERS, TEXT, build_checkpoint
from peft import PeftModel
from PIL import Image

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.targets import find_targets
from milora_vl.config import DataSection, MiloraConfig
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.images import ImageProcessorError
from milora_vl.data.records import read_records
from milora_vl.eval.generate_plain import PlainAnswerer, build_prompt, generate
from milora_vl.eval.generate_shared import SharedAnswerer, build_answerer
from milora_vl.eval.items import EvaluationError, ImageSource, Request
from milora_vl.export.merge import merge_adapter
from milora_vl.model.families import FAMILIES, FamilyError, find_family
from milora_vl.model.load import VLM, LoadError, load_vlm
from milora_vl.training.inputs import build_collate, build_dataset
from milora_vl.training.trainer import supervised_positions, token_loss_sum

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
OWN_LINEARS = {  # what other families call theirs
    "qwen3_5": LINEARS | {"in_proj_qkv", "in_proj_z", "out_proj"},
    "lfm2_vl": {"q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3"},
}
SIZES = {"wide.png": (50, 30), "tall.png": (30, 70), "square.png": (40, 40)}
TALKS = [
    (["wide.png"], ["What is in the picture?", "A red fox."]),
    (["tall.png", "square.png"], ["Which is round?", "The ball.", "Why?", "It is :)"]),
    ([], ["How many cats are there?", "Two"]),
    (["square.png"], ["What colour is it?", "Blue."]),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        noise = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


@pytest.fixture(scope="module", params=list(BUILDERS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "model")
    except (ImportError, AttributeError) as error:
        # a class that this transformers lacks; any other mistake of a builder is an error
        if isinstance(error, AttributeError) and "module transformers" not in str(error):
            raise
        pytest.skip(f"{request.param} cannot be built here: {error}")


def build_data(vlm: VLM, folder: Path, where: Path) -> ConversationDataset:
    allowed = vlm.image_reader.max_images if vlm.image_reader else None
    records = [
        {
            "image": images,
            "conversations": [
                {"from": ("human", "gpt")[turn % 2], "value": marks + text}
                for turn, text in enumerate(texts)
                for marks in ["<image>\n" * len(images) if turn == 0 else ""]
            ],
        }
        for images, texts in TALKS
        if not allowed or len(images) <= allowed
    ]  # fmt: skip
    (where / "train.json").write_text(json.dumps(records))
    conversations, _ = read_records(where / "train.json", folder)
    section = DataSection(train=["train.json"], image_folder=str(folder), max_length=1000)
    return build_dataset(vlm, section, conversations)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    keep = supervised_positions(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs, logits_to_keep=keep).logits


def test_every_family_goes_the_whole_way(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    vlm = load_vlm(checkpoint, dtype=torch.float32)
    family = find_family(vlm.model)
    dataset = build_data(vlm, pictures, tmp_path)
    samples = [dataset[index] for index in range(len(dataset))]
    assert dataset.lengths == [len(sample["input_ids"]) for sample in samples]
    collate = build_collate(vlm)
    batch = collate(samples)

    # a mixed batch computes what its samples compute alone (of Mllama see plain_generation.py)
    vlm.model.eval()
    alike = samples if not family.cross_attention else [samples[0], samples[3]]
    with torch.no_grad():
        together, n_together = token_loss_sum(vlm.model, collate(alike))
        alone = [token_loss_sum(vlm.model, collate([sample])) for sample in alike]
    assert n_together == sum(n for _, n in alone)
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), atol=2e-3, rtol=1e-5)

    # step 0: the same function; only projections of the language model are matched
    before = logits(vlm.model, batch)
    start = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    peft_model, certificate = attach_milora(vlm.model, MiloraConfig(r=4), progress=False)
    torch.testing.assert_close(logits(peft_model, batch), before, atol=1e-3, rtol=0)
    modules = certificate.matched["language_model"]
    assert {name.rpartition(".")[2] for name in modules} == OWN_LINEARS.get(
        vlm.model.config.model_type, LINEARS
    )
    assert all(name.startswith(f"{family.language_model}.") for name in modules)
    assert certificate.matched["projector"] == [family.projector]

    # two training steps: the loss of the batch falls; tower, biases and embeddings stay
    peft_model.train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(2):
        loss_sum, n = token_loss_sum(peft_model, batch)
        (loss_sum / n).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_sum.detach() / n))
    assert losses[1] < losses[0]
    after = logits(peft_model, batch)
    assert not torch.allclose(after, before, atol=1e-3)

    # saved, it is a stock PEFT adapter of the original base; merged, a plain model
    save_adapter(peft_model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load_vlm(checkpoint).model, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(stock, batch), after, atol=1e-3, rtol=0)
    again = load_adapter(load_vlm(checkpoint).model, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, batch), after, atol=1e-3, rtol=0)
    merged = merge_adapter(peft_model)
    torch.testing.assert_close(logits(merged, batch), after, atol=1e-3, rtol=0)
    adapted = {f"{name}.weight" for name in modules}
    moved = {
        name
        for name, value in merged.state_dict().items()
        if not torch.equal(value, start[name]) and not name.startswith(f"{family.projector}.")
    }
    assert moved <= adapted | {f"{family.projector}.weight"}

    # answers do not depend on the batch, left-padded
    vlm = vlm.with_model(merged.eval())
    prompts = [build_prompt(vlm, "Why?", [])]
    for name in SIZES:
        prompts.append(build_prompt(vlm, "What is in the picture?", [Image.open(pictures / name)]))
    assert len({len(prompt["input_ids"]) for prompt in prompts}) > 1
    assert generate(vlm, prompts, 6) == [generate(vlm, [prompt], 6)[0] for prompt in prompts]


def test_bfloat16_weights_take_the_float32_pictures_of_the_processor(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    vlm = load_vlm(checkpoint, dtype=torch.bfloat16)
    dataset = build_data(vlm, pictures, tmp_path)
    batch = build_collate(vlm)([dataset[0], dataset[len(dataset) - 1]])
    assert torch.isfinite(logits(vlm.model, batch)).all()


def test_the_models_own_template_and_processor_give_the_same_prompt(
    checkpoint: Path, pictures: Path
) -> None:
    vlm = load_vlm(checkpoint)
    if not vlm.processor.chat_template and vlm.prompt_style.name != "prefix":
        pytest.skip("its checkpoint has no chat template")
    names = list(SIZES)[: 1 if checkpoint.parent.name.startswith("paligemma") else 2]
    shown = [Image.open(pictures / name).convert("RGB") for name in names]
    ours = build_prompt(vlm, "What is round?", shown)
    if vlm.prompt_style.name == "prefix":
        text = vlm.processor.image_token + "What is round?"
    else:
        content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": "What is round?"}]
        text = vlm.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    stock = vlm.processor(
        text=[text], images=[shown], add_special_tokens=False, return_tensors="pt"
    )
    assert ours["input_ids"] == stock["input_ids"][0].tolist()
    if not vlm.image_reader:
        return
    for name, value in ours["image_inputs"].items():
        assert torch.equal(value, stock[name]), name
    for name, value in ours["token_inputs"].items():
        assert torch.equal(value, torch.as_tensor(stock[name])[0]), name


def test_a_family_outside_the_table_is_found_by_inspection_with_a_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tf.Cohere2VisionConfig(
        vision_config=tf.SiglipVisionConfig(hidden_size=24, num_hidden_layers=1, image_size=28),
        text_config=tf.Cohere2Config(**TEXT, vocab_size=64, pad_token_id=0),
    )
    with torch.device("meta"):
        model = tf.Cohere2VisionForConditionalGeneration(config)
    assert config.model_type not in FAMILIES
    with caplog.at_level(logging.WARNING):
        family = find_family(model)
    assert "by inspection" in caplog.text
    assert family.language_model == "model.language_model"
    assert family.tower == "model.vision_tower"
    assert family.projector == "model.multi_modal_projector"


def test_experts_in_one_tensor_are_skipped_with_a_word_and_attention_is_adapted() -> None:
    config = tf.Qwen3MoeConfig(
        **TEXT, vocab_size=64, pad_token_id=0, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    model = tf.Qwen3MoeForCausalLM(config)
    targets = find_targets(model, "all-linear")
    assert len(targets.modules) == 8
    assert "for adapter.experts to choose" in targets.skipped["model.layers.0.mlp.experts"]


def test_benches_ask_other_families_by_plain_generation(pictures: Path, tmp_path: Path) -> None:
    vlm = load_vlm(build_checkpoint("qwen2_vl", tmp_path / "model"))
    answerer = build_answerer(vlm, batch_size=3)
    assert isinstance(answerer, PlainAnswerer)
    requests = [
        Request(f"{name} {question}", question, ImageSource(name, pictures / name))
        for name in SIZES
        for question in ("What is it?", "Is there a very large red fox in the picture?")
    ]
    requests.append(Request("none", "Why?", None))
    batched = answerer.answer(requests, max_new_tokens=5, progress=False)
    assert batched == answerer.answer_one_by_one(requests, max_new_tokens=5)
    assert set(batched) == {request.id for request in requests}
    missing = Request("missing", "Why?", ImageSource("row 3", pictures / "absent.png"))
    with pytest.raises(EvaluationError, match=r"1 failed, 0 allowed.*row 3"):
        answerer.answer([*requests, missing], max_new_tokens=2, progress=False)
    answers = answerer.answer(
        [missing, *requests], max_new_tokens=2, allow_errors=1, progress=False
    )
    assert answers["missing"].text is None
    plain = load_vlm(build_checkpoint("llava", tmp_path / "llava"))
    assert isinstance(build_answerer(plain), SharedAnswerer)


def test_an_encoder_decoder_is_refused_with_the_reason() -> None:
    config = tf.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(FamilyError, match="encoder-decoder"):
        find_family(tf.BartForConditionalGeneration(config))


def test_more_pictures_than_a_family_takes_are_refused(tmp_path: Path) -> None:
    vlm = load_vlm(build_checkpoint("paligemma", tmp_path / "model"), prompt_style="chat_template")
    assert vlm.prompt_style.name == "prefix"
    with pytest.raises(ImageProcessorError, match="2 images in one sample, but PaliGemmaProcessor"):
        build_prompt(vlm, "Why?", [Image.new("RGB", (20, 20))] * 2)


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "paligemma", "internvl"])
def test_processor_and_model_that_disagree_on_image_tokens_name_both_numbers(
    name: str, tmp_path: Path
) -> None:
    folder = build_checkpoint(name, tmp_path / "model")
    file = folder / "processor_config.json"
    text = file.read_text()
    broken = text.replace('"image_seq_length": 4', '"image_seq_length": 5')
    broken = broken.replace('"image_seq_len": 4', '"image_seq_len": 5')
    assert broken != text
    file.write_text(broken)
    with pytest.raises(LoadError, match=r"puts 5 image tokens .* expects 4"):
        load_vlm(folder)
