"""Numbers of bytes, read and written."""

import pytest

from memkernels.memory_size import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("written", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 << 29), ("80gib", 80 << 30), (7, 7), ("9", 9)]
)
def test_sizes_are_read(written, size):
    assert parse_bytes("memory", written) == size


@pytest.mark.parametrize(
    ("size", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (15_360, "15.4 kB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (2_500_000_000, "2.5 GB"),
        (999_600 * 10**9, "1000 TB"),
        (12_345 * 10**12, "12345 TB"),
    ],
)
def test_sizes_are_written(size, written):
    assert format_bytes(size) == written
