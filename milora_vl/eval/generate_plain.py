"""Greedy answers of any model by plain batched ``model.generate``: what works for every family."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from milora_vl.constants import IMAGE_TOKEN, VIDEO_TOKEN
from milora_vl.data.collate import pad_batch
from milora_vl.data.encode import encode
from milora_vl.data.images import ImageTransform
from milora_vl.data.records import Turn
from milora_vl.data.videos import Video, load_frames
from milora_vl.eval.answering import Question, ask_all, find_stop_ids, read_answer
from milora_vl.eval.items import Answer, NonFiniteError, Request


def build_prompt(
    vlm: Any,
    question: str,
    images: Sequence[Image.Image] = (),
    pad_to_square: bool | None = None,
    videos: Sequence[Video] = (),
) -> dict[str, Any]:
    """Encode one question as for training.

    Args:
        vlm: From ``load_vlm``.
        question: Plain text; the images come before it.
        images: RGB images.
        pad_to_square: Whether images of LLaVA-1.5 are padded with the mean color; None: as the
            model or its adapter says.
        videos: Videos; they come after the images and before the question.

    Returns:
        A sample for ``generate``.

    Raises:
        ValueError: If there are images or videos and the model takes none, or not so many.
    """
    marks = f"{IMAGE_TOKEN}\n" * len(images) + f"{VIDEO_TOKEN}\n" * len(videos)
    return build_chat(vlm, [Turn("user", marks + question)], images, pad_to_square, videos)


def build_chat(
    vlm: Any,
    turns: Sequence[Turn],
    images: Sequence[Image.Image] = (),
    pad_to_square: bool | None = None,
    videos: Sequence[Video] = (),
) -> dict[str, Any]:
    """Encode a conversation that the user had the last word in; see ``build_prompt``.

    Args:
        vlm: From ``load_vlm``.
        turns: With an ``IMAGE_TOKEN`` for each image.
        images: RGB images, in order.
        pad_to_square: As for ``build_prompt``.
        videos: As for ``build_prompt``, with a ``VIDEO_TOKEN`` for each.

    Raises:
        ValueError: If there are images and the model takes none, or not so many; or if the turns
            do not fit the prompt style.
    """
    if images and not vlm.has_vision:
        raise ValueError(f"{vlm.path} is a text model and takes no image")
    if videos and not (vlm.image_reader and vlm.image_reader.takes_videos):
        raise ValueError(f"{vlm.path} takes no video")
    counts: list[Any] = [vlm.tokens_per_image] * len(images)
    if vlm.image_reader:
        counts = vlm.image_reader.expand([image.size for image in images])
        counts = [*counts, *vlm.image_reader.expand_videos(videos)]
    style, tokenizer = vlm.prompt_style, vlm.tokenizer
    ids = encode(turns, style, tokenizer, counts, add_generation_prompt=True).input_ids
    if vlm.image_reader:
        inputs = vlm.image_reader.read(images, videos) if images or videos else {}
        tokens = vlm.image_reader.token_inputs(ids, None, inputs)
        return {"input_ids": ids, "image_inputs": inputs, "token_inputs": tokens}
    sample: dict[str, Any] = {"input_ids": ids}
    if images:
        pads = getattr(vlm, "pad_to_square", True) if pad_to_square is None else pad_to_square
        transform = ImageTransform(vlm.processor.image_processor, pads)
        sample["pixel_values"] = torch.stack([transform(one) for one in images])
    return sample


@torch.inference_mode()
def generate(
    vlm: Any,
    samples: Sequence[dict[str, Any]],
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Decode greedily, all samples in one batch padded on the left.

    Mllama's samples go in one batch for each number of images: in transformers, a token that sees
    no image attends to all images of its batch's shape, padding included, so that an answer
    would depend on its neighbours.

    Args:
        vlm: From ``load_vlm``; its model may carry an adapter.
        samples: From ``build_prompt``.
        max_new_tokens: Longest answer in tokens.
        stop_ids: Tokens that end an answer; None: those of the model's generation config.

    Returns:
        New token ids of each sample, its end token included, padding removed.

    Raises:
        NonFiniteError: If the model's logits are NaN or infinite.
    """
    if stop_ids is None:
        stops = vlm.model.generation_config.eos_token_id
        stop_ids = [stops] if isinstance(stops, int) else list(stops or [])
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        masks = sample.get("token_inputs", {}).get("cross_attention_mask")
        groups.setdefault(0 if masks is None else masks.shape[1], []).append(index)
    answers: dict[int, list[int]] = {}
    for group in groups.values():
        batch = [samples[index] for index in group]
        try:
            tokens = _generate(vlm, batch, max_new_tokens, stop_ids)
        except NonFiniteError as error:
            raise NonFiniteError(str(error), group[error.row]) from error
        answers |= zip(group, tokens, strict=True)
    return [answers[index] for index in range(len(samples))]


