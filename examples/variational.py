"""Variational inference without data: a flow is fitted to Rosenbrock's density, of which only the formula is known.

The flow q is trained on samples of its own, by the reverse Kullback-Leibler divergence E_q[log q(x) − log p(x)].
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inverse_flow.models import Glow

STEEPNESS = 10.0
# ∫ exp(−U) of the energy below: one Gaussian of deviation 1 and, across the valley, one of 1/√10. To judge the result.
LOG_NORMALIZER = math.log(2 * math.pi / math.sqrt(STEEPNESS))

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
parser.add_argument("--output", type=Path, default=Path("variational.png"), help="where the picture goes")
arguments = parser.parse_args()


def energy(x: Tensor) -> Tensor:
    """U(x) = −log p(x) up to a constant: half of Rosenbrock's function, (1 − x₁)² + 10·(x₂ − x₁²)²."""
    return 0.5 * ((1 - x[:, 0]).square() + STEEPNESS * (x[:, 1] - x[:, 0].square()).square())


torch.manual_seed(0)
flow = Glow((2,), levels=1, steps=6, hidden=32, scale="softplus")
optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
for step in range(arguments.steps):
    x, log_prob = flow.sample_and_log_prob(256)
    loss = (log_prob + energy(x)).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
    optimizer.step()
    schedule.step()
    if step % 100 == 0 or step == arguments.steps - 1:
        print(f"step {step:4d}: divergence {loss.item() + LOG_NORMALIZER:.3f} nats")

flow.eval()
with torch.no_grad():
    x, log_prob = flow.sample_and_log_prob(20000)
    log_weights = -energy(x) - log_prob
weights = log_weights.softmax(0)
estimate = log_weights.logsumexp(0).item() - math.log(len(x))
print(f"divergence: {LOG_NORMALIZER - log_weights.mean():.3f} nats over {len(x)} samples")
print(f"log of the normalising constant: {estimate:.3f} estimated, {LOG_NORMALIZER:.3f} exact")
print(f"mean of x1: {(weights * x[:, 0]).sum():.3f} estimated, 1 exact")
print(f"effective sample size: {100 / (weights.square().sum() * len(x)):.0f} %")

axes_x, axes_y = torch.linspace(-2.5, 4.5, 200), torch.linspace(-2, 14, 200)
grid = torch.cartesian_prod(axes_x, axes_y)
with torch.no_grad():
    densities = {"Rosenbrock's density": (-energy(grid) - LOG_NORMALIZER).exp(), "the flow": flow.log_prob(grid).exp()}
figure = Figure(figsize=(7.2, 3.2), layout="constrained")
for axes, (title, density) in zip(figure.subplots(1, 3), (*densities.items(), ("its samples", None)), strict=True):
    if density is None:
        axes.scatter(*x[:2000].T.numpy(), s=1)
    else:
        image = density.view(200, 200).T.sqrt().numpy()  # the root, to see the tails too
        axes.imshow(image, extent=(-2.5, 4.5, -2, 14), origin="lower", aspect="auto")
    axes.set(xlim=(-2.5, 4.5), ylim=(-2, 14))
    axes.set_title(title, fontsize=9)
figure.savefig(arguments.output, dpi=150)
print(f"the picture: {arguments.output}")
