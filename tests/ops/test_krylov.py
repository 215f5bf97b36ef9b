"""GMRES by itself, on dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inverse_flow.ops.krylov import Found, gmres

SIZE = 12


def unchanged(vectors: Tensor) -> Tensor:
    return vectors


def run(matrix: Tensor, right: Tensor, precondition: Tensor | None = None, **options: float) -> Found:
    settings = {"tolerance": 1e-10, "max_iterations": 200, "restart": 20} | options
    about = unchanged if precondition is None else lambda vectors: vectors @ precondition.mT
    return gmres(lambda vectors: vectors @ matrix.mT, right, about, **settings)  # type: ignore[arg-type]


def problem(spread: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(SIZE, dtype=torch.float64)
    matrix += spread * torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
    return matrix, torch.randn(3, SIZE, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("restart", [5, 20])
def test_it_solves(restart: int) -> None:
    matrix, right = problem(0.1)
    found = run(matrix, right, restart=restart)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, right.mT).mT, rtol=1e-8, atol=1e-8)
    residual = (right - found.x @ matrix.mT).norm(dim=1) / right.norm(dim=1)
    torch.testing.assert_close(found.residual, residual, rtol=1e-6, atol=1e-18)
    assert (found.residual <= 1e-10).all()


def test_without_restarts_it_needs_no_more_steps_than_unknowns() -> None:
    matrix, right = problem(1.0)
    found = run(matrix, right, tolerance=1e-8)
    assert (found.residual <= 1e-8).all()
    assert (found.iterations <= SIZE).all()


def test_the_exact_inverse_needs_one_step() -> None:
    matrix, right = problem()
    assert run(matrix, right, torch.linalg.inv(matrix)).iterations.tolist() == [1, 1, 1]


def test_each_member_stops_on_its_own_residual() -> None:
    """The same steps and solution as alone, whoever else is in the batch."""
    matrix, right = problem()
    values, vectors = torch.linalg.eigh(matrix + matrix.mT)
    matrix = matrix + matrix.mT
    right[0] = vectors[:, 3]  # an eigenvector: solved exactly after one step
    right[1] = vectors[:, 2] + vectors[:, 5] * values.sign()[5]
    together = run(matrix, right)
    alone = [run(matrix, row[None]) for row in right]
    assert together.iterations.tolist() == [int(found.iterations) for found in alone]
    assert together.iterations[:2].tolist() == [1, 2]
    assert together.iterations[2] > 2
    torch.testing.assert_close(together.x, torch.cat([found.x for found in alone]), rtol=1e-7, atol=1e-9)


def test_a_right_hand_side_of_zeros_and_an_empty_batch() -> None:
    matrix, right = problem()
    right[1] = 0
    found = run(matrix, right)
    assert found.iterations[1] == 0
    assert not found.x[1].any()
    assert found.residual[1] == 0
    assert run(matrix, right[:0]).x.shape == (0, SIZE)


def test_what_does_not_converge_is_seen_in_the_residual() -> None:
    matrix, right = problem()
    found = run(matrix, right, max_iterations=3)
    assert found.iterations.tolist() == [3, 3, 3]
    assert (found.residual > 1e-10).all()
    matrix[0] = 0  # singular: the residual stalls, and it is given up long before the last step
    found = run(matrix, right, max_iterations=10_000)
    assert (found.iterations < 200).all()
    assert (found.residual > 1e-3).all()


def test_an_overflow_is_no_solution_and_spoils_no_other() -> None:
    matrix, right = problem()
    right[1, 0] = torch.inf
    found = run(matrix, right)
    assert not found.residual[1] <= 1e-10
    assert (found.residual[::2] <= 1e-10).all()
