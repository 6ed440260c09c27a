"""Base and tuned checkpoint, or an adapter file, to the spectrum of their difference, one parameter at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lineage.adapters import Factors, bind, is_adapter, open_adapter
from lineage.cache import begin, identify
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.claim import summarise
from lineage.errors import LineageError
from lineage.keys import Param
from lineage.layers import Facts, Seen, Sums
from lineage.pairs import Pair, comparable, difference, pick_device, stream_pairs
from lineage.results import LayerSpectrum, SvdResult, VectorDelta, provenance
from lineage.rounding import Noise
from lineage.spectrum import SOLVERS, Spectrum, exact_float32, solve_factors, solve_full

MODULE_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te2_": "text_encoder_2",
    "lora_te": "text_encoder",
    "unet.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
}
ROUNDED = (
    "The rounding edge counts the storage of both files. Where the tuned model was trained from the base as stored, "
    "only its own rounding is there, and the edge is conservative by up to a factor of 1.4."
)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """How `svd` measures; see there."""

    rank: int
    components: tuple[str, ...] | None
    solver: str
    device: torch.device
    tolerance: float
    progress: Progress | None

    def __post_init__(self):
        if self.rank < 1:
            raise LineageError(f"rank {self.rank}: give the largest k to report, 1 or more.")
        if not 1e-5 <= self.tolerance < 1:
            raise LineageError(f"tolerance {self.tolerance}: give the width of an energy interval, from 1e-5 to 1.")
        if self.solver not in SOLVERS:
            raise LineageError(f"solver {self.solver!r}: choose one of {', '.join(SOLVERS)}.")

    @property
    def ks(self) -> list[int]:
        """1, 2, 4, ... and the rank itself."""
        return sorted({2**i for i in range(self.rank.bit_length())} | {self.rank})

    def wants(self, component: str) -> bool:
        return self.components is None or component in self.components


@dataclass
class Found:
    """What has been measured so far. base_energy: name -> ||W_base||_F^2."""

    layers: list[LayerSpectrum] = field(default_factory=list)
    vectors: list[VectorDelta] = field(default_factory=list)
    unmatched: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base_energy: dict[str, float] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        """Take over what another part found."""
        self.layers += other.layers
        self.vectors += other.vectors
        self.unmatched += other.unmatched
        self.base_energy |= other.base_energy

    def leave_out(self, name: str, side: str, reason: str) -> None:
        self.unmatched.append({"name": name, "side": side, "reason": reason})


def svd(
    base: str | Path | None,
    tuned: str | Path,
    *,
    rank: int = 64,
    components: Sequence[str] | None = None,
    solver: str = "auto",
    device: str = "auto",
    tolerance: float = 1e-3,
    progress: Progress | None = None,
) -> SvdResult:
    """In how many ranks does `tuned` differ from `base`, layer by layer?

    rank: the largest k of the reported energies. components: only these (unet, text_encoder, ...). tolerance: width of
    the certified energy intervals that `auto` must reach. With an adapter file as `tuned`, `base` may be None.
    Raises LineageError for unreadable files, for models without a common parameter and for options out of range."""
    chosen = tuple(components) if components else None
    options = Options(rank, chosen, solver, pick_device(device), tolerance, progress)
    start = time.monotonic()
    paths = {"base": base, "tuned": tuned} if base is not None else {"tuned": tuned}
    begin(*paths.values())
    with exact_float32(), torch.inference_mode():
        found = _measure(base, tuned, options)
    inputs = {role: identify(path) for role, path in paths.items()}
    return SvdResult(
        provenance("svd", inputs, str(options.device), seconds=round(time.monotonic() - start, 3)),
        Path(base).name if base is not None else "",
        Path(tuned).name,
        rank,
        tolerance,
        summarise(found.layers, found.vectors, found.base_energy, rank),
        tuple(found.layers),
        tuple(found.vectors),
        tuple(found.unmatched),
        tuple(found.notes),
    )


def _measure(base: str | Path | None, tuned: str | Path, options: Options) -> Found:
    with ExitStack() as stack:
        model = stack.enter_context(open_checkpoint(base)) if base is not None else None
        if is_adapter(tuned):
            found = _measure_adapter(model, tuned, options)
        elif model is None:
            raise LineageError(f"{tuned}: is a whole model, so its base is needed: lineage svd BASE TUNED.")
        else:
            found = _measure_pair(model, stack.enter_context(open_checkpoint(tuned)), options)
    if not found.layers and not found.vectors:
        raise LineageError(
            f"{tuned}: nothing to compare: {len(found.unmatched)} parameters, none of them in both and wanted. "
            "`lineage inspect` shows what each file holds."
        )
    return found


def _measure_pair(base: Checkpoint, tuned: Checkpoint, options: Options) -> Found:
    wanted, unmatched = comparable(base, tuned, options.components)
    found = Found(unmatched=unmatched)
    if any(p.dtype.itemsize < 4 for pair in wanted for p in pair):
        found.notes.append(ROUNDED)
    total, done = sum(p.numel for p, _ in wanted), 0
    noise = Noise(options.device, max((p.numel for p, _ in wanted if len(p.shape) > 1), default=0))

    def work(group: list[Pair], base: Tensor, tuned: Tensor) -> Found:
        return _measure_group(group, base, tuned, noise, options)

    for group, part in stream_pairs(base, tuned, wanted, options.device, work):
        found.add(part)
        done += sum(p.numel for p, _ in group)
        if options.progress:
            options.progress(done, total, group[-1][0].name)
    order = {p.name: i for i, (p, _) in enumerate(wanted)}
    found.layers.sort(key=lambda layer: order[layer.name])
    found.vectors.sort(key=lambda vector: order[vector.name])
    return found


def _measure_group(group: list[Pair], base: Tensor, tuned: Tensor, noise: Noise, options: Options) -> Found:
    """What is found about each pair of the stacks (b, m, n)."""
    delta, sums = difference(base, tuned)
    facts = [Facts(param, s) for (param, _), s in zip(group, sums, strict=True)]
    found = Found()
    for fact in facts:
        if not fact.sums.finite:
            found.leave_out(fact.param.name, "both", "holds NaN or infinity in the base or in the tuned model")
    kept = [i for i, fact in enumerate(facts) if fact.sums.finite]
    found.base_energy.update({facts[i].param.name: facts[i].sums.base for i in kept})
    if len(group[0][0].shape) < 2:
        found.vectors += [facts[i].vector() for i in kept]
        return found
    found.layers += [facts[i].identical_layer(options.ks) for i in kept if facts[i].sums.delta == 0]
    changed = [i for i in kept if facts[i].sums.delta > 0]
    if changed:
        part = slice(None) if len(changed) == len(group) else changed
        found.layers += _spectra([facts[i] for i in changed], base[part], tuned[part], delta[part], noise, options)
    return found


def _spectra(
    facts: list[Facts], base: Tensor, tuned: Tensor, delta: Tensor, noise: Noise, options: Options
) -> list[LayerSpectrum]:
    edges, energies = (x.tolist() for x in noise.edges(base, tuned))
    spectra = SOLVERS[options.solver](delta, options.rank, edges, options.tolerance)
    rows = zip(facts, spectra, energies, edges, strict=True)
    return [f.layer(s, Seen.through(s, energy, e), options.ks) for f, s, energy, e in rows]


def _measure_adapter(model: Checkpoint | None, path: str | Path, options: Options) -> Found:
    """Spectra of an adapter's deltas, from its factors; relative to the base's weights where a base is given."""
    adapter = open_adapter(path)
    found = Found()
    if model is None:
        targets = [(name, _module(name, factors), factors) for name, factors in adapter.modules.items()]
    else:
        bound, found.unmatched = bind(adapter, model.specs)
        targets = [(name, model.specs[name], factors) for name, factors in bound.items()]
    targets = [t for t in targets if options.wants(t[1].component)]
    for done, (name, param, factors) in enumerate(targets, 1):
        weight = None if model is None else model[name].float()
        energy = 0.0 if weight is None else float(weight.square().sum(dtype=torch.float64))
        if weight is not None:
            found.base_energy[name] = energy
        if len(param.shape) < 2:
            total = float(factors.delta(weight).square().sum(dtype=torch.float64))
            found.vectors.append(Facts(param, Sums(energy, total, None)).vector())
        else:
            found.layers.append(_adapter_layer(param, energy, _factor_spectrum(factors, weight), options))
        if options.progress:
            options.progress(done, len(targets), name)
    return found


def _adapter_layer(param: Param, base: float, s: Spectrum, options: Options) -> LayerSpectrum:
    """The record of a delta that storage has not rounded; base: ||W_base||_F^2."""
    facts = Facts(param, Sums(base, s.total, None))
    return facts.layer(s, Seen.through(s, 0.0, 0.0), options.ks) if s.total else facts.identical_layer(options.ks)


def _factor_spectrum(factors: Factors, weight: Tensor | None) -> Spectrum:
    """From the factors where they are smaller than the delta, else from the delta."""
    pair = factors.left_right()
    if pair is not None:
        return solve_factors(*pair)
    return solve_full(factors.delta(weight).flatten(1)[None])[0]


def _module(name: str, factors: Factors) -> Param:
    """A stand-in for the base's parameter where no base is given: the adapter's own module name."""
    component = next((c for prefix, c in MODULE_COMPONENTS.items() if name.startswith(prefix)), "model")
    return Param(name, name, tuple(factors.shape), torch.float32, component, "", "")
