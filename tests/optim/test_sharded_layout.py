"""What ranks have of the buckets of optim.ShardedOptimizer."""

import pytest
import torch

from memkernels.optim.sharded.layout import make_buckets


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_element_has_one_rank_and_no_block_is_cut(ranks):
    sizes = [1, 0, 300, 5000, 256, 70, 4097, 12]
    dtypes = [torch.float32, torch.bfloat16]
    named = [(f"p{i}", torch.nn.Parameter(torch.zeros(n, dtype=dtypes[i % 3 == 2])), i) for i, n in enumerate(sizes)]
    buckets = make_buckets(named, ranks, 8000)
    assert sorted(piece.place for bucket in buckets for piece in bucket.pieces) == list(range(len(sizes)))
    for bucket in buckets:
        flat = torch.zeros(bucket.size, dtype=torch.int64)
        assert bucket.shard_size % 256 == 0
        assert len(bucket.pieces) == 1 or sum(p.parameter.nbytes for p in bucket.pieces) <= 8000
        for piece in bucket.pieces:
            assert piece.parameter.dtype == bucket.dtype and piece.start % 256 == 0
            bucket.view(flat, piece).add_(1)
            covered = []
            for rank in range(ranks):
                first, last = bucket.elements_of(piece, rank)
                assert first == last or first % 256 == 0
                covered += range(first, last)
                assert all(
                    rank * bucket.shard_size <= piece.start + e < (rank + 1) * bucket.shard_size
                    for e in (first, last - 1)
                    if last > first
                )
            assert covered == list(range(piece.parameter.numel()))
        for first, last in bucket.gaps():
            flat[first:last] += 1
        assert (flat == 1).all()
