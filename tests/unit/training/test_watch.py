"""Laws of the watch over steps: what is not finite is named at its step, and never written."""

import math

import pytest
import torch

from milora_vl.training.watch import (
    OVERFLOWS_IN_A_ROW,
    SKIPS_IN_A_ROW,
    NonFiniteError,
    StepWatch,
    all_finite,
)

NAN = torch.tensor(math.nan)
ONE = torch.tensor(1.0)


def watch(mode="stop", **options) -> StepWatch:
    return StepWatch(mode, lambda step, micro: f"the records of {step}/{micro}", **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_among_many_is_found(bad: float) -> None:
    good = [torch.full((3,), 3e38), torch.zeros(2, 2, dtype=torch.bfloat16), torch.arange(3)]
    assert all_finite(good)  # also where a sum of squares would overflow
    assert all_finite([])
    assert not all_finite([*good, torch.tensor([0.0, bad])])


def test_a_loss_and_a_gradient_name_their_step_and_records() -> None:
    one = watch()
    one.see_loss(ONE)
    one.see_loss(NAN)
    with pytest.raises(NonFiniteError, match=r"the loss is not finite at step 7.*of 7/1"):
        one.see_gradient(7, ONE)
    two = watch()
    two.see_loss(ONE)
    with pytest.raises(NonFiniteError, match=r"gradient norm is not finite at step 3.*of 3/None"):
        two.see_gradient(3, torch.tensor(math.inf))


def test_a_flag_that_is_read_late_names_its_own_step() -> None:
    late = watch(late=True)
    late.see_loss(NAN)
    assert not late.see_gradient(1, ONE)  # nothing waits for the device
    late.see_loss(ONE)
    with pytest.raises(NonFiniteError, match="at step 1"):
        late.see_gradient(2, ONE)
    before_a_save = watch(late=True)
    before_a_save.see_loss(NAN)
    before_a_save.see_gradient(5, ONE)
    with pytest.raises(NonFiniteError, match="at step 5"):
        before_a_save.flush()


def test_steps_are_left_out_until_ten_in_a_row() -> None:
    skip = watch("skip")
    for step in range(1, SKIPS_IN_A_ROW):
        skip.see_loss(NAN)
        assert skip.see_gradient(step, ONE)
    skip.see_loss(ONE)
    assert not skip.see_gradient(SKIPS_IN_A_ROW, ONE)
    assert skip.skipped == SKIPS_IN_A_ROW - 1
    for step in range(SKIPS_IN_A_ROW - 1):
        skip.see_loss(NAN)
        skip.see_gradient(step, ONE)
    skip.see_loss(NAN)
    with pytest.raises(NonFiniteError, match="10 steps in a row"):
        skip.see_gradient(99, ONE)


def test_overflows_of_a_loss_scaler_are_counted_and_only_a_long_run_ends() -> None:
    scaled = watch(scaled=True)
    for step in range(3):
        scaled.see_loss(NAN)
        assert not scaled.see_gradient(step, NAN)
    scaled.see_gradient(3, ONE)
    assert scaled.skipped == 3
    for step in range(1, OVERFLOWS_IN_A_ROW):
        scaled.see_gradient(step, NAN)
    with pytest.raises(NonFiniteError, match="float16 overflowed"):
        scaled.see_gradient(OVERFLOWS_IN_A_ROW, NAN)
