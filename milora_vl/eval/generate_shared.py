"""Greedy answers of a LLaVA-1.5-like model: images and common beginnings are computed once.

Numbers do not depend on the batch: a row attends to its own tokens only, at their own positions, so
in exact arithmetic the result is that of ``model.generate`` on one question at a time.
``SharedAnswerer.answer_one_by_one`` is that reference.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.encode import encode
from milora_vl.data.images import ImageTransform
from milora_vl.data.prompts import get_style
from milora_vl.data.records import Turn
from milora_vl.eval.answering import Question, ask_all, find_stop_ids
from milora_vl.eval.generate_plain import PlainAnswerer, answer_one_by_one
from milora_vl.eval.items import EvaluationError, ImageSource, Request
from milora_vl.eval.prefix_tree import build_tree, generate_over_trees, plan_trees, tree_logits
from milora_vl.model.load import count_image_tokens

logger = logging.getLogger(__name__)

MAX_NODES = 512
"""Most nodes of a prefix tree beyond its first row; attention over a tree costs their square."""

_FEATURE_CACHE_BYTES = 1 << 30
_PROBE_TOLERANCE, _PROBE_TOLERANCE_LOW = 1e-3, 3e-2  # of the span of the logits; low: 16 bits


def build_answerer(vlm: Any, *, batch_size: int = 16) -> "SharedAnswerer | PlainAnswerer":
    """Return the fast asker where it computes what the model computes, else the plain one.

    Prefix trees are built where every image is one square of a fixed number of tokens, which is
    LLaVA-1.5's way; other families are asked by plain batched ``model.generate``. So is a model
    whose attention takes no mask, or whose adapter acts outside of the layers; the log says so.

    Raises:
        EvaluationError: If the model takes no images.
    """
    if not getattr(vlm, "has_vision", True):
        raise EvaluationError(f"{vlm.path} is a text model; the benches ask about images")
    if getattr(vlm, "image_reader", None) is not None:
        return PlainAnswerer(vlm, batch_size=batch_size)
    answerer = SharedAnswerer(vlm, batch_size=batch_size)
    if reason := answerer.why_not_shared():
        logger.warning("answers come from plain batches, which are slower: %s", reason)
        return PlainAnswerer(vlm, batch_size=batch_size)
    return answerer


class SharedAnswerer:
    """Asks one model over prefix trees; keeps the features of images between calls.

    Args:
        vlm: Has ``model`` (LlavaForConditionalGeneration, or a PEFT model around one),
            ``processor`` and ``prompt_style`` (a style or its name).
        batch_size: Most questions in one forward pass.
        share_prefix: Compute common beginnings once; off only to compare.
        pad_to_square: Whether images are padded with the mean color, as LLaVA does; None: as
            the model or its adapter says.
    """

    def __init__(
        self,
        vlm: Any,
        *,
        batch_size: int = 16,
        share_prefix: bool = True,
        pad_to_square: bool | None = None,
    ) -> None:
        """See the class."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.vlm = vlm
        self.model = vlm.model.get_base_model() if isinstance(vlm.model, PeftModel) else vlm.model
        self.tokenizer = vlm.processor.tokenizer
        self.style = get_style(vlm.prompt_style)
        self.batch_size = batch_size
        self.share_prefix = share_prefix
        pads = getattr(vlm, "pad_to_square", True) if pad_to_square is None else pad_to_square
        self.transform = ImageTransform(vlm.processor.image_processor, pads)
        self.stop_ids = find_stop_ids(vlm)
        self.n_image_tokens = count_image_tokens(vlm.processor)
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._ids: dict[str, list[int]] = {}  # of the questions of the call in progress

    answer = ask_all
    answer_one_by_one = answer_one_by_one

    def sample(self, request: Request) -> dict[str, Any]:
        """Return what ``generate`` of other models takes."""
        sample: dict[str, Any] = {"input_ids": self.encode(request)}
        if request.images:
            sample["pixel_values"] = torch.stack([self.transform(x.open()) for x in request.images])
        return sample

    def encode(self, request: Request) -> list[int]:
        """Return the prompt's token ids, made exactly as for training."""
        text = request.prompt.replace(IMAGE_TOKEN, "").strip()
        if request.video is not None:
            raise ValueError(f"{request.video.where}: a video, and this model takes none")
        counts = [self.n_image_tokens] * len(request.images)
        turns = [Turn("user", f"{IMAGE_TOKEN}\n" * len(counts) + text)]
        return encode(
            turns, self.style, self.tokenizer, counts, add_generation_prompt=True
        ).input_ids

    def batches(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Yield batches of whole prefix trees of similar size, the largest first."""
        self._ids = {one.digest: self.encode(one.requests[0]) for one in questions}
        ids = [self._ids[one.digest] for one in questions]
        trees = self._plan(ids, questions)
        # the largest first, so that lack of memory shows at once
        sizes = [sum(len(ids[row]) for row in tree) for tree in trees]
        batch: list[Question] = []
        for place in sorted(range(len(trees)), key=lambda place: -sizes[place]):
            if batch and len(batch) + len(trees[place]) > self.batch_size:
                yield batch
                batch = []
            batch = batch + [questions[row] for row in trees[place]]
        if batch:
            yield batch

    def _plan(self, ids: Sequence[list[int]], questions: Sequence[Question]) -> list[list[int]]:
        return plan_trees(
            ids,
            [one.key for one in questions],
            max_rows=self.batch_size,
            max_nodes=MAX_NODES,
            share=self.share_prefix,
        )

    def generate(self, batch: Sequence[Question], max_new_tokens: int) -> list[list[int]]:
        """Return the new tokens of each answer, its end token included."""
        ids = [self._ids[one.digest] for one in batch]
        planned = self._plan(ids, batch)
        features = self._encode_images({one.key: one.requests[0].images for one in batch})
        tokens = generate_over_trees(
            self.model,
            [build_tree(ids, rows, share=self.share_prefix) for rows in planned],
            [features[batch[rows[0]].key] for rows in planned],
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
        )
        return [tokens[row] for row in range(len(batch))]

    def why_not_shared(self) -> str | None:
        """Return why the fast path would not compute what the model computes, or None.

        Two short rows are run as a tree and, each alone, through the whole model. They differ if
        the attention ignores the mask (flash attention takes none), or if something acts outside
        of the language model's layers: a learned prompt, a hook on the whole model.
        """
        image = self.model.config.image_token_id
        # any tokens will do, but the image's
        a, b, c, d, e = [token for token in range(6) if token != image][:5]
        rows = [[a, b, c], [a, d, e]]
        was_training = self.vlm.model.training
        self.vlm.model.eval()
        try:
            with torch.inference_mode():
                shared = tree_logits(self.model, build_tree(rows, [0, 1]))
                device = self.model.device
                inputs = [torch.tensor([row], device=device) for row in rows]
                outputs = [
                    self.vlm.model(input_ids=one, attention_mask=torch.ones_like(one))
                    for one in inputs
                ]
                alone = torch.stack([output.logits[0, -1] for output in outputs])
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            return f"the model cannot be run over prefix trees ({type(error).__name__}: {error})"
        finally:
            self.vlm.model.train(was_training)
        if not torch.isfinite(alone).all():
            return None  # the first question will tell
        is_autocast = torch.is_autocast_enabled(device.type)
        is_low = is_autocast or self.model.dtype.itemsize < 4
        tolerance = _PROBE_TOLERANCE_LOW if is_low else _PROBE_TOLERANCE
        span = float(alone.max() - alone.min())
        if float((shared - alone).abs().max()) <= tolerance * span:
            return None
        return (
            "its answers would differ, since its attention takes no mask (load it with sdpa or "
            "eager attention) or its adapter acts outside of the layers"
        )

    def _encode_images(
        self, sources: dict[str | None, tuple[ImageSource, ...]]
    ) -> dict[str | None, Tensor | None]:
        """Return the features of all images of a key, in order [n P, D]; None for the key None."""
        # a key of several images is that of each, joined
        parts = {key: key.split("+") for key in sources if key is not None}
        new = {
            part: self.transform(source.open())
            for key, names in parts.items()
            for part, source in zip(names, sources[key], strict=True)
            if part not in self._features
        }
        if new:
            self._features |= encode_images(self.model, new)
        result: dict[str | None, Tensor | None] = {None: None}
        for key, names in parts.items():
            for part in names:
                self._features.move_to_end(part)
            found = [self._features[part] for part in names]
            result[key] = found[0] if len(found) == 1 else torch.cat(found)
        while sum(one.nbytes for one in self._features.values()) > _FEATURE_CACHE_BYTES:
            self._features.popitem(last=False)
        return result


def encode_images(
    model: LlavaForConditionalGeneration, pixel_values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the projected features [P, D] of images [3, H, W], by the same keys."""
    pixels = torch.stack(list(pixel_values.values())).to(model.device, model.dtype)
    features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    return dict(zip(pixel_values, features, strict=True))
