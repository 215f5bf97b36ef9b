"""Densities in the plane: a flow of vectors learns a banana and two moons from points."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal

from inverse_flow.data import TOY_DENSITIES, draw_toy
from inverse_flow.models import Glow

EDGE = 3.0  # of the part of the plane that is shown

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--names", nargs="+", choices=TOY_DENSITIES, default=["banana", "two_moons"])
parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each flow")
parser.add_argument("--output", type=Path, default=Path("densities.png"), help="where the picture goes")
arguments = parser.parse_args()


def banana(points: Tensor) -> Tensor:
    """Its exact log-density, to judge the learned one."""
    u, v = points.unbind(1)
    return Normal(0.0, 1.0).log_prob(u) + Normal(u.square() / 2 - 0.5, 0.5).log_prob(v)


def learn(name: str) -> Glow:
    """A flow of spline couplings, trained on 256 fresh points per step."""
    flow = Glow((2,), levels=1, steps=4, hidden=32, coupling="spline")
    optimizer = torch.optim.Adam(flow.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    points = draw_toy(name, 256 * arguments.steps, seed=1)
    for batch in points.split(256):
        loss = -flow.log_prob(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return flow.eval()


torch.manual_seed(0)
figure = Figure(figsize=(7.2, 2.4 * len(arguments.names)), layout="constrained")
axis = torch.linspace(-EDGE, EDGE, 160)
grid = torch.cartesian_prod(axis, axis)
for row, name in zip(figure.subplots(len(arguments.names), 3, squeeze=False), arguments.names, strict=True):
    flow, test = learn(name), draw_toy(name, 5000, seed=2)
    with torch.no_grad():
        nats = -flow.log_prob(test).mean().item()
        density = flow.log_prob(grid).exp().view(160, 160).T
    exact = f", {-banana(test).mean():.3f} by the density itself" if name == "banana" else ""
    print(f"{name}: {nats:.3f} nats per point on 5000 fresh ones{exact}")
    row[0].scatter(*test[:1500].T.numpy(), s=1)
    row[1].imshow(density.numpy(), extent=(-EDGE, EDGE, -EDGE, EDGE), origin="lower")
    row[2].scatter(*flow.sample(1500).T.numpy(), s=1)
    for axes, title in zip(row, (f"{name}: points", "density of the flow", "samples of the flow"), strict=True):
        axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=[], yticks=[])
        axes.set_title(title, fontsize=9)
figure.savefig(arguments.output, dpi=150)
print(f"the picture: {arguments.output}")
