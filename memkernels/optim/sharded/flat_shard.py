"""A rank's range of a one-dimensional tensor, as torch's Distributed Checkpoint writes and reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatShard(Tensor):
    """Elements [offset, offset + local.numel()) of a tensor of `total`: what DTensor cannot say, whose ranks have equal
    parts. It has the whole tensor's shape, and computes nothing."""

    local: Tensor
    offset: int

    @staticmethod
    def __new__(cls, local: Tensor, offset: int, total: int) -> FlatShard:
        shard = Tensor._make_wrapper_subclass(cls, (total,), dtype=local.dtype, device=local.device)
        shard.local, shard.offset = local, offset
        return shard

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{function}: a FlatShard is only saved and loaded.")

    # The protocol of torch.distributed.checkpoint.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.local.numel() == 0:
            return []
        return [ChunkStorageMetadata(offsets=torch.Size([self.offset]), sizes=self.local.size())]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.local
