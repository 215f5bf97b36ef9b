import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import models
from inverse_flow.flows import prepare_sampling
from inverse_flow.models import ConditionalFlow, Glow, Hint, InverseFlow, LabelContext, SummaryNet

SIZE = {"levels": 2, "steps": 1, "hidden": 3}
CONTEXT_CHANNELS = 2


def shaken(model: ConditionalFlow) -> ConditionalFlow:
    """``model`` in float64 with nothing left at its initial value: a new coupling ignores its context."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def of_images(kind: type = Glow, form: str = "map") -> ConditionalFlow:
    flow = kind((1, 4, 4), **SIZE, context_channels=CONTEXT_CHANNELS)
    return shaken(ConditionalFlow(flow, SummaryNet(3, CONTEXT_CHANNELS, hidden=4, form=form)))


def of_labels(size: tuple[int, ...] | None = None) -> ConditionalFlow:
    flow = InverseFlow((1, 4, 4), **SIZE, context_channels=CONTEXT_CHANNELS)
    return shaken(ConditionalFlow(flow, LabelContext(5, CONTEXT_CHANNELS, size)))


def of_volumes(kind: type = Glow) -> ConditionalFlow:
    flow = kind((1, 4, 4, 4), **SIZE, context_channels=CONTEXT_CHANNELS)
    return shaken(ConditionalFlow(flow, SummaryNet(1, CONTEXT_CHANNELS, hidden=4, dimensions=3)))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CASES = {
    "glow_map": (of_images, draw(2, 3, 4, 4)),
    "glow_vector": (lambda: of_images(form="vector"), draw(2, 3, 6, 8)),
    "hint_map": (lambda: of_images(Hint), draw(2, 3, 4, 4)),
    "labels": (of_labels, torch.tensor([4, 1])),
    "label_maps": (lambda: of_labels((2, 2)), torch.tensor([4, 1])),
    "glow_volume": (of_volumes, draw(2, 1, 4, 4, 4)),
    "hint_volume": (lambda: of_volumes(Hint), draw(2, 1, 4, 4, 4)),
}
cases = pytest.mark.parametrize(("make", "observation"), CASES.values(), ids=CASES)


@cases
def test_round_trip_and_density(make: Any, observation: Tensor) -> None:
    model = make()
    x = draw(2, *model.event_shape)
    latents, logdet = model(x, observation)
    assert [tuple(z.shape[1:]) for z in latents] == list(model.latent_shapes)
    back, inverse_logdet = model.inverse(latents, observation)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    samples, log_prob = model.sample_and_log_prob(2, observation, 0.5)
    torch.testing.assert_close(log_prob, model.log_prob(samples, observation))


@cases
def test_the_observation_matters(make: Any, observation: Tensor) -> None:
    model = make()
    x = draw(2, *model.event_shape)
    other = observation.flip(0)
    assert not torch.allclose(model.log_prob(x, observation), model.log_prob(x, other))
    generator = torch.Generator().manual_seed(0)
    samples = model.sample(2, observation, generator=generator)
    assert not torch.allclose(samples, model.sample(2, other, generator=generator.manual_seed(0)))


def check_gradients_reach(model: ConditionalFlow, observation: Tensor) -> None:
    model.zero_grad()
    model.log_prob(draw(2, *model.event_shape), observation).sum().backward()
    for name, parameter in model.summary.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@cases
def test_gradients_reach_the_summary(make: Any, observation: Tensor) -> None:
    check_gradients_reach(make(), observation)


def test_the_check_of_gradients_can_fail() -> None:
    class Detached(SummaryNet):
        def forward(self, observation: Tensor) -> Tensor:
            return super().forward(observation).detach()

    flow = Glow((1, 4, 4), **SIZE, context_channels=CONTEXT_CHANNELS)
    with pytest.raises(AssertionError):
        check_gradients_reach(shaken(ConditionalFlow(flow, Detached(3, CONTEXT_CHANNELS))), draw(2, 3, 4, 4))


def test_gradients_of_the_summary_are_right() -> None:
    """Against a finite difference in one weight."""
    model, observation = of_images(), draw(2, 3, 4, 4)
    x, weight = draw(2, 1, 4, 4), model.summary.layers[0].weight
    (gradient,) = torch.autograd.grad(model.log_prob(x, observation).sum(), weight)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[1, 2, 0, 1] += sign * step
            values.append(model.log_prob(x, observation).sum())
            weight[1, 2, 0, 1] -= sign * step
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), gradient[1, 2, 0, 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [of_images, of_volumes], ids=["image", "volume"])
def test_memory_efficient_training_reaches_the_summary_too(make: Any) -> None:
    gradients, model = [], make()
    for memory_efficient in (False, True):
        model.flow.memory_efficient = memory_efficient
        observation = draw(2, model.summary.config.channels, *model.event_shape[1:])
        loss = model.log_prob(draw(2, *model.event_shape), observation).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for rebuilt, stored in zip(*gradients, strict=True):
        torch.testing.assert_close(rebuilt, stored)


@cases
def test_one_example_at_a_time(make: Any, observation: Tensor) -> None:
    """Under ``vmap``, the observation too: the gradients of every example by itself."""
    model = make()
    x = draw(2, *model.event_shape)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, observation: Tensor) -> Tensor:
        latents, logdet = torch.func.functional_call(model, parameters, (x[None], observation[None]))
        return model.flow.base.log_prob(latents).sum() + logdet.sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, observation)
    model.log_prob(x, observation).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].sum(0), parameter.grad)


def test_a_label_out_of_range_is_refused_under_vmap_too() -> None:
    labels = LabelContext(3, 2)
    for wrong in (3, -1):
        with pytest.raises(IndexError, match="out of range"):
            torch.func.vmap(lambda label: labels(label[None]))(torch.tensor([0, wrong]))


def test_labels_are_learned() -> None:
    """Two classes of constant images: after some steps each label's images are its own."""
    torch.manual_seed(0)
    flow = Glow((1, 2, 2), levels=1, steps=2, hidden=8, context_channels=2)
    model = ConditionalFlow(flow, LabelContext(2, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        labels = torch.randint(0, 2, (32,))
        x = 2.0 * labels.view(-1, 1, 1, 1) - 1 + 0.3 * torch.randn(32, 1, 2, 2)
        loss = -model.log_prob(x, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    means = model.eval().sample(200, torch.arange(200) % 2).view(100, 2, -1).mean((0, 2))
    torch.testing.assert_close(means, torch.tensor([-1.0, 1.0]), rtol=0, atol=0.25)


@pytest.mark.parametrize("make", [of_images, of_labels, lambda: of_labels((2, 2))])
def test_a_config_survives_json(make: Any) -> None:
    model = make()
    twin = models.build(json.loads(json.dumps(models.describe(model)))).double().eval()
    assert isinstance(twin, ConditionalFlow)
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    observation = draw(2, 3, 4, 4) if make is of_images else torch.tensor([0, 3])
    x = draw(2, 1, 4, 4)
    assert torch.equal(twin.log_prob(x, observation), model.log_prob(x, observation))
    assert twin.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_prepared_flow_is_conditioned_too() -> None:
    model, labels = of_labels(), torch.tensor([0, 3])
    prepared = ConditionalFlow(prepare_sampling(model.flow), model.summary)
    x = draw(2, 1, 4, 4)
    torch.testing.assert_close(prepared.log_prob(x, labels), model.log_prob(x, labels))
    with pytest.raises(TypeError, match="not Flow with LabelContext"):
        prepared.config  # noqa: B018


def test_a_summary_of_your_own() -> None:
    flow = Glow((1, 4, 4), **SIZE, context_channels=CONTEXT_CHANNELS)
    model = ConditionalFlow(flow, nn.Linear(7, CONTEXT_CHANNELS))
    assert model.sample(3, torch.randn(3, 7)).shape == (3, 1, 4, 4)
    with pytest.raises(TypeError, match="not Glow with Linear"):
        models.describe(model)


def test_a_map_of_labels_starts_as_the_vector() -> None:
    torch.manual_seed(0)
    vectors = LabelContext(5, 3)(torch.tensor([4, 0]))
    torch.manual_seed(0)
    maps = LabelContext(5, 3, (2, 4))(torch.tensor([4, 0]))
    assert torch.equal(maps, vectors[:, :, None, None].expand(-1, -1, 2, 4))


def test_a_summary_in_each_form() -> None:
    observation = torch.randn(2, 3, 6, 8)
    as_map = SummaryNet(3, 5)(observation)
    assert as_map.shape == (2, 5, 3, 4)
    torch.manual_seed(0)
    vector = SummaryNet(3, 5, form="vector")
    torch.manual_seed(0)
    torch.testing.assert_close(vector(observation), SummaryNet(3, 5)(observation).mean((2, 3)))


NEWER = of_labels().config.to_dict()
NEWER["summary"]["colour"] = 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConditionalFlow(Glow((1, 4, 4)), LabelContext(2, 3)), ValueError, "context_channels=0, .* gives 3"),
        (lambda: ConditionalFlow(Glow((1, 4, 4)), nn.Linear(2, 2)), ValueError, "at least 1"),
        (lambda: of_images().log_prob(draw(2, 1, 4, 4), None), ValueError, "none was given"),
        (lambda: of_images().log_prob(draw(2, 1, 4, 4), draw(2, 1, 4, 4)), ValueError, r"\(B, 3, H, W\), got \(2, 1"),
        (lambda: of_labels().sample(2, torch.tensor([0, 5])), ValueError, "0 … 4, got 0 … 5"),
        (lambda: of_labels().sample(2, torch.tensor([-1, 3])), ValueError, "0 … 4, got -1 … 3"),
        (lambda: of_labels().sample(2, torch.tensor([0.0, 1.0])), TypeError, "integers, got torch.float32"),
        (lambda: of_labels().sample(2, [0, 1]), TypeError, "a tensor of integers, got list"),
        (lambda: ConditionalFlow(Glow, LabelContext(2, 3)), TypeError, "the flow of .* is a module, got type"),
        (lambda: ConditionalFlow(Glow((1, 4, 4)), "labels"), TypeError, "the summary of .* is a module, got str"),
        (lambda: of_labels().sample(1, torch.tensor([[0]])), ValueError, r"\(B,\), got shape \(1, 1\)"),
        (lambda: of_labels().sample(3, torch.tensor([0, 1])), ValueError, "one row per example: 3, got 2"),
        (lambda: SummaryNet(1, 0), ValueError, "context_channels must be at least 1, got 0"),
        (lambda: SummaryNet(1, 1, form="list"), ValueError, "got 'list'"),
        (lambda: SummaryNet(1, 1, dimensions=4), ValueError, "2 .* or 3 .*, got 4"),
        (lambda: LabelContext(2, 1, (3, 0)), ValueError, "size must be at least 1, got 0"),
        (lambda: LabelContext(2, 1, (3, 1, 1, 1)), ValueError, r"\(D, H, W\), .* got \(3, 1, 1, 1\)"),
        (lambda: SummaryNet(1, 1)([1.0]), TypeError, "SummaryNet expects a tensor, got list"),
        (lambda: SummaryNet(1, 1)(draw(1, 1, 4, 4).double()), TypeError, "is in torch.float32, got torch.float64"),
        (lambda: LabelContext(0, 1), ValueError, "classes must be at least 1, got 0"),
        (
            lambda: models.build({"kind": "ConditionalFlow", "config": {"kind": "X", "summary_kind": "LabelContext"}}),
            ValueError,
            "unknown kind 'X'; known: InverseFlow",
        ),
        (
            lambda: models.build({"kind": "ConditionalFlow", "config": NEWER}),
            ValueError,
            "LabelConfig has no colour: was it written by a newer version",
        ),
    ],
)
def test_errors_say_what_was_given(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
