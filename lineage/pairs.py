"""Two models side by side: their matched parameters, read, moved to a device and subtracted, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from joblib import Parallel, delayed
from torch import Tensor

from lineage.checkpoint import Checkpoint
from lineage.errors import LineageError
from lineage.keys import Param, match
from lineage.layers import Sums, matrix_shape
from lineage.spectrum import row_blocks, squared_norms

MAX_WORKERS = 4
STACK_ENTRIES = 2**27  # of one stack of equal shapes on an accelerator: 512 MiB in float32

Pair = tuple[Param, Param]
_R = TypeVar("_R")


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" is CUDA where there is one. LineageError for one that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise LineageError(f"device {name!r} cannot be used ({str(e).splitlines()[0]}). Try --device cpu.") from e
    return device


def comparable(
    base: Checkpoint, tuned: Checkpoint, components: Sequence[str] | None
) -> tuple[list[Pair], list[dict[str, str]]]:
    """(pairs of weights of the wanted components, in the base's order; the rest as {name, side, reason})."""
    pairs, left_out = match(base.specs, tuned.specs)
    wanted = []
    for pair in pairs:
        if components is not None and pair[0].component not in components:
            continue
        integers = [p.dtype for p in pair if not p.dtype.is_floating_point]
        if integers:
            left_out.append({"name": pair[0].name, "side": "both", "reason": f"holds {integers[0]}, not weights"})
        elif pair[0].numel == 0:
            left_out.append({"name": pair[0].name, "side": "both", "reason": "has no entries"})
        else:
            wanted.append(pair)
    return wanted, left_out


def stream_pairs(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: list[Pair],
    device: torch.device,
    work: Callable[[list[Pair], Tensor, Tensor], _R],
) -> Iterator[tuple[list[Pair], _R]]:
    """(group, work(group, base stack, tuned stack)) for groups of pairs; stacks (b, m, n) in their stored dtypes.

    Groups are read and worked on by a few threads, so that reading overlaps computing. On the CPU each thread has
    its share of the cores: small eigenvalue problems do not scale over more. On CUDA each has its own stream."""
    cores = torch.get_num_threads()
    workers = min(cores, MAX_WORKERS) if device.type == "cpu" else 2

    def job(group: list[Pair]) -> tuple[list[Pair], _R]:
        torch.set_num_threads(max(1, cores // workers))
        with torch.inference_mode(), _own_stream(device):
            return group, work(group, *_load(base, tuned, group, device))

    tasks: Iterator[Any] = (delayed(job)(group) for group in _groups(pairs, device))
    try:
        parallel: Any = Parallel(workers, backend="threading", return_as="generator", pre_dispatch="n_jobs")
        yield from parallel(tasks)
    finally:
        torch.set_num_threads(cores)


def difference(base: Tensor, tuned: Tensor) -> tuple[Tensor, list[Sums]]:
    """tuned - base of stacks (b, m, n) in float32 (subtracted in float64 where either is), and their sums."""
    precise = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    delta = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    sums = torch.zeros(3, len(base), dtype=torch.float64, device=base.device)
    for rows in row_blocks(base):
        reference = base[:, rows].to(precise)
        block = tuned[:, rows].to(precise).sub_(reference)
        delta[:, rows] = block
        different = torch.stack([d.count_nonzero() for d in block])
        sums += torch.stack([squared_norms(reference), squared_norms(block), different])
    entries = delta[0].numel()
    return delta, [Sums(b, d, entries - int(n)) for b, d, n in sums.T.tolist()]


def _own_stream(device: torch.device) -> AbstractContextManager:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _groups(pairs: list[Pair], device: torch.device) -> Iterator[list[Pair]]:
    """One pair at a time on the CPU, in file order; stacks of equal shapes and dtypes on an accelerator."""
    if device.type == "cpu":
        yield from ([pair] for pair in pairs)
        return
    alike: dict[tuple, list[Pair]] = {}
    for a, b in pairs:
        alike.setdefault((matrix_shape(a), a.dtype, b.dtype), []).append((a, b))
    for same in alike.values():
        size = max(1, STACK_ENTRIES // same[0][0].numel)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def _load(base: Checkpoint, tuned: Checkpoint, group: list[Pair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stacks (b, m, n) of the group in their stored dtypes, on `device`."""
    shape = matrix_shape(group[0][0])
    stacks = (
        _stack([base[a.name].reshape(shape) for a, _ in group]),
        _stack([tuned[b.name].reshape(shape) for _, b in group]),
    )
    if device.type == "cuda":
        stacks = tuple(s.pin_memory() for s in stacks)
    return tuple(s.to(device, non_blocking=True) for s in stacks)  # type: ignore[return-value]


def _stack(matrices: list[Tensor]) -> Tensor:
    """(b, m, n), without a copy of a single matrix."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)
