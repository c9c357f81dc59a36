"""A server of this package in a thread, and clients of it."""

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager

import openai
import uvicorn
from PIL import Image

from milora_vl.serve.app import Limits, create_app
from milora_vl.serve.engine import Engine

KEY = "a key of the tests"


@contextmanager
def running(models, api_key=None, limits=None, **settings):
    """Serve models on a free port of this machine; yields the base URL and the engine."""
    engine = Engine(**settings)
    app = create_app(models, engine, limits or Limits(max_tokens=64), api_key)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ends = time.monotonic() + 30
    while not server.started and time.monotonic() < ends:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}/v1", engine
    finally:
        server.should_exit = True
        thread.join(timeout=30)


def client_of(url, key=KEY):
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)


def picture(seed):
    """Return a small picture that differs by seed."""
    image = Image.linear_gradient("L").resize((30 + seed, 40)).convert("RGB")
    image.paste((17 * seed % 256, 90, 200), (2, 2, 12, 5 + seed))
    return image


def data_url(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def user(question, image=None):
    """Return a user's message, the image before the text."""
    if image is None:
        return {"role": "user", "content": question}
    shown = {"type": "image_url", "image_url": {"url": data_url(image)}}
    return {"role": "user", "content": [shown, {"type": "text", "text": question}]}
