"""A flow as one layer from a tensor to a tensor."""

from __future__ import annotations

import pytest
import torch

from inverse_flow.flows import Flow
from inverse_flow.models import InverseFlow
from inverse_flow.reversible import ReversibleSequential

from .test_battery import CASES, Case, flat


@pytest.mark.parametrize("case", [CASES["flow"], CASES["inverse_flow"], CASES["volume_flow"]])
def test_latents_side_by_side(case: Case) -> None:
    flow, x, context = case.layer(), case.images(3), case.context(3)
    flattened = flow.flatten()
    z, logdet = flattened(x, context)
    latents, expected_logdet = flow(x, context)
    assert torch.equal(z, flat(latents))
    assert torch.equal(logdet, expected_logdet)
    back, inverse_logdet = flattened.inverse(z, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    assert flattened.output_shape(case.shape) == tuple(z.shape[1:])
    assert flattened.input_shape(tuple(z.shape[1:])) == flattened.event_shape == case.shape
    assert flattened.uses_context == case.uses_context


def test_it_is_a_layer() -> None:
    inner = InverseFlow((1, 4, 4), levels=2, steps=1, hidden=3).double().eval()
    outer = Flow([inner.flatten()], (1, 4, 4))
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(outer.log_prob(x), inner.log_prob(x))
    z, _ = ReversibleSequential(inner.flatten())(x)
    assert z.shape == (2, 16)


def test_a_vector_of_another_size_is_refused() -> None:
    flattened = InverseFlow((1, 4, 4), levels=2, steps=1, hidden=3).flatten()
    for shape in ((2, 15), (2, 1, 16)):
        with pytest.raises(ValueError, match=r"flattened, are \(B, 16\), got"):
            flattened.inverse(torch.zeros(shape))
