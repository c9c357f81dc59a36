"""The benches by name. A new bench is one file in this folder; nothing else lists it.

A bench is a module with

* ``FILES``, the official files as ``--help`` names them, ``METRIC``, ``MAX_NEW_TOKENS`` and
  ``VERSION``, which goes up with any change of prompts or scores;
* ``load``: official files, or the hub mirror (``MIRRORS``) -> items;
* ``parse`` and ``judge``: one answer -> what is read out of it, and its row;
* ``summarize``: all rows -> the numbers of ``results.json``;
* ``submission``: items and answers -> contents of files for an evaluation server, by name.

``COMMON`` stands in for what a module leaves out: ``sample`` (which questions a limit keeps),
``headline_sums`` and ``headline`` (the score as a function of sums over groups, which is what the
bootstrap needs) and ``majority`` (the best guess that sees no question). ``VARIANTS`` of a module
are further benches from the same files, with some parts exchanged. A bench that a judge model
scores also has ``JUDGE_PROMPT`` (name and version of the wording), ``judge_prompt``, ``is_usable``
and ``with_reply``.
"""

import pkgutil
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from milora_vl.eval import scoring, statistics
from milora_vl.eval.items import take_sample

Bench = SimpleNamespace

COMMON: dict[str, Any] = {
    "sample": take_sample,
    "headline_sums": scoring.mean_sums,
    "headline": statistics.ratio,
    "VARIANTS": {},
}


def _benches() -> dict[str, Bench]:
    benches: dict[str, Bench] = {}
    for info in pkgutil.iter_modules(__path__):
        parts = {**COMMON, **vars(import_module(f"{__name__}.{info.name}"))}
        parts.setdefault("majority", partial(scoring.best_constant, judge=parts["judge"]))
        for name, changes in {info.name: {}, **parts["VARIANTS"]}.items():
            benches[name.replace("_", "-")] = SimpleNamespace(**{**parts, **changes})
    return benches


BENCHES = _benches()
