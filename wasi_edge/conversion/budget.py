"""What a conversion holds in memory, and how many calibration photos a budget allows. No torch.

    peak = base + blocks + max(spectra, regression, buffers of a pass) + tokens of the calibration photos

The terms follow `convert.py` and `walk.py`: the dense block and its factors; the moments of all its linears and float64
copies while the largest is taken apart; of one linear, its covariance three times (itself, damped, and factorised) and
as many matrices of the weight's size; the buffers of both networks over a few photos; two streams of tokens in float16.
The base is that of before the library pages left, and generous.
"""

from __future__ import annotations

from wasi_edge.chunks import WIDE_INPUT, conversion_photos
from wasi_edge.errors import BudgetInfeasible
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.units import format_size

BASE_BYTES = 240 * 2**20  # Python, torch, numpy, Pillow, Rich
SLACK_BYTES = 8 * 2**20
DECODE_BYTES = 32 * 2**20  # a JPEG of any camera; larger pictures are passed over where it gets tight
MOST_PHOTOS = 512
FEWEST_PHOTOS = 16


def calibration_photos(
    geometry: Geometry, image_size: int, available: int, budget_bytes: int, base_bytes: int = BASE_BYTES
) -> int:
    """How many of `available` photos may calibrate (0 where there are none): as many as fit, at most 512.

    Raises BudgetInfeasible, naming the smallest budget that works, where not even 16 of them (or all) fit.
    """
    fewest = min(available, FEWEST_PHOTOS)
    smallest = conversion_bytes(geometry, image_size, fewest, base_bytes)
    if smallest > budget_bytes:
        needed = -(-smallest // 2**20)
        what = f"with {fewest} calibration photos" if fewest else "without calibration"
        remedy = " or leave --calibrate away" if fewest else ""
        raise BudgetInfeasible(
            f"converting this model {what} needs {needed} MB, the budget is {format_size(budget_bytes)}; "
            f"try --budget {needed}MB{remedy}",
            needed * 2**20,
        )
    most = min(available, MOST_PHOTOS)
    while conversion_bytes(geometry, image_size, most, base_bytes) > budget_bytes:
        most -= 1
    return most


def conversion_bytes(geometry: Geometry, image_size: int, photos: int, base_bytes: int = BASE_BYTES) -> int:
    """Predicted peak of the process that converts this network, calibrated on so many photos (0: none)."""
    linears = geometry.linear_shapes()
    shapes = list(set(linears.values()))
    block = max(
        4 * sum(rows * columns for name, (rows, columns) in linears.items() if name.startswith(f"blocks.{index}."))
        for index in range(geometry.depth)
    )
    factorisation = max(8 * (2 * rows * columns + 6 * min(rows, columns) ** 2) for rows, columns in shapes)
    fixed = base_bytes + SLACK_BYTES + 2 * block
    if photos == 0:
        return fixed + factorisation
    sizes = [(rows, columns, 4 if columns > WIDE_INPUT else 8) for rows, columns in shapes]
    spectra = factorisation + max(
        sum(
            columns**2 * (4 if columns > WIDE_INPUT else 8)
            for name, (_, columns) in linears.items()
            if name.startswith(f"blocks.{index}.")
        )
        for index in range(geometry.depth)
    )
    moments = max(size * (columns**2 + rows * columns) for rows, columns, size in sizes)
    regression = max(3 * moments, max(size * columns**2 for _, columns, size in sizes) + factorisation)
    blocks = geometry.block_shapes(image_size)
    numbers = max(shape.tokens * (12 * shape.width + 2 * shape.mlp_width) for shape in blocks)
    together = conversion_photos(max(shape.tokens * shape.width for shape in blocks))
    chunk = 2 * 4 * min(photos, together) * numbers
    held = _stream_bytes(geometry, image_size, photos)
    reading = base_bytes + SLACK_BYTES + held + DECODE_BYTES
    return max(fixed + max(spectra, regression, moments + chunk) + held, reading)


def decode_allowance(geometry: Geometry, image_size: int, photos: int, budget_bytes: int) -> int:
    """Bytes that decoding one calibration photo may take: photos are read before any block is."""
    return budget_bytes - BASE_BYTES - SLACK_BYTES - _stream_bytes(geometry, image_size, photos)


def _stream_bytes(geometry: Geometry, image_size: int, photos: int) -> int:
    """Both streams of tokens in float16, and one of them a second time where it comes to another order."""
    largest = max(shape.tokens * shape.width for shape in geometry.block_shapes(image_size))
    return (3 if geometry.has_windows else 2) * 2 * photos * largest
