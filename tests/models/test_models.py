import json
from typing import Any

import pytest
import torch

from inverse_flow import InverseConv2d, models
from inverse_flow.flows import (
    HINT,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    CheckerboardCoupling,
    Conv1x1,
    EmergingConv,
    ExponentialConv,
    Householder,
    LeakyReLU,
    PeriodicConv,
    Permute,
    ResNet,
    Reverse,
    SmoothLeakyReLU,
    SmoothTanh,
    SplineActivation,
    SplineCoupling,
    Split,
    Squeeze,
    WaveletSqueeze,
    Woodbury,
)
from inverse_flow.models import (
    KINDS,
    FInCFlow,
    Glow,
    GlowConfig,
    Hint,
    HintConfig,
    ImageFlow,
    InverseFlow,
    InverseFlowConfig,
    RealNVP,
    RealNVPConfig,
)

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
        {"inverse_conv": "sampling"},
        {"inverse_conv": "emerging"},
        {"inverse_conv": "emerging", "corner": "plu", "kernel_size": 2},
        {"inverse_conv": "periodic"},
        {"inverse_conv": "exponential"},
        {"inverse_conv": "woodbury"},
        {"inverse_conv": "woodbury", "masks": "checkerboard"},
        {"inverse_conv": "none"},
        {"activation": "spline"},
        {"activation": "leaky_relu"},
        {"activation": "smooth_leaky_relu"},
        {"activation": "smooth_tanh"},
        {"conv1x1": "householder"},
        {"conv1x1": "permutation"},
        {"squeeze": "haar"},
        {"coupling": "spline"},
        {"coupling": "hint"},
        {"conditioner": "resnet", "blocks": 1},
        {"masks": "checkerboard", "orders": "alternating"},
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


