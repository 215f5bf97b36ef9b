"""Deblurring: a causal blur undone exactly by the solve, an unknown blur learned by gradient through the solve, and
centred blurs with noise undone by iterations between two solves.

A causal blur mixes every pixel with those above and to the left of it: the smear of a sensor that is read out while the
scene moves. It is A(w) of this library, so its inverse is ``inverse_conv2d`` with the same weight.

The blurs of a lens or of a shaken camera reach to all sides, and lose what no inverse brings back: ``solve_conv2d``
with Tikhonov's term finds the image that explains what was seen without amplifying its noise.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from inverse_flow.data import load_embedded
from inverse_flow.functional import causal_conv2d, inverse_conv2d, solve_conv2d
from inverse_flow.training.figures import save_rows, to_uint8

KERNEL_SIZE = 5
DECAY = 0.7  # of the smear from one pixel to the next
SHOWN = 8
NOISE = 0.01  # standard deviation, where white is 1
TIKHONOV = [10 ** (-power / 2) for power in range(3, 9)]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300, help="optimizer steps for the unknown blur")
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


def gaussian(size: int, deviation: float) -> torch.Tensor:
    row = torch.exp(-((torch.arange(size) - size // 2) ** 2) / (2 * deviation**2))
    return row[:, None] * row


def motion(size: int, degrees: float) -> torch.Tensor:
    """A straight movement while the shutter was open."""
    along, angle = torch.linspace(-(size // 2), size // 2, 100 * size), math.radians(degrees)
    rows, columns = (torch.round(along * part).long() + size // 2 for part in (-math.sin(angle), math.cos(angle)))
    return torch.zeros(size, size).index_put_((rows, columns), torch.ones(100 * size), accumulate=True)


def defocus(size: int) -> torch.Tensor:
    """A disc: what a lens makes of a point out of focus."""
    place = torch.arange(size) - size // 2
    return (place[:, None] ** 2 + place**2 <= (size / 2) ** 2).float()


def quality(images: torch.Tensor, wanted: torch.Tensor) -> float:
    """The peak signal-to-noise ratio in dB, more is better."""
    return -10 * math.log10((images - wanted).square().mean())


rows = {"sharp": test, "blurred": blurred, "known blur undone": undone, "learned blur undone": found}
for name, taps in {"Gaussian": gaussian(9, 1.2), "motion": motion(7, 30), "defocus": defocus(5)}.items():
    lens = (taps / taps.sum())[None, None]

    def seen_through(images: torch.Tensor, lens: torch.Tensor = lens) -> torch.Tensor:
        return F.conv2d(images, lens, padding="same") + NOISE * torch.randn_like(images)

    # How much to trust the picture is chosen on images that are known sharp.
    known = sharp[:50]
    seen = seen_through(known)
    best = max(TIKHONOV, key=lambda term: quality(solve_conv2d(seen, lens, tikhonov=term, tolerance=1e-4).x, known))
    seen = seen_through(test)
    restored = solve_conv2d(seen, lens, tikhonov=best, tolerance=1e-4)
    gain = f"{quality(seen, test):.1f} dB become {quality(restored.x, test):.1f} dB"
    print(f"{name} blur with noise: {gain}, λ = {best:.1e}, at most {restored.iterations.max()} iterations")
    rows |= {f"{name} blur, noise {NOISE}": seen, f"{name} blur, restored": restored.x}

save_rows(arguments.output, rows, columns=SHOWN)
print(f"before and after: {arguments.output}")
