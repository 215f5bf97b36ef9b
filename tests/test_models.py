import json

import pytest
import torch

from inverse_flow import InverseConv2d, models
from inverse_flow.flows import ActNorm, AdditiveCoupling, AffineCoupling, Conv1x1, Split, Squeeze
from inverse_flow.models import InverseFlow, InverseFlowConfig

SMALL = {"levels": 2, "steps": 2, "hidden": 4}


def test_the_step_is_that_of_the_paper() -> None:
    model = InverseFlow((1, 8, 8), levels=3, steps=2, hidden=4)
    kinds = [type(layer).__name__ for layer in model.layers]
    level = ["Squeeze", "Compose", "Compose"]
    assert kinds == [*level, "Split", *level, "Split", *level]
    step = [type(layer) for layer in model.layers[1].layers]
    assert step == [InverseConv2d, ActNorm, Conv1x1, AffineCoupling]


def test_the_shapes_of_the_latents() -> None:
    model = InverseFlow((3, 8, 12), **SMALL)
    assert model.latent_shapes == ((6, 4, 6), (24, 2, 3))
    latents, _ = model(torch.rand(2, 3, 8, 12))
    assert [tuple(z.shape[1:]) for z in latents] == list(model.latent_shapes)


def test_every_inverse_convolution_has_four_groups_with_the_four_orders() -> None:
    for module in InverseFlow((3, 8, 8), **SMALL).modules():
        if isinstance(module, InverseConv2d):
            assert module.groups == 4
            assert set(module.order) == {"top_left", "top_right", "bottom_left", "bottom_right"}


def test_alternating_orders_change_from_step_to_step() -> None:
    model = InverseFlow((1, 4, 4), levels=1, steps=5, hidden=4, orders="alternating")
    convolutions = [module for module in model.modules() if isinstance(module, InverseConv2d)]
    assert [conv.groups for conv in convolutions] == [1] * 5
    orders = [conv.order for conv in convolutions]
    assert len(set(orders[:4])) == 4
    assert orders[4] == orders[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coupling": "additive"},
        {"logit_margin": 1e-3},
        {"split_prior": "standard"},
        {"orders": "alternating"},
        {"kernel_size": 2},
        {"kernel_size": (3, 1)},
        {"corner": "plu"},
    ],
)
def test_every_option_inverts(options: dict) -> None:
    torch.manual_seed(0)
    model = InverseFlow((1, 8, 8), **SMALL, **options).double()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    model(x)  # initialises the ActNorms
    latents, logdet = model(x)
    back, inverse_logdet = model.inverse(latents)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)


def test_options_reach_the_layers() -> None:
    model = InverseFlow((1, 8, 8), **SMALL, coupling="additive", split_prior="standard", kernel_size=(2, 5))
    modules = list(model.modules())
    assert any(isinstance(m, AdditiveCoupling) for m in modules)
    assert not any(isinstance(m, AffineCoupling) for m in modules)
    assert next(m for m in modules if isinstance(m, Split)).prior_net is None
    assert next(m for m in modules if isinstance(m, InverseConv2d)).kernel_size == (2, 5)


def test_a_context_conditions_the_model() -> None:
    torch.manual_seed(0)
    model = InverseFlow((1, 8, 8), **SMALL, context_channels=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x, context = torch.rand(2, 1, 8, 8), torch.randn(2, 3)
    assert not torch.allclose(model.log_prob(x, context), model.log_prob(x, context + 1))
    assert model.sample(2, context).shape == x.shape


def test_the_number_of_parameters() -> None:
    model = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=5)
    inverse_conv, actnorm, conv1x1 = 4 * 1 * 3 * 3, 4 + 4, 4 * 4 + 4 * 4 + 4
    coupling = (2 * 5 * 9 + 5) + (5 * 5 + 5) + (5 * 4 * 9 + 4)
    assert model.num_parameters == inverse_conv + actnorm + conv1x1 + coupling


def test_a_config_survives_json() -> None:
    config = InverseFlowConfig((1, 8, 8), kernel_size=(3, 2))
    assert InverseFlowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_build_makes_what_describe_described() -> None:
    model = InverseFlow((1, 8, 8), **SMALL, coupling="additive")
    twin = models.build(json.loads(json.dumps(models.describe(model))))
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(twin.eval().log_prob(x), model.eval().log_prob(x))
    with pytest.raises(ValueError, match="unknown kind of model 'Other'; known: InverseFlow"):
        models.build({"kind": "Other", "config": {}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 4}, "4 levels need height and width divisible by 16, got 8 × 8"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"orders": "two"}, "got 'two'"),
        ({"coupling": "cubic"}, "got 'cubic'"),
        ({"split_prior": "flat"}, "got 'flat'"),
    ],
)
def test_errors_say_what_was_given(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InverseFlow((1, 8, 8), **options)


def test_an_image_shape_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(C, H, W\), got \(8, 8\)"):
        InverseFlow((8, 8))


def test_the_first_layer_squeezes() -> None:
    assert isinstance(InverseFlow((1, 8, 8), **SMALL).layers[0], Squeeze)
