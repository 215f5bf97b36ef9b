import torch
from torch import nn

from inverse_flow.training.average import AveragedModel


def test_the_average_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    averaged = AveragedModel(model, decay=0.5)
    nn.init.constant_(model.weight, 3.0)
    averaged.update(model, step=1000)
    assert averaged.model.weight.item() == 2.0
    averaged.update(model, step=1000)
    assert averaged.model.weight.item() == 2.5
    assert model.weight.item() == 3.0


def test_early_steps_forget_quickly() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    averaged = AveragedModel(model, decay=0.999)
    nn.init.constant_(model.weight, 1.0)
    averaged.update(model, step=0)
    assert abs(averaged.model.weight.item() - 0.9) < 1e-6


def test_buffers_are_copied_and_the_twin_does_not_train() -> None:
    model = nn.BatchNorm1d(2)
    averaged = AveragedModel(model, decay=0.9)
    model(torch.randn(8, 2))
    averaged.update(model, step=0)
    assert torch.equal(averaged.model.running_mean, model.running_mean)
    assert not averaged.model.training
    assert not any(parameter.requires_grad for parameter in averaged.model.parameters())
