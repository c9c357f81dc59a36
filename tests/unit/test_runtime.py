"""Laws of full precision: exact products inside, every switch as before outside."""

import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from milora_vl import MiloraConfig, attach_milora, merge_adapter
from milora_vl.runtime import full_precision

backends = torch.backends
new_interface = pytest.mark.skipif(
    not hasattr(backends, "fp32_precision"), reason="torch before 2.9 has one switch only"
)


def switches():
    """Return every setting that can be read, those that raise as such."""

    def read(get):
        try:
            return get()
        except RuntimeError as error:
            return type(error)

    found = [
        read(torch.get_float32_matmul_precision),
        read(lambda: backends.cuda.matmul.allow_tf32),
    ]
    if hasattr(backends, "fp32_precision"):
        parts = (backends, backends.cudnn, backends.cuda.matmul, backends.cudnn.conv)
        parts += (backends.mkldnn, backends.mkldnn.matmul)
        found += [part.fp32_precision for part in parts]
    return found


def is_exact():
    if not hasattr(backends, "fp32_precision"):
        return torch.get_float32_matmul_precision() == "highest"
    matmuls = (backends.cuda.matmul, backends.mkldnn.matmul)
    return all(part.fp32_precision == "ieee" for part in matmuls)


@pytest.fixture(autouse=True)
def default_switches():
    yield
    if hasattr(backends, "fp32_precision"):
        backends.fp32_precision = "none"
        backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    if hasattr(backends, "fp32_precision"):
        backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"


def turn_everything(setting):
    backends.fp32_precision = setting  # as transformers' TrainingArguments(tf32=True) does


def turn_one(setting):
    backends.cuda.matmul.fp32_precision = setting


def turn_products_back_only():
    turn_everything("tf32")
    backends.cuda.matmul.fp32_precision = "ieee"
    backends.mkldnn.matmul.fp32_precision = "bf16"


def turn_old_and_new():
    torch.set_float32_matmul_precision("high")
    backends.cuda.matmul.fp32_precision = "ieee"


def turn_backends():
    backends.fp32_precision = "bf16"
    backends.cudnn.fp32_precision = "tf32"


OLD = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
}
NEW = {
    "everything tf32": lambda: turn_everything("tf32"),
    "everything bf16": lambda: turn_everything("bf16"),
    "everything ieee": lambda: turn_everything("ieee"),
    "cuda tf32": lambda: turn_one("tf32"),
    "all but products": turn_products_back_only,
    "old and new": turn_old_and_new,
    "backends": turn_backends,
}
SETTINGS = [pytest.param(value, id=name) for name, value in OLD.items()] + [
    pytest.param(value, id=name, marks=new_interface) for name, value in NEW.items()
]


@pytest.mark.parametrize("turn", SETTINGS)
def test_products_are_exact_inside_and_every_switch_is_restored(turn):
    turn()
    before = switches()
    with full_precision():
        assert is_exact()
        with full_precision():
            assert is_exact()
        assert is_exact()
    assert switches() == before
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert switches() == before


@new_interface
def test_a_switch_that_followed_another_follows_it_afterwards():
    turn_everything("tf32")
    with full_precision():
        pass
    turn_everything("ieee")
    assert is_exact()
    backends.cuda.matmul.fp32_precision = "ieee"
    backends.fp32_precision = "tf32"
    with full_precision():
        pass
    assert backends.cuda.matmul.fp32_precision == "ieee"
    assert backends.mkldnn.matmul.fp32_precision == "tf32"


@new_interface
def test_a_block_that_ends_leaves_the_block_of_another_thread_exact():
    turn_everything("tf32")
    inside, leave, seen = threading.Event(), threading.Event(), []

    def work():
        with full_precision():
            inside.set()
            leave.wait(10)
            seen.append(is_exact())

    thread = threading.Thread(target=work)
    with full_precision():
        thread.start()
        assert inside.wait(10)
    leave.set()
    thread.join()
    assert seen == [True]
    assert not is_exact()


def test_autocast_is_off_inside_and_on_again_outside():
    left, right = torch.randn(8, 8), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert (left @ right).dtype == torch.float32
        assert (left @ right).dtype == torch.bfloat16


@pytest.mark.parametrize("init", ["milora", "pissa", "null_space"])
def test_no_decomposition_runs_in_reduced_precision(init, monkeypatch):
    decompositions = ("svd", "qr", "eigh", "cholesky_ex", "svdvals", "solve_triangular")
    seen = []
    for name in decompositions:
        real = getattr(torch.linalg, name)

        def spy(*args, real=real, **options):
            seen.append(is_exact() and not torch.is_autocast_enabled("cpu"))
            return real(*args, **options)

        monkeypatch.setattr(torch.linalg, name, spy)
    if hasattr(backends, "fp32_precision"):
        turn_everything("tf32")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    batch = {"input_ids": torch.arange(8)[None]}
    with torch.autocast("cpu", torch.bfloat16):
        settings = MiloraConfig(r=4, factor_cache=False, init=init)
        peft_model, _ = attach_milora(model, settings, calibration=[batch], progress=False)
        merge_adapter(peft_model)
    assert seen
    assert all(seen)
