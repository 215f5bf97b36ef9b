import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel

from inverse_flow.flows import ActNorm, Compose, Flow
from inverse_flow.models import Glow


def images(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 5


def test_the_first_training_batch_is_normalised() -> None:
    layer = ActNorm(3)
    x = images(8, 3, 5, 4) * torch.tensor([1.0, 100.0, 0.01]).view(-1, 1, 1)
    z, _ = layer(x)
    assert bool(layer.initialized)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_only_the_first_batch_counts() -> None:
    layer = ActNorm(2)
    layer(images(4, 2, 3, 3))
    before = layer.bias.detach().clone()
    layer(images(4, 2, 3, 3) + 10)
    assert torch.equal(layer.bias, before)


def test_evaluation_and_the_inverse_do_not_initialise() -> None:
    layer = ActNorm(2).eval()
    x = images(4, 2, 3, 3)
    assert torch.equal(layer(x)[0], x)
    assert torch.equal(layer.train().inverse(x)[0], x)
    assert not bool(layer.initialized)


def test_the_state_dict_carries_the_initialisation() -> None:
    layer, other = ActNorm(2), ActNorm(2)
    layer(images(4, 2, 3, 3))
    other.load_state_dict(layer.state_dict())
    x = images(4, 2, 3, 3) + 10
    assert torch.equal(other(x)[0], layer(x)[0])


def test_an_uninitialised_state_dict_makes_it_uninitialised_again() -> None:
    layer = ActNorm(2)
    layer(images(4, 2, 3, 3))
    layer.load_state_dict(ActNorm(2).state_dict())
    z, _ = layer(images(4, 2, 3, 3) + 10)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 2, 1, 1)])
def test_a_batch_without_spread_initialises_nothing(shape: tuple[int, ...]) -> None:
    layer = ActNorm(2)
    x = images(*shape)
    z, logdet = layer(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(shape[0]))
    assert not bool(layer.initialized)
    layer(images(4, 2, 3, 3))
    assert bool(layer.initialized)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_channel_is_centred_and_keeps_its_scale(value: float) -> None:
    layer = ActNorm(2)
    x = images(4, 2, 3, 3)
    x[:, 1] = value
    z, _ = layer(x)
    assert torch.isfinite(z).all()
    assert layer.log_scale[1].item() == 0
    torch.testing.assert_close(z[:, 1], torch.zeros(4, 3, 3), atol=1e-5 * max(value, 1), rtol=0)


def test_a_batch_with_nan_is_refused_and_changes_nothing() -> None:
    layer = ActNorm(2)
    x = images(4, 2, 3, 3)
    x[0, 1, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"channels \[1\]"):
        layer(x)
    assert not bool(layer.initialized)
    assert torch.equal(layer.bias, torch.zeros(2))


