import math

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import ActNorm, Conv1x1, Flow, FlowLayer, Logit, Shape, Split, Squeeze, StandardNormal
from inverse_flow.models import InverseFlow
from inverse_flow.parts import Carried, Part, part_shares, run_frozen, split_flow, truncated_log_prob
from inverse_flow.parts.config import Cut

SHAPE = (1, 8, 8)
CUTTINGS = [("blocks", 1), ("blocks", 2), ("blocks", 3), ("across", 1), ("across", 2), ("across", 3), ("across", 5)]


def model() -> InverseFlow:
    """Logit, then three levels: layers 1 to 4, 5 to 8 and 9 to 11."""
    torch.manual_seed(1)
    return InverseFlow(SHAPE, levels=3, steps=2, hidden=4, logit_margin=1e-3)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def trained_a_little(flow: InverseFlow) -> InverseFlow:
    """No layer is the identity."""
    flow.train()
    flow.log_prob(images(8))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval()


def bounds(parts: list[Part]) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in parts]


@pytest.mark.parametrize(("cut", "count"), CUTTINGS)
def test_the_parts_in_a_row_are_the_flow(cut: Cut, count: int) -> None:
    flow = trained_a_little(model())
    parts = split_flow(flow, cut, count)
    assert len(parts) == count
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(flow.layers)))
    x = images()
    carried = run_frozen(parts, x)
    latents, logdet = flow(x)
    assert all(map(torch.equal, (*carried.latents, carried.x), latents))
    assert torch.equal(carried.logdet, logdet)
    assert torch.equal(truncated_log_prob(flow, carried), flow.log_prob(x))


def test_blocks_end_after_their_split() -> None:
    assert bounds(split_flow(model(), "blocks", 3)) == [(0, 5), (5, 9), (9, 12)]
    # The first block has four times the pixels of the second: it is a part alone.
    assert bounds(split_flow(model(), "blocks", 2)) == [(0, 5), (5, 12)]


def test_without_splits_a_block_ends_before_the_next_squeeze() -> None:
    layers = [Logit(), Squeeze(), ActNorm(4), Conv1x1(4), Squeeze(), ActNorm(16), Squeeze(), ActNorm(64)]
    assert bounds(split_flow(Flow(layers, SHAPE), "blocks", 3)) == [(0, 4), (4, 6), (6, 8)]


def test_blocks_of_a_flow_with_steps_before_its_squeezes() -> None:
    """As in Real NVP, where a level begins at the resolution that the split before it left."""
    layers = [ActNorm(1), Squeeze(), ActNorm(4), Split(4), ActNorm(2), Squeeze(), ActNorm(8)]
    assert bounds(split_flow(Flow(layers, SHAPE), "blocks", 2)) == [(0, 4), (4, 7)]


def test_cuts_across_blocks_leave_something_to_learn_in_every_part_and_no_split_without_its_step() -> None:
    flow = model()
    most = len(split_flow(flow, "across", 6))
    assert most == 6
    for count in range(1, most + 1):
        for part in split_flow(flow, "across", count):
            assert part.named_parameters()
            assert not isinstance(flow.layers[part.start], Split)


def test_across_blocks_the_work_is_shared_better_than_by_blocks() -> None:
    flow = InverseFlow((1, 16, 16), levels=2, steps=8, hidden=16)
    blocks, across = (part_shares(split_flow(flow, cut, 2)) for cut in ("blocks", "across"))
    assert sum(blocks) == pytest.approx(1)
    assert max(across) < 0.6 < max(blocks)


