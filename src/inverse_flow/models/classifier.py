"""A classifier in which the inverse convolution is an ordinary layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.conv import InverseConv2d
from inverse_flow.flows.base import check_dtype
from inverse_flow.ops.causal import read_part
from inverse_flow.ops.spec import check_integer, check_number, check_sizes

# From opposite corners, so that after both every pixel has seen the whole image.
ORDERS = ("top_left", "bottom_right")
# Slope of the activation below zero: a solve has an output at every pixel, and none of them should die.
NEGATIVE_SLOPE = 0.1


class InverseConvClassifier(nn.Module):
    """Two inverse convolutions of the image's own channels, each with a leaky ReLU, and a network of one hidden layer.

    The solve is a recursive filter: with C = 1 and a 3×3 window it has eight weights, and each of its outputs depends
    on all pixels towards its corner. Nagar & Varma, AISTATS 2025 (arXiv 2410.14634), section 4, report 97.6 % on MNIST
    for two such layers, 16 parameters in all; what else their classifier consists of was not at hand, so that the head
    here is our own.

    Args:
        image_shape: (C, H, W).
        classes: number of logits.
        hidden: width of the hidden layer.
        kernel_size: of the inverse convolutions.
        dropout: probability of dropping a hidden value in training.
        inverse_convs: False leaves both out, and their activations: the control.

    Shape:
        (B, C, H, W), floating → (B, classes).

    Raises:
        ValueError: sizes below 1; a dropout outside [0, 1); images of another shape.
        TypeError: images that are not floating, or of another dtype than the weights.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int = 10,
        hidden: int = 256,
        *,
        kernel_size: int | tuple[int, int] = 3,
        dropout: float = 0.2,
        inverse_convs: bool = True,
    ) -> None:
        super().__init__()
        self.image_shape = check_sizes("image_shape", image_shape, "(C, H, W)", range(3, 4))
        check_integer("classes", classes)
        check_integer("hidden", hidden)
        check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        # No bias: the head has one, and 16 parameters remain for an image of one channel.
        self.inverse_convs = nn.ModuleList(
            InverseConv2d(image_shape[0], kernel_size, order=order, bias=False)
            for order in (ORDERS if inverse_convs else ())
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(image_shape), hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        check_dtype(self, images)
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"the classifier takes (B, {expected}), got {tuple(images.shape)}")
        for layer in self.inverse_convs:
            images = F.leaky_relu(layer(images)[0], NEGATIVE_SLOPE)
        logits: Tensor = self.head(images)
        return logits

    @property
    def num_inverse_conv_parameters(self) -> int:
        """Weights that the inverse convolutions read. The fixed entries of the corner tap are stored but not read."""
        return sum(
            int(read_part(torch.ones_like(layer.weight), layer.spec).sum())
            for layer in self.inverse_convs
            if isinstance(layer, InverseConv2d)
        )

    @property
    def num_parameters(self) -> int:
        """All learnable numbers that are read: those of the inverse convolutions, and the head's."""
        return self.num_inverse_conv_parameters + sum(parameter.numel() for parameter in self.head.parameters())

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """(B,) labels with the largest logit, in evaluation mode. Leaves the mode alone."""
        was_training = self.training
        self.eval()
        try:
            labels: Tensor = self(images).argmax(1)
        finally:
            self.train(was_training)
        return labels
