import base64
import io

import pytest
import torch
from eval_models import build_vlm, picture, picture_bytes
from family_models import build_checkpoint
from peft import LoraConfig, get_peft_model

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.encode import encode
from milora_vl.data.images import ImageTransform, load_image
from milora_vl.data.records import Turn
from milora_vl.eval.generate_shared import SharedAnswerer, build_answerer
from milora_vl.eval.items import EvaluationError, ImageSource, Request
from milora_vl.model.load import load_vlm

QUESTIONS = [
    "What is this?",
    "What is this?\nA. cat\nB. dog",
    "What is this?\nA. dog\nB. cat",
    "Is there a fox in the image?\nAnswer the question using a single word or phrase.",
    "How many apples are there on the table next to the red fox, and why?",
]


def mixed_requests():
    """Three pictures and none; shared beginnings, lengths from short to long."""
    requests = []
    for seed in (1, 2, 3, None):
        for index, question in enumerate(QUESTIONS[: 5 if seed != 2 else 2]):
            image = None if seed is None else picture(seed)
            requests.append(Request(f"{seed}-{index}", question, image))
    return requests


def texts(answers):
    return {name: answer.text for name, answer in answers.items()}


def with_frequent_stops(vlm, **options):
    """An answerer that ends rows at different steps: a third of the vocabulary ends an answer."""
    answerer = SharedAnswerer(vlm, **options)
    answerer.stop_ids |= set(range(0, vlm.model.config.text_config.vocab_size, 3))
    return answerer


@pytest.mark.parametrize(
    ("kind", "style", "tower"),
    [
        ("byte_level", "chatml", "clip"),
        ("byte_level", "chatml", "dinov2"),
        ("llama", "vicuna_v1", "clip"),
        ("llama_legacy", "llava_llama_2", "clip"),
    ],
)
def test_batched_answers_equal_plain_generation_one_by_one(kind, style, tower):
    vlm = build_vlm(kind, style, tower)
    requests = mixed_requests()
    single = SharedAnswerer(vlm).answer_one_by_one(requests, max_new_tokens=7)
    batched = SharedAnswerer(vlm).answer(requests, max_new_tokens=7, progress=False)
    assert batched == single  # text, number of tokens and whether it ended
    assert len(set(texts(single).values())) > 5, "the model answers everything alike"
    answerer = with_frequent_stops(vlm)
    single = answerer.answer_one_by_one(requests, max_new_tokens=7)
    assert answerer.answer(requests, max_new_tokens=7, progress=False) == single
    assert len({answer.n_tokens for answer in single.values()}) > 2, "all end at the same step"


def test_questions_about_several_images_are_answered_as_by_plain_generation():
    vlm = build_vlm()
    requests = [
        Request("one", "Which?", picture(1)),
        Request("two", "Which?", picture(1), (picture(2),)),
        Request("turned", "Which?", picture(2), (picture(1),)),
        Request("three", "Which?", picture(1), (picture(2), picture(3))),
        Request("longer", "Which one is it?", picture(1), (picture(2), picture(3))),
        Request("again", "Which?", picture(1), (picture(2),)),
    ]
    single = SharedAnswerer(vlm).answer_one_by_one(requests, max_new_tokens=7)
    assert SharedAnswerer(vlm).answer(requests, max_new_tokens=7, progress=False) == single
    assert len(set(texts(single).values())) > 3, "the images make no difference"
    assert SharedAnswerer(vlm).encode(requests[3]).count(vlm.model.config.image_token_id) == (
        3 * SharedAnswerer(vlm).n_image_tokens
    )


@pytest.mark.parametrize("family", ["llava", "bakllava", "vipllava"])
def test_every_family_that_is_asked_over_trees_equals_plain_generation(family, tmp_path):
    vlm = load_vlm(build_checkpoint(family, tmp_path / "model"), dtype=torch.float32)
    answerer = build_answerer(vlm, batch_size=8)
    assert isinstance(answerer, SharedAnswerer)
    requests = mixed_requests()
    single = answerer.answer_one_by_one(requests, max_new_tokens=5)
    assert answerer.answer(requests, max_new_tokens=5, progress=False) == single
    assert len(set(texts(single).values())) > 3


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"share_prefix": False}])
def test_answers_do_not_depend_on_batching_or_sharing(options):
    vlm = build_vlm()
    requests = mixed_requests()
    reference = with_frequent_stops(vlm).answer(requests, max_new_tokens=6, progress=False)
    other = with_frequent_stops(vlm, **options).answer(
        requests[::-1], max_new_tokens=6, progress=False
    )
    assert other == reference


def test_a_peft_model_answers_with_its_adapter():
    vlm = build_vlm()
    requests = mixed_requests()
    before = SharedAnswerer(vlm).answer(requests, max_new_tokens=4, progress=False)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = vlm.with_model(get_peft_model(vlm.model, config))
    answerer = SharedAnswerer(adapted)
    after = answerer.answer(requests, max_new_tokens=4, progress=False)
    assert after == answerer.answer_one_by_one(requests, max_new_tokens=4)
    assert texts(after) != texts(before)


def test_pictures_change_the_answer_and_each_is_encoded_once():
    answerer = SharedAnswerer(build_vlm())
    seen = []
    transform = answerer.transform
    answerer.transform = lambda image: seen.append(image) or transform(image)
    same_question = [Request(str(seed), QUESTIONS[0], picture(seed)) for seed in (1, 2, 3, 4)]
    answers = answerer.answer(same_question, max_new_tokens=6, progress=False)
    assert len(set(texts(answers).values())) > 1
    answerer.answer(mixed_requests(), max_new_tokens=2, progress=False)
    assert len(seen) == 4


