"""Ask a model behind an OpenAI-compatible endpoint: the same questions, prompts and scores.

The server writes the prompt of its own model around each question. ``milora-vl serve`` does so as
evaluation does here, so its answers are those of the local model.
"""

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from tqdm import tqdm

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.eval.answering import Journal, Question, check_failures, distinct_questions
from milora_vl.eval.items import Answer, ImageSource, Request

KEY_VARIABLES = ("MILORA_API_KEY", "OPENAI_API_KEY")
PROMPT_STYLE = "the server's own"
_TIMEOUT_S = 600
_RETRIES = 5
_TEMPORARY = frozenset((408, 409, 429, 500, 502, 503, 504))


class EndpointAnswerer:
    """Asks a served model; the interface is that of ``PlainAnswerer``.

    Args:
        url: Base URL of the endpoint, up to but without ``/chat/completions``.
        model: Name of the model there.
        batch_size: Most requests at a time.
        api_key: Key; None for the environment's ``MILORA_API_KEY`` or ``OPENAI_API_KEY``.
        wait_s: Pause before a first retry, in seconds; it doubles each time.

    Raises:
        ValueError: If the URL is no web address, or no model is named.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        *,
        batch_size: int = 16,
        api_key: str | None = None,
        wait_s: float = 1.0,
    ) -> None:
        """See the class."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {url!r}: an http:// or https:// URL was expected")
        if not model:
            raise ValueError("--endpoint needs --model, the name of the model on that server")
        self.url, self.model, self.batch_size, self.wait_s = url, model, batch_size, wait_s
        self._key = api_key or next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)

    def identity(self) -> dict[str, Any]:
        """Return what its answers depend on besides the questions, as far as it can be known."""
        return {"endpoint": self.url, "model": self.model}

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        allow_errors: int = 0,
        label: str = "",
        progress: bool = True,
        journal: Journal | None = None,
    ) -> dict[str, Answer]:
        """Answer all requests; options are those of ``ask_all``.

        Raises:
            EvaluationError: If more than ``allow_errors`` samples have failed.
        """
        questions, answers = distinct_questions(requests, max_new_tokens)
        check_failures(answers, allow_errors)
        options = {"desc": label, "unit": "item", "total": len(requests), "disable": not progress}
        with ThreadPoolExecutor(self.batch_size) as pool, tqdm(**options) as bar:
            for batch in self._batches(questions):
                known = {one.digest: journal.get(one.digest) if journal else None for one in batch}
                asked = [one for one in batch if known[one.digest] is None]
                new = pool.map(lambda one: self._ask(one.requests[0], max_new_tokens), asked)
                found = dict(zip((one.digest for one in asked), new, strict=True))
                if journal is not None and found:
                    journal.record(found)
                known |= found
                answers |= {one.id: known[q.digest] for q in batch for one in q.requests}
                check_failures(answers, allow_errors)
                bar.update(len(answers) - bar.n)
        return answers

    def answer_one_by_one(
        self, requests: Sequence[Request], *, max_new_tokens: int
    ) -> dict[str, Answer]:
        """Answer one request at a time, for comparison."""
        return {one.id: self._ask(one, max_new_tokens) for one in requests}

    def _batches(self, questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
        size = 4 * self.batch_size  # what is lost at most when the call is interrupted
        for start in range(0, len(questions), size):
            yield questions[start : start + size]

    def _ask(self, request: Request, max_new_tokens: int) -> Answer:
        started = time.perf_counter()
        try:
            reply = self._post(
                {
                    "model": self.model,
                    "messages": [{"role": "user", "content": content_of(request)}],
                    "max_tokens": max_new_tokens,
                    "temperature": 0,
                }
            )
            choice = reply["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise ValueError("the reply holds no text")
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            return Answer(None, error=f"{self.url}: {error}")
        return Answer(
            text.strip(),
            n_tokens=(reply.get("usage") or {}).get("completion_tokens", 0),
            ended=choice.get("finish_reason") == "stop",
            seconds=time.perf_counter() - started,
        )

    def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the server's reply; what may pass is tried again.

        Raises:
            OSError: If the server cannot be reached or answers with an error.
            ValueError: If the reply is no JSON.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(_RETRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                failure = OSError(
                    f"HTTP {error.code}: {error.read()[:300].decode(errors='replace')}"
                )
                if error.code not in _TEMPORARY:
                    break
            except OSError as error:
                failure = error
            if attempt < _RETRIES:
                time.sleep(self.wait_s * 2**attempt)
        raise failure


def content_of(request: Request) -> list[dict[str, Any]]:
    """Return a question as content parts: the images, then the text.

    Raises:
        ValueError: If an image cannot be read, or the question shows a video.
        OSError: If a file cannot be read.
    """
    if request.video is not None:
        raise ValueError("a question on a video cannot be asked of an endpoint")
    sources = [one for one in (request.image, *request.more_images) if one is not None]
    shown = [{"type": "image_url", "image_url": {"url": _data_url(one)}} for one in sources]
    text = request.prompt.replace(IMAGE_TOKEN, "").strip()
    return [*shown, {"type": "text", "text": text}]


def _data_url(source: ImageSource) -> str:
    content = source.read()
    try:
        with Image.open(io.BytesIO(content)) as image:  # the head alone is read
            kind = Image.MIME.get(image.format or "", "application/octet-stream")
    except OSError as error:
        raise ValueError(f"{source.where}: {error}") from error
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
