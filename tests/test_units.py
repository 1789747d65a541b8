"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest

from wasi_edge.errors import UsageError
from wasi_edge.units import format_duration, format_size, parse_duration, parse_size

MEBIBYTE = 2**20


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512MB", 512 * MEBIBYTE),
        ("512MiB", 512 * MEBIBYTE),
        ("512m", 512 * MEBIBYTE),
        (" 512 mb ", 512 * MEBIBYTE),
        ("1.5GiB", 1536 * MEBIBYTE),
        (".5g", 512 * MEBIBYTE),
        ("1GB", 1024 * MEBIBYTE),
        ("640k", 640 * 1024),
        ("400000000", 400_000_000),
        ("7b", 7),
    ],
)
def test_sizes_are_binary(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "0MB", "0.1b", "12 parsecs", "1,5GB", "1e9", "5 5", "nan"])
def test_other_words_are_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20m", 1200),
        ("20min", 1200),
        ("90s", 90),
        ("90", 90),
        ("1.5h", 5400),
        ("1h30m", 5400),
        ("1H 30M", 5400),
        (" 2 m ", 120),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5m", "0m", "5 years", "1h,30m", "soon"])
def test_other_words_are_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_duration(text)


def test_a_formatted_size_is_read_back() -> None:
    assert format_size(448 * MEBIBYTE) == "448 MB"
    assert parse_size(format_size(448 * MEBIBYTE)) == 448 * MEBIBYTE


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45 s"), (450, "7.5 min"), (4800, "80.0 min"), (5400, "1 h 30 min"), (7260, "2 h 1 min")],
)
def test_a_duration_as_a_person_says_it(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
