"""Law of folder swaps: a swap that fails leaves the old folder in its place."""

from pathlib import Path

import pytest

from milora_vl.files import replace_folder


def test_failed_swap_puts_the_old_folder_back(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "a").write_text("old")
    with pytest.raises(OSError, match="missing"):
        replace_folder(tmp_path / "missing", final)
    assert (final / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
