"""The benches by name. A new bench is one file here and one line in ``BENCHES``.

A bench is a module with ``VERSION``, ``METRIC``, ``MAX_NEW_TOKENS`` and the functions ``load``
(official files, or the hub mirror -> items), ``parse`` and ``judge`` (one answer),
``headline_sums`` and ``headline`` (the score as a function of sums over groups, which is what the
bootstrap needs), ``summarize`` (all rows -> numbers), ``majority`` and ``write_submission``. One
that a judge model scores also has ``JUDGE_PROMPT`` (name and version of the wording),
``judge_prompt``, ``is_usable`` and ``with_reply``. A second
bench from the same files is the module with some parts exchanged.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

from milora_vl.eval.benches import (
    custom,
    gqa,
    llava_w,
    mmbench,
    mme,
    mmmu,
    mmvet,
    pope,
    seed,
    sqa,
    textvqa,
    vizwiz,
    vqav2,
)

Bench = ModuleType | SimpleNamespace


def variant(bench: ModuleType, **parts: Any) -> SimpleNamespace:
    """Return a bench that differs from a module in some parts."""
    return SimpleNamespace(**{**vars(bench), **parts})


BENCHES: dict[str, Bench] = {
    "mmbench": mmbench,
    "pope": pope,
    "vqav2": vqav2,
    "mmbench-cn": variant(mmbench, load=mmbench.load_chinese, MIRRORS=mmbench.MIRRORS_CN),
    "gqa": gqa,
    "vizwiz": vizwiz,
    "sqa": sqa,
    "sqa-full": variant(
        sqa, load=sqa.load_full, summarize=sqa.summarize_full, METRIC=sqa.METRIC_FULL
    ),
    "textvqa": textvqa,
    "textvqa-ocr": variant(textvqa, load=textvqa.load_with_ocr),
    "mme": mme,
    "seed": seed,
    "seed-image": variant(
        seed, load=seed.load_images, summarize=seed.summarize_images, METRIC=seed.METRIC_IMAGE
    ),
    "seed-video": variant(
        seed, load=seed.load_videos, summarize=seed.summarize_videos, METRIC=seed.METRIC_VIDEO
    ),
    "mmmu": mmmu,
    "mmmu-first": variant(mmmu, load=mmmu.load_first),
    "mmvet": mmvet,
    "llava-w": llava_w,
    "custom": custom,
}
