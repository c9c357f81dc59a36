"""Laws of the decay toward the start: decoupled, exact, and of the factors alone."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments, default_data_collator

from milora_vl.adapter.attach import attach_milora
from milora_vl.config import ConfigError, MiloraConfig, parse_config
from milora_vl.training.decay import DecayToStart, check_decay, pull_before_steps, start_of

LR, RATE = 0.01, 0.5


def moved_adapter(make_tiny_vlm, residual="anchor"):
    config = MiloraConfig(r=4, residual=residual)
    model, _ = attach_milora(make_tiny_vlm(), config, progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, trained


@pytest.mark.parametrize("residual", ["anchor", "subtract"])
def test_without_a_gradient_the_distance_to_the_start_shrinks_by_lr_times_rate(
    make_tiny_vlm, residual
):
    model, trained = moved_adapter(make_tiny_vlm, residual)
    starts = start_of(model)
    before = {p: p.detach().clone() for p in trained}
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    hook = pull_before_steps(optimizer, starts, RATE)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in trained:
        if parameter in starts:
            way = (1 - LR * RATE) * (before[parameter] - starts[parameter])
            assert_close(parameter - starts[parameter], way, atol=1e-7, rtol=1e-5)
        else:  # the projector has no start to go back to
            assert torch.equal(parameter, before[parameter])
    optimizer.found_inf = torch.ones(())  # as a float16 scaler tells a fused optimizer
    skipped = {p: p.detach().clone() for p in trained}
    optimizer.step()
    assert all(torch.equal(p, skipped[p]) for p in trained)
    del optimizer.found_inf
    hook.remove()
    after = {p: p.detach().clone() for p in trained}
    optimizer.step()
    assert all(torch.equal(p, after[p]) for p in trained)


def test_it_is_adamw_on_the_distance_with_its_own_decoupled_decay():
    torch.manual_seed(0)
    start = torch.randn(8, 6)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(torch.zeros_like(start))  # the distance itself
    optimizer = torch.optim.AdamW([ours], lr=LR, weight_decay=0.0)
    pull_before_steps(optimizer, {ours: start}, RATE)
    plain = torch.optim.AdamW([theirs], lr=LR, weight_decay=RATE)
    for _ in range(20):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        plain.step()
    assert_close(ours - start, theirs, atol=1e-5, rtol=1e-4)


def test_any_trainer_takes_the_callback(make_tiny_vlm, tmp_path):
    distances = {}
    for rate in (0.0, 20.0):
        config = MiloraConfig(r=4, train_projector=False)
        model, _ = attach_milora(make_tiny_vlm(), config, progress=False)
        rows = [{"input_ids": [1, 5, 9, 2], "labels": [1, 5, 9, 2]}] * 4
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=LR, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        callbacks = [DecayToStart(rate)] if rate else []
        trainer = Trainer(
            model, arguments, default_data_collator, train_dataset=rows, callbacks=callbacks
        )
        trainer.train()
        distances[rate] = sum(float((p - start).norm()) for p, start in start_of(model).items())
    assert 0 < distances[20.0] < 0.95 * distances[0.0]


def test_what_cannot_be_pulled_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"training\.weight_decay"):
        MiloraConfig(init="lora", decay_to_start=0.1)
    values = {"model": {"path": "m", "prompt_style": "plain"}, "data": {"train": "t.json"}}
    with pytest.raises(ConfigError, match=r"adapter\.decay_to_start"):
        parse_config({**values, "adapter": {"decay_to_start": -1}})
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, optim="schedule_free_adamw")
    with pytest.raises(ConfigError, match="schedule_free"):
        check_decay(arguments)

    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            """As schedulefree's optimizers have it."""

    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="ScheduleFree steps on other values"):
        pull_before_steps(ScheduleFree([weight], lr=1.0), {weight: weight}, 0.1)
