"""A flow that knows what it draws: trained on labelled images that ship with the package, sampled class by class."""

import argparse
from pathlib import Path

import torch

from inverse_flow.data import load_embedded
from inverse_flow.flows import prepare_sampling
from inverse_flow.models import ConditionalFlow, InverseFlow, LabelContext
from inverse_flow.training import bits_per_dim, dequantize
from inverse_flow.training.figures import save_samples, to_uint8

SAMPLES_PER_CLASS = 8  # a row of the picture
TEMPERATURE = 0.7

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
parser.add_argument("--output", type=Path, default=Path("class_conditional.png"), help="where the picture goes")
arguments = parser.parse_args()

torch.manual_seed(0)
data = load_embedded()
names = data.class_names
flow = InverseFlow(data.train.image_shape, levels=2, steps=2, hidden=32, logit_margin=1e-3, context_channels=8)
# A learned map for every class, at the resolution of the flow's first level.
model = ConditionalFlow(flow, LabelContext(len(names), context_channels=8, size=(14, 14)))
print(f"{model.num_parameters} parameters")
# The maps see a tenth of the images each: they may move faster.
groups = [{"params": model.flow.parameters()}, {"params": model.summary.parameters(), "lr": 3e-2}]
optimizer = torch.optim.Adam(groups, lr=3e-3)
for step in range(arguments.steps):
    rows = torch.randint(len(data.train), (32,))
    log_prob = model.log_prob(dequantize(data.train.images[rows]), data.train.labels[rows])
    loss = bits_per_dim(log_prob, model.event_shape).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 50 == 0 or step == arguments.steps - 1:
        print(f"step {step:3d}: {loss.item():.2f} bits/dim")

model.eval()
with torch.no_grad():
    # Bayes' rule turns a conditional density into a classifier: every class is equally frequent here.
    test = data.test[:100]
    images = dequantize(test.images)
    by_class = [model.log_prob(images, torch.full((len(test),), label)) for label in range(len(names))]
    right = (torch.stack(by_class).argmax(0) == test.labels).double().mean()
print(f"class by Bayes' rule: {100 * right:.0f} % of {len(test)} test images right")

sampler = ConditionalFlow(prepare_sampling(model.flow), model.summary)
labels = torch.arange(len(names)).repeat_interleave(SAMPLES_PER_CLASS)
samples = sampler.sample(len(labels), labels, TEMPERATURE)
real = torch.cat([data.test.images[data.test.labels == label][:SAMPLES_PER_CLASS] for label in range(len(names))])
save_samples(arguments.output, to_uint8(samples), real, title="samples, a class in each row")
print(f"samples of {', '.join(names)}: {arguments.output}")
