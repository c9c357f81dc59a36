"""Every way to start an adapter, on the embedded SmolLM2-135M: start, train, save, load, export.

    python scripts/bench/baselines.py                      all of them, residual "auto"
    python scripts/bench/baselines.py --inits lora dora --r 8

One JSON line each: the largest change of a logit at step 0 (over the largest logit), what two steps
did to the loss, the difference of the saved adapter under stock PEFT, and of the exported LoRA.
Fails where the start is not the base, or a saved adapter is not the live one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora_vl import MiloraConfig, attach_milora, save_adapter
from milora_vl.adapter.attach import compute_logits
from milora_vl.config import Init
from milora_vl.export.forms import export_adapter
from milora_vl.model.embedded import load_smollm2

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "To make tea, boil water, put the leaves into a pot and wait for four minutes.",
)
LEARNT = "Question: what colour is the house of the baker? Answer: it is turquoise."
TOLERANCE = 1e-4  # of the largest logit: rounding through 30 layers of float32


def save_base(folder: Path) -> Path:
    """Write the embedded language model as a checkpoint."""
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encode(tokenizer: Any, texts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    length = min(row.shape[1] for row in rows)
    ids = torch.cat([row[:, :length] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference over the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def check_init(base: Path, tokenizer: Any, init: str, r: int, folder: Path) -> dict[str, Any]:
    """Take one method all the way; return its numbers.

    Raises:
        AssertionError: If a law is broken.
    """

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    batch, lesson = encode(tokenizer, TEXTS), encode(tokenizer, (LEARNT,))
    before = compute_logits(load(), batch)
    started = time.perf_counter()
    config = MiloraConfig(r=r, init=init, factor_cache=False)
    model, certificate = attach_milora(
        load(), config, batch=batch, calibration=[batch, lesson], progress=False
    )
    seconds = time.perf_counter() - started
    start = difference(compute_logits(model, batch), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(**lesson, labels=lesson["input_ids"]).loss
        losses.append(round(float(loss.detach()), 4))
        if len(losses) <= 2:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    live = compute_logits(model, batch)
    saved = save_adapter(model, folder / "adapter", base=str(base))
    del model
    stock = difference(compute_logits(PeftModel.from_pretrained(load(), saved), batch), live)
    exported = export_adapter(saved, folder / "export", "lora", base=str(base))
    again = compute_logits(PeftModel.from_pretrained(load(), exported.folder), batch)
    numbers = {
        "init": init,
        "residual": certificate.residual,
        "attach_seconds": round(seconds, 1),
        "trainable": certificate.trainable_parameters,
        "step0_relative": start,
        "losses": losses,
        "moved_relative": difference(live, before),
        "stock_peft_relative": stock,
        "export_relative": difference(again, live),
        "export_checks": [str(check) for check in exported.checks],
    }
    assert start < TOLERANCE, numbers
    assert losses[2] < losses[0], numbers
    assert numbers["moved_relative"] > 10 * max(stock, numbers["export_relative"]), numbers
    assert max(stock, numbers["export_relative"]) < TOLERANCE, numbers
    return numbers


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inits", nargs="+", choices=get_args(Init), default=get_args(Init))
    parser.add_argument("--r", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = save_base(Path(folder) / "base")
        tokenizer = AutoTokenizer.from_pretrained(base)
        for init in options.inits:
            place = Path(folder) / init.replace(":", "_")
            print(json.dumps(check_init(base, tokenizer, init, options.r, place)), flush=True)


if __name__ == "__main__":
    main()