class FiniteLogits(LogitsProcessor):
    """Changes nothing, and ends the generation when the logits of a row mean nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are.

        Raises:
            NonFiniteError: Naming the first row whose logits are NaN or infinite.
        """
        # NaN and +inf show in the maximum; a single -inf forbids a token and is no harm
        finite = torch.isfinite(scores.max(dim=-1).values)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise NonFiniteError("the model's logits are not finite", row)
        return scores


def _generate(
    vlm: Any, samples: Sequence[dict[str, Any]], max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    tokenizer, device = vlm.tokenizer, vlm.model.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # on the left, so that the answers of all rows begin at one column
    batch = pad_batch(samples, pad, "left")
    width = batch["input_ids"].shape[1]
    inputs = {name: value.to(device) for name, value in batch.items()}
    output = vlm.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([FiniteLogits()]),
    )
    # generate pads the rows that end before others
    return [_until_stop(row, set(stop_ids)) for row in output[:, width:].tolist()]


def _until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens


def answer_one_by_one(
    asker: Any, requests: Sequence[Request], *, max_new_tokens: int
) -> dict[str, Answer]:
    """Answer with plain ``model.generate``, one request at a time: slow, for comparison."""
    answers = {}
    for request in requests:
        samples = [asker.sample(request)]
        (tokens,) = generate(asker.vlm, samples, max_new_tokens, sorted(asker.stop_ids))
        answers[request.id] = read_answer(asker, tokens)
    return answers


class PlainAnswerer:
    """Asks one model with ``model.generate``; the interface is that of ``SharedAnswerer``.

    Args:
        vlm: From ``load_vlm``; its model may carry an adapter.
        batch_size: Most questions in one forward pass.
    """

    def __init__(self, vlm: Any, *, batch_size: int = 16) -> None:
        """See the class."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.vlm = vlm
        self.tokenizer = vlm.tokenizer
        self.batch_size = batch_size
        self.stop_ids = find_stop_ids(vlm)

    answer = ask_all
    answer_one_by_one = answer_one_by_one

    def encode(self, request: Request) -> list[int]:
        """Return the prompt's token ids, made exactly as for training."""
        return self.sample(request)["input_ids"]

    def batches(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Yield batches of similar length, the longest prompts first."""
        waiting = sorted(questions, key=lambda one: -len(one.requests[0].prompt))
        while waiting:
            batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
            yield batch

    def generate(self, batch: Sequence[Question], max_new_tokens: int) -> list[list[int]]:
        """Return the new tokens of each answer, its end token included."""
        prompts = [self.sample(one.requests[0]) for one in batch]
        return generate(self.vlm, prompts, max_new_tokens, sorted(self.stop_ids))

    def sample(self, request: Request) -> dict[str, Any]:
        """Return a request as ``generate`` takes it."""
        images = [source.open() for source in request.images]
        question = request.prompt.replace(IMAGE_TOKEN, "").strip()
        videos = []
        if (video := request.video) is not None:
            sampling = replace(self.vlm.video_sampling, span_s=video.span_s)
            videos = [load_frames(video.path, sampling)]
        return build_prompt(self.vlm, question, images, videos=videos)