def test_a_kind_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="unknown kind of model 'Other'; known: InverseFlow, Glow"):
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
        ({"inverse_conv": "both"}, 'must be "training", .*, "woodbury" or "none", got \'both\''),
        ({"activation": "tanh"}, "got 'tanh'"),
        ({"inverse_conv": "exponential", "kernel_size": 2}, "needs odd kernel sizes, got 2"),
        ({"inverse_conv": "periodic", "corner": "plu"}, "corner='plu' is of inverse and emerging convolutions"),
        ({"inverse_conv": "woodbury", "kernel_size": 5}, "has no kernel, got kernel_size=5"),
        ({"conv1x1": "qr"}, "got 'qr'"),
        ({"squeeze": "fourier"}, "got 'fourier'"),
        ({"masks": "stripes"}, "got 'stripes'"),
        ({"conditioner": "unet"}, "got 'unet'"),
        ({"max_row_sum": 1.0}, "max_row_sum must be above 0 and below 1, got 1.0"),
        ({"inverse_conv": "none", "max_row_sum": 0.5}, "max_row_sum=0.5 bounds inverse convolutions"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"masks": "checkerboard", "coupling": "spline", "orders": "alternating"}, "need an .* coupling, got 'spline'"),
        ({"masks": "checkerboard"}, 'divisible by 4, got 1; use orders="alternating"'),
    ],
)
def test_errors_say_what_was_given(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InverseFlow((1, 8, 8), **options)


def test_an_image_shape_of_no_event_is_refused() -> None:
    for shape in ((), (1, 2, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"must be \(D,\), \(C, L\), \(C, H, W\) or \(C, D, H, W\), got"):
            InverseFlow(shape)


# ---------------------------------------------------------------------------------------- every kind of model


def shaken(model: ImageFlow) -> ImageFlow:
    """``model`` in float64 with nothing left at its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def kinds_of(model: ImageFlow) -> set[type]:
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("inverse_conv", ["training", "sampling", "none"])
def test_every_kind_inverts_with_the_log_determinant_of_its_jacobian(kind: type[ImageFlow], inverse_conv: str) -> None:
    model = shaken(kind((1, 4, 4), levels=2, steps=1, hidden=2, inverse_conv=inverse_conv))
    assert (InverseConv2d in kinds_of(model)) == (inverse_conv != "none")
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    latents, logdet = model(x)
    back, inverse_logdet = model.inverse(latents)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)

    def flat(image: torch.Tensor) -> torch.Tensor:
        return torch.cat([latent.flatten() for latent in model(image.view(1, 1, 4, 4))[0]])

    jacobian = torch.autograd.functional.jacobian(flat, x[0].flatten())
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Glow, {}),
        (Glow, {"squeeze": "haar", "conv1x1": "householder", "activation": "spline"}),
        (Glow, {"coupling": "spline", "conditioner": "resnet"}),
        (Hint, {}),
        (RealNVP, {}),
    ],
)
def test_models_of_volumes(kind: type[ImageFlow], options: dict[str, Any]) -> None:
    model = shaken(kind((1, 4, 2, 4), levels=1 if kind is not RealNVP else 2, steps=1, hidden=2, **options))
    x = torch.rand(2, 1, 4, 2, 4, dtype=torch.float64)
    latents, logdet = model(x)
    back, inverse_logdet = model.inverse(latents)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    assert model.sample(2).shape == x.shape


def test_the_step_of_each_kind() -> None:
    size = {"levels": 1, "steps": 1, "hidden": 4}
    steps = {name: [type(layer) for layer in kind((1, 4, 4), **size).layers[-1].layers] for name, kind in KINDS.items()}
    assert steps == {
        "InverseFlow": [InverseConv2d, ActNorm, Conv1x1, AffineCoupling],
        "Glow": [ActNorm, Conv1x1, AffineCoupling],
        "RealNVP": [ActNorm, CheckerboardCoupling],
        "FInCFlow": [Reverse, ActNorm, Conv1x1, AffineCoupling],
        "Hint": [ActNorm, Householder, HINT],
    }
    assert isinstance(FInCFlow((1, 4, 4), **size).layers[-1].layers[0].layer, InverseConv2d)


def test_the_ablations_are_flags() -> None:
    """The kinds differ in their defaults alone: each becomes another by its options."""
    torch.manual_seed(0)
    inverse_flow = InverseFlow((1, 4, 4), inverse_conv="none")
    torch.manual_seed(0)
    glow = Glow((1, 4, 4))
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(inverse_flow.log_prob(x), glow.log_prob(x))
    torch.manual_seed(0)
    sampling = InverseFlow((1, 4, 4), inverse_conv="sampling")
    torch.manual_seed(0)
    assert torch.equal(sampling.log_prob(x), FInCFlow((1, 4, 4)).log_prob(x))


def test_options_choose_the_layers() -> None:
    chosen = {
        WaveletSqueeze: {"squeeze": "haar"},
        Householder: {"conv1x1": "householder"},
        Permute: {"conv1x1": "permutation"},
        SplineActivation: {"activation": "spline"},
        SplineCoupling: {"coupling": "spline"},
        HINT: {"coupling": "hint"},
        ResNet: {"conditioner": "resnet"},
        CheckerboardCoupling: {"masks": "checkerboard"},
        InverseConv2d: {"inverse_conv": "training"},
        EmergingConv: {"inverse_conv": "emerging"},
        PeriodicConv: {"inverse_conv": "periodic"},
        ExponentialConv: {"inverse_conv": "exponential"},
        Woodbury: {"inverse_conv": "woodbury"},
        LeakyReLU: {"activation": "leaky_relu"},
        SmoothLeakyReLU: {"activation": "smooth_leaky_relu"},
        SmoothTanh: {"activation": "smooth_tanh"},
    }
    plain = kinds_of(Glow((1, 4, 4), **SMALL))
    for layer, options in chosen.items():
        assert layer not in plain
        assert layer in kinds_of(Glow((4, 4, 4), **SMALL, **options))
    model = Glow((1, 4, 4), **SMALL, conditioner="resnet", blocks=3)
    assert {len(module.blocks) for module in model.modules() if isinstance(module, ResNet)} == {3}
    # Householder and Haar learn no scale, so there is no other 1×1 convolution or squeeze beside them.
    assert not {Conv1x1, Squeeze} & kinds_of(Hint((1, 4, 4), **SMALL))


def test_real_nvp_arranges_its_masks_as_published() -> None:
    model = RealNVP((1, 8, 8), levels=2, steps=3, hidden=4)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == [*["Compose"] * 3, "Squeeze", *["Compose"] * 3, "Split", *["Compose"] * 4]
    boards = [module for module in model.modules() if isinstance(module, CheckerboardCoupling)]
    assert [board.parity for board in boards] == [0, 1, 0, 0, 1, 0, 1]
    assert [type(layer) for layer in model.layers[4].layers] == [ActNorm, Permute, AffineCoupling]
    # The last level does not squeeze: one level needs no even sizes.
    assert RealNVP((1, 5, 7), levels=1, steps=1, hidden=2).sample(2).shape == (2, 1, 5, 7)


def test_every_coupling_of_a_permuted_level_changes_what_the_last_one_kept() -> None:
    model = Glow((1, 2, 2), levels=1, steps=2, hidden=2, conv1x1="permutation")
    assert [m.permutation.tolist() for m in model.modules() if isinstance(m, Permute)] == [[3, 2, 1, 0]] * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "spline", "coupling": "spline"},
        {"inverse_conv": "sampling", "conv1x1": "householder", "squeeze": "haar", "coupling": "hint"},
        {"masks": "checkerboard", "orders": "alternating", "conditioner": "resnet"},
    ],
)
def test_memory_efficient_changes_neither_values_nor_gradients(options: dict[str, Any]) -> None:
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    gradients, values = [], []
    for memory_efficient in (False, True):
        torch.manual_seed(1)
        model = shaken(InverseFlow((1, 4, 4), **SMALL, **options, memory_efficient=memory_efficient))
        assert model.memory_efficient == memory_efficient
        log_prob = model.log_prob(x)
        values.append(log_prob.detach())
        gradients.append(torch.autograd.grad(log_prob.sum(), list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(values[1], values[0])
    for rebuilt, stored in zip(*gradients, strict=True):
        torch.testing.assert_close(rebuilt, stored)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_survives_json(kind: type[ImageFlow]) -> None:
    model = kind((1, 8, 8), **SMALL, context_channels=2)
    twin = models.build(json.loads(json.dumps(models.describe(model))))
    assert type(twin) is kind
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    assert twin.num_parameters == model.num_parameters
    x, context = torch.rand(2, 1, 8, 8), torch.randn(2, 2)
    assert torch.equal(twin.eval().log_prob(x, context), model.eval().log_prob(x, context))


def test_the_sizes_of_the_papers() -> None:
    config = RealNVPConfig.paper((3, 32, 32), hidden=8)
    assert (config.levels, config.steps, config.blocks, config.hidden) == (2, 3, 8, 8)
    assert (GlowConfig.paper((3, 32, 32)).steps, InverseFlowConfig.paper((1, 28, 28)).steps) == (32, 16)
    with pytest.raises(ValueError, match="HintConfig has no published sizes"):
        HintConfig.paper((1, 8, 8))


def test_configs_of_other_versions() -> None:
    """A config of an earlier version lacks the newer fields; one of a later version has fields unknown here."""
    values = InverseFlowConfig((1, 8, 8)).to_dict()
    for name in ("inverse_conv", "activation", "conv1x1", "squeeze", "masks", "conditioner", "memory_efficient"):
        del values[name]
    assert InverseFlowConfig.from_dict(values) == InverseFlowConfig((1, 8, 8))
    with pytest.raises(ValueError, match="InverseFlowConfig has no wavelet: was it written by a newer version"):
        InverseFlowConfig.from_dict({**values, "wavelet": 1})


def test_the_names_of_weights_stay_those_of_earlier_checkpoints() -> None:
    step = InverseFlow((1, 8, 8), levels=1, steps=1, hidden=4, corner="plu").layers[1]
    assert list(step.state_dict()) == [
        *(f"layers.0.{name}" for name in ("weight", "log_scale", "sign", "permutation")),
        *(f"layers.1.{name}" for name in ("bias", "log_scale", "initialized")),
        *(f"layers.2.{name}" for name in ("lower", "upper", "log_scale", "permutation", "sign")),
        *(f"layers.3.conditioner.layers.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")),
    ]


def test_more_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="2 levels need length divisible by 4, got 6"):
        InverseFlow((1, 6))
    with pytest.raises(ValueError, match="2 levels need depth, height and width divisible by 4, got 4 × 4 × 6"):
        Glow((1, 4, 4, 6))
    with pytest.raises(ValueError, match="at least 1, got"):
        Glow((0, 4, 4))
    with pytest.raises(TypeError, match="Glow is built from a GlowConfig, got HintConfig"):
        Glow.from_config(HintConfig((1, 4, 4)))
    with pytest.raises(TypeError, match="wavelet"):
        Glow((1, 4, 4), wavelet=True)


@pytest.mark.parametrize("options", [{}, {"coupling": "hint"}, {"masks": "checkerboard"}])
def test_the_scale_reaches_every_affine_coupling(options: dict[str, str]) -> None:
    model = Glow((2, 4, 4), levels=2, steps=1, hidden=3, scale="softplus", **options)
    couplings = [m for m in model.modules() if isinstance(m, (AffineCoupling, CheckerboardCoupling))]
    assert couplings
    assert {coupling.scale for coupling in couplings} == {"softplus"}
    with pytest.raises(ValueError, match="a scale is a choice of"):
        Glow((2, 4, 4), coupling="additive", scale="softplus")
