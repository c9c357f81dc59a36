"""Laws of the dial: its ends are the base and the trained model, by one loaded model."""

import json

import pytest
import torch
from eval_data import write_benches

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.adapter.tuned import load_tuned
from milora_vl.cli import main
from milora_vl.config import MiloraConfig
from milora_vl.eval import dial as dial_file
from milora_vl.eval.evaluation import evaluate
from milora_vl.model.load import load_vlm


def test_its_ends_are_the_base_and_the_trained_model(
    tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    vlm = load_vlm(tiny_checkpoint)
    model, _ = attach_milora(vlm.model, MiloraConfig(r=4, residual="anchor"), progress=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    run = tmp_path / "run"
    save_adapter(model, run / "adapter", base=vlm.path, processor=vlm.processor)
    data = write_benches(tmp_path / "data", n_pictures=2)
    loads = []
    read = dial_file.read_source
    monkeypatch.setattr(
        dial_file, "read_source", lambda *words: loads.append(words) or read(*words)
    )
    words = ["dial", str(run), "--data", str(data), "--device", "cpu"]
    assert (
        main([*words, "--bench", "mmbench,pope", "--retention", "pope", "--strengths", "1,0.5"])
        == 0
    )
    assert len(loads) == 1
    printed = capsys.readouterr().out
    assert [f"strength {one}" in printed for one in ("0:", "0.5:", "1:")] == [True] * 3
    result = json.loads((run / "dial" / "dial.json").read_text())
    assert [row["strength"] for row in result["strengths"]] == [0.0, 0.5, 1.0]
    assert result["gain"] == ["mmbench"]
    assert result["retention"] == ["text", "pope"]
    first, _, last = result["strengths"]
    assert first["text"]["text_perplexity_ratio"] == 1
    assert all(entry["change"] == 0 for entry in first["benches"].values())
    assert last["text"]["text_perplexity_ratio"] != 1
    for strength, tuned in (("0", None), ("1", run / "adapter")):
        alone = load_tuned(None if tuned else tiny_checkpoint, tuned, device="cpu")
        found = evaluate(
            alone, "mmbench,pope", data, tmp_path / strength, blind=False, progress=False
        )
        dialled = json.loads((run / "dial" / f"strength_{strength}" / "results.json").read_text())
        texts = [
            [json.loads(line)["text"] for line in (folder / "predictions.jsonl").open()]
            for folder in (tmp_path / strength, run / "dial" / f"strength_{strength}")
        ]
        assert texts[0] == texts[1]
        losses = [one["text_probe"]["loss_nats_per_token"] for one in (found, dialled)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    html = (run / "dial" / "dial.html").read_text()
    assert html.count("<img") == 2
    assert "cannot be shown" not in html
    assert main(["dial", str(run)]) == 1  # no config names benches
    assert "pass --bench" in capsys.readouterr().err
