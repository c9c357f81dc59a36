"""Our normalizers, parsers and scores against independent scorers, as installed from their wheels.

lmms-eval 0.7.3 and salesforce-lavis 1.0.2 are fetched once (pinned), never installed and never part
of the package; where they cannot be had the tests are skipped and say so.
"""

import importlib
import importlib.util
import random
import string
import sys
import types
import zipfile

import pytest

from milora_vl.data.fetch import FetchError, fetch_pypi
from milora_vl.eval.answers import (
    CONTRACTIONS,
    is_open_answer_right,
    m4c,
    m4c_accuracy,
    parse_choice,
    parse_yes_no,
    vqa_accuracy,
    vqa_official,
)
from milora_vl.eval.benches import gqa, mme, seed, sqa
from milora_vl.eval.items import Item

pytestmark = pytest.mark.network

N_STRINGS = 20_000
WHEELS = (
    ("lmms-eval", "0.7.3", "5709f9f9f56a8f5f22bf379571bd1c5e7702af5ae2bbb9637001c5dd91168895"),
    (
        "salesforce-lavis",
        "1.0.2",
        "489782efc2d98d8e878112b2758f82ac2e6c10dfcfa087db6656465c7784d49f",
    ),
)
PIECES = [
    *CONTRACTIONS,
    *CONTRACTIONS.values(),
    *(
        [
            "zero",
            "one",
            "two",
            "three",
            "ten",
            "none",
            "a",
            "an",
            "the",
            "yes",
            "no",
            "A",
            "B",
            "C",
            "D",
            "it's",
            "dog's",
            "red,blue",
            "1,000",
            "3.",
            "3.5",
        ]
    ),
    *(";/[]\"{}()=+\\_-><@`,?!.:'"),
    *("\n", "\t", " ", "  ", "...", ", ", " ,", "é", "中", "１", "İ", "ß", "\u00a0", "\r", "\x1f"),
]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Folders of the two unpacked wheels."""
    folders = []
    for name, version, sha256 in WHEELS:
        try:
            wheel = fetch_pypi(name, version, sha256)
        except FetchError as error:
            pytest.skip(f"the independent scorer {name} {version} cannot be had: {error}")
        folder = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def lmms(wheels):
    """Import a module of lmms-eval's tasks; its own package imports far more than that needs."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(wheels[0]))
    for name in ("lmms_eval", "lmms_eval.tasks"):
        package = types.ModuleType(name)
        package.__path__ = [str(wheels[0] / name.replace(".", "/"))]
        patch.setitem(sys.modules, name, package)
    if importlib.util.find_spec("loguru") is None:
        loguru = types.ModuleType("loguru")
        loguru.logger = types.SimpleNamespace(info=print, warning=print, debug=print, error=print)
        patch.setitem(sys.modules, "loguru", loguru)

    def load(name):
        try:
            return importlib.import_module(f"lmms_eval.tasks.{name}")
        except ImportError as error:
            pytest.skip(f"lmms-eval's {name} needs what is not installed: {error}")

    yield load
    patch.undo()


@pytest.fixture(scope="module")
def lavis(wheels):
    path = wheels[1] / "lavis/common/vqa_tools/vqa_eval.py"
    spec = importlib.util.spec_from_file_location("lavis_vqa_eval", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VQAEval()


def strings(n, seed_number=0):
    """Random and adversarial answers: pieces of the rules, punctuation, digits, other scripts."""
    rng = random.Random(seed_number)
    letters = string.ascii_letters + string.digits + string.punctuation + " "
    for _ in range(n):
        kind = rng.random()
        if kind < 0.5:
            yield rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(0, 6)))
        elif kind < 0.9:
            yield "".join(rng.choices(letters, k=rng.randint(0, 14)))
        else:
            yield "".join(chr(rng.randint(1, 0x2FFF)) for _ in range(rng.randint(0, 8)))


def one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def repeats_commas(text):
    """The one known difference: lmms-eval takes "1,,2" for a number with a thousands mark."""
    return ",," in text


