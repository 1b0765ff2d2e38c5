"""Blocks of a slab with known bytes."""

import torch


def filled(slab, nbytes, seed):
    block = slab.allocate(nbytes)
    content = bytes_of(nbytes, seed)
    memoryview(block)[:] = content
    return block, content


def bytes_of(nbytes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator).numpy().tobytes()
