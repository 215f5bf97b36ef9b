"""Inpainting: a conditional flow draws what a hole in an image may have hidden, given the pixels around it.

The flow is one of the pixels in the hole, which may lie anywhere. A summary network sees the window around it: the
pixels that are left, and where there are any.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.data import load_embedded
from inverse_flow.flows import prepare_sampling
from inverse_flow.models import ConditionalFlow, InverseFlow, SummaryNet
from inverse_flow.training import bits_per_dim, dequantize
from inverse_flow.training.figures import save_rows

HOLE, WINDOW, CONTEXT = 12, 28, 16
EDGE = (WINDOW - HOLE) // 2  # of the window, on each side of the hole
SAMPLES = 19  # so that one value in twenty is below them all, and one above, if it is drawn as they are

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
parser.add_argument("--output", type=Path, default=Path("inpainting.png"), help="where the picture goes")
arguments = parser.parse_args()


class Surroundings(SummaryNet):
    """The map of a summary network where the hole is; it is of half the resolution."""

    def forward(self, window: Tensor) -> Tensor:
        return super().forward(window)[:, :, EDGE // 2 : -EDGE // 2, EDGE // 2 : -EDGE // 2]


def cut(images: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels in a hole of each image, (B, 1, HOLE, HOLE), and (B, 2, WINDOW, WINDOW): those around it, and ones
    where there are any."""
    padded = F.pad(torch.cat((images, torch.ones_like(images)), dim=1), [EDGE] * 4)
    every = padded.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1)
    window = every[torch.arange(len(images)), :, corners[:, 0], corners[:, 1]]
    hole = window[:, :, EDGE:-EDGE, EDGE:-EDGE]
    pixels = hole[:, :1].clone()
    hole.zero_()
    return pixels, window


def fill(images: Tensor, corners: Tensor, pixels: Tensor) -> Tensor:
    """The images with other pixels in their holes."""
    filled = images.clone()
    for image, (top, left), hole in zip(filled, corners.tolist(), pixels, strict=True):
        image[:, top : top + HOLE, left : left + HOLE] = hole
    return filled


def anywhere(images: Tensor) -> Tensor:
    """The upper left corner of a hole for each image."""
    return torch.randint(images.shape[-1] - HOLE + 1, (len(images), 2))


torch.manual_seed(0)
data = load_embedded()
flow = InverseFlow((1, HOLE, HOLE), levels=2, steps=4, hidden=48, logit_margin=1e-3, context_channels=CONTEXT)
model = ConditionalFlow(flow, Surroundings(2, CONTEXT, hidden=64))
print(f"{model.num_parameters} parameters")
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
for step in range(arguments.steps):
    images = dequantize(data.train.images[torch.randint(len(data.train), (32,))])
    loss = bits_per_dim(model.log_prob(*cut(images, anywhere(images))), model.event_shape).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 100 == 0 or step == arguments.steps - 1:
        print(f"step {step:4d}: {loss.item():.2f} bits/dim")

model.eval()
images = dequantize(data.test.images)
corners = anywhere(images)
hidden, window = cut(images, corners)
with torch.no_grad():
    own, others = (
        bits_per_dim(model.log_prob(hidden, seen), model.event_shape).mean() for seen in (window, window.roll(1, 0))
    )
print(f"{len(images)} test images: {own:.2f} bits/dim, {others:.2f} given the surroundings in another image")

sampler = ConditionalFlow(prepare_sampling(model.flow), model.summary)
rows = window.repeat_interleave(SAMPLES, 0)
samples = sampler.sample(len(rows), rows).clamp(0, 1).unflatten(0, (-1, SAMPLES))
mean = samples.mean(1)
# Of a sample drawn as the truth is the mean square error is twice that of the mean of the density.
for name, guess in {"one sample": samples[:, 0], "the mean of the samples": mean}.items():
    print(f"{name}: root mean square error {(guess - hidden).square().mean().sqrt():.3f}")
within = (samples.amin(1) <= hidden) & (hidden <= samples.amax(1))
share = 100 * within.double().mean()
print(f"{share:.0f} % of the pixels lie between the least and the largest of {SAMPLES} samples, 90 % if they are right")

spread = samples.std(1)
rows = {
    "images": images,
    "what is left": fill(images, corners, torch.full_like(hidden, 0.5)),
    **{f"sample {i + 1}": fill(images, corners, samples[:, i]) for i in range(3)},
    f"mean of {SAMPLES} samples": fill(images, corners, mean),
    "their standard deviation": fill(torch.zeros_like(images), corners, spread / spread.amax()),
}
save_rows(arguments.output, rows)
print(f"the picture: {arguments.output}")
