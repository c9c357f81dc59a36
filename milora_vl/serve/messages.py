"""Messages of a chat request -> turns and images, within limits; the only place that reads them."""

import io
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from milora_vl.constants import IMAGE_TEXT, IMAGE_TOKEN
from milora_vl.data.images import BadImageError, load_image
from milora_vl.data.records import Turn
from milora_vl.errors import MiloraError
from milora_vl.eval.items import decode_base64

FETCH_TIMEOUT_S = 10
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class BadRequestError(MiloraError, ValueError):
    """A request that cannot be answered; the text says what to change."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead from an allowed host to any other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def read_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    allowed_hosts: Collection[str] = (),
    max_bytes: int = 1 << 25,
) -> tuple[list[Turn], list[Image.Image]]:
    """Return turns with an image mark where an image stands, and the images in order.

    Args:
        messages: Of the request: a system message or none, then user and assistant in turn.
        allowed_hosts: Hosts that images may be fetched from.
        max_bytes: Largest image file that is fetched.

    Raises:
        BadRequestError: Naming the message and what to change.
    """
    turns: list[Turn] = []
    images: list[Image.Image] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = ROLES.get(message.get("role", ""))
        if role is None:
            raise BadRequestError(f"{where}: role {message.get('role')!r} is none of {[*ROLES]}")
        expected = {"user"} if turns and turns[-1].role != "user" else {"assistant"}
        expected = expected if turns else {"system", "user"}
        if role not in expected:
            raise BadRequestError(
                f"{where}: {role} where {' or '.join(sorted(expected))} was expected; a system "
                "message comes first, then user and assistant take turns"
            )
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise BadRequestError(f"{where}: content is neither text nor a list of parts")
        texts = []
        for place, part in enumerate(parts):
            text, image = _read_part(
                part, role, f"{where}.content[{place}]", allowed_hosts, max_bytes
            )
            texts.append(text)
            images += [] if image is None else [image]
        turns.append(Turn(role, "\n".join(texts)))
    if not turns or turns[-1].role != "user":
        raise BadRequestError("messages: the last one must be the user's")
    return turns, images


def _read_part(
    part: Any, role: str, where: str, allowed_hosts: Collection[str], max_bytes: int
) -> tuple[str, Image.Image | None]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        # characters that look like the mark are no image; in other turns all text is text
        text = part["text"]
        return text.replace(IMAGE_TOKEN, IMAGE_TEXT) if role == "user" else text, None
    if kind != "image_url":
        raise BadRequestError(f"{where}: a text or an image_url part was expected, not {kind!r}")
    if role != "user":
        raise BadRequestError(f"{where}: an image in a message of the {role}; only users show any")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise BadRequestError(f"{where}: image_url holds no url")
    try:
        content = _image_bytes(url, allowed_hosts, max_bytes)
        return IMAGE_TOKEN, load_image(io.BytesIO(content))
    except BadImageError as error:  # its text names the bytes in memory
        raise BadRequestError(f"{where}: the data is no image that can be read") from error
    except (ValueError, OSError) as error:
        raise BadRequestError(f"{where}: {error}") from error


def _image_bytes(url: str, allowed_hosts: Collection[str], max_bytes: int) -> bytes:
    if url.startswith("data:"):
        return decode_base64(url)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("images come as data: URLs (data:image/png;base64,...)")
    if parts.hostname not in allowed_hosts:
        raise ValueError(
            f"images are not fetched from {parts.hostname}: send a data: URL, or start the server "
            f"with --allow-http {parts.hostname}"
        )
    opener = urllib.request.build_opener(_NoRedirects)
    with opener.open(url, timeout=FETCH_TIMEOUT_S) as response:
        content = response.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"the image is larger than {max_bytes} bytes")
    return content
