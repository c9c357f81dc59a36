"""The HTTP side: chat completions and the list of models, in the form of OpenAI's API."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from milora_vl.eval.generate_plain import build_chat
from milora_vl.serve.engine import Engine, Event, Job, QueueFullError
from milora_vl.serve.messages import BadRequestError, read_messages
from milora_vl.serve.models import ServedModel

POLL_S = 0.5
"""How often a waiting request looks whether its client is still there, in seconds."""


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        max_tokens: Longest answer, and the length where a request names none.
        timeout_s: From the request to the end of its answer.
        max_body_bytes: Of the request, images included.
        allowed_hosts: Hosts that images may be fetched from.
    """

    max_tokens: int = 1024
    timeout_s: float = 300.0
    max_body_bytes: int = 32 << 20
    allowed_hosts: tuple[str, ...] = ()


class ApiError(Exception):
    """An answer that is an error, with its HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        """Keep what the answer says."""
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """A request for a completion. A field that would change the answer and is not here is refused.

    Fields that may have only one value are here so that clients which always send them are served.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)  # greedy, as the evaluation here
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end the answer."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(one for one in stop if one)


def create_app(
    models: Sequence[ServedModel], engine: Engine, limits: Limits, api_key: str | None = None
) -> FastAPI:
    """Return the application.

    Args:
        models: What requests may ask, by name.
        engine: Answers; closed when the application ends.
        limits: What one request may take.
        api_key: What clients must send as bearer token; None for no key.
    """
    by_name = {one.name: one for one in models}
    started, prompt_lock = int(time.time()), Lock()

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="milora-vl", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def say(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        check_key(request.headers, api_key)
        return {"object": "list", "data": [describe(name, started) for name in by_name]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str, request: Request) -> dict[str, Any]:
        check_key(request.headers, api_key)
        return describe(find(by_name, name).name, started)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        check_key(request.headers, api_key)
        deadline = time.monotonic() + limits.timeout_s
        try:
            engine.admit()
        except QueueFullError as error:
            raise ApiError(429, str(error), "queue_full") from error
        try:
            asked = read_request(await read_body(request, limits.max_body_bytes))
            served = find(by_name, asked.model)
            sample = await run_in_threadpool(build_sample, served, asked, limits, prompt_lock)
            length = length_of(asked, served, sample, limits.max_tokens)
        except BaseException:
            engine.give_back()
            raise
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = Job(
            served,
            sample,
            max_tokens=length,
            deadline=deadline,
            emit=sender(asyncio.get_running_loop(), events),
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=asked.stops(),
        )
        engine.submit(job)
        if asked.stream:
            lines = stream(asked, job, events)
            return StreamingResponse(lines, media_type="text/event-stream")
        return JSONResponse(await collect(request, asked, job, events))

    return app


def check_key(headers: Mapping[str, str], api_key: str | None) -> None:
    """Refuse a request without the key.

    Raises:
        ApiError: With status 401.
    """
    sent = headers.get("authorization", "").removeprefix("Bearer ").strip()
    if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
        raise ApiError(401, "a valid API key is needed (Authorization: Bearer KEY)", "invalid_key")


def describe(name: str, started: int) -> dict[str, Any]:
    """Return a model as the API lists it."""
    return {"id": name, "object": "model", "created": started, "owned_by": "milora-vl"}


def find(by_name: Mapping[str, ServedModel], name: str) -> ServedModel:
    """Return the model of a name.

    Raises:
        ApiError: With status 404 and the names there are.
    """
    if name not in by_name:
        raise ApiError(404, f"no model {name!r}; there are {[*by_name]}", "model_not_found")
    return by_name[name]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body, unless it is too large.

    A page of another site can make a browser post forms and plain text to this machine, but not
    JSON, so only JSON is read.

    Raises:
        ApiError: With status 413 or 415.
    """
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise ApiError(415, "Content-Type: application/json is needed")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(413, f"the request is larger than {max_bytes} bytes")
    return bytes(body)


def read_request(body: bytes) -> ChatRequest:
    """Return the request that a body holds.

    Raises:
        ApiError: With status 400, naming the field.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise ApiError(400, f"{where}: {first['msg']}") from error


def build_sample(
    served: ServedModel, asked: ChatRequest, limits: Limits, lock: Lock
) -> dict[str, Any]:
    """Return the prompt, its images read.

    Raises:
        ApiError: With status 400.
    """
    try:
        turns, images = read_messages(
            asked.messages, allowed_hosts=limits.allowed_hosts, max_bytes=limits.max_body_bytes
        )
        with lock:  # a fast tokenizer refuses two threads that set its padding
            return build_chat(served.vlm, turns, images)
    except (BadRequestError, ValueError) as error:
        raise ApiError(400, str(error)) from error


def length_of(asked: ChatRequest, served: ServedModel, sample: Mapping[str, Any], most: int) -> int:
    """Return how many tokens the answer may have.

    Raises:
        ApiError: With status 400, if the prompt leaves no room.
    """
    config = served.vlm.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 1 << 30
    room = context - len(sample["input_ids"])
    if room < 1:
        length = len(sample["input_ids"])
        message = f"the prompt has {length} tokens, and the model takes {context} with its answer"
        raise ApiError(400, message, "context_length_exceeded")
    return min(asked.max_completion_tokens or asked.max_tokens or most, most, room)


async def collect(
    request: Request, asked: ChatRequest, job: Job, events: asyncio.Queue[Event]
) -> dict[str, Any]:
    """Wait for the whole answer; it is cancelled when the client goes away.

    Raises:
        ApiError: If it fails.
    """
    texts = []
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), POLL_S)
            except asyncio.TimeoutError:  # another class before Python 3.11
                if await request.is_disconnected():
                    raise ApiError(499, "the client went away") from None
                continue
            if event.status:
                raise ApiError(event.status, event.error)
            texts.append(event.text)
            if event.finish:
                break
    finally:
        job.cancelled.set()
    message = {"role": "assistant", "content": "".join(texts)}
    choice = {"index": 0, "message": message, "finish_reason": event.finish, "logprobs": None}
    return {**head(asked, "chat.completion"), "choices": [choice], "usage": usage(job, event)}


