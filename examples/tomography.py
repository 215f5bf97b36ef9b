"""Tomography from few angles: learned steps along the gradient, beside as many plain ones and ten times as many.

An image is seen through its sums along the rays of eight directions. The network is the unrolled loop of this library,
which trains in the memory of one step.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from inverse_flow.data import load_embedded
from inverse_flow.models import LoopNetwork
from inverse_flow.training.figures import tile, to_uint8

ANGLES, LEARNED, STATE, SHOWN = 8, 6, 7, 8

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300, help="optimiser steps")
parser.add_argument("--output", type=Path, default=Path("tomography.png"), help="where the picture goes")
arguments = parser.parse_args()

angles = torch.arange(ANGLES) * torch.pi / ANGLES
turns = torch.stack((angles.cos(), -angles.sin(), 0 * angles, angles.sin(), angles.cos(), 0 * angles), 1).view(-1, 2, 3)


def project(x: Tensor) -> Tensor:
    """Images (B, 1, H, W) to their sums along vertical rays after each turn, (B, angles, W): a linear map."""
    grids = F.affine_grid(turns, [ANGLES, 1, *x.shape[2:]], align_corners=False)
    turned = F.grid_sample(x.transpose(0, 1).expand(ANGLES, -1, -1, -1), grids, align_corners=False)
    return turned.sum(2).transpose(0, 1) / x.shape[2]


def gradient_steps(data: Tensor, count: int) -> Tensor:
    """Least squares from zero, by gradient descent with the longest steps that are sure to converge."""
    x = torch.zeros(len(data), 1, 28, 28, requires_grad=True)
    for _ in range(count):
        (gradient,) = torch.autograd.grad(0.5 * (project(x) - data).square().sum(), x)
        x = (x - gradient * 28 / ANGLES).detach().requires_grad_()
    return x.detach()


def reconstruct(data: Tensor) -> Tensor:
    zeros = torch.zeros(len(data), 1 + STATE, 28, 28)
    return loop(zeros[:, :1], zeros[:, 1:], data, project)[0]


torch.manual_seed(0)
images = load_embedded()
train, test = images.train.images / 256, images.test.images / 256
loop = LoopNetwork(1, STATE, hidden=16, steps=LEARNED)
optimizer = torch.optim.Adam(loop.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
for step in range(arguments.steps):
    x = train[torch.randint(len(train), (16,))]
    loss = (reconstruct(project(x)) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(loop.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 50 == 0 or step == arguments.steps - 1:
        print(f"step {step:3d}: mean squared error {loss.item():.4f}")

loop.eval()
data = project(test)
with torch.no_grad():
    learned = reconstruct(data)
found = {f"{count} plain steps": gradient_steps(data, count) for count in (LEARNED, 10 * LEARNED)}
found[f"{LEARNED} learned steps"] = learned
for name, x in found.items():
    print(f"{name}: relative error {(x - test).norm() / test.norm():.3f} on {len(test)} test images")

figure = Figure(figsize=(8, 4.8), layout="constrained")
rows = {"images": test, **found}
for axes, (name, x) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
    axes.imshow(tile(to_uint8(x[:SHOWN].clamp(0, 0.999)), columns=SHOWN), interpolation="nearest")
    axes.set_title(name, loc="left")
    axes.set_axis_off()
figure.savefig(arguments.output, dpi=150)
print(f"the picture: {arguments.output}")
