"""Amortised Bayes: one network for the posterior of a linear Gaussian problem under every observation.

x ~ N(0, I) in three dimensions is seen through y = A x + noise in two. Two flows side by side learn p(x, y) from pairs;
then p(x | y) of an observation is a matter of sampling. Here the exact posterior is known, N(m(y), S), and the
answers are set beside it.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inverse_flow.flows import JointFlow
from inverse_flow.models import Hint

NOISE = 0.5
A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]])

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
parser.add_argument("--output", type=Path, default=Path("posterior.png"), help="where the picture goes")
arguments = parser.parse_args()


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Pairs (x, y)."""
    x = torch.randn(count, 3)
    return x, x @ A.T + NOISE * torch.randn(count, 2)


torch.manual_seed(0)
joint = JointFlow(Hint((2,), levels=1, steps=2, hidden=32), Hint((3,), levels=1, steps=2, hidden=32), hidden=32)
optimizer = torch.optim.Adam(joint.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
for step in range(arguments.steps):
    loss = -joint.log_prob(*draw(256)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 100 == 0 or step == arguments.steps - 1:
        print(f"step {step:4d}: {loss.item():.3f} nats per pair")

# Exactly: S = (I + AᵀA / σ²)⁻¹, m(y) = S Aᵀ y / σ².
covariance = torch.linalg.inv(torch.eye(3) + A.T @ A / NOISE**2)
gain = covariance @ A.T / NOISE**2
joint.eval()
x, y = draw(5000)
exact = torch.distributions.MultivariateNormal(y @ gain.T, covariance).log_prob(x)
with torch.no_grad():
    found = joint.log_prob_given(x, y)
    evidence = joint.observed.log_prob(y)
exact_evidence = torch.distributions.MultivariateNormal(torch.zeros(2), A @ A.T + NOISE**2 * torch.eye(2)).log_prob(y)
print(f"divergence of the posterior from the exact one: {(exact - found).mean():.3f} nats, over 5000 observations")
print(f"divergence of the evidence p(y): {(exact_evidence - evidence).mean():.3f} nats")

observed = torch.tensor([[1.5, -1.0], [-1.0, 0.0], [0.5, 2.0]])
figure = Figure(figsize=(7.2, 2.6), layout="constrained")
angles = torch.linspace(0, 2 * math.pi, 200)
circle = 2 * torch.stack((angles.cos(), angles.sin()))
for axes, value in zip(figure.subplots(1, len(observed)), observed, strict=True):
    samples = joint.sample_given(value.expand(4000, 2))
    mean = gain @ value
    off = (samples.mean(0) - mean).norm() / covariance.trace().sqrt()
    spread = (samples.T.cov() - covariance).norm() / covariance.norm()
    print(f"y = {value.tolist()}: the mean is off by {off:.3f} deviations, the covariance by {100 * spread:.0f} %")
    axes.scatter(*samples[:1000, :2].T.numpy(), s=1)
    ellipse = torch.linalg.cholesky(covariance[:2, :2]) @ circle + mean[:2, None]
    axes.plot(*ellipse.numpy(), color="black", linewidth=1)
    axes.set_title(f"y = ({value[0]:g}, {value[1]:g})", fontsize=9)
    axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
figure.savefig(arguments.output, dpi=150)
print(f"samples of x1 and x2, and the exact ellipse of two deviations: {arguments.output}")
