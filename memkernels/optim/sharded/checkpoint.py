"""Checkpoints that any number of ranks write and any other number reads."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memkernels.optim.agreement import exchange_texts, exchanging, on_all
from memkernels.optim.local import is_distributed
from memkernels.optim.sharded.index import INDEX, VERSION, checksum_of, index_text, read_index
from memkernels.optim.sharded.optimizer import ShardedOptimizer
from memkernels.optim.sharded.states import (
    Part,
    check_names,
    groups_to_json,
    join_masters,
    state_dict_of,
    states_to_fill,
    states_to_save,
)


def save_checkpoint(
    path: str | os.PathLike, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, extra: Any = None
) -> None:
    """Writes a model, its optimizer and `extra` into a new folder, which any number of ranks load, at any stage.

    Every rank of the optimizer's process group calls it, and all see the same file system. By torch's Distributed
    Checkpoint in the format of safetensors, a file for each rank: `model.<name>` are tensors of the model's
    `state_dict`, `state.<name>.<key>` ranges of the optimizer's states in order of the parameter's elements, as they
    are stored, in few bits too. `index.json` has the groups, the steps, `extra`, and a CRC32 of each file and of
    itself. Distributed Checkpoint's own format keeps its metadata as a pickle, which runs what it says when it is read;
    nothing of this one can.

    The folder is written under another name beside `path`, is brought to the disk, and is renamed when it is complete:
    what has the name is whole, and a checkpoint that fails leaves those before it as they are, and nothing of itself.

    Args:
        path: does not exist yet: give each checkpoint a name of its own.
        model: the module; frozen tensors that are not plain, such as quantised weights, are left out.
        optimizer: a `ShardedOptimizer`, an optimizer of this package, or torch's AdamW in one process.
        extra: what JSON can hold: the batch it was at, a scheduler's state.

    Raises:
        TypeError: path, model or optimizer is of another kind; or the optimizer is no `ShardedOptimizer` and has
            DTensors.
        ValueError: the optimizer has a parameter that the model has not, or the ranks' paths differ.
        FileExistsError: path exists, on every rank.
        OSError: a rank could not write, on every rank.
        RankFailure: another rank has ended.
    """
    group = _group_of(optimizer)
    folder = _folder(path, group)
    temporary = folder.parent / f".{folder.name}.incomplete"

    def check() -> tuple[list[list[Part]], torch.optim.Optimizer]:
        if folder.exists():
            raise FileExistsError(f"{folder} exists; a checkpoint overwrites nothing.")
        json.dumps(extra)
        return _parts_of(model, optimizer)

    parts, local = on_all(group, check, [f"path {folder.absolute()}"])
    try:
        _write(folder, temporary, model, optimizer, parts, local, extra, group)
    except BaseException:
        if _is_first(group):
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(
    path: Path,
    temporary: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: list[list[Part]],
    local: torch.optim.Optimizer,
    extra: Any,
    group: dist.ProcessGroup | None,
) -> None:
    """Writes a checkpoint into `temporary`, and renames it."""

    def begin() -> None:
        if _is_first(group):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    on_all(group, begin)
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.wait()
    tensors, aliases = _tensors_of(model)

    def collect() -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in tensors.items()} | states_to_save(parts, local)

    saved = on_all(group, collect)
    with _failing_as(OSError, path, group):
        dcp.save(saved, storage_writer=_Writer(str(temporary)), process_group=group, no_dist=group is None)
    names = _union(group, on_all(group, lambda: {file.name: 0 for file in temporary.iterdir()}))

    def checksums() -> dict[str, int]:
        return {name: checksum_of(temporary / name) for name in _share_of(sorted(names), group)}

    files = _union(group, on_all(group, checksums))

    def finish() -> None:
        if not _is_first(group):
            return
        index = {
            "version": VERSION,
            "groups": groups_to_json(parts, local),
            "aliases": aliases,
            "files": files,
            "extra": extra,
        }
        with open(temporary / INDEX, "w") as file:
            file.write(index_text(index))
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        os.rename(temporary, path)
        _sync_folder(path.parent)

    on_all(group, finish)


class _Writer(dcp.HuggingFaceStorageWriter):
    """A file for each rank. What fails is an OSError on all: errors of safetensors cannot be sent to other ranks."""

    def __init__(self, path: str) -> None:
        super().__init__(path, save_distributed=True)

    def write_data(self, *arguments: Any) -> Any:
        try:
            return super().write_data(*arguments)
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from None


def load_checkpoint(path: str | os.PathLike, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Loads what `save_checkpoint` wrote into a model and its optimizer; returns `extra`.

    The optimizer may be another than the one that was saved: sharded over another number of ranks, of another stage, in
    one process, or torch's own; with states of another width, which are converted as its `load_state_dict` does, or
    other groups, as long as those of one group were in one group; frozen parameters may be in them or not. Every rank
    of its process group calls it. Of bfloat16 with a remainder, a float32 parameter gets the master weight, whatever
    optimizer it has; one in bfloat16 that has no remainder gets the bfloat16.

    Args:
        path: the folder.
        model: of the same names and shapes.
        optimizer: as for `save_checkpoint`.

    Raises:
        TypeError: as `save_checkpoint`.
        ValueError: the ranks' paths differ; a file is missing, damaged, or of another model. On every rank, before
            anything is changed.
        RankFailure: another rank has ended.
    """
    group = _group_of(optimizer)
    folder = _folder(path, group)

    def check() -> tuple[list[list[Part]], torch.optim.Optimizer, dict[str, Any]]:
        parts, local = _parts_of(model, optimizer)
        index = read_index(folder)
        check_names(parts, index["groups"], [name for name, of in model.named_parameters() if not of.requires_grad])
        _check_files(folder, index["files"], group)
        return parts, local, index

    parts, local, index = on_all(group, check, [f"path {folder.absolute()}"])
    tensors, _ = _tensors_of(model)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    rounds = _rounds(tensors, index["aliases"])
    filled = on_all(group, lambda: states_to_fill(parts, index["groups"], local))
    states = {name: tensor for name, tensor in filled.items() if tensor.numel()}

    def check_tensors() -> None:
        saved = reader.read_metadata().state_dict_metadata
        for wanted in (states, *rounds):
            _check_tensors(wanted, saved)

    on_all(group, check_tensors)
    with _failing_as(ValueError, folder, group):
        dcp.load(states, storage_reader=reader, process_group=group, no_dist=group is None)
    on_all(group, lambda: optimizer.load_state_dict(state_dict_of(parts, index["groups"], filled, local)))
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.wait()
        optimizer.zero_grad()
    for wanted in rounds:
        with _failing_as(ValueError, folder, group):
            dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    if join_masters(parts, index["groups"], filled) and isinstance(optimizer, ShardedOptimizer):
        optimizer.send_values()
    return index["extra"]


