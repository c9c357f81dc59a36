"""A judge model behind an OpenAI-compatible endpoint, for benches whose answers are free text."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from milora_vl.eval.bench_files import read_json_lines, shorten
from milora_vl.eval.items import EvaluationError
from milora_vl.files import write_bytes_atomic

KEY_VARIABLES = ("MILORA_JUDGE_API_KEY", "OPENAI_API_KEY")
_TIMEOUT_S = 120
_RETRIES = 4
_TEMPORARY = frozenset((408, 409, 429, 500, 502, 503, 504))  # worth another try


class JudgeError(EvaluationError):
    """The judge did not give a usable reply; nothing is scored in its place."""


@dataclass(frozen=True)
class Judge:
    """A judge model.

    Attributes:
        url: Base URL of the endpoint, up to but without ``/chat/completions``.
        model: Name of the model there; it goes beside every score.
        api_key: Key, or None for the environment's ``MILORA_JUDGE_API_KEY`` or ``OPENAI_API_KEY``.
        wait_s: Pause before a first retry, in seconds; it doubles each time.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    wait_s: float = 2.0

    def __post_init__(self) -> None:
        """Reject anything but a web address, so that no local file can be read through it."""
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--judge-url {self.url!r}: an http:// or https:// URL was expected")
        if not self.model:
            raise ValueError("--judge-model is needed with --judge-url: no score without its name")

    def ask(self, prompt: str) -> str:
        """Return the judge's reply to one prompt, at temperature 0.

        Raises:
            JudgeError: If the endpoint cannot be reached or answers with an error, after retries.
        """
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": prompt}],
        }
        for attempt in range(_RETRIES + 1):
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                message = f"HTTP {error.code}: {error.read()[:300].decode(errors='replace')}"
                if error.code not in _TEMPORARY:
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                message = f"{type(error).__name__}: {error}"
            if attempt < _RETRIES:
                # longer each time: an overloaded endpoint needs it
                time.sleep(self.wait_s * 2**attempt)
        raise JudgeError(f"judge {self.model} at {self.url}: {message}")

    def _post(self, body: Mapping[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        key = self.api_key or next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            reply = json.load(response)
        text = reply["choices"][0]["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the reply holds no text")
        return text

    def ask_all(
        self,
        prompts: Mapping[str, str],
        is_usable: Callable[[str], bool],
        journal: Path,
        *,
        progress: bool = True,
    ) -> dict[str, str]:
        """Return replies to all prompts; those an earlier call left in ``journal`` are not asked.

        Args:
            prompts: Prompt by id.
            is_usable: Whether a score can be read out of a reply; one that cannot is asked again
                once.
            journal: JSONL of this judge's replies, written as they come.
            progress: Whether to show a progress bar.

        Raises:
            JudgeError: Naming the item, if a reply is missing or unusable.
        """
        known = self._read_journal(journal)
        replies = {}
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a", encoding="utf-8") as stream:
            for name, prompt in tqdm(prompts.items(), desc="judge", disable=not progress):
                reply = known.get(prompt)
                for _ in range(2):
                    if reply is None or not is_usable(reply):
                        reply = self.ask(prompt)
                if reply is None or not is_usable(reply):
                    shown = shorten(repr(reply))
                    raise JudgeError(
                        f"judge {self.model}: no score in the reply on {name}: {shown}"
                    )
                replies[name] = reply
                if known.get(prompt) != reply:
                    # kept at once: a reply costs money
                    entry = {"model": self.model, "id": name, "prompt": prompt, "reply": reply}
                    stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    stream.flush()
        return replies

    def _read_journal(self, journal: Path) -> dict[str, str]:
        """Return kept replies by prompt; a last line cut short by a crash is taken away."""
        if not journal.is_file():
            return {}
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_bytes_atomic(journal, whole)
        rows = read_json_lines(journal)
        return {row["prompt"]: row["reply"] for row in rows if row["model"] == self.model}