def test_half_precision_images_are_measured_in_float32() -> None:
    layer = ActNorm(1)
    x = torch.full((4, 1, 64, 64), 300.0, dtype=torch.float16)
    x[:2] = 200.0
    z, _ = layer(x)
    torch.testing.assert_close(z.unique(), torch.tensor([-1.0, 1.0], dtype=torch.float16))


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"2 channels.*\(1, 3, 4, 4\)"):
        ActNorm(2)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\).*\(2,\)"):
        ActNorm(2)(torch.zeros(2))
    with pytest.raises(TypeError, match=r"torch.uint8"):
        ActNorm(2)(torch.zeros(1, 2, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="ndarray"):
        ActNorm(2)(torch.zeros(1, 2, 4, 4).numpy())


def test_training_through_the_inverse_counts() -> None:
    """What a reverse Kullback-Leibler divergence has taught the layer is not overwritten by the first data."""
    layer = ActNorm(2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.inverse(images(4, 2, 3, 3))[0].square().sum().backward()
    optimizer.step()
    trained = [parameter.detach().clone() for parameter in layer.parameters()]
    layer(images(4, 2, 3, 3))
    assert bool(layer.initialized)
    assert all(torch.equal(parameter, value) for parameter, value in zip(layer.parameters(), trained, strict=True))


@pytest.mark.parametrize("rebuilt", [False, True])
def test_both_directions_in_the_first_step(rebuilt: bool) -> None:
    """Data first, and both have the same parameters; samples first, and the gradients would be those of two."""
    z, x = torch.randn(8, 2, 3, 3), images(8, 2, 3, 3)

    def gradients(flow: Flow, *, data_first: bool) -> list[torch.Tensor]:
        calls = [lambda: flow.log_prob(x).sum(), lambda: flow.inverse((z,))[0].square().sum()]
        losses = [call() for call in (calls if data_first else calls[::-1])]
        return list(torch.autograd.grad(sum(losses), list(flow.parameters())))

    flow = Flow([ActNorm(2)], (2, 3, 3), memory_efficient=rebuilt)
    first = gradients(flow, data_first=True)
    torch.testing.assert_close(gradients(flow, data_first=False), first)
    fresh = Flow([ActNorm(2)], (2, 3, 3), memory_efficient=rebuilt)
    refusal = "modified by an inplace operation" if rebuilt else "run the model forward first, on one batch of data"
    with pytest.raises(RuntimeError, match=refusal):
        gradients(fresh, data_first=False)
    # By themselves they are as good as ever.
    fresh = Flow([ActNorm(2)], (2, 3, 3), memory_efficient=rebuilt)
    fresh.inverse((z,))[0].sum().backward()
    fresh.log_prob(x).sum().backward()


def test_a_backward_pass_that_runs_the_layer_again_changes_nothing() -> None:
    flow = Flow([Compose(ActNorm(2))], (2, 3, 3), memory_efficient=True)
    x, log_prob = flow.sample_and_log_prob(8)
    (log_prob + x.square().flatten(1).sum(1)).mean().backward()
    layer = flow.layers[0].layers[0]
    assert not layer.initialized
    assert not any(parameter.any() for parameter in layer.parameters())
    flow(images(8, 2, 3, 3))
    assert layer.initialized


def test_the_tensors_of_one_call_are_not_initialised_nor_do_they_tell_of_the_layer() -> None:
    layer, x = ActNorm(2), images(8, 2, 3, 3)
    trained = ActNorm(2)
    trained(x)
    for buffers in ({}, dict(layer.named_buffers())):
        zeros = {name: torch.zeros(2) for name, _ in layer.named_parameters()}
        with pytest.raises(RuntimeError, match="ActNorm is not initialised"):
            functional_call(layer, {**zeros, **buffers}, (x,))
        assert not any(zero.any() for zero in zeros.values())
    others = {name: tensor.detach().clone() for name, tensor in trained.state_dict().items()}
    for module in (layer, layer.eval()):
        assert torch.equal(functional_call(module, others, (x,))[0], trained(x)[0])
    layer.train()
    assert not layer.initialized
    assert torch.equal(layer(x)[0], trained(x)[0])
    assert layer.initialized


def test_a_transform_does_not_initialise_it() -> None:
    layer, x = ActNorm(2), images(8, 2, 3, 3)
    parameters = dict(layer.named_parameters())
    for run in (
        lambda: vmap(lambda one: layer(one[None])[0])(x),
        lambda: grad(lambda x: layer(x)[0].sum())(x),
        lambda: grad(lambda parameters: functional_call(layer, parameters, (x,))[0].sum())(parameters),
    ):
        with pytest.raises(RuntimeError, match="ActNorm is not initialised"):
            run()
    assert not layer.initialized
    assert not any(parameter.any() for parameter in parameters.values())
    layer(x)
    torch.testing.assert_close(vmap(lambda one: layer(one[None])[0])(x)[:, 0], layer(x)[0])


def test_a_layer_evaluated_too_early_warns_once() -> None:
    layer, x = ActNorm(2).eval(), images(4, 2, 3, 3)
    with pytest.warns(UserWarning, match=r"not initialised: .* training mode first"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.inverse(x)
        trained = ActNorm(2)
        trained(x)
        trained.eval()(x)
        loaded = ActNorm(2).eval()
        loaded.load_state_dict(trained.state_dict())
        loaded(x)
    with pytest.warns(UserWarning, match="not initialised"):
        ActNorm(2).eval().inverse(x)


# PyTorch's own look at a tensor within a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_captured_too_early_it_says_what_to_do() -> None:
    layer, x = ActNorm(2), images(4, 2, 3, 3)
    with pytest.raises(Exception, match=r"flow.train\(\)\(batch\)"):
        torch.compile(layer, fullgraph=True, backend="eager")(x)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"flow.train\(\)\(batch\)"):
            torch.export.export(layer, (x,), strict=strict)
    torch.compile(layer, backend="eager")(x)  # with a break in the graph it is run as ever
    assert layer.initialized
    torch.compile(layer, fullgraph=True, backend="eager")(x)


def _train_once(rank: int, folder: Path) -> None:
    """One step of a model on this process's share of a batch; leaves its parameters in the folder."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Glow((1, 4, 4), levels=1, steps=1, hidden=2)
    parallel = DistributedDataParallel(model)
    (*_, last), logdet = parallel(images(8, 1, 4, 4)[rank::2])
    (last.square().sum() - logdet.sum()).backward()
    torch.save([*model.parameters(), *(parameter.grad for parameter in model.parameters())], folder / f"{rank}.pt")
    distributed.barrier()  # PyTorch may hang when a group ends while its thread still clears up after a reduction
    distributed.destroy_process_group()


def test_processes_of_data_parallel_training_initialise_it_alike(tmp_path: Path) -> None:
    multiprocessing.spawn(_train_once, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.manual_seed(0)
    alone = Glow((1, 4, 4), levels=1, steps=1, hidden=2)
    alone(images(8, 1, 4, 4))
    torch.testing.assert_close(first[:2], list(alone.layers[1].layers[0].parameters()))
