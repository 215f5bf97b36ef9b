"""Every model is captured whole by ``torch.compile`` and ``torch.export``: forward, inverse, sampling and density."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from inverse_flow.models import (
    ConditionalFlow,
    FInCFlow,
    Glow,
    Hint,
    InverseConvClassifier,
    InverseFlow,
    LabelContext,
    RealNVP,
    SummaryNet,
)

SHAPE = (1, 4, 4)
SIZE = {"levels": 2, "steps": 1, "hidden": 1}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "inverse_flow": lambda: InverseFlow(SHAPE, **SIZE),
    "finc_flow": lambda: FInCFlow(SHAPE, **SIZE, corner="plu"),
    "glow": lambda: Glow(SHAPE, **SIZE, logit_margin=0.01),
    "real_nvp": lambda: RealNVP(SHAPE, **SIZE, blocks=1),
    "hint": lambda: Hint(SHAPE, **{**SIZE, "levels": 1}),
    "by_label": lambda: ConditionalFlow(Glow(SHAPE, **SIZE, context_channels=2), LabelContext(4, 2)),
    "by_image": lambda: ConditionalFlow(Glow(SHAPE, **SIZE, context_channels=2), SummaryNet(1, 2, hidden=1)),
}
BATCH = torch.export.Dim("batch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler about its own code


class AllMethods(nn.Module):
    """What a model can do, in one graph; ``forward`` is what ``log_prob`` calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, latents: tuple[Tensor, ...], *condition: Tensor) -> tuple[Tensor, ...]:
        back, logdet = self.model.inverse(latents, *condition)
        return self.model.log_prob(x, *condition), back, logdet, self.model.sample(x.shape[0], *condition)


def shaken(model: nn.Module) -> nn.Module:
    """``model`` with nothing left at its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def arguments(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    condition: tuple[Tensor, ...] = ()
    if isinstance(model, ConditionalFlow):
        labels = isinstance(model.summary, LabelContext)
        condition = (torch.arange(batch) % 4 if labels else torch.rand(batch, *SHAPE),)
    latents = tuple(torch.randn(batch, *shape) for shape in model.latent_shapes)
    return (torch.rand(batch, *SHAPE), latents, *condition)


def check(captured: nn.Module, module: AllMethods, *batches: int) -> None:
    """What was captured gives what the model gives, for every batch, and the gradients of its parameters."""
    for batch in batches:
        inputs = arguments(module.model, batch)
        found = []
        for function in (captured, module):
            torch.manual_seed(0)
            results = function(*inputs)
            loss = sum(result.square().sum() for result in results[:-1] if result.requires_grad)
            of_name = {name.removeprefix("_orig_mod."): value for name, value in function.named_parameters()}
            parameters = [of_name[name] for name, _ in module.named_parameters()]
            found.append((results, torch.autograd.grad(loss, parameters, allow_unused=True)))
        (*values, samples), grads = found[0]
        (*expected, expected_samples), expected_grads = found[1]
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)  # sums in another order
        assert samples.shape == expected_samples.shape  # the compiler may draw the latents in another order
        assert torch.isfinite(samples).all()


models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@pytest.mark.alike
@models
@pytest.mark.parametrize("how", ["compiled", "exported", "exported strictly"])
def test_captured_whole_and_trained(make: Callable[[], nn.Module], how: str) -> None:
    torch.compiler.reset()
    module = AllMethods(shaken(make()))
    if how == "compiled":
        check(torch.compile(module, fullgraph=True, backend="aot_eager"), module, 3)
        return
    strict = how == "exported strictly"
    x, latents, *condition = arguments(module.model, 3)
    shapes = [{0: BATCH}, tuple({0: BATCH} for _ in latents), *([({0: BATCH},)] if condition else [])]
    program = torch.export.export(module, (x, latents, *condition), dynamic_shapes=tuple(shapes), strict=strict)
    for captured in (program.module(), program.run_decompositions().module()):
        check(captured, module, 3, 5)


def test_equal_steps_share_one_compiled_program() -> None:
    """Compiled layer by layer, a model costs the compiler as much whatever the number of its steps."""
    torch.compiler.reset()
    programs = []
    for steps in (2, 4):
        flow = shaken(InverseFlow((1, 8, 8), levels=1, steps=steps, hidden=1))
        x, latents = torch.rand(3, 1, 8, 8), tuple(torch.randn(3, *shape) for shape in flow.latent_shapes)
        expected = flow.log_prob(x), flow.inverse(latents)[0]
        counter = CompileCounter()
        torch.compiler.reset()
        for layer in flow.layers:
            layer.compile(fullgraph=True, backend=counter)
            layer.inverse = torch.compile(layer.inverse, fullgraph=True, backend=counter)
        torch.testing.assert_close((flow.log_prob(x), flow.inverse(latents)[0]), expected)
        programs.append(counter.frame_count)
    assert programs[0] == programs[1]


def test_a_classifier_is_captured_too() -> None:
    model = InverseConvClassifier(SHAPE, hidden=3).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    program = torch.export.export(model, (torch.rand(3, *SHAPE),), dynamic_shapes=({0: BATCH},), strict=True)
    x = torch.rand(5, *SHAPE)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(program.module()(x), model(x))


@models
def test_built_without_values_and_given_those_of_another(make: Callable[[], nn.Module]) -> None:
    model = shaken(make())
    with torch.device("meta"):
        twin = make().eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    module, inputs = AllMethods(twin), arguments(model, 3)
    torch.manual_seed(0)
    expected = AllMethods(model)(*inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(module(*inputs), expected)
