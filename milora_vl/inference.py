"""Ask a model a question about an image."""

from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from milora_vl.adapter.tuned import load_tuned
from milora_vl.data.images import load_image, to_rgb
from milora_vl.data.videos import VIDEO_SUFFIXES, FrameSampling, load_frames
from milora_vl.eval.generate_plain import build_prompt, generate
from milora_vl.model.load import VLM


def load_for_inference(
    model: Path | str | None,
    adapter: Path | str | None = None,
    device: str = "auto",
    quantization: Literal["nf4"] | None = None,
    prompt_style: str | None = None,
) -> VLM:
    """Load a model, with its adapter if one is given, ready to answer.

    Args:
        model: Hub id or checkpoint folder; None: the base that the adapter names.
        adapter: Run, checkpoint or adapter folder, or hub id; also of plain PEFT adapters.
        device: "cpu", "cuda", ... or "auto".
        quantization: "nf4" brings the language model to 4 bits; an adapter that was trained so
            answers as it did in training.
        prompt_style: Default: as the adapter was trained, else by the model.

    Returns:
        Model and processor.

    Raises:
        milora_vl.model.load.LoadError: If the model cannot be loaded.
        ValueError: If the adapter belongs to another model.
    """
    return load_tuned(
        model, adapter, device=device, quantization=quantization, prompt_style=prompt_style
    )


@torch.inference_mode()
def ask(
    vlm: VLM,
    image: Path | str | Image.Image | None,
    question: str,
    max_new_tokens: int = 128,
    video_frames: int | None = None,
) -> str:
    """Answer a question by greedy decoding.

    Args:
        vlm: From ``load_for_inference`` or ``load_vlm``.
        image: An image or its file, or a video's file; None for a question without one.
        question: Plain text; the image comes first.
        max_new_tokens: Longest answer in tokens.
        video_frames: Frames shown of a video, spread evenly; None: as the adapter saw them, or 8.

    Returns:
        The answer without special tokens.

    Raises:
        milora_vl.data.images.BadImageError: If the file is no readable image or video.
        ValueError: If the model takes no images, or no videos, or no frame is asked for.
    """
    if video_frames is not None and video_frames < 1:
        raise ValueError(f"video_frames must be at least 1, not {video_frames}")
    images, videos = [], []
    if isinstance(image, Path | str) and Path(image).suffix.lower() in VIDEO_SUFFIXES:
        sampling = FrameSampling(video_frames) if video_frames is not None else vlm.video_sampling
        videos = [load_frames(image, sampling)]
    elif image is not None:
        images = [to_rgb(image) if isinstance(image, Image.Image) else load_image(image)]
    (tokens,) = generate(vlm, [build_prompt(vlm, question, images, videos=videos)], max_new_tokens)
    return vlm.tokenizer.decode(tokens, skip_special_tokens=True).strip()
