"""`lineage resize`: an adapter of fewer ranks from one of more, without the model; compression after training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lineage.adapters import Adapter, Factors, open_adapter, save_adapter
from lineage.cache import identify
from lineage.errors import FileError, LineageError
from lineage.extract_result import AdaptedLayer, AdapterResult
from lineage.extraction import DTYPES, check_output, identify_output, loha, low_rank, relative_error
from lineage.factors import factors
from lineage.results import provenance
from lineage.spectrum import exact_float32

Progress = Callable[[int, int, str], None]
COMPONENTS = {"lora_unet_": "unet", "lora_te2_": "text_encoder_2", "lora_te": "text_encoder"}


@dataclass(frozen=True)
class Size:
    """How many ranks a module keeps: at most `rank`; or the fewest that hold the share `energy` of its squared sum; or
    those whose singular value is at least the largest divided by `ratio`."""

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None

    def __post_init__(self):
        if sum(x is not None for x in (self.rank, self.energy, self.ratio)) != 1:
            raise LineageError("say by one thing how many ranks to keep: --rank, --energy or --ratio.")
        if self.rank is not None and self.rank < 1:
            raise LineageError(f"rank {self.rank}: a rank must be 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise LineageError(f"energy {self.energy}: give a share, above 0 and up to 1.")
        if self.ratio is not None and not self.ratio >= 1:
            raise LineageError(
                f"ratio {self.ratio}: give the largest singular value over the smallest kept, 1 or more."
            )

    @property
    def words(self) -> str:
        if self.energy is not None:
            return f"{100 * self.energy:g} % of each module's squared sum"
        return (
            f"rank {self.rank}" if self.rank is not None else f"singular values within 1/{self.ratio:g} of the largest"
        )

    def keeps(self, s: Tensor) -> int:
        """How many of the singular values `s` (descending, s[0] > 0)."""
        if self.rank is not None:
            return min(self.rank, len(s))
        if self.energy is not None:
            held = s.square().cumsum(0) / s.square().sum()
            return min(int((held < self.energy).sum()) + 1, len(s))
        return int((s >= s[0] / (self.ratio or 1)).sum())


def resize(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    kind: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> AdapterResult:
    """Write `adapter` (LoRA, LoCon, LoHa, LoKr) again with fewer ranks, chosen as `Size` says.

    kind: locon (also what a LoRA becomes; the default), or loha, which keeps a LoHa a LoHa by least squares. The
    singular values come from a QR of the factors, so a LoCon's error is the least possible; the scale goes into the
    factors (alpha = rank). Whole differences are copied. dtype: of the new factors, default as in the file.
    LineageError for what is no adapter, for DoRA, whose change depends on the base, and for a wrong option."""
    wanted, began, output = Size(rank, energy, ratio), time.monotonic(), check_output(output, force)
    if kind not in (None, "locon", "loha") or (dtype is not None and dtype not in DTYPES):
        raise LineageError(f"kind {kind}, dtype {dtype}: choose locon or loha, and one of {', '.join(DTYPES)}.")
    source = open_adapter(adapter)
    modules: dict[str, Factors] = {}
    layers: list[AdaptedLayer] = []
    with exact_float32(), torch.inference_mode():
        for done, (name, old) in enumerate(source.modules.items(), 1):
            modules[name] = old
            if old.kind != "diff":
                modules[name], layer = _resized(source.path, name, old, wanted, kind == "loha", dtype)
                layers.append(layer)
            if progress:
                progress(done, len(source.modules), name)
    save_adapter(output, modules, _metadata(source, layers, kind or "locon"))
    seconds = round(time.monotonic() - began, 3)
    return AdapterResult(
        provenance=provenance("resize", {"adapter": identify(source.path)}, seconds=seconds),
        **identify_output(output),
        source=source.path.name,
        base="",
        algorithm=kind or "locon",
        criterion=wanted.words,
        dtype=dtype or "as stored",
        kept=_kept(layers),
        layers=tuple(layers),
        left_out=(),
    )


def _resized(
    path: Path, name: str, old: Factors, wanted: Size, hadamard: bool, dtype: str | None
) -> tuple[Factors, AdaptedLayer]:
    if old.needs_weight:
        raise FileError(
            path, f"module {name} is DoRA, whose change depends on the base.", "It cannot be resized alone."
        )
    delta = old.delta().flatten(1)
    u, s, vh = _triples(old, delta)
    count = wanted.keeps(s) if s[0] > 0 else 1
    dim = math.ceil(math.sqrt(count)) if hadamard and wanted.rank is None else count
    root = s[:dim].sqrt()
    tensors = loha(delta, dim) if hadamard else low_rank(u[:, :dim] * root, root[:, None] * vh[:dim], old.shape)
    stored = DTYPES[dtype] if dtype else next(iter(old.tensors.values())).dtype
    new = factors({slot: t.to(stored).contiguous() for slot, t in tensors.items()}, dim).shaped(old.shape)
    norm = float(s.norm())
    layer = AdaptedLayer(
        name=name,
        module=name,
        component=next((c for prefix, c in COMPONENTS.items() if name.startswith(prefix)), "model"),
        block="",
        shape=tuple(old.shape),
        rank=dim,
        wanted=wanted.rank if wanted.rank is not None and wanted.rank > dim else None,
        relative=None,
        frobenius=norm,
        error=relative_error(delta, new) if norm else 0.0,
        best_error=float(s[dim**2 :].norm()) / norm if hadamard and norm else None,
    )
    return new, layer


def _triples(old: Factors, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u (m, k), s (k,), vh (k, n)) of the delta, from a QR of thin factors where there are some; float64."""
    pair = old.left_right()
    if pair is None:
        return torch.linalg.svd(delta.double(), full_matrices=False)
    left, right = (torch.linalg.qr(side.double()) for side in (pair[0], pair[1].mT))
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return left.Q @ u, s, vh @ right.Q.mT


def _kept(layers: list[AdaptedLayer]) -> float | None:
    total = sum(layer.frobenius**2 for layer in layers)
    return 1 - sum((layer.error * layer.frobenius) ** 2 for layer in layers) / total if total else None


def _metadata(source: Adapter, layers: list[AdaptedLayer], kind: str) -> Mapping[str, str]:
    """The source's records, with the new kind and ranks."""
    ranks = {layer.rank for layer in layers}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    changed = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": f'{{"algo": "{kind}", "conv_dim": "{dim}", "conv_alpha": "{dim}"}}',
    }
    kept = {k: v for k, v in source.metadata.items() if not k.startswith("sshs_")}
    return {"format": "pt", **kept, **changed}
