"""The emulator has teeth: each mistake of planted.py shows where it is looked for, and nothing does without one."""

from __future__ import annotations

import pytest

from .checks import check_backward, check_solve
from .emulator import (
    ANY_REGIME,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    IDENTITY,
    TENSOR,
    TOP_LEFT,
    TOP_RIGHT,
    UNIT_TRIANGULAR,
    Case,
    DriverError,
)
from .planted import PLANTED
from .test_lanes import WIDE
from .test_tensor import PARTLY_SHARED, RING

CHECKS = {"solve": check_solve, "backward": check_backward}
THREE = (1, 2, 3)

SMALL = Case(2, (TOP_LEFT, BOTTOM_RIGHT), 3, 5, 6, 3, 3, GENERAL, seeds=THREE)
# Many channels: on tensor cores, and inverted by blocks. Two tiles, and several teams.
WIDE_GROUP = Case(2, (TOP_LEFT,), 16, 5, 34, 1, 2, UNIT_TRIANGULAR, seeds=THREE)
# One tile, so it is in the buffer where teams meet.
ONE_TILE = WIDE_GROUP.but(width=17)
# Corners that one warp inverts, while others copy the weights.
WARP_GENERAL = Case(1, (TOP_LEFT,), 5, 13, 15, 2, 2, GENERAL, seeds=THREE)
WARP_TRIANGULAR = Case(1, (TOP_LEFT,), 11, 13, 15, 2, 2, UNIT_TRIANGULAR, seeds=THREE)
# Folded before the solve, so that weights are copied.
FOLDED = Case(2, (TOP_LEFT, BOTTOM_RIGHT), 18, 5, 6, 3, 3, GENERAL, forced_regime=TENSOR, seeds=THREE)

# Rows as lanes. Two images of a warp.
LANES = Case(4, (TOP_LEFT, BOTTOM_RIGHT), 2, 5, 6, 3, 3, GENERAL, forced_regime=ANY_REGIME, seeds=THREE)
# Eight lanes per pixel, two bands, and rows that move four pixels at a time.
PIXEL_LANES = LANES.but(batch=2, orders=(TOP_RIGHT, BOTTOM_LEFT), channels=6, height=7, width=8)
BANDS = LANES.but(batch=2, channels=3, height=35, width=12)
# Four bands of two warps, and two of 17 rows.
SECOND_BANDS = LANES.but(batch=1, orders=(TOP_LEFT,), channels=5, height=16, width=5, threads_per_block=64)
UNEVEN_BANDS = LANES.but(batch=1, orders=(TOP_LEFT,), channels=1, height=33, width=9)
# Two of one warp, a lane per row: right of the image its recurrence goes on, and with these weights hardly fades.
ONE_WARP = UNEVEN_BANDS.but(width=8, corner=IDENTITY, threads_per_block=32, shared_bytes=227 * 1024, seeds=(1,))
# Sixteen lanes per pixel, of which four have no channels.
IDLE_LANES = PIXEL_LANES.but(channels=9, height=5)
# As channels_last has them; the distances of rows and images are multiples of four whatever that of pixels is.
PIXELS = LANES.but(
    orders=(TOP_RIGHT,), channels=8, height=7, width=8, input_layout="channels_last", output_layout="channels_last"
)
# Smaller tiles than those of test_lanes.py, and more of them.
WAITING = UNEVEN_BANDS.but(height=65, width=40, threads_per_block=32, shared_bytes=3000)

