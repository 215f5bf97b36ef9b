import torch
from torch import nn

from inverse_flow.training.trainer import average_of


def test_the_average_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    averaged = average_of(model, decay=0.5)
    nn.init.constant_(model.weight, 3.0)
    averaged.n_averaged.fill_(1000)
    averaged.update_parameters(model)
    assert averaged.module.weight.item() == 2.0
    averaged.update_parameters(model)
    assert averaged.module.weight.item() == 2.5
    assert model.weight.item() == 3.0


def test_early_steps_forget_quickly() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    averaged = average_of(model, decay=0.999)
    nn.init.constant_(model.weight, 1.0)
    averaged.update_parameters(model)
    assert abs(averaged.module.weight.item() - 0.9) < 1e-6


def test_buffers_are_copied_and_the_twin_does_not_train() -> None:
    model = nn.BatchNorm1d(2)
    averaged = average_of(model, decay=0.9)
    model(torch.randn(8, 2))
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.running_mean, model.running_mean)
    assert not averaged.module.training
    assert not any(parameter.requires_grad for parameter in averaged.module.parameters())
