"""Other families are asked by plain generation: once a question, whatever fails in between."""

import pytest
import torch
from eval_models import picture
from family_models import build_checkpoint

from milora_vl.eval import generate_plain
from milora_vl.eval.answering import AnswerJournal
from milora_vl.eval.generate_shared import build_answerer
from milora_vl.eval.items import ImageSource, Request
from milora_vl.model.load import load_vlm


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load_vlm(build_checkpoint("qwen2_vl", tmp_path_factory.mktemp("qwen") / "model"))


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the batches that were generated; ``calls.most`` is what memory allows."""
    generate = generate_plain.generate

    class Calls(list):
        most = 99

    seen = Calls()

    def counted(vlm, prompts, *rest):
        if len(prompts) > seen.most:
            raise torch.OutOfMemoryError("out of memory")
        seen.append(len(prompts))
        return generate(vlm, prompts, *rest)

    monkeypatch.setattr(generate_plain, "generate", counted)
    return seen


def questions(n=7):
    return [Request(str(place), "Why? " * (1 + place), picture(place % 2)) for place in range(n)]


OPTIONS = {"max_new_tokens": 2, "progress": False}


def test_every_question_is_answered_when_memory_runs_out_on_the_way(vlm, calls):
    reference = build_answerer(vlm, batch_size=4).answer(questions(), **OPTIONS)
    calls.clear()
    calls.most = 2
    assert build_answerer(vlm, batch_size=4).answer(questions(), **OPTIONS) == reference
    assert set(reference) == {request.id for request in questions()}
    assert max(calls) == 2


def test_all_images_of_a_question_are_shown_in_their_order(vlm):
    orders = {"ab": (0, 1), "ba": (1, 0), "aab": (0, 0, 1), "a": (0,)}
    requests = [
        Request(name, "Why?", picture(first), tuple(picture(one) for one in rest))
        for name, (first, *rest) in orders.items()
    ]
    answerer = build_answerer(vlm)
    image = vlm.model.config.image_token_id
    counts = {one.id: answerer.encode(one).count(image) for one in requests}
    assert counts == {name: counts["a"] * len(order) for name, order in orders.items()}
    answers = answerer.answer(requests, max_new_tokens=6, progress=False)
    assert answers == answerer.answer_one_by_one(requests, max_new_tokens=6)
    assert len({answers[name].text for name in orders}) == len(orders)


def test_the_same_question_about_the_same_picture_is_asked_once(vlm, calls):
    twice = [*questions(3), *(Request(f"{one.id}b", one.prompt, one.image) for one in questions(3))]
    answers = build_answerer(vlm).answer(twice, **OPTIONS)
    assert sum(calls) == 3
    assert all(answers[f"{one.id}b"] == answers[one.id] for one in questions(3))


def test_answers_are_kept_and_a_missing_picture_is_a_failed_sample(vlm, calls, tmp_path):
    missing = Request("gone", "Why?", ImageSource("row 3", tmp_path / "gone.png"))
    asked = [missing, *questions(3)]
    options = {**OPTIONS, "allow_errors": 1}
    journal = AnswerJournal(tmp_path / "j", {})
    first = build_answerer(vlm).answer(asked, journal=journal, **options)
    assert "row 3" in first["gone"].error
    calls.clear()
    again = AnswerJournal(tmp_path / "j", {})
    assert build_answerer(vlm).answer(asked, journal=again, **options) == first
    assert not calls
    assert again.served_seconds > 0
