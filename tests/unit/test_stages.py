"""Laws of the stages: they do what is not done, say what they lack, and a page fails no run."""

import json
import logging
from pathlib import Path

import pytest

from milora_vl import stages
from milora_vl.cli import main
from milora_vl.errors import MiloraError


def test_a_report_that_cannot_be_drawn_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(folder: Path) -> None:
        raise ValueError("ParseException: $")

    monkeypatch.setattr(stages, "write_report", broken)
    with caplog.at_level(logging.WARNING):
        stages.report_stage(tmp_path, {"before": {}, "after": {}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"before": {}, "after": {}}
    assert "report.html was not written: ValueError: ParseException: $" in caplog.text


def test_missing_data_are_made_by_the_command_of_the_config(tmp_path: Path) -> None:
    wanted = tmp_path / "made.json"
    code = f"import pathlib; pathlib.Path({str(wanted)!r}).write_text('[]')"
    stages.prepare_data(f'python -c "{code}"', [str(wanted), None])
    assert wanted.read_text() == "[]"
    with pytest.raises(MiloraError, match=r"other\.json"):
        stages.prepare_data("python -c pass", [str(tmp_path / "other.json")])
    with pytest.raises(MiloraError, match="code 3"):
        stages.prepare_data('python -c "raise SystemExit(3)"', [str(wanted)])


@pytest.mark.parametrize("error", [KeyError("k"), AttributeError("a"), MiloraError("mend this")])
def test_no_error_of_any_kind_shows_a_traceback_unless_asked(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("milora_vl.cli.load_config", broken)
    assert main(["check", "any.yaml"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert str(error) in text
    assert ("--debug" in text) != isinstance(error, MiloraError)
    with pytest.raises(type(error)):
        main(["check", "any.yaml", "--debug"])
