from dataclasses import replace

import pytest
import torch
from torch import nn

from inverse_flow.models import InverseFlow
from inverse_flow.training import EndToEnd, TrainConfig, Workers, bits_per_dim
from inverse_flow.training.method import make_optimizer, update

CONFIG = TrainConfig(learning_rate=0.1, max_grad_norm=1e6)


def model() -> InverseFlow:
    torch.manual_seed(1)
    return InverseFlow((1, 4, 4), levels=2, steps=1, hidden=4)


def images() -> torch.Tensor:
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_step_reports_the_density_before_it_and_the_norm_of_the_gradient() -> None:
    trained, twin = model(), model()
    result = EndToEnd(trained, CONFIG, Workers()).step(images(), step=0, progress=0.0, rate_factor=1.0)
    log_prob = twin.log_prob(images()).mean()
    bits = bits_per_dim(log_prob, (1, 4, 4))
    gradients = torch.autograd.grad(bits, list(twin.parameters()), materialize_grads=True)
    assert result.log_prob == pytest.approx(log_prob.item(), rel=1e-6)
    assert result.bits_per_dim == pytest.approx(bits.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamax", torch.optim.Adamax)])
def test_the_update_by_hand(name: str, kind: type[torch.optim.Optimizer]) -> None:
    """Both optimizers move a weight by their learning rate in the first step, whatever its gradient."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = make_optimizer([weight], replace(CONFIG, optimizer=name))
    assert type(optimizer) is kind
    bits = weight @ torch.tensor([3.0, -4.0])
    norm = update(optimizer, bits, [("weight", weight)], CONFIG, step=0, rate_factor=0.5)
    assert norm == pytest.approx(5.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.95, 2.05]))


def test_an_optimizer_keeps_its_own_rate_under_the_schedule() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([weight], CONFIG, learning_rate=0.3)
    for factor in (0.5, 0.1):
        update(optimizer, weight.sum(), [("weight", weight)], CONFIG, step=0, rate_factor=factor)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * factor)


def test_bf16_is_for_the_networks_alone() -> None:
    seen: dict[str, torch.dtype] = {}
    trained = model()
    for name, module in trained.named_modules():
        if isinstance(module, nn.Conv2d) or type(module).__name__ in ("InverseConv2d", "Conv1x1", "ActNorm"):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.update(
                    {name: output.dtype if isinstance(output, torch.Tensor) else output[0].dtype}
                )
            )
    method = EndToEnd(trained, replace(CONFIG, precision="bf16"), Workers())
    result = method.step(images(), step=0, progress=0.0, rate_factor=0.0)
    networks = {dtype for name, dtype in seen.items() if "conditioner" in name or "prior_net" in name}
    layers = {dtype for name, dtype in seen.items() if "conditioner" not in name and "prior_net" not in name}
    assert networks == {torch.bfloat16}
    assert layers == {torch.float32}
    exact = EndToEnd(model(), CONFIG, Workers()).step(images(), step=0, progress=0.0, rate_factor=0.0)
    assert result.bits_per_dim == pytest.approx(exact.bits_per_dim, rel=1e-2)
    assert result.grad_norm == pytest.approx(exact.grad_norm, rel=5e-2)