def _folder(path: str | os.PathLike, group: dist.ProcessGroup | None) -> Path:
    """The path, where every rank has named one."""

    def check() -> Path:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path: expected a folder's name, got {path!r}.")
        return Path(path)

    return on_all(group, check)


def _group_of(optimizer: torch.optim.Optimizer) -> dist.ProcessGroup | None:
    return optimizer.process_group if isinstance(optimizer, ShardedOptimizer) else None


def _parts_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[list[Part]], torch.optim.Optimizer]:
    """What this process holds of each group's parameters, and the optimizer that holds it."""
    for name, value, kind in (("model", model, torch.nn.Module), ("optimizer", optimizer, torch.optim.Optimizer)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a kind of {kind.__name__}, got {type(value).__name__}.")
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.parts(), optimizer.local
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter not in names:
            raise ValueError(f"optimizer: expected parameters of model, got another of shape {tuple(parameter.shape)}.")
        if is_distributed(parameter):
            raise TypeError(
                f"optimizer: expected a ShardedOptimizer, since {names[parameter]} is a DTensor, got"
                f" {type(optimizer).__name__}."
            )
    return [
        [Part(names[parameter], parameter, 0, parameter.shape) for parameter in group["params"]]
        for group in optimizer.param_groups
    ], optimizer


def _tensors_of(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's dense tensors by `model.<name>`, each once; and the other names of those that have several."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.numel() == 0:
            continue
        if is_traceable_wrapper_subclass(tensor) and not is_distributed(tensor):
            continue
        key = f"model.{name}"
        if id(tensor) in names:
            aliases[key] = names[id(tensor)]
            continue
        names[id(tensor)] = key
        tensors[key] = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    return tensors, aliases


def _rounds(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> list[dict[str, Tensor]]:
    """Tensors by the checkpoint's names: each in one round, and in further ones those that were one tensor there."""
    rounds: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        key = aliases.get(name, name)
        if all(key in of_round for of_round in rounds):
            rounds.append({})
        next(of_round for of_round in rounds if key not in of_round)[key] = tensor
    return rounds


@contextmanager
def _failing_as(error: type[Exception], path: Path, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Has what fails within torch's Distributed Checkpoint on any rank raise `error` on all, as it does there."""
    try:
        with warnings.catch_warnings(), nullcontext() if group is None else exchanging(group):
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except dcp.CheckpointException as failure:
        said = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in failure.failures.items())
        raise error(f"{path}: {said}") from failure


def _is_first(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_rank(group) == 0


def _share_of(items: list[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Those of equal lists that this rank sees to."""
    return items if group is None else items[dist.get_rank(group) :: dist.get_world_size(group)]


def _union(group: dist.ProcessGroup | None, own: dict[str, int]) -> dict[str, int]:
    """The entries of every rank."""
    if group is None:
        return own
    return {
        name: value
        for text in exchange_texts(group, json.dumps(own).encode())
        for name, value in json.loads(text).items()
    }


def _check_files(path: Path, files: Mapping[str, int], group: dist.ProcessGroup | None) -> None:
    """Each rank reads some of the files."""
    for name, checksum in _share_of(list(files.items()), group):
        if not (path / name).is_file() or checksum_of(path / name) != checksum:
            raise ValueError(f"{path / name}: missing, truncated or damaged.")


def _check_tensors(wanted: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    for name, tensor in wanted.items():
        if name not in saved or saved[name].size != tensor.size():
            got = tuple(saved[name].size) if name in saved else "nothing"
            raise ValueError(
                f"{name}: expected shape {tuple(tensor.size())}, got {got}; a checkpoint of another model?"
            )


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
