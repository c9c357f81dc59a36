"""Laws of the server: each name answers as its model does alone, within limits."""

import base64
import http.server
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from served_models import KEY, client_of, data_url, picture, running, user

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.cli import parse_words, read_named
from milora_vl.config import MiloraConfig
from milora_vl.eval.__main__ import main as eval_main
from milora_vl.inference import ask, load_for_inference
from milora_vl.model.load import load_vlm
from milora_vl.serve.app import Limits, warn_of_exposure
from milora_vl.serve.engine import Engine, Event, Job, QueueFullError, Transcript
from milora_vl.serve.messages import BadRequestError, read_messages
from milora_vl.serve.models import load_served

N_TOKENS = 12
QUESTIONS = [(f"What is number {i}?", picture(i) if i % 3 else None) for i in range(7)]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with larger weights, so that its answers depend on the question."""
    vlm = load_vlm(tiny_checkpoint)
    with torch.no_grad():
        for name, weight in vlm.model.named_parameters():
            if weight.ndim == 2 and ("language_model" in name or "projector" in name):
                weight.mul_(6)
        vlm.model.get_input_embeddings().weight[:6] = 0  # says no special token
    folder = tmp_path_factory.mktemp("served") / "base"
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(checkpoint, tmp_path_factory):
    """Two adapters away from their start, one with a projector."""
    found, root = {}, tmp_path_factory.mktemp("adapters")
    for name, settings in {
        "my/one-v1.0": {"r": 4},
        "two": {"init": "lora", "r": 2, "train_projector": False},
    }.items():
        vlm = load_vlm(checkpoint)
        model, _ = attach_milora(vlm.model, MiloraConfig(**settings), progress=False)
        generator = torch.Generator().manual_seed(len(name))
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator)
                weight.data.add_(noise, alpha=0.3)
        found[name] = save_adapter(model, root / str(len(found)), processor=vlm.processor)
    return found


@pytest.fixture(scope="module")
def alone(checkpoint, adapters):
    """Name -> answers of that model, asked alone and one question at a time."""
    names = {checkpoint.name: None, **adapters}
    answers = {}
    for name, folder in names.items():
        vlm = load_for_inference(checkpoint, folder)
        answers[name] = [ask(vlm, image, text, N_TOKENS) for text, image in QUESTIONS]
    return answers


@pytest.fixture(scope="module")
def server(adapters):
    models = load_served(None, adapters)  # the adapters name their base
    with running(models, KEY, batch_size=4, max_requests=24) as (url, engine):
        yield url, engine


def complete(client, name, question, image=None, **settings):
    settings = {"max_tokens": N_TOKENS, "temperature": 0, **settings}
    messages = [user(question, image)]
    return client.chat.completions.create(model=name, messages=messages, **settings)


def test_the_base_and_every_adapter_are_listed(server, alone):
    client = client_of(server[0])
    assert {one.id for one in client.models.list()} == set(alone)
    assert client.models.retrieve("my/one-v1.0").id == "my/one-v1.0"


def test_twenty_requests_at_once_are_answered_as_each_model_answers_alone(server, alone):
    client = client_of(server[0])
    asked = [(name, index) for name in alone for index in range(len(QUESTIONS))][:20]
    assert len({tuple(answers) for answers in alone.values()}) == 3  # the names do differ
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda one: complete(client, one[0], *QUESTIONS[one[1]]), asked))
    for (name, index), answer in zip(asked, answers, strict=True):
        assert answer.choices[0].message.content == alone[name][index], (name, index)
        assert answer.model == name
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert 0 < answer.usage.completion_tokens <= N_TOKENS


def test_a_streamed_answer_is_the_whole_one_in_pieces(server, alone):
    client = client_of(server[0])
    name, (question, image) = "my/one-v1.0", QUESTIONS[1]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(complete(client, name, question, image, **options))
    texts = [one.choices[0].delta.content or "" for one in chunks if one.choices]
    assert "".join(texts) == alone[name][1]
    assert sum(map(bool, texts)) > 1
    whole = complete(client, name, question, image)
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_conversation_and_a_stop_text(server, alone):
    client, name = client_of(server[0]), "two"
    text = complete(client, name, *QUESTIONS[0]).choices[0].message.content
    stop = text[3:5]
    answer = complete(client, name, *QUESTIONS[0], stop=[stop]).choices[0]
    assert answer.message.content == text[: text.index(stop)].rstrip()
    assert answer.finish_reason == "stop"
    turns = [user("Hello", picture(2)), {"role": "assistant", "content": "Hi."}, user("And now?")]
    longer = client.chat.completions.create(model=name, messages=turns, max_tokens=3)
    assert longer.usage.prompt_tokens > 3


def test_a_draw_with_a_seed_can_be_made_again(server):
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    first, again = (
        complete(client_of(server[0]), "two", *QUESTIONS[0], **settings) for _ in range(2)
    )
    assert first.choices[0].message.content == again.choices[0].message.content


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"model": "three"}, openai.NotFoundError, r"no model 'three'; there are \["),
        ({"n": 2}, openai.BadRequestError, "n: "),
        ({"logprobs": True}, openai.BadRequestError, "logprobs: "),
        ({"extra_body": {"best_of": 3}}, openai.BadRequestError, "best_of: "),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, openai.BadRequestError, "tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(server, settings, error, says):
    known = {"model": "two", "messages": [user("Hello")], "max_tokens": 3}
    with pytest.raises(error, match=says):
        client_of(server[0]).chat.completions.create(**{**known, **settings})


def test_a_wrong_key_a_full_queue_and_a_large_body_are_refused(server):
    url, engine = server
    with pytest.raises(openai.AuthenticationError):
        client_of(url, "another").models.list()
    with pytest.raises(openai.AuthenticationError):
        complete(client_of(url, "another"), "two", "Hello")
    for _ in range(engine.max_requests):
        engine.admit()
    with pytest.raises(openai.RateLimitError, match="24 requests are waiting"):
        complete(client_of(url), "two", "Hello")
    for _ in range(engine.max_requests):
        engine.give_back()
    assert complete(client_of(url), "two", "Hello").choices
    with pytest.raises(openai.APIStatusError, match="larger than 33554432 bytes") as refused:
        complete(client_of(url), "two", "x" * (33 << 20))
    assert refused.value.status_code == 413
    request = urllib.request.Request(
        f"{url}/chat/completions", b"{}", {"Authorization": f"Bearer {KEY}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="415"):  # as a form of another site would come
        urllib.request.urlopen(request)
    assert engine.n_requests == 0  # every place was given back


def test_a_request_out_of_time_ends_and_gives_its_place_back(tiny_checkpoint):
    with running(load_served(tiny_checkpoint, {}), limits=Limits(timeout_s=0.0)) as (url, engine):
        with pytest.raises(openai.APIStatusError, match="took longer") as late:
            complete(client_of(url), tiny_checkpoint.name, "Hello")
        assert late.value.status_code == 504
        chunks = complete(client_of(url), tiny_checkpoint.name, "Hello", stream=True)
        with pytest.raises(openai.APIError, match="took longer"):
            list(chunks)
        assert engine.n_requests == 0


def test_a_batch_that_fails_is_an_error_of_its_requests_alone():
    class Broken:
        name = "broken"

        def active(self):
            raise RuntimeError("no such device")

    engine, events = Engine(max_requests=1), []
    job = Job(Broken(), {}, max_tokens=1, deadline=time.monotonic() + 60, emit=events.append)
    engine.admit()
    with pytest.raises(QueueFullError):
        engine.admit()
    engine.submit(job)
    while not events:
        time.sleep(0.01)
    assert events == [Event(status=500, error="RuntimeError: no such device")]
    engine.admit()  # the place is free, and the thread lives
    engine.close()


class Letters:
    """Decodes token n to the n-th letter; 26 is a space, 27 half a character."""

    def decode(self, tokens, skip_special_tokens):
        return "".join("abcdefghijklmnopqrstuvwxyz \ufffd"[token] for token in tokens)


def test_text_is_sent_once_it_is_certain():
    text = Transcript(Letters(), ["cd"])
    assert [text.add(t)[0] for t in (26, 0, 26, 1, 27)] == ["", "a", "", " b", ""]
    assert text.rest() == "\ufffd"
    text = Transcript(Letters(), ["cd", "xyz"])
    assert [text.add(t) for t in (0, 2, 4, 2, 3)] == [
        ("a", False), ("", False), ("ce", False), ("", False), ("", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "the last one must be the user's"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is none of"),
        ([{"role": "assistant", "content": "x"}], "assistant where system or user was expected"),
        ([user("a"), user("b")], r"messages\[1\]: user where assistant was expected"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "not 'input_audio'"),
        ([{"role": "user", "content": 3}], "neither text nor a list"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}],
                }
            ],
            "images come as data: URLs",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
            "not valid base64|cannot identify",
        ),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "only users show any",
        ),
    ],
)
def test_messages_that_cannot_be_read_are_named(messages, says):
    with pytest.raises(BadRequestError, match=says):
        read_messages(messages)


def test_characters_that_look_like_the_image_mark_are_no_image(server):
    answer = complete(client_of(server[0]), "two", "What does <image> mean?", max_tokens=2)
    assert answer.choices


def test_images_are_fetched_from_allowed_hosts_alone_and_through_no_redirect():
    content = data_url(picture(1)).partition(",")[2]

    class Pictures(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", "/picture")
            self.end_headers()
            self.wfile.write(base64.b64decode(content))

        def log_message(self, *_):
            pass

    pictures = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{pictures.server_port}"

        def read(path, **settings):
            part = {"type": "image_url", "image_url": {"url": root + path}}
            return read_messages([{"role": "user", "content": [part]}], **settings)

        with pytest.raises(BadRequestError, match=r"--allow-http 127\.0\.0\.1"):
            read("/picture")
        assert read("/picture", allowed_hosts=["127.0.0.1"])[1][0].size == picture(1).size
        with pytest.raises(BadRequestError, match="302"):
            read("/moved", allowed_hosts=["127.0.0.1"])
        with pytest.raises(BadRequestError, match="larger than 10 bytes"):
            read("/picture", allowed_hosts=["127.0.0.1"], max_bytes=10)
    finally:
        pictures.shutdown()
        pictures.server_close()


def test_an_evaluation_of_the_endpoint_is_that_of_the_local_model(
    server, checkpoint, adapters, tmp_path, monkeypatch
):
    data, rows = tmp_path / "own.jsonl", []
    for index, (question, image) in enumerate(QUESTIONS):
        if image:
            image.save(tmp_path / f"{index}.png")
        shown = {"image": f"{index}.png"} if image else {}
        choices = (
            {"choices": ["a fox", "12 apples"], "answer": "AB"[index % 2]} if index < 3 else {}
        )
        rows.append({"question": question, **shown, **(choices or {"answers": ["red"]})})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--bench", "custom", "--data", str(data), "--max-new-tokens", "6"]
    here = ["--model", str(checkpoint), "--adapter", str(adapters["two"]), "--no-text-probe"]
    monkeypatch.setenv("MILORA_API_KEY", KEY)
    there = ["--model", "two", "--endpoint", server[0]]
    found = []
    for place, more in (("here", here), ("there", there)):
        assert eval_main([*words, *more, "--out", str(tmp_path / place)]) == 0
        results = json.loads((tmp_path / place / "results.json").read_text())
        lines = (tmp_path / place / "predictions.jsonl").read_text().splitlines()
        kept = ("text", "blind_text", "parsed", "score", "ended", "n_tokens")
        answers = [{key: json.loads(line).get(key) for key in kept} for line in lines]
        scores = results["benches"]["custom"]
        scores.pop("seconds_per_item")
        found.append((answers, scores))
    assert found[0] == found[1]
    assert any(answer["text"] for answer in found[0][0])
    results = json.loads((tmp_path / "there" / "results.json").read_text())
    assert results["model"] == "two"
    assert results["text_probe"] is None


def test_an_endpoint_that_refuses_is_an_error_and_never_an_empty_answer(server, tmp_path, capsys):
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"question": "Why?", "answers": ["so"]}) + "\n")
    words = ["--bench", "custom", "--data", str(data), "--endpoint", server[0]]
    assert eval_main([*words, "--model", "two", "--out", str(tmp_path / "out")]) == 1
    assert "HTTP 401" in capsys.readouterr().err
    assert eval_main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "--endpoint needs --model" in capsys.readouterr().err
    assert eval_main([*words, "--model", "two", "--adapter", "x"]) == 1
    assert "--adapter and --endpoint" in capsys.readouterr().err


def test_words_of_the_command_line(tmp_path):
    arguments = parse_words(["serve", "--adapter", "a=runs/a", "--adapter", "runs/b/adapter"])
    assert arguments.host == "127.0.0.1"
    assert [*read_named(arguments.adapter)] == ["a", "b"]
    with pytest.raises(ValueError, match="a name of its own is needed"):
        read_named(["a=x", "a=y"])
    assert warn_of_exposure("127.0.0.1", None, ["m"]) is None
    assert warn_of_exposure("0.0.0.0", "key", ["m"]) is None
    assert "set --api-key" in warn_of_exposure("0.0.0.0", None, ["m"])


def test_adapters_that_cannot_share_a_base_are_refused_before_it_is_used(adapters, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "elsewhere", "r": 4}
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="name several bases"):
        load_served(None, {"two": adapters["two"], "other": other})
