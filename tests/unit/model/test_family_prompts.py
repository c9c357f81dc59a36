"""The whole prompt of bench questions as each family's processor and style write it."""

import io
import itertools
from datetime import date
from pathlib import Path

from family_models import BUILDERS, build_checkpoint
from official_layouts import mme, sqa
from PIL import Image

from milora_vl.eval.benches import BENCHES
from milora_vl.eval.generate_plain import build_prompt
from milora_vl.model.load import load_vlm

GOLDEN = Path(__file__).parents[2] / "golden" / "family_prompts.txt"


def as_text(tokenizer, ids):
    """The prompt with all its marks; one that is repeated stands once, with how often."""
    marks = tokenizer.get_added_vocab().values()
    text = ""
    for is_mark, run in itertools.groupby(ids, lambda token: token in marks):
        if not is_mark:
            text += tokenizer.decode(list(run))
            continue
        for token, same in itertools.groupby(run):
            n = len(list(same))
            text += tokenizer.convert_ids_to_tokens(token) + (f" x {n}" if n > 1 else "")
    return text


def test_the_prompt_of_every_family_is_as_recorded(tmp_path, golden):
    sqa(tmp_path)
    mme(tmp_path, [("existence", "000")])
    lettered, without_picture = BENCHES["sqa-full"].load(tmp_path)
    yes_no = BENCHES["mme"].load(tmp_path)[0]
    parts = []
    for family in BUILDERS:
        vlm = load_vlm(build_checkpoint(family, tmp_path / family), prompt_day=date(2031, 2, 3))
        parts.append(f"===== {family}: prompt style {vlm.prompt_style.name}")
        for item in (lettered, yes_no, without_picture):
            shown = [Image.open(io.BytesIO(item.image.read()))] if item.image else []
            ids = build_prompt(vlm, item.prompt, shown)["input_ids"]
            parts.append(f"--- {item.id}\n{as_text(vlm.tokenizer, ids)}")
    golden(GOLDEN, "\n".join(parts) + "\n")
