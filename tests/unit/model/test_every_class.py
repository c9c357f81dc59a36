"""Law of inspection: of every class for pictures and text the language model alone is matched."""

import importlib.util
import logging
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from family_models import BUILDERS
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from milora_vl.adapter.targets import find_targets, kind_of
from milora_vl.model.families import FAMILIES, find_family, has_vision

SCRIPT = Path(__file__).resolve().parents[3] / "scripts/families.py"
STATE_SPACE = re.compile(r"(.*\.\d+)\.\w+\.A_log")
REASONS = (
    r"is an encoder-decoder",
    r"does not predict the next token",
    r"no part of \w+ holds the language model alone",
)


def load_script() -> ModuleType:
    """Load the script that writes the page, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("families_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["families_script"] = module
    spec.loader.exec_module(module)
    return module


families = load_script()
PAGE = families.PAGE.read_text(encoding="utf-8")


def is_picture_part(model: nn.Module, name: str) -> bool:
    """Whether a module lies in a tower, told by classes and configurations, not by our names."""
    parts = name.split(".")
    seen = [getattr(model.config, key, None) for key in ("vision_config", "audio_config")]
    for end in range(1, len(parts)):
        part = model.get_submodule(".".join(parts[:end]))
        if any(config is not None and getattr(part, "config", None) is config for config in seen):
            return True
        if re.search(r"(Vision|Visual|Audio|QFormer|VQ)(?!\w*Text)", type(part).__name__):
            return "ForC" not in type(part).__name__ and end > 1
    return False


@pytest.mark.parametrize("kind", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_the_language_model_alone_is_matched_or_the_reason_is_told(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = families.build(kind)
    assert families.row_of(kind, model).line + "\n" in PAGE
    if isinstance(model, str):
        pytest.skip(f"{kind}: {model}")
    skipped: dict[str, str] = {}
    with caplog.at_level(logging.WARNING):
        try:
            targets = find_targets(model, "all-linear")
            modules, skipped, refused = targets.modules, targets.skipped, ""
        except ValueError as error:
            refused = str(error)
            assert any(re.search(reason, refused) for reason in REASONS), refused
            pattern = re.search(r"target_modules='(.*?)'$", refused)
            if not pattern:  # nothing of it can be adapted
                assert kind not in FAMILIES
                return
            modules = find_targets(model, pattern[1].replace("\\\\", "\\")).modules
    family = find_family(model)
    if kind not in FAMILIES and has_vision(model.config):
        assert "by inspection" in caplog.text
    assert all(name.startswith(f"{family.language_model}.") for name in modules)
    assert not [name for name in modules if is_picture_part(model, name)]
    assert model.get_output_embeddings() not in [model.get_submodule(name) for name in modules]
    kinds = {kind_of(name) for name in modules}
    only_experts = any("experts" in reason for reason in skipped.values())
    assert kinds == {"attention", "mlp"} or ((refused or only_experts) and kinds)
    if refused:
        return
    # every linear of the decoder is matched or its omission is told, and no layer is passed over
    inside = {
        name
        for name, module in model.get_submodule(family.language_model).named_modules()
        if isinstance(module, nn.Linear)
    }
    told = {*modules, *skipped}
    linear = {name for name in told if isinstance(model.get_submodule(name), nn.Linear)}
    assert {f"{family.language_model}.{name}" for name in inside} == linear
    layer = re.compile(r"^(.*?\.\d+)\.")
    numbered = {found[1] for name in told if (found := layer.match(name))}
    # layers of state-space mixers hold no attention and no MLP
    spaces = {
        found[1] for name, _ in model.named_parameters() if (found := STATE_SPACE.match(name))
    }
    experts = [name for name, reason in skipped.items() if "experts" in reason]
    assert {layer.match(name)[1] for name in (*modules, *experts)} >= {
        name
        for name in numbered - spaces
        if any(part.startswith("layer") for part in name.split("."))
    }


def test_the_page_counts_what_it_lists() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(lines) == len(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    adapted = [line for line in lines if line.endswith(("| whole way |", "| names |"))]
    assert f"\n{len(adapted)} are adapted." in PAGE
    assert len(adapted) + sum("| refused: " in line for line in lines) >= 92
    whole_way = {re.search(r"`(.*?)`", line)[1] for line in lines if "| whole way |" in line}
    aliases = {"bakllava", "pixtral"}  # of the class of LLaVA
    assert whole_way == set(BUILDERS) - aliases
