"""Laws of LLaVA-1.5 that published numbers need: 576 tokens, layer -2 without CLS, its padding."""

import torch
from chat_tokenizers import build_extended
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from milora_vl.data.images import ImageTransform, mean_color
from milora_vl.model.prompting import check_image_tokens, count_image_tokens

SIDE, PATCH, D_VISION = 336, 14, 16


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The real geometry and the real picture settings; narrow."""
    tokenizer = build_extended()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=D_VISION, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            image_size=SIDE, patch_size=PATCH, initializer_range=0.2,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval(), processor


def test_a_picture_takes_576_tokens() -> None:
    model, processor = build()
    assert count_image_tokens(processor) == 576
    check_image_tokens(model, processor, "llava")


def test_features_are_layer_minus_2_without_the_class_token() -> None:
    model, processor = build()
    picture = Image.effect_noise((500, 200), 80).convert("RGB")
    pixel_values = ImageTransform(processor.image_processor)(picture)[None]
    with torch.no_grad():
        states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        assert len(states) == 4
        expected = model.model.multi_modal_projector(states[-2][:, 1:])[0]
        features = model.model.get_image_features(pixel_values)
    found = getattr(features, "pooler_output", features)[0]
    assert found.shape == (576, 24)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


def test_the_border_has_clips_mean_color() -> None:
    _, processor = build()
    assert mean_color(processor.image_processor) == (122, 116, 104)
    wide = Image.new("RGB", (400, 100), "white")
    pixels = ImageTransform(processor.image_processor)(wide)
    assert pixels.shape == (3, SIDE, SIDE)
    assert pixels[:, :100].abs().max() < 0.02  # the border above: the mean, so almost zero
    assert pixels[:, SIDE // 2].min() > 1.5  # the whole width of the picture is kept
