"""Laws of machines by name, and of the batch that fits on them."""

import pytest

from milora_vl.devices import GPUS, REMEDIES, fit_batch, parse_machine


@pytest.mark.parametrize(
    ("text", "count", "gib"),
    [
        ("1x24GB", 1, 24), ("8x80GB", 8, 80), ("40 GiB", 1, 40), ("H100", 1, 80),
        ("8 x NVIDIA H100", 8, 80), ("4xl40s", 4, 48), ("A100", 1, 40), ("A100-80GB", 1, 80),
        ("rtx 4090", 1, 24), ("2xGeForce RTX 3090", 2, 24), ("tesla t4", 1, 16),
    ],
)  # fmt: skip
def test_a_machine_is_read_as_people_write_it(text, count, gib):
    machine = parse_machine(text)
    assert (machine.count, machine.gpu.gib) == (count, gib)
    assert machine.usable_gib < gib


@pytest.mark.parametrize("text", ["", "0x24GB", "x24GB", "1x0GB", "H10", "cuda:0", "many", "8x"])
def test_an_unknown_machine_names_the_known_ones(text):
    with pytest.raises(ValueError, match=r"8xH100.*RTX4090"):
        parse_machine(text)


def test_the_table_is_in_order():
    for name, gpu in GPUS.items():
        assert 8 <= gpu.gib <= 300, name
        assert gpu.float32_tflops < gpu.tflops, name
        assert parse_machine(name).gpu == gpu


def memory(fixed, sample, saved=0.0):
    return lambda batch, changes: fixed + (sample * batch) - saved * len(changes)


def test_the_configured_batch_is_kept_where_it_fits():
    fit = fit_batch(parse_machine("8x80GB"), 16, 128, memory(20, 2))
    assert (fit.fits, fit.batch, fit.accumulation, fit.changes) == (True, 16, 1, ())
    assert "128 = 8 devices x 16 x 1" in "\n".join(fit.lines())


def test_a_smaller_batch_is_accumulated_to_the_same_global_one():
    fit = fit_batch(parse_machine("1x24GB"), 16, 128, memory(14, 2))
    assert not fit.fits
    assert (fit.batch, fit.accumulation) == (4, 32)  # 14 + 2 x 4 = 22 of 22.08 GiB
    assert fit.changes == ("training.per_device_train_batch_size=4",)


def test_as_few_changes_as_make_one_sample_fit():
    fit = fit_batch(parse_machine("1x24GB"), 1, 8, memory(30, 1, saved=5))
    assert fit.changes == (*REMEDIES[:2], "training.per_device_train_batch_size=2")
    hopeless = fit_batch(parse_machine("1x24GB"), 1, 8, memory(90, 1, saved=5))
    assert (hopeless.batch, hopeless.changes) == (0, REMEDIES)
    assert "not even one sample" in "\n".join(hopeless.lines())