ORDER = "depends on the order"
EITHER = "depends on the order|off by"
WRONG = "off by|AddressSanitizer|UndefinedBehaviorSanitizer|runtime error"
# What shows it: the mistake, the operation, the case, and the complaint.
SIGHTINGS = [
    ("missing barrier", "solve", SMALL, ORDER),
    ("index one past the end", "solve", SMALL, "heap-buffer-overflow"),
    ("read of unwritten memory", "solve", SMALL, "off by nan"),
    ("barrier that some threads skip", "solve", SMALL, "do not meet at the same barrier"),
    ("missing barrier of the fold", "solve", SMALL, EITHER),
    ("missing barrier of the fold", "solve", WARP_GENERAL, EITHER),
    ("missing barrier between the levels of the fold", "solve", WIDE_GROUP, EITHER),
    ("missing barrier between the levels of the fold", "solve", WARP_TRIANGULAR, EITHER),
    ("no barrier behind the warp that inverts the corner", "solve", WARP_GENERAL, EITHER),
    ("no barrier behind the warp that inverts the corner", "solve", WARP_TRIANGULAR, EITHER),
    ("the corner is not waited for", "solve", WARP_TRIANGULAR, EITHER),
    ("the copy of the weights is not waited for", "solve", WARP_TRIANGULAR, EITHER),
    ("the copy of the weights is not waited for", "solve", SMALL, EITHER),
    ("the last taps of a channel pair are left out", "solve", LANES, EITHER),
    ("the permutation of a transposed corner", "solve", WARP_GENERAL.but(transposed=True), "off by"),
    # Of both gradient kernels, over several tiles: the emulator's copies arrive at once or at the wait.
    ("missing barrier of the gradient", "backward", SMALL, EITHER),
    ("missing barrier of the gradient", "backward", WIDE_GROUP, f"{ORDER}|{WRONG}"),
    ("tiles of the gradient that nobody waited for", "backward", SMALL.but(batch=40), EITHER),
    ("tiles of the gradient that nobody waited for", "backward", WIDE_GROUP, EITHER),
    ("the tile that is used is overwritten", "backward", SMALL.but(batch=40), EITHER),
    ("the tile that is used is overwritten", "backward", WIDE_GROUP, EITHER),
    ("missing barrier behind the last tile of the gradient", "backward", ONE_TILE, EITHER),
    ("missing barrier where teams meet", "backward", ONE_TILE, EITHER),
    ("small part left out of a split product", "backward", ONE_TILE, "off by"),
    ("gradient on tensor cores: the loop of one tap fewer", "backward", FOLDED, "off by"),
    ("gradient on tensor cores: a tap where the one before it stands", "backward", ONE_TILE, "off by"),
    ("gradient on tensor cores: a step that is taken to stay in its row", "backward", ONE_TILE, "off by"),
    ("gradient on tensor cores: a step that is not filled up", "backward", ONE_TILE, "off by nan"),
    ("tensor cores: missing barrier", "solve", FOLDED, ORDER),
    ("tensor cores: missing barrier before the sums", "solve", FOLDED, ORDER),
    ("tensor cores: the small part of x is dropped", "solve", FOLDED, "off by"),
    ("tensor cores: the small part of the weights is dropped", "solve", FOLDED, "off by"),
    ("tensor cores: weights that nobody waited for", "solve", FOLDED, "off by nan"),
    ("tensor cores: a ring of one diagonal too few", "solve", RING, "off by"),
    ("tensor cores: weights of shared memory past those that are there", "solve", PARTLY_SHARED, WRONG),
    ("tensor cores: a k-step reads the pixel of the one before", "solve", FOLDED, "off by"),
    ("tensor cores: the tile of outputs of another job", "solve", FOLDED, WRONG),
    ("tensor cores: an operand that is not rounded", "solve", FOLDED, "off by"),
    ("lanes: no barrier between phases", "solve", BANDS, EITHER),
    ("lanes: a band starts two phases early", "solve", BANDS, EITHER),
    ("lanes: the rows above are read one off", "solve", BANDS, EITHER),
    ("lanes: the rows above are read one off", "solve", WAITING, EITHER),
    ("lanes: no wait for the tile to the left", "solve", WAITING, EITHER),
    ("lanes: no barrier before the flag is set", "solve", WAITING, EITHER),
    ("lanes: a shuffle without half of the warp", "solve", LANES, "only whole warps may shuffle"),
    ("lanes: flags that are not cleared", "solve", WAITING, "."),
    ("lanes: a flag that is never set", "solve", WAITING, "waits for a flag that nobody sets"),
    ("lanes: a shuffle across images", "solve", LANES, "off by"),
    ("lanes: a shuffle from the wrong lane", "solve", LANES, "off by"),
    ("lanes: lanes of a pixel that do not wait", "solve", PIXEL_LANES, EITHER),
    ("lanes: lanes of a pixel that do not wait", "solve", BANDS, EITHER),
    ("lanes: lanes of a pixel that do not wait", "solve", IDLE_LANES, EITHER),
    ("lanes: rows above the image", "solve", PIXEL_LANES, "off by|depends on the order|AddressSanitizer"),
    ("lanes: a mirrored row that is not reversed", "solve", PIXEL_LANES, "off by"),
    ("lanes: a row that is not aligned", "solve", PIXEL_LANES.but(input_layout="shifted"), "misaligned"),
    ("lanes: a tile that is not aligned", "solve", WIDE[-1], "."),
    ("lanes: a second band that starts before the one above it is far enough", "solve", SECOND_BANDS, EITHER),
    ("lanes: a second band that keeps the sums of the first", "solve", ONE_WARP, "off by"),
    ("lanes: a lane below its band", "solve", UNEVEN_BANDS, EITHER),
    ("lanes: a band that has not looked ahead", "solve", BANDS, "off by"),
    ("lanes: a band that has not looked ahead", "solve", UNEVEN_BANDS, "off by"),
    ("lanes: the rows further up are those of this column", "solve", PIXEL_LANES, EITHER),
    ("lanes: channels that are not aligned", "solve", PIXELS.but(input_layout="channels_last, sliced"), "misaligned"),
    ("lanes: the next channel of a pixel", "solve", PIXELS, "off by"),
    ("lanes: the other channels of a pixel", "solve", PIXELS, "off by"),
]


def test_every_mistake_is_looked_for() -> None:
    assert {name for name, *_ in SIGHTINGS} == set(PLANTED)


@pytest.mark.parametrize(("operation", "case"), dict.fromkeys(sighting[1:3] for sighting in SIGHTINGS))
def test_without_a_planted_mistake_the_checks_pass(operation: str, case: Case) -> None:
    CHECKS[operation](case)


@pytest.mark.parametrize(("name", "operation", "case", "message"), SIGHTINGS)
def test_a_planted_mistake_shows(name: str, operation: str, case: Case, message: str) -> None:
    with pytest.raises((AssertionError, DriverError), match=message):
        CHECKS[operation](case.but(planted=name))
