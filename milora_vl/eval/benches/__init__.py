"""The benches by name. A new bench is one file here and one line in ``BENCHES``.

A bench is a module with ``VERSION``, ``METRIC``, ``MAX_NEW_TOKENS`` and the functions ``load``
(official files -> items), ``parse`` and ``judge`` (one answer), ``headline_sums`` and ``headline``
(the score as a function of sums over groups, which is what the bootstrap needs), ``summarise`` (all
rows -> numbers), ``majority`` and ``write_submission``.
"""

from types import ModuleType

from milora_vl.eval.benches import mmbench, pope, vqav2

BENCHES: dict[str, ModuleType] = {"mmbench": mmbench, "pope": pope, "vqav2": vqav2}
