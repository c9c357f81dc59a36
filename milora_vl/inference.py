"""Ask a model a question about a picture."""

from pathlib import Path

import torch
from PIL import Image

from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.encode import encode
from milora_vl.data.images import build_image_transform, load_image
from milora_vl.data.records import Turn
from milora_vl.model.load import VLM, load_vlm


def load_for_inference(
    model: Path | str, adapter: Path | str | None = None, device: str = "auto"
) -> VLM:
    """Load a model, with its adapter if one is given, ready to answer.

    Raises:
        milora_vl.model.load.LoadError: If the model cannot be loaded.
        ValueError: If the adapter belongs to another model.
    """
    vlm = load_vlm(model, device=device)
    return vlm.with_model(load_adapter(vlm.model, adapter).eval()) if adapter else vlm


@torch.inference_mode()
def ask(
    vlm: VLM, image: Path | str | Image.Image | None, question: str, max_new_tokens: int = 128
) -> str:
    """Answer a question by greedy decoding.

    Args:
        vlm: From ``load_for_inference`` or ``load_vlm``.
        image: A picture or its file; None for a question without one.
        question: Plain text; the image comes first.
        max_new_tokens: Longest answer in tokens.

    Returns:
        The answer without special tokens.

    Raises:
        milora_vl.data.images.BadImageError: If the file is no readable picture.
    """
    tokenizer, device = vlm.processor.tokenizer, vlm.model.device
    text = question if image is None else f"{IMAGE_TOKEN}\n{question}"
    counts = [] if image is None else [vlm.tokens_per_image]
    encoded = encode(
        [Turn("user", text)], vlm.prompt_style, tokenizer, counts, add_generation_prompt=True
    )
    input_ids = torch.tensor([encoded.input_ids], device=device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if image is not None:
        picture = image.convert("RGB") if isinstance(image, Image.Image) else load_image(image)
        transform = build_image_transform(vlm.processor.image_processor)
        inputs["pixel_values"] = transform(picture)[None].to(device)
    output = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True).strip()
