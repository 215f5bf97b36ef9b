"""Tomography from few angles: all the images that the data allow, beside the exact answer.

An image is seen through its sums along the rays of eight directions, with noise. A conditional flow learns the
posterior of the image. What sums up the data for it is an unrolled loop, which takes learned steps along the gradient
of the misfit, and trains in the memory of one step; then the summary network, of where the loop has come to. As image
and noise are Gaussian here, so is the exact posterior.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from inverse_flow.models import ConditionalFlow, Glow, LoopNetwork, SummaryNet
from inverse_flow.training.figures import save_rows

SIDE, ANGLES, NOISE = 16, 8, 0.05
CORRELATION = 4.0  # in pixels: the covariance of two is exp(−distance / CORRELATION)
LEARNED, STATE, CONTEXT = 6, 7, 8
OBSERVED, SAMPLES, SHOWN = 20, 99, 8

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
parser.add_argument("--output", type=Path, default=Path("tomography.png"), help="where the picture goes")
arguments = parser.parse_args()

angles = torch.arange(ANGLES) * torch.pi / ANGLES
turns = torch.stack((angles.cos(), -angles.sin(), 0 * angles, angles.sin(), angles.cos(), 0 * angles), 1).view(-1, 2, 3)


def project(x: Tensor) -> Tensor:
    """Images (B, 1, H, W) to their sums along vertical rays after each turn, (B, angles, W): a linear map."""
    grids = F.affine_grid(turns, [ANGLES, 1, *x.shape[2:]], align_corners=False)
    turned = F.grid_sample(x.transpose(0, 1).expand(ANGLES, -1, -1, -1), grids, align_corners=False)
    return turned.sum(2).transpose(0, 1) / x.shape[2]


# The image is N(0, C). With A the projections as a matrix the posterior is N(K y, C − K A C), K = C Aᵀ (A C Aᵀ + σ²)⁻¹.
pixels = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
prior = torch.exp(-torch.cdist(pixels, pixels) / CORRELATION)
matrix = project(torch.eye(SIDE**2).view(-1, 1, SIDE, SIDE)).flatten(1).T.double()
gain = torch.linalg.solve(matrix @ prior @ matrix.T + NOISE**2 * torch.eye(len(matrix)), matrix @ prior).T
covariance = prior - gain @ matrix @ prior
root = torch.linalg.cholesky(prior).float()


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Images and their data."""
    x = (torch.randn(count, SIDE**2) @ root.T).view(-1, 1, SIDE, SIDE)
    data = project(x)
    return x, data + NOISE * torch.randn_like(data)


class LearnedSteps(nn.Module):
    """Data to a context of the flow."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = LoopNetwork(1, STATE, hidden=16, steps=LEARNED)
        self.summary = SummaryNet(1 + STATE, CONTEXT)

    def forward(self, data: Tensor) -> Tensor:
        zeros = torch.zeros(len(data), 1 + STATE, SIDE, SIDE)
        context: Tensor = self.summary(torch.cat(self.loop(zeros[:, :1], zeros[:, 1:], data, project), dim=1))
        return context


torch.manual_seed(0)
flow = Glow((1, SIDE, SIDE), levels=2, steps=4, hidden=32, context_channels=CONTEXT)
model = ConditionalFlow(flow, LearnedSteps())
print(f"{model.num_parameters} parameters")
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
for step in range(arguments.steps):
    loss = -model.log_prob(*draw(32)).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    schedule.step()
    if step % 100 == 0 or step == arguments.steps - 1:
        print(f"step {step:4d}: {loss.item():.1f} nats per image")

model.eval()
x, data = draw(200)
exact_mean = (data.flatten(1).double() @ gain.T).view_as(x).float()
exact_deviation = covariance.diagonal().sqrt().view(1, SIDE, SIDE).float()
with torch.no_grad():
    found = model.log_prob(x, data)
vectors = x.flatten(1).double()
exact = MultivariateNormal(exact_mean.flatten(1).double(), covariance).log_prob(vectors)
told = (exact - MultivariateNormal(torch.zeros(SIDE**2).double(), prior).log_prob(vectors)).mean()
print(f"divergence from the exact posterior: {(exact - found).mean():.1f} nats, of {told:.1f} that the data tell")

x, data, exact_mean = x[:OBSERVED], data[:OBSERVED], exact_mean[:OBSERVED]
with torch.no_grad():
    context = model.summary(data).repeat_interleave(SAMPLES, 0)  # once for all samples of an observation
samples = model.flow.sample(len(context), context).unflatten(0, (-1, SAMPLES))
mean, deviation = samples.mean(1), samples.std(1)
errors = [(guess - x).norm() / x.norm() for guess in (mean, exact_mean)]
print(f"relative error of the posterior mean: {errors[0]:.3f} by the flow, {errors[1]:.3f} exactly")
ratio = samples.var(1).mean(0).sqrt() / exact_deviation
print(f"its standard deviation over the exact one: {ratio.mean():.2f}, from {ratio.min():.2f} to {ratio.max():.2f}")
rank = (samples < x[:, None]).double().mean(1)
for share in (0.5, 0.9):
    within = ((rank - 0.5).abs() < share / 2).double().mean()
    print(f"within the middle {100 * share:.0f} % of the samples: {100 * within:.0f} % of the true values")

brightest = 6  # deviations, from black to white
rows = {"images": x, "exact posterior mean": exact_mean, f"mean of {SAMPLES} samples": mean, "a sample": samples[:, 0]}
rows = {name: image / brightest + 0.5 for name, image in rows.items()}
rows |= {"exact standard deviation": exact_deviation.expand_as(x), "that of the samples": deviation}
save_rows(arguments.output, {name: row[:SHOWN] for name, row in rows.items()})
print(f"the picture: {arguments.output}")
