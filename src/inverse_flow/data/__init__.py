"""Image data sets from files on disk, a small one inside the package, and toy densities. See docs/data.md."""

from inverse_flow.data.cifar10 import load_cifar10
from inverse_flow.data.embedded import load_embedded
from inverse_flow.data.folder import load_image_folder
from inverse_flow.data.idx import load_idx_folder
from inverse_flow.data.imagenet import load_imagenet
from inverse_flow.data.images import ImageData, ImageSet
from inverse_flow.data.load import load
from inverse_flow.data.slice import load_slice
from inverse_flow.data.toy import TOY_DENSITIES, draw_toy

__all__ = [
    "TOY_DENSITIES",
    "ImageData",
    "ImageSet",
    "draw_toy",
    "load",
    "load_cifar10",
    "load_embedded",
    "load_idx_folder",
    "load_image_folder",
    "load_imagenet",
    "load_slice",
]
