"""The schedules against numbers worked out by hand, and what they do to a model and its optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effcore.methods.echo_llama import ECHOSchedule
from effcore.methods.epas import EPASSchedule, StaticSchedule


class Layers(nn.Module):
    """The least that a schedule needs: one "projection" a layer, used by owners, and one weight that is always used."""

    def __init__(self, layers: int = 4):
        super().__init__()
        self.projections = nn.ParameterList(nn.Parameter(torch.full((2,), float(i + 1))) for i in range(layers))
        self.always = nn.Parameter(torch.ones(2))
        self.layout = "_".join(map(str, range(layers)))
        self.switches = 0

    def set_layout(self, layout: str) -> None:
        self.layout = layout
        self.switches += 1

    def switched_off_parameters(self):
        owners = [int(owner) for owner in self.layout.split("_")]
        return [(f"projections.{i}", p) for i, p in enumerate(self.projections) if owners[i] != i]

    def forward(self) -> torch.Tensor:
        owners = {int(owner) for owner in self.layout.split("_")}
        return sum((self.projections[i] ** 2).sum() for i in owners) + (self.always**2).sum()


def train(model, schedule, optimizer, steps, first=0):
    for step in range(first, first + steps):
        schedule.apply(model, optimizer, step)
        optimizer.zero_grad()
        model().backward()
        optimizer.step()


def test_epas_equation():
    schedule = EPASSchedule(num_layers=8, switch_every=10, max_shared=5, layers_per_switch=2, first_switch=3)
    # shared(t) = min(5, 2·⌊(t − 3)/10⌋)
    expected = {0: 0, 3: 0, 12: 0, 13: 2, 22: 2, 23: 4, 32: 4, 33: 5, 43: 5, 10_000: 5}
    assert {step: schedule.shared(step) for step in expected} == expected
    assert schedule.switches() == (13, 23, 33)
    assert schedule.layout(12) == "0_1_2_3_4_5_6_7"
    assert schedule.layout(13) == "0_1_2_3_4_5_5_5"
    assert schedule.layout(33) == "0_1_2_2_2_2_2_2"


@pytest.mark.parametrize(("layers", "shared"), [(1, 0), (2, 1), (3, 2), (4, 3), (12, 8), (30, 20), (32, 22)])
def test_epas_defaults_reach_two_thirds_a_third_into_training(layers, shared):
    steps = 3000
    schedule = EPASSchedule.plan(layers, steps)
    assert schedule.max_shared == shared
    if shared:
        assert steps // 3 - shared < schedule.switches()[-1] <= steps // 3
    assert schedule.shared(steps // 3) == shared


def test_epas_plan_of_a_run_that_is_too_short_switches_every_step():
    assert EPASSchedule.plan(12, 6).switch_every == 1


def test_echo_equation():
    schedule = ECHOSchedule(num_layers=6, final_start=3, steps_per_stage=10, first_stage=5)
    expected = {0: 6, 4: 6, 5: 5, 14: 5, 15: 4, 25: 3, 34: 3, 35: 3, 1000: 3}
    assert {step: schedule.start(step) for step in expected} == expected
    assert schedule.switches() == (5, 15, 25)
    assert [schedule.converting(step) for step in (4, 5, 14, 15, 25, 34, 35)] == [None, 5, 5, 4, 3, 3, None]
    assert schedule.layout(25) == "0_1_2_2_2_2"


def test_echo_defaults_are_the_public_checkpoints():
    assert ECHOSchedule.plan(22, 10_000) == ECHOSchedule(22, final_start=11, steps_per_stage=150)
    assert ECHOSchedule.plan(8, 60).switches() == (0, 10, 20, 30)


def test_static_layout():
    schedule = StaticSchedule("0_0_2_2")
    assert [schedule.layout(step) for step in (0, 99)] == ["0_0_2_2"] * 2
    assert (schedule.shared(0), schedule.start(0), schedule.num_layers, schedule.switches()) == (2, 1, 4, (0,))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EPASSchedule(4, 10, max_shared=4), "max_shared must be from 0 to 3"),
        (lambda: EPASSchedule(4, 0, max_shared=2), "switch_every must be positive"),
        (lambda: EPASSchedule(4, 1, max_shared=2, layers_per_switch=0), "layers_per_switch must be positive"),
        (lambda: EPASSchedule(4, 1, max_shared=2, first_switch=-1), "first_switch must not be negative"),
        (lambda: EPASSchedule(4, 1, max_shared=2, restart_from=2.0), "restart_from must be from 0 to 1"),
        (lambda: ECHOSchedule(4, final_start=0), "final_start must be from 1 to 4"),
        (lambda: ECHOSchedule(4, 2, steps_per_stage=0), "steps_per_stage must be positive"),
        (lambda: ECHOSchedule(4, 2, distillation=-1.0), "distillation must not be negative"),
    ],
)
def test_settings_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_switched_off_projections_stand_still(optimizer_class):
    model = Layers()
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(model.parameters(), lr=0.1, weight_decay=0.5, **options)
    schedule = EPASSchedule(4, switch_every=2, max_shared=2)
    train(model, schedule, optimizer, 4)  # layer 3 is off from step 2 on
    before = model.projections[3].detach().clone()
    assert model.projections[3] not in optimizer.state
    train(model, schedule, optimizer, 4, first=4)
    assert torch.equal(model.projections[3], before)
    assert model.projections[3].grad is None
    assert model.projections[2] not in optimizer.state
    assert model.projections[1] in optimizer.state
    assert model.switches == 2


def test_a_region_that_shrinks_again_starts_with_fresh_momentum():
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, StaticSchedule("0_1_2_3"), optimizer, 5)
    train(model, StaticSchedule("0_1_2_2"), optimizer, 3)
    fresh = copy.deepcopy(model)
    train(model, StaticSchedule("0_1_2_3"), optimizer, 1)
    train(fresh, StaticSchedule("0_1_2_3"), torch.optim.AdamW(fresh.parameters(), lr=0.1), 1)
    assert torch.equal(model.projections[3], fresh.projections[3])
    assert optimizer.state[model.projections[3]]["step"] == 1
    assert optimizer.state[model.projections[2]]["step"] == 9


def test_apply_does_nothing_between_switches_and_counts_without_a_step():
    model = Layers()
    schedule = EPASSchedule(4, switch_every=2, max_shared=1)
    assert [schedule.apply(model) for _ in range(5)] == [False, False, True, False, False]
    assert model.switches == 1


def test_a_schedule_serves_another_model_too():
    schedule, first, second = StaticSchedule("0_0_2_2"), Layers(), Layers()
    assert schedule.apply(first, step=0) and schedule.apply(second, step=0)
    assert first.layout == second.layout == "0_0_2_2"
    second.set_layout("0_1_2_3")  # by somebody else
    assert schedule.apply(second, step=1) and second.layout == "0_0_2_2"
    assert not schedule.apply(second, step=2)


def test_resumed_state_continues_and_refuses_other_settings():
    schedule = EPASSchedule(4, switch_every=2, max_shared=2)
    for _ in range(3):
        schedule.apply(Layers())
    state = schedule.state_dict()
    again = EPASSchedule(4, switch_every=2, max_shared=2)
    again.load_state_dict(state)
    model = Layers()  # as a checkpoint of the full model would load
    again.apply(model)
    assert model.layout == schedule.layout(3) == "0_1_2_2"
    with pytest.raises(ValueError, match="max_shared: 2 there, 1 here"):
        EPASSchedule(4, switch_every=2, max_shared=1).load_state_dict(state)


def test_wrappers_are_looked_through_and_other_models_refused():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Layers()
    StaticSchedule("0_1_2_2").apply(Wrapper(Wrapper(model)), step=0)
    assert model.layout == "0_1_2_2"
    with pytest.raises(TypeError, match="share_activations"):
        StaticSchedule("0_0").apply(nn.Linear(2, 2), step=0)


def test_warm_restart_scales_the_step_and_no_scheduler_notices():
    schedule = EPASSchedule(4, switch_every=4, max_shared=1, restart_steps=2, restart_from=0.5)
    assert [schedule.learning_rate_factor(step) for step in range(8)] == [1, 1, 1, 1, 0.5, 0.75, 1, 1]
    model = Layers()
    optimizer = torch.optim.SGD([model.always], lr=1.0)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # multiplies the rate that it finds
    for step in range(8):
        schedule.apply(model, optimizer, step)
        before = model.always.detach().clone()
        model.always.grad = torch.ones(2)
        optimizer.step()
        expected = 0.5**step * schedule.learning_rate_factor(step)
        torch.testing.assert_close(before - model.always.detach(), torch.full((2,), expected))
        decay.step()
    assert optimizer.param_groups[0]["lr"] == 0.5**8


def test_restarts_are_off_by_default():
    schedule = EPASSchedule.plan(4, 30)
    assert {schedule.learning_rate_factor(step) for step in range(30)} == {1.0}