def test_pictures_are_padded_to_a_square_before_anything_else_as_llava_does():
    vlm = build_vlm()
    wide = ImageSource("wide", encoded=base64.b64encode(picture_bytes(1, (20, 40))).decode())
    pixels = SharedAnswerer(vlm).transform(wide.open())
    processor = vlm.processor.image_processor
    image = load_image(io.BytesIO(wide.read()))
    assert torch.equal(pixels, ImageTransform(processor, True)(image))
    assert not torch.equal(pixels, ImageTransform(processor, False)(image))
    assert pixels[:, 0].abs().max() < 0.02, "the border has the mean colour"


def test_identical_requests_are_asked_once_and_all_answered(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(picture_bytes(1))
    vlm = build_vlm()
    n_rows = []
    vlm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: n_rows.append(kwargs["inputs_embeds"].shape[:2]),
        with_kwargs=True,
    )
    requests = [
        Request("file", QUESTIONS[0], ImageSource("x", path=file)),
        Request("text", QUESTIONS[0], picture(1)),
        Request("again", QUESTIONS[0], picture(1, where="another row")),
    ]
    answerer = SharedAnswerer(vlm)
    answers = answerer.answer(requests, max_new_tokens=1, progress=False)
    assert set(answers) == {"file", "text", "again"}
    assert answers["file"] == answers["text"] == answers["again"]
    assert n_rows == [(1, len(answerer.encode(requests[0])))]


def test_prompt_ids_are_the_beginning_of_the_training_ids():
    vlm = build_vlm()
    answerer = SharedAnswerer(vlm)
    turns = [Turn("user", f"{IMAGE_TOKEN}\n{QUESTIONS[1]}"), Turn("assistant", "A")]
    trained = encode(turns, vlm.prompt_style, vlm.processor.tokenizer, [4]).input_ids
    asked = answerer.encode(Request("x", QUESTIONS[1], picture(1)))
    assert answerer.n_image_tokens == 4
    assert trained[: len(asked)] == asked


def test_a_marker_in_a_question_is_not_a_picture():
    answerer = SharedAnswerer(build_vlm())
    asked = answerer.encode(Request("x", f"What does {IMAGE_TOKEN} mean?", picture(1)))
    assert asked.count(answerer.model.config.image_token_id) == 4


BROKEN = [
    (ImageSource("t.tsv row 7", encoded="@@not base64@@"), "t.tsv row 7.*base64"),
    (ImageSource("t.tsv row 8", encoded="aGVsbG8="), "t.tsv row 8.*image"),
    (ImageSource("t.tsv row 9"), "t.tsv row 9.*no image"),
]


@pytest.mark.parametrize(("image", "message"), BROKEN)
def test_a_damaged_picture_is_an_error_that_names_its_row(image, message):
    requests = [*mixed_requests(), Request("bad", QUESTIONS[0], image)]
    answerer = SharedAnswerer(build_vlm())
    with pytest.raises(EvaluationError, match=message):
        answerer.answer(requests, max_new_tokens=2, progress=False)
    allowed = answerer.answer(requests, max_new_tokens=2, allow_errors=1, progress=False)
    assert allowed["bad"].text is None
    assert allowed["bad"].error
    del allowed["bad"]
    assert allowed == answerer.answer(requests[:-1], max_new_tokens=2, progress=False)


def test_a_missing_file_is_an_error_that_names_row_and_file(tmp_path):
    image = ImageSource("random.jsonl row 3", path=tmp_path / "gone.png")
    with pytest.raises(EvaluationError, match=r"random\.jsonl row 3.*gone\.png"):
        SharedAnswerer(build_vlm()).answer(
            [Request("x", QUESTIONS[0], image)], max_new_tokens=1, progress=False
        )


def limit_memory(model, n_tokens):
    def hook(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[:2].numel() > n_tokens:
            raise torch.OutOfMemoryError("out of memory")

    return model.model.register_forward_pre_hook(hook, with_kwargs=True)


def test_out_of_memory_makes_batches_smaller_and_changes_no_answer():
    vlm = build_vlm()
    requests = mixed_requests()
    answerer = SharedAnswerer(vlm)
    reference = answerer.answer(requests, max_new_tokens=4, progress=False)
    longest = max(len(answerer.encode(request)) for request in requests)
    handle = limit_memory(vlm.model, longest)
    assert answerer.answer(requests, max_new_tokens=4, progress=False) == reference
    handle.remove()
    limit_memory(vlm.model, longest - 1)
    with pytest.raises(EvaluationError, match="out of memory"):
        answerer.answer(requests, max_new_tokens=4, progress=False)


def test_training_mode_and_gradients_come_back():
    vlm = build_vlm()
    vlm.model.train()
    SharedAnswerer(vlm).answer(mixed_requests()[:2], max_new_tokens=1, progress=False)
    assert vlm.model.training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in vlm.model.parameters())


def test_the_models_own_end_token_is_not_part_of_the_text():
    vlm = build_vlm()
    answerer = SharedAnswerer(vlm)
    answerer.stop_ids = set(range(vlm.model.config.text_config.vocab_size))
    answer = answerer.answer(mixed_requests()[:1], max_new_tokens=5, progress=False)["1-0"]
    assert (answer.text, answer.n_tokens, answer.ended) == ("", 1, True)


def test_end_markers_of_model_and_style_both_stop():
    vlm = build_vlm("llama", "vicuna_v1")
    vlm.model.generation_config.eos_token_id = [7, 8]
    eos = vlm.processor.tokenizer.convert_tokens_to_ids("</s>")
    assert SharedAnswerer(vlm).stop_ids == {7, 8, eos}


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size"):
        SharedAnswerer(build_vlm(), batch_size=0)