def test_official_normalizer_on_any_string(lavis, lmms):
    processor = lmms("_task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    for text in strings(N_STRINGS):
        line = one_line(text)
        ours = vqa_official(text)
        assert ours == lavis.processDigitArticle(lavis.processPunctuation(line)), repr(text)
        if not repeats_commas(text):
            theirs = processor.process_digit_article(processor.process_punctuation(line))
            assert ours == theirs, repr(text)


def test_m4c_normalizer_on_any_string(lmms):
    processor = lmms("_task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    for text in strings(N_STRINGS, 1):
        assert m4c(text) == processor(text), repr(text)


def test_the_one_known_difference_of_the_normalizers(lmms):
    processor = lmms("_task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    assert vqa_official("1,,2") == "1 2"  # as the official code and LAVIS
    assert processor.process_digit_article(processor.process_punctuation("1,,2")) == "12"


def ten_answers(rng, texts):
    pool = rng.sample(texts, 3)
    return [rng.choice(pool) for _ in range(10)]


def test_accuracies_agree(lmms):
    textvqa, vqa = lmms("textvqa.utils"), lmms("vqav2.utils")
    rng = random.Random(2)
    texts = [text for text in strings(400, 2) if not repeats_commas(text)]
    for _ in range(2_000):
        answers = ten_answers(rng, texts)
        said = rng.choice([*answers, rng.choice(texts)])
        doc = {"answers": list(answers), "question_id": 1}
        assert m4c_accuracy(said, answers) == pytest.approx(
            textvqa.textvqa_process_results(doc, [said])["exact_match"]
        )
        people = [{"answer": one, "answer_id": place} for place, one in enumerate(answers)]
        # we score predictions as they are uploaded, m4c-processed; it takes them as they are
        theirs = vqa.vqav2_process_results({"answers": people, "question_id": 1}, [m4c(said)])
        assert vqa_accuracy(said, answers) == pytest.approx(theirs["exact_match"])


def test_pope_agrees_where_the_answer_is_a_bare_word_and_differs_as_known(lmms):
    utils = lmms("pope.utils")
    rng = random.Random(3)
    docs = [{"answer": rng.choice(["yes", "no"]), "question_id": n} for n in range(200)]
    said = [rng.choice(["yes", "no", "Yes", "No"]) for _ in docs]
    results = [
        utils.pope_process_results(doc, [text]) for doc, text in zip(docs, said, strict=True)
    ]
    ours = [parse_yes_no(text) for text in said]
    right = sum(doc["answer"] == one for doc, one in zip(docs, ours, strict=True))
    assert utils.pope_aggregate_accuracy([x["pope_accuracy"] for x in results]) == right / 200
    # pinned disagreements; the published scores were made with the official rule
    for text in ("Yes.", "There is a dog.", ""):
        doc = {"answer": "yes", "question_id": 0}
        assert utils.pope_process_results(doc, [text])["pope_accuracy"]["score"] == 0
        assert parse_yes_no(text) == "yes"


def test_mme_agrees_but_for_periods_and_single_letters(lmms):
    utils = lmms("mme.utils")
    for text in strings(20_000, 4):
        bare = text.lower().strip().replace(".", "")
        if len(bare) != 1:  # theirs also takes "y" and "n"
            assert (mme.parse(None, bare) or "other") == utils.parse_pred_ans(text), repr(text)
    assert mme.parse(None, "y") is None
    assert utils.parse_pred_ans("y") == "yes"


def sqa_item(n, right):
    letters = tuple("ABCDE"[:n])
    return Item("1", None, "", (letters[right],), "1", "all", letters, choices=letters)


def test_sqa_agrees_on_letters_and_differs_as_known(lmms):
    utils = lmms("scienceqa.utils")
    item, doc = sqa_item(4, 1), {"choices": ["w", "x", "y", "z"], "answer": 1}
    for text in ("A", "B", "C", "D", "B. x", "A. w", "", "what", "(B)"):
        theirs = utils.sqa_process_results(doc, [text])["exact_match"]
        assert sqa.judge(item, text).score == theirs, text
    # LLaVA's own parser, which the published scores were made with
    for text, ours in (("b", 0), ("B.", 0), ("B.x", 0), ("The answer is B.", 1)):
        assert sqa.judge(item, text).score == ours
        assert utils.sqa_process_results(doc, [text])["exact_match"] == 1 - ours


def test_seed_agrees_on_bare_letters_and_leniently_on_all(lmms):
    utils = lmms("seedbench.utils")
    item = sqa_item(4, 1)
    for text in [*"ABCDb", "B.", "B. dog", "Because", *(one for one in strings(500, 5) if one)]:
        doc = {"answer": "B", "data_type": "image", "question_id": "1"}
        result = utils.seed_process_result(doc, [text])["seed_all"]
        theirs = utils.seed_aggregation_result([result])
        row = seed.judge(item, text)
        assert float(row.details["lenient"] == "B") == theirs, repr(text)
        if text in tuple("ABCD"):
            assert row.score == theirs


def test_mmmu_letters_and_open_answers_agree(lmms):
    module = lmms("_task_utils.mmmu_mcq_utils")
    options = ["cat", "a dog", "3.5", "blue"]
    pieces = [*"ABCDE", "(A)", "(B)", "A.", "cat", "a dog", "the", "answer", "is", ".", "so", "3.5"]
    rng = random.Random(6)
    named = dict(zip("ABCD", options, strict=True))
    for _ in range(5_000):
        text = " ".join(rng.choices(pieces, k=rng.randint(1, 8)))
        ours = parse_choice(text, options)
        theirs = {module.parse_mmmu_multi_choice_response(text, list("ABCD"), named) for _ in "123"}
        if ours is not None:  # else it draws at random
            assert theirs == {ours}, text
    utils = lmms("mmmu.utils")
    pieces = ["3", "3.5", "1,000", "-2", "1e3", "x", "fox", "so", "is", "=", ".", "\n", "Thus", "A"]
    for _ in range(5_000):
        text = " ".join(rng.choices(pieces, k=rng.randint(1, 7)))
        right = rng.sample(["3", "fox", "1000", "x", "-2.00", "3.5"], 2)
        theirs = utils.eval_open(right, utils.parse_open_response(text))
        assert is_open_answer_right(text, right) == theirs, (text, right)


def test_gqa_is_stricter_than_lmms_eval_which_deletes_punctuation():
    item = Item("1", None, "", ("t-shirt",), "1", "open")
    assert [gqa.judge(item, text).score for text in ("T-shirt.", "tshirt", "t shirt")] == [1, 0, 0]


def test_mmbench_circular_agrees(lmms):
    pandas = pytest.importorskip("pandas")
    module = lmms("mmbench.mmbench_evals")
    from milora_vl.eval.benches import mmbench

    rows, ours = [], []
    rng = random.Random(7)
    for base in range(12):
        for turn in range(4):
            answer = "ABCD"[-turn % 4]
            text = rng.choice([answer] * 8 + ["A", "nothing"])
            options = dict(zip("ABCD", ["w1", "x2", "y3", "z4"], strict=True))
            index = base + turn * 1_000_000
            rows.append({"index": index, "question": "?", **options, "answer": answer})
            rows[-1] |= {"prediction": text, "category": "c", "l2-category": "l", "split": "dev"}
            details = {"l2": "l", "rotation": turn, "answer_text": None}
            shared = (str(index), None, "", (answer,), str(base), "c", tuple(options.values()))
            ours.append(mmbench.judge(Item(*shared, details=details), text))
    evaluator = module.MMBench_Evaluator()
    theirs = evaluator.eval_result(pandas.DataFrame(rows).to_dict("records"), "static")
    overall = theirs[0] if isinstance(theirs, tuple) else theirs
    assert mmbench.summarize(ours)["score"] == pytest.approx(overall)
