"""Makes the embedded slice of Fashion-MNIST from the complete data set.

    python tools/make_fashion_mnist_slice.py FOLDER

FOLDER holds the four idx.gz files of Fashion-MNIST, as Debian's package dataset-fashion-mnist installs them in
/usr/share/datasets/fashion-mnist. Their contents are checked against the md5 checksums below. Of each class the
first 100 training and the first 20 test images are taken, in the order of the files. The same input gives the same
arrays, but not always the same bytes: those depend on the version of zlib.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inverse_flow.data import embedded
from inverse_flow.data.files import md5_of
from inverse_flow.data.idx import parse_idx

PER_CLASS = {"train": 100, "t10k": 20}
OUTPUT_NAMES = {"train": "train", "t10k": "test"}
MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def read_checked(folder: Path, name: str) -> NDArray[np.uint8]:
    content = gzip.decompress((folder / f"{name}.gz").read_bytes())
    if md5_of(content) != MD5[name]:
        sys.exit(f"{folder / name}.gz unpacks to md5 {md5_of(content)}; Fashion-MNIST's is {MD5[name]}")
    return parse_idx(content, name)


def first_of_each_class(labels: NDArray[np.uint8], count: int) -> NDArray[np.int32]:
    chosen = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen)).astype(np.int32)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    arrays = {}
    for prefix, count in PER_CLASS.items():
        labels = read_checked(folder, f"{prefix}-labels-idx1-ubyte")
        images = read_checked(folder, f"{prefix}-images-idx3-ubyte")
        indices = first_of_each_class(labels, count)
        name = OUTPUT_NAMES[prefix]
        arrays |= {f"{name}_images": images[indices], f"{name}_labels": labels[indices], f"{name}_indices": indices}
    output = Path(embedded.__file__).parent / embedded.FILE
    np.savez_compressed(output, **arrays)
    print(f"{output}: {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
