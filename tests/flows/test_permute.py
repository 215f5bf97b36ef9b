import pytest
import torch

from inverse_flow.flows import Permute


def test_output_channel_i_is_input_channel_permutation_i() -> None:
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert Permute([2, 0, 1])(x)[0].flatten().tolist() == [2, 0, 1]
    assert Permute(torch.tensor([2, 0, 1])).inverse(x)[0].flatten().tolist() == [1, 2, 0]


@pytest.mark.parametrize("wrong", [[0, 0], [1, 2], [[0, 1]]])
def test_what_is_no_permutation_is_refused(wrong: list) -> None:
    with pytest.raises(ValueError, match="names each of the channels"):
        Permute(wrong)
