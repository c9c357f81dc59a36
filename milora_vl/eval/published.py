"""Published scores of LLaVA-1.5-7B, to stand beside ours when that model is evaluated."""

import re
from typing import Any

_MODEL = re.compile(r"llava-(?:v)?1\.5-7b", re.IGNORECASE)

LLAVA_15_7B: dict[str, dict[str, Any]] = {
    "vqav2": {"full": 78.5, "lora": 79.1, "milora": 79.2, "split": "test-dev, by the server"},
    "gqa": {"full": 62.0, "lora": 63.0, "milora": 62.1, "split": "testdev balanced"},
    "vizwiz": {"full": 50.0, "lora": 47.8, "milora": 53.3, "split": "test-dev, by the server"},
    "sqa": {"full": 66.8, "lora": 68.4, "milora": 70.6, "split": "test, IMG; 67.9 when run again"},
    "textvqa-ocr": {"full": 58.2, "lora": 58.2, "milora": 58.7, "split": "val, OCR in the prompt"},
    "pope": {"full": 85.9, "lora": 86.4, "milora": 87.9, "split": "mean F1, random of 2,910 rows"},
    "mme": {"full": 1510.7, "lora": 1476.9, "split": "perception points"},
    "mmbench": {"full": 64.3, "lora": 66.1, "milora": 66.1, "split": "dev 20230712, circular"},
    "mmbench-cn": {"full": 58.3, "lora": 58.9, "split": "dev 20231003, circular"},
    "seed": {"full": 58.6, "lora": 60.1, "split": "image and video"},
    "seed-image": {"full": 66.1, "split": "image only"},
    "llava-w": {"full": 65.4, "lora": 67.9, "split": "judge gpt-4-0314, no longer offered"},
    "mmvet": {"full": 31.1, "lora": 30.2, "split": "judge gpt-4-0613 of its authors"},
}
"""Per cent (MME: points) by bench: full finetuning and LoRA from LLaVA's model zoo, MiLoRA from its
authors' result table (github.com/sufenlp/MiLoRA), where full is 61.9 and LoRA 62.9 on GQA."""


def published_scores(model: str, bench: str) -> dict[str, Any]:
    """Return the published scores of a bench if the model is LLaVA-1.5-7B, else nothing.

    Args:
        model: Hub id or path.
        bench: Name of the bench.
    """
    return dict(LLAVA_15_7B.get(bench, {})) if _MODEL.search(model) else {}