class Halves(FlowLayer):
    """A layer of one's own that splits off a latent, as a ``Split`` with a standard prior does."""

    splits_off_latent = True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        return x.chunk(2, dim=1), x.new_zeros(len(x))

    def inverse(self, z: tuple[Tensor, Tensor], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.cat(z, dim=1), z[0].new_zeros(len(z[0]))

    def output_shape(self, shape: Shape) -> Shape:
        return (shape[0] // 2, *shape[1:])

    def latent_shape(self, shape: Shape) -> Shape:
        return self.output_shape(shape)


@pytest.mark.parametrize(("cut", "count"), [("blocks", 2), ("across", 2), ("across", 3)])
def test_whatever_splits_off_a_latent_is_a_split(cut: Cut, count: int) -> None:
    own, known = (
        split_flow(Flow([Squeeze(), Conv1x1(4), split, Conv1x1(2), Squeeze(), Conv1x1(8)], (1, 4, 4)), cut, count)
        for split in (Halves(), Split(4, prior="standard"))
    )
    assert bounds(own) == bounds(known)
    assert [part.input_shapes for part in own] == [part.input_shapes for part in known]
    carried = Carried.of(torch.randn(2, 1, 4, 4))
    for part in own:
        given = (*carried.latents, carried.x)
        assert tuple(tuple(value.shape[1:]) for value in given) == part.input_shapes
        carried = part(carried)


def test_the_balance_is_the_best_there_is() -> None:
    flow = InverseFlow((1, 16, 16), levels=2, steps=3, hidden=8)
    found = max(part_shares(split_flow(flow, "across", 3)))
    ends = range(1, len(flow.layers))
    every = [
        max(part_shares([Part(flow, 0, a), Part(flow, a, b), Part(flow, b, len(flow.layers))]))
        for a in ends
        for b in ends
        if a < b and not isinstance(flow.layers[a], Split) and not isinstance(flow.layers[b], Split)
    ]
    assert found == pytest.approx(min(every))


@pytest.mark.parametrize(("cut", "count"), [("blocks", 3), ("across", 4)])
def test_the_gradient_of_a_part_is_that_of_its_own_objective(cut: Cut, count: int) -> None:
    """Of −log p_z(f^(1:k)(x)) − log|det J_{f_k}|, written out; and nothing reaches any other part."""
    flow = trained_a_little(model()).double()
    x = images().double()
    parts = split_flow(flow, cut, count)
    for k, part in enumerate(parts):
        carried = part(run_frozen(parts[:k], x))
        flow.zero_grad()
        truncated_log_prob(flow, carried).sum().backward()
        own = [parameter for _, parameter in part.named_parameters()]
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own]
        others = [p for p in flow.parameters() if all(p is not mine for mine in own)]
        assert all(p.grad is None for p in others)

        h = run_frozen(parts[:k], x).x
        latents, logdet = [], torch.zeros(len(x), dtype=torch.float64)
        for layer in flow.layers[part.start : part.stop]:
            result, change = layer(h)
            h, *latent = result if isinstance(layer, Split) else (result,)
            latents += latent
            logdet = logdet + change
        normal = torch.distributions.Normal(0.0, 1.0)
        objective = logdet + sum(normal.log_prob(z).flatten(1).sum(1) for z in [*latents, h])
        expected = torch.autograd.grad(objective.sum(), own, materialize_grads=True)
        torch.testing.assert_close(found, list(expected))
        assert any(gradient.any() for gradient in found)


def test_the_truncated_flow_is_a_density() -> None:
    """It integrates to one: ∫ p(x) dx over a grid of images with one pixel pair that varies."""
    torch.manual_seed(3)
    flow = Flow([ActNorm(2), Conv1x1(2), Split(2), ActNorm(1), ActNorm(1)], (2, 1, 1)).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    axis = torch.linspace(-9, 9, 361, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    parts = split_flow(flow, "across", 4)
    for count in range(1, 5):
        density = truncated_log_prob(flow, run_frozen(parts[:count], grid)).exp()
        assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-6)


def test_what_is_carried_has_no_history_once_detached() -> None:
    carried = split_flow(model(), "blocks", 2)[0](Carried.of(images()))
    assert carried.x.requires_grad
    assert carried.latents[0].requires_grad
    assert carried.logdet.requires_grad
    detached = carried.detach()
    assert not any(value.requires_grad for value in (detached.x, *detached.latents, detached.logdet))
    assert torch.equal(detached.x, carried.x)


def test_the_names_of_a_part_are_those_of_the_flow() -> None:
    flow = model()
    named = [named for part in split_flow(flow, "across", 3) for named in part.named_parameters()]
    assert [name for name, _ in named] == [name for name, _ in flow.named_parameters()]
    assert "layers 0 to 4" in repr(split_flow(flow, "blocks", 3)[0])


class Learned(StandardNormal):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_errors_say_what_would_be_right() -> None:
    with pytest.raises(ValueError, match="by blocks into 1 to 3 parts, got 4"):
        split_flow(model(), "blocks", 4)
    with pytest.raises(ValueError, match="across blocks into 1 to 6 parts, got 7"):
        split_flow(model(), "across", 7)
    with pytest.raises(ValueError, match='cut must be "blocks" or "across", got \'middle\''):
        split_flow(model(), "middle", 2)
    for wrong in (True, "2", 2.0):
        with pytest.raises(TypeError, match=f"count must be an integer, got {wrong!r}"):
            split_flow(model(), "across", wrong)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        split_flow(model(), "across", 0)
    with pytest.raises(ValueError, match=r"made of layers: there is none to train base\.scale with"):
        split_flow(Flow([ActNorm(1)], SHAPE, base=Learned()), "across", 1)


def test_part_shares_follow_the_multiplications() -> None:
    flow = Flow([ActNorm(1), Squeeze(), ActNorm(4)], (1, 4, 4))
    first, second = 2 * 16, 8 * 4
    assert part_shares(split_flow(flow, "across", 2)) == pytest.approx([first / (first + second)] * 2)
    assert math.isclose(first, second)
