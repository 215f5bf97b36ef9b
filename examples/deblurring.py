"""Deblurring: a causal blur undone exactly by the solve, and an unknown blur learned by gradient through the solve.

A causal blur mixes every pixel with those above and to the left of it: the smear of a sensor that is read out while the
scene moves. It is A(w) of this library, so its inverse is ``inverse_conv2d`` with the same weight.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from inverse_flow.data import load_embedded
from inverse_flow.functional import causal_conv2d, inverse_conv2d
from inverse_flow.training.figures import tile, to_uint8

KERNEL_SIZE = 5
DECAY = 0.7  # of the smear from one pixel to the next
SHOWN = 8

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300, help="optimiser steps for the unknown blur")
parser.add_argument("--output", type=Path, default=Path("deblurring.png"), help="where the picture goes")
arguments = parser.parse_args()

torch.manual_seed(0)
data = load_embedded()
sharp, test = data.train.images / 256, data.test.images[:SHOWN] / 256

# The corner tap, bottom right in the kernel, meets the pixel itself; the sum is 1, so that the brightness stays.
fade = DECAY ** torch.arange(KERNEL_SIZE - 1, -1, -1.0)
blur = fade[:, None] * fade[None, :]
blur = (blur / blur.sum())[None, None]

blurred = causal_conv2d(test, blur)
undone = inverse_conv2d(blurred, blur)
print(f"known blur: the error falls from {(blurred - test).abs().max():.3f} to {(undone - test).abs().max():.1e}")
# What the blur has lost is lost: the solve amplifies the rounding of a blurred picture that was stored in 8 bits.
stored = to_uint8(blurred) / 256
print(f"known blur, stored in 8 bits: the error is {(inverse_conv2d(stored, blur) - test).abs().max():.3f}")


def learn(pairs: tuple[torch.Tensor, torch.Tensor], steps: int) -> torch.Tensor:
    """The weight w for which the solve turns the blurred images into the sharp ones."""
    before, after = pairs
    weight = torch.zeros(1, 1, KERNEL_SIZE, KERNEL_SIZE)
    weight[0, 0, -1, -1] = 1  # no blur
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for step in range(steps):
        rows = torch.randint(len(before), (32,))
        loss = (inverse_conv2d(before[rows], weight) - after[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:3d}: mean squared error {loss.item():.2e}")
    return weight.detach()


learned = learn((causal_conv2d(sharp, blur), sharp), arguments.steps)
found = inverse_conv2d(blurred, learned)
print(f"unknown blur: its weight is learned to {(learned - blur).abs().max():.1e} of at most {blur.max():.2f}")
print(f"unknown blur: the error falls from {(blurred - test).abs().max():.3f} to {(found - test).abs().max():.1e}")

figure = Figure(figsize=(8, 4.8), layout="constrained")
rows = {"sharp": test, "blurred": blurred, "known blur undone": undone, "learned blur undone": found}
for axes, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
    axes.imshow(tile(to_uint8(images), columns=SHOWN), interpolation="nearest")
    axes.set_title(name, loc="left")
    axes.set_axis_off()
figure.savefig(arguments.output, dpi=150)
print(f"before and after: {arguments.output}")
