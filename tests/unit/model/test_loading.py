"""Laws of loading: what is passed through, what is refused, and what the messages say to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from PIL import Image
from quantized_models import build_whole_checkpoint
from safetensors.torch import load_file

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.config import MiloraConfig
from milora_vl.data.prompts import render_segments
from milora_vl.data.records import Turn
from milora_vl.inference import ask, load_for_inference
from milora_vl.model.load import LoadError, load_vlm
from milora_vl.model.load_errors import explain, explained_memory


def hub_error(kind: type[Exception], status: int) -> OSError:
    """What transformers raises: its own error, caused by the hub client's."""
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/x"))
    try:
        try:
            raise kind("Client Error", response=response)
        except kind as cause:
            raise OSError("something about the repository") from cause
    except OSError as error:
        return error


def test_a_gated_model_says_how_to_log_in() -> None:
    message = str(explain("owner/model", hub_error(GatedRepoError, 403)))
    assert "hf auth login" in message
    assert "accept its terms" in message


def test_an_unknown_revision_is_named() -> None:
    message = str(explain("owner/model", hub_error(RevisionNotFoundError, 404), "v9"))
    assert "no revision 'v9'" in message


def test_offline_says_that_it_is() -> None:
    with pytest.raises(LoadError, match=r"HF_HUB_OFFLINE is set.*download the checkpoint"):
        load_vlm("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_says_what_to_change(error: Exception) -> None:
    with pytest.raises(LoadError, match=r"nf4.*per_device_train_batch_size"), explained_memory("m"):
        raise error


def test_other_errors_inside_loading_are_not_called_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape") as caught, explained_memory("m"):
        raise RuntimeError("shape mismatch")
    assert not isinstance(caught.value, LoadError)


def test_pickles_are_read_only_when_the_flag_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match="allow_pickle"):
        load_vlm(folder)
    found = load_vlm(folder, allow_pickle=True).model.state_dict()
    for name, value in load_vlm(tiny_checkpoint).model.state_dict().items():
        assert torch.equal(found[name], value)


def test_dtype_device_and_attention_are_as_asked(tiny_checkpoint: Path) -> None:
    assert load_vlm(tiny_checkpoint).model.dtype == torch.float32
    vlm = load_vlm(tiny_checkpoint, dtype=torch.bfloat16, device="cpu", attn_implementation="eager")
    assert vlm.model.dtype == torch.bfloat16
    assert vlm.model.device.type == "cpu"
    assert vlm.model.config._attn_implementation == "eager"


def test_an_unknown_prompt_style_lists_the_known_ones(tiny_checkpoint: Path) -> None:
    with pytest.raises(LoadError, match=r"'vicuna'.*chat_template.*vicuna_v1"):
        load_vlm(tiny_checkpoint, prompt_style="vicuna")


def test_the_models_own_template_can_be_asked_for(tiny_checkpoint: Path) -> None:
    own = load_vlm(tiny_checkpoint, prompt_style="chat_template").prompt_style
    named = load_vlm(tiny_checkpoint, prompt_style="chatml").prompt_style
    assert own.name == "chat_template"
    assert own.assistant_suffix == named.assistant_suffix == "<|im_end|>"
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", "A fox.")]
    assert [one.text for one in render_segments(turns, own) if one.has_images] == ["<image>"]


def test_a_template_that_cannot_be_used_is_refused_with_the_reason(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(LoadError, match=r"cannot be used: it fails.*prompt_style"):
        load_vlm(folder, prompt_style="chat_template")


def test_4_bits_and_pickles_exclude_each_other(tiny_checkpoint: Path) -> None:
    with pytest.raises(LoadError, match=r"reads only safetensors.*allow_pickle has no effect"):
        load_vlm(tiny_checkpoint, quantization="nf4", allow_pickle=True)


def test_code_of_a_checkpoint_is_not_run_unasked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.ForeignConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(LoadError, match="trust_remote_code"):
        load_vlm(folder)
    assert not ran.exists()


def test_answers_in_4_bits_are_those_of_the_4_bit_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = build_whole_checkpoint(tmp_path / "model")
    vlm = load_for_inference(folder, device="cpu", quantization="nf4")
    assert vlm.float_weights is not None
    kinds = {type(module).__name__ for module in vlm.model.model.language_model.modules()}
    assert "Linear4bit" in kinds
    picture = Image.new("RGB", (40, 30), "red")
    expected = load_vlm(folder, quantization="nf4")
    assert ask(vlm, picture, "What?", 4) == ask(expected, picture, "What?", 4)
    peft_model, _ = attach_milora(
        expected.model, MiloraConfig(r=4), weights=expected.float_weights, progress=False
    )
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_B.milora" in name:
                value.add_(0.1)
    save_adapter(peft_model, tmp_path / "adapter")
    trained = ask(expected.with_model(peft_model.eval()), picture, "What?", 4)
    again = load_for_inference(folder, tmp_path / "adapter", "cpu", "nf4")
    assert ask(again, picture, "What?", 4) == trained
