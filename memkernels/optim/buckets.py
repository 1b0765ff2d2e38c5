"""What is on its way between ranks at stages 1 and 2 of ZeRO, for those, too, who do not import torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

BUCKET_BYTES = 32 << 20
EXCHANGES_AT_ONCE = 2
# By stage: stage 1 receives; stage 2 has what is sent and received, and a bucket that is filled meanwhile.
BUCKETS = {1: EXCHANGES_AT_ONCE, 2: 2 * EXCHANGES_AT_ONCE + 1}


def bytes_exchanged(sizes: Sequence[int]) -> dict[int, int]:
    """The memory of what is on its way, by stage.

    Buckets of at most BUCKET_BYTES have memory that stays; a larger one, of one parameter, has its own meanwhile.

    Args:
        sizes: bytes of the buckets, in their order.
    """
    usual = max((size for size in sizes if size <= BUCKET_BYTES), default=0)
    found = {}
    for stage in BUCKETS:
        kept = large = 0
        for first in range(len(sizes)):
            window = sizes[first : first + EXCHANGES_AT_ONCE]
            copies = [stage] * len(window) + [stage - 1]  # of those on their way, and of the one that is filled
            window = [*window, *sizes[first + EXCHANGES_AT_ONCE :][:1]]
            kept = max(kept, sum(n for n, size in zip(copies, window, strict=False) if size <= BUCKET_BYTES))
            large = max(large, sum(n * size for n, size in zip(copies, window, strict=False) if size > BUCKET_BYTES))
        found[stage] = kept * usual + large
    return found
