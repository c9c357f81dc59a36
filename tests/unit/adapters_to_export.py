"""Adapters that were trained for two steps, to be exported."""

import torch

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.config import MiloraConfig
from milora_vl.export.logits_check import check_batches, drawn_picture
from milora_vl.model.load import load_vlm

CLOSE = {"atol": 1e-4, "rtol": 0}


def example(vlm):
    batches = check_batches(
        vlm.processor, vlm.model.device, vlm.model.dtype, drawn_picture(), "What is this?"
    )
    return batches["picture and text"]


def make_adapter(checkpoint, folder, quantization=None, **settings):
    """Train an adapter for two steps; return its folder and the live logits on an example."""
    vlm = load_vlm(checkpoint, quantization=quantization)
    config = MiloraConfig(**{"r": 4, "lora_alpha": 8, **settings})
    model, certificate = attach_milora(vlm.model, config, progress=False)
    batch = example(vlm)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    for _ in range(2):
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    certificate.to_json(folder / "certificate.json")
    save_adapter(model, folder / "adapter", base=vlm.path, processor=vlm.processor)
    before = compute_logits(load_vlm(checkpoint, quantization=quantization).model, batch)
    live = compute_logits(model, batch)
    assert (live - before).abs().max() > 1e-2
    return folder, live
