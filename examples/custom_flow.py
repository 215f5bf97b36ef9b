"""A flow of your own around InverseConv2d, trained for some seconds on images that ship with the package."""

import torch

from inverse_flow import InverseConv2d
from inverse_flow.data import load_embedded
from inverse_flow.flows import ActNorm, AffineCoupling, Flow, Squeeze
from inverse_flow.training import bits_per_dim, dequantize

torch.manual_seed(0)
images = load_embedded().train.images
layers = [Squeeze(4)]
for order in ("top_left", "bottom_right"):
    layers += [InverseConv2d(16, order=order), ActNorm(16), AffineCoupling(16, hidden=32)]
flow = Flow(layers, event_shape=(1, 28, 28))
optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)

for step in range(61):
    x = dequantize(images[torch.randint(len(images), (50,))])
    loss = bits_per_dim(flow.log_prob(x), flow.event_shape).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:2d}: {loss.item():.2f} bits/dim")

samples = flow.sample(16, temperature=0.7)
print(f"samples: {tuple(samples.shape)}")