async def stream(asked: ChatRequest, job: Job, events: asyncio.Queue[Event]) -> AsyncIterator[str]:
    """Yield the answer in server-sent events."""
    first = head(asked, "chat.completion.chunk")

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return line({**first, "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while True:
            event = await events.get()
            if event.status:
                yield line(ApiError(event.status, event.error).body())
                return
            if event.text:
                yield chunk({"content": event.text})
            if event.finish:
                break
        yield chunk({}, event.finish)
        if asked.stream_options and asked.stream_options.include_usage:
            yield line({**first, "choices": [], "usage": usage(job, event)})
        yield "data: [DONE]\n\n"
    finally:
        job.cancelled.set()


def sender(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event]) -> Any:
    """Return what puts events of another thread into the queue of a request."""

    def send(event: Event) -> None:
        with suppress(RuntimeError):  # the server was stopped meanwhile
            loop.call_soon_threadsafe(events.put_nowait, event)

    return send


def line(value: Mapping[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def head(asked: ChatRequest, kind: str) -> dict[str, Any]:
    """Return what all parts of an answer begin with."""
    created = int(time.time())
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": created, "model": asked.model}


def usage(job: Job, event: Event) -> dict[str, int]:
    """Return the tokens that were read and written."""
    read = len(job.sample["input_ids"])
    return {
        "prompt_tokens": read,
        "completion_tokens": event.n_tokens,
        "total_tokens": read + event.n_tokens,
    }


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until interrupted."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=5)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a host name."""
    return host in ("localhost", "::1") or host.startswith("127.")


def warn_of_exposure(host: str, api_key: str | None, names: Collection[str]) -> str | None:
    """Return a warning if others can reach the server without a key."""
    if is_loopback(host) or api_key is not None:
        return None
    return f"{host} can be reached by others, and anybody may ask {', '.join(names)}: set --api-key"
