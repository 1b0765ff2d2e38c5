"""What is on its way between ranks at stages 1 and 2 of ZeRO, for those, too, who do not import torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

BUCKET_BYTES = 32 << 20
EXCHANGES_AT_ONCE = 2


def bytes_exchanged(sizes: Sequence[int], stage: int, *, ranks: int, itemsize: int, sent_itemsize: int) -> int:
    """The memory at stage 1 or 2 of what is on its way.

    Of a bucket that is exchanged there is what is received and what is sent, at stage 1 the gradients themselves where
    they are sent in their own dtype; at stage 2 another bucket is filled meanwhile. Buckets of at most BUCKET_BYTES
    have memory that stays; a larger one, of one parameter, has its own meanwhile.

    Args:
        sizes: bytes of the buckets' parameters, in their order.
        itemsize: bytes of an element of the parameters.
        sent_itemsize: of what is sent.
    """
    converted = sent_itemsize != itemsize
    if ranks > 1:
        at_once, of_each, of_next = EXCHANGES_AT_ONCE, 1 + (stage == 2 or converted), stage == 2
    else:  # which sends nothing
        at_once, of_each, of_next = 0, 0, stage == 2 or converted
    usual = max((size for size in sizes if size <= BUCKET_BYTES), default=0)
    kept = large = 0
    for first in range(len(sizes)):
        window = sizes[first : first + at_once + 1]
        copies = [of_each] * len(window[:at_once]) + [int(of_next)]
        kept = max(kept, sum(n for n, size in zip(copies, window, strict=False) if size <= BUCKET_BYTES))
        large = max(large, sum(n * size for n, size in zip(copies, window, strict=False) if size > BUCKET_BYTES))
    return (kept * usual + large) * sent_itemsize // itemsize
