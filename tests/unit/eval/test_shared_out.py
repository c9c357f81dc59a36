"""Laws of an evaluation by several processes: every question is asked once, nothing is lost."""

from pathlib import Path

from milora_vl.eval.evaluation import AnswerJournal, share_of
from milora_vl.eval.items import Answer, Item


def test_shares_are_whole_disjoint_and_keep_groups_together() -> None:
    items = [Item(str(n), None, "q", ("A",), group=str(n // 3), category="") for n in range(20)]
    shares = [share_of(items, rank, 3) for rank in range(3)]
    assert sorted(int(item.id) for share in shares for item in share) == list(range(20))
    groups = [{item.group for item in share} for share in shares]
    assert not groups[0] & groups[1]
    assert not groups[1] & groups[2]
    assert not groups[0] & groups[2]
    assert share_of(items, 0, 1) == items


def test_the_main_process_takes_over_the_answers_of_the_others(tmp_path: Path) -> None:
    identity = {"model": "m"}
    other = AnswerJournal(tmp_path / "answers.partial.1.jsonl", identity)
    other.record({"a": Answer(text="yes", n_tokens=2, ended=True, seconds=0.5)})
    stranger = AnswerJournal(tmp_path / "answers.partial.2.jsonl", {"model": "n"})
    stranger.record({"b": Answer(text="no", n_tokens=2, ended=True, seconds=0.5)})
    main = AnswerJournal(tmp_path / "answers.partial.jsonl", identity)
    for file in (other.path, stranger.path):
        main.take_over(file)
        assert not file.exists()
    for journal in (main, AnswerJournal(main.path, identity)):  # on disk, too
        assert journal.get("a").text == "yes"
        assert journal.get("b") is None
