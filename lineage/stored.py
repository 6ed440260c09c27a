"""What every reader of a model file offers: stored names, specs from headers, tensors on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DAMAGED = "The file is damaged or incomplete: get it anew."


@dataclass(frozen=True)
class Spec:
    """One stored tensor. offset: of its first byte in the file, None where the bytes do not lie there in the open."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None = None


class Raw(Mapping[str, Tensor]):
    """Stored name -> tensor, over one file or several; specs from headers; order by file and offset."""

    specs: dict[str, Spec]
    metadata: dict[str, str]

    @property
    def order(self) -> list[str]:
        """Names in the order of their bytes."""
        return list(self.specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def close(self) -> None:
        """Let go of the file."""
