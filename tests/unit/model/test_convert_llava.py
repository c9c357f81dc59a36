"""Laws of converting original LLaVA checkpoints, on synthetic ones in their layouts."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from chat_tokenizers import build_llama_like
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from milora_vl.cli import main
from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.prompts import render_segments
from milora_vl.data.records import Turn
from milora_vl.eval.generate_plain import build_prompt
from milora_vl.model.compose import compose_from_names
from milora_vl.model.convert_llava import _merge_lora_, convert_llava
from milora_vl.model.load import LoadError, load_vlm

D, VISION_D, SIDE, PATCH = 32, 24, 28, 14
MM_SETTINGS = {
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": VISION_D,
}


class Original:
    """The parts of an original checkpoint, and what that model computes."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.tokenizer = build_llama_like("llama_legacy")
        self.language = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer), hidden_size=D, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
                tie_word_embeddings=False, eos_token_id=2, bos_token_id=1, pad_token_id=0,
            )
        ).eval()  # fmt: skip
        self.tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=VISION_D, intermediate_size=32, num_hidden_layers=3,
                num_attention_heads=2, image_size=SIDE, patch_size=PATCH, initializer_range=0.2,
            )
        ).eval()  # fmt: skip
        self.projector = nn.Sequential(nn.Linear(VISION_D, D), nn.GELU(), nn.Linear(D, D))
        self.tower.save_pretrained(folder / "tower")
        size = {"shortest_edge": SIDE}
        CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
            folder / "tower"
        )
        self.language.save_pretrained(folder / "base")
        self.tokenizer.save_pretrained(folder / "base")

    @torch.no_grad()
    def logits(self, ids: list[int], pixel_values: torch.Tensor, image_id: int) -> torch.Tensor:
        """As the original code: patch features of layer -2 take the place of the image mark."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        features = self.projector(states[:, 1:])[0]
        is_image = torch.tensor(ids) == image_id
        table = self.language.get_input_embeddings()
        embeds = table(torch.tensor(ids).masked_fill(is_image, 0))
        embeds[is_image] = features
        return self.language(inputs_embeds=embeds[None]).logits[0]

    def projector_weights(self, prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}{name}": value for name, value in self.projector.state_dict().items()}

    def write(self, layout: str) -> tuple[Path, dict]:
        source = self.folder / layout
        source.mkdir()
        settings = MM_SETTINGS | {"mm_vision_tower": str(self.folder / "tower")}
        options = {"base": str(self.folder / "base")}
        if layout == "whole":
            settings = self.language.config.to_dict() | settings
            weights = dict(self.language.state_dict())
            weights |= self.projector_weights("model.mm_projector.")
            prefix = "model.vision_tower.vision_tower.vision_model."
            for name, value in self.tower.state_dict().items():
                weights[prefix + name.removeprefix("vision_model.")] = value
            torch.save(weights, source / "pytorch_model.bin")
            self.tokenizer.save_pretrained(source)
            options = {}
        elif layout == "projector":
            torch.save(self.projector_weights("model.mm_projector."), source / "mm_projector.bin")
        else:
            lora = {}
            for name, module in self.language.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    down = torch.randn(4, module.in_features) / 8
                    up = torch.randn(module.out_features, 4) / 8
                    lora[f"base_model.model.{name}.lora_A.weight"] = down
                    lora[f"base_model.model.{name}.lora_B.weight"] = up
                    module.weight.data += 2.0 * up @ down
            torch.save(lora, source / "adapter_model.bin")
            (source / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
            trained = self.projector_weights("base_model.model.model.mm_projector.")
            torch.save(trained, source / "non_lora_trainables.bin")
        (source / "config.json").write_text(json.dumps(settings))
        return source, options


@pytest.mark.parametrize("layout", ["whole", "projector", "lora"])
def test_logits_match_after_conversion(layout: str, tmp_path: Path) -> None:
    original = Original(tmp_path)
    source, options = original.write(layout)
    convert_llava(source, tmp_path / "out", dtype=torch.float32, **options)
    vlm = load_vlm(tmp_path / "out", dtype=torch.float32)
    assert vlm.prompt_style.name == "vicuna_v1"
    assert vlm.tokens_per_image == (SIDE // PATCH) ** 2
    prompt = build_prompt(vlm, "What is in the picture?", [Image.new("RGB", (40, 20), "red")])
    ids, image_id = prompt["input_ids"], vlm.model.config.image_token_id
    with torch.no_grad():
        found = vlm.model(
            input_ids=torch.tensor([ids]), pixel_values=prompt["pixel_values"]
        ).logits[0]
    expected = original.logits(ids, prompt["pixel_values"], image_id)
    known = expected.shape[1]
    torch.testing.assert_close(found[:, :known], expected, atol=1e-4, rtol=0)
    assert (found.argmax(-1) < known).all()  # tokens that were added are never the answer


def test_the_written_chat_template_is_our_vicuna_prompt(tmp_path: Path) -> None:
    source, options = Original(tmp_path).write("projector")
    convert_llava(source, tmp_path / "out", dtype=torch.float32, **options)
    vlm = load_vlm(tmp_path / "out")
    turns = [Turn("user", f"{IMAGE_TOKEN}\nHi"), Turn("assistant", "Yes"), Turn("user", "Why?")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    stock = vlm.processor.apply_chat_template(messages, add_generation_prompt=True)
    segments = render_segments(turns, "vicuna_v1", add_generation_prompt=True)
    assert stock == "<s>" + "".join(segment.text for segment in segments)
    assert stock.endswith("ASSISTANT:")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, options = Original(tmp_path).write("projector")
    (source / "mm_projector.bin").write_bytes(pickle.dumps({"model.mm_projector.0.weight": Bomb()}))
    with pytest.raises(LoadError, match=r"mm_projector\.bin: not a plain file of tensors"):
        convert_llava(source, tmp_path / "out", **options)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "its projector is 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "cut into tiles"),
        ({"mm_use_im_start_end": True}, "<im_start>"),
    ],
)
def test_what_transformers_cannot_express_is_refused(
    change: dict, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MM_SETTINGS | change))
    with pytest.raises(LoadError, match=message):
        convert_llava(tmp_path, tmp_path / "out")


def test_the_command_says_that_a_projector_needs_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, options = Original(tmp_path).write("projector")
    words = ["convert-llava", str(source), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "--base" in capsys.readouterr().err
    assert main([*words, "--base", options["base"], "--dtype", "float32"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_hub_id_is_fetched_and_explained_where_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source, options = Original(tmp_path).write("projector")
    words = ["convert-llava", "some-org/stage1", "--out", str(tmp_path / "out")]
    assert main([*words, "--base", options["base"]]) == 1
    assert "some-org/stage1: neither a folder here nor found" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(source))
    assert main([*words, "--base", options["base"]]) == 0
    stored = load_vlm(tmp_path / "out").model.dtype
    assert stored == torch.float16


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    source, options = Original(tmp_path).write("projector")
    with pytest.raises(FileExistsError, match="nothing in it is overwritten"):
        convert_llava(source, source, **options)
    assert (source / "mm_projector.bin").exists()


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("extra", "settings", "words"),
    [
        (f"{LAYER}.lora_magnitude_vector", {}, "use_dora=None does not fit"),
        (f"{LAYER}.bias", {}, r"q_proj\.bias"),
        ("base_model.model.lm_head.modules_to_save.weight", {}, "modules_to_save"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", {}, "embed_tokens"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.bias", {}, r"lora_A\.bias"),
        (None, {"use_dora": True}, "use_dora"),
        (None, {"init_lora_weights": "pissa_niter_4"}, "pissa"),
        (None, {"peft_type": "ADALORA"}, "ADALORA"),
        (None, {"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        (None, {"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_a_merge_does_not_express_is_refused_by_name(extra, settings, words) -> None:
    lora = {f"{LAYER}.lora_A.weight": torch.ones(2, 4), f"{LAYER}.lora_B.weight": torch.ones(4, 2)}
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
    if extra:
        lora[extra] = torch.ones(4)
    with pytest.raises(LoadError, match=words):
        _merge_lora_(weights, lora, {"r": 8, "lora_alpha": 4, **settings})


PATTERNS = {
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "down_proj": 7},
}


@pytest.mark.parametrize(
    "settings",
    [
        PATTERNS,
        PATTERNS | {"use_rslora": True},
        PATTERNS | {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"], "init_lora_weights": "gaussian"},
        {"target_modules": ["embed_tokens", "v_proj"], "bias": "lora_only"},
        {"target_modules": ["lm_head", "k_proj"], "bias": "all", "init_lora_weights": "orthogonal"},
    ],
)
def test_a_lora_folder_merges_as_in_peft(settings: dict, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    peft_model = get_peft_model(model, LoraConfig(**options))
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) / 4)
    peft_model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    before = {name: value.clone() for name, value in weights.items()}
    _merge_lora_(weights, stored, json.loads((tmp_path / "adapter_config.json").read_text()))
    merged = peft_model.merge_and_unload().state_dict()
    assert merged.keys() == weights.keys()
    for name, value in merged.items():
        torch.testing.assert_close(weights[name], value, msg=name)
    assert sum(not torch.equal(weights[name], before[name]) for name in before) >= 4


@pytest.mark.parametrize(
    "name",
    ["lm_head.bias", "model.norm.bias", "model.vision_tower.vision_tower.vision_model.extra"],
)
def test_a_tensor_without_a_place_is_named_and_not_dropped(name: str, tmp_path: Path) -> None:
    source, _ = Original(tmp_path).write("whole")
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, name: torch.ones(D)}, source / "pytorch_model.bin")
    with pytest.raises(LoadError, match=name.rpartition("vision_model.")[2].removeprefix("model.")):
        convert_llava(source, tmp_path / "out")
    del weights["lm_head.weight"]
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"lacks lm_head\.weight"):
        convert_llava(source, tmp_path / "out")


@pytest.mark.parametrize("part", ["tower", "base"])
def test_parts_that_lack_a_weight_are_refused_wherever_they_are_loaded(
    part: str, tmp_path: Path
) -> None:
    source, _ = Original(tmp_path).write("whole")
    file = tmp_path / part / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "layers.1." in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=rf"{part} lacks 1 weights .*layers\.1\."):
        compose_from_names(
            f"hf:{tmp_path / 'tower'}", str(tmp_path / "base"), tmp_path / "composed"
        )
    if part == "tower":
        with pytest.raises(LoadError, match="tower lacks 1 weights"):
            convert_llava(source, tmp_path / "out")
