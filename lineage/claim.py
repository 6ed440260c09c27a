"""The article's claim, put to the layers: does the change of a fine-tune live in fewer than 64 ranks?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from lineage.results import Group, LayerSpectrum, SvdSummary, VectorDelta, Within

EnergyAt = Callable[[LayerSpectrum], float | None]


def summarise(
    layers: Sequence[LayerSpectrum], vectors: Sequence[VectorDelta], base_energy: Mapping[str, float], k: int
) -> SvdSummary:
    """Summary over all layers. base_energy: name -> ||W_base||_F^2, empty where no base was given."""
    big = [layer for layer in layers if _short_side(layer) > k]
    changed = [layer for layer in big if layer.frobenius > 0]
    everything = [*layers, *vectors]
    known = [layer.signal_rank for layer in changed if layer.signal_rank is not None]
    signal, raw = _within(changed, signal_at(k)), _within(changed, raw_at(k))
    gaussian = _within(changed, lambda layer: layer.gaussian_energy[str(k)])
    return SvdSummary(
        k=k,
        answer=_answer(k, len(big), len(changed), signal, raw, gaussian),
        signal=signal,
        raw=raw,
        gaussian=gaussian,
        median_signal_rank=float(median(known)) if known else None,
        signal_rank_unknown=len(changed) - len(known),
        matrices=len(big),
        small_matrices=len(layers) - len(big),
        vectors=len(vectors),
        identical_matrices=sum(layer.frobenius == 0 for layer in layers),
        identical_vectors=sum(v.frobenius == 0 for v in vectors),
        frobenius=sum(x.frobenius**2 for x in everything) ** 0.5,
        relative=_relative(everything, base_energy),
        components=_groups(layers, vectors, base_energy, k, lambda x: x.component),
        blocks=_groups(layers, vectors, base_energy, k, lambda x: f"{x.component} {x.block}"),
    )


def raw_at(k: int) -> EnergyAt:
    """Energy at k of the raw delta, rounding noise included."""
    return lambda layer: layer.energy[str(k)].value


def signal_at(k: int) -> EnergyAt:
    """Energy at k of what stands out of the rounding noise; None where nothing does."""
    return lambda layer: layer.signal_energy[str(k)] if layer.signal_energy else None


def _short_side(layer: LayerSpectrum) -> int:
    return min(layer.shape[0], layer.entries // layer.shape[0])


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _within(layers: Iterable[LayerSpectrum], energy_at: EnergyAt) -> Within:
    """Only layers whose energy is known count; weights are their delta energies."""
    rows = [(e, layer.frobenius**2) for layer in layers if (e := energy_at(layer)) is not None]
    total = sum(w for _, w in rows)

    def layers_above(share: float) -> float | None:
        return _share(sum(e >= share for e, _ in rows), len(rows))

    def energy_above(share: float) -> float | None:
        return _share(sum(w for e, w in rows if e >= share), total)

    return Within(
        len(rows),
        layers_above(0.9),
        layers_above(0.99),
        energy_above(0.9),
        energy_above(0.99),
        _share(sum(e * w for e, w in rows), total),
    )


def _relative(parts: Iterable[LayerSpectrum | VectorDelta], base_energy: Mapping[str, float]) -> float | None:
    known = [p for p in parts if p.name in base_energy]
    share = _share(sum(p.frobenius**2 for p in known), sum(base_energy[p.name] for p in known))
    return None if share is None else share**0.5


def _groups(
    layers: Sequence[LayerSpectrum],
    vectors: Sequence[VectorDelta],
    base_energy: Mapping[str, float],
    k: int,
    key: Callable[[LayerSpectrum | VectorDelta], str],
) -> dict[str, Group]:
    members: dict[str, list[LayerSpectrum | VectorDelta]] = {}
    for part in (*layers, *vectors):
        members.setdefault(key(part), []).append(part)
    return {name: _group(parts, base_energy, k) for name, parts in members.items()}


def _group(parts: list[LayerSpectrum | VectorDelta], base_energy: Mapping[str, float], k: int) -> Group:
    layers = [p for p in parts if isinstance(p, LayerSpectrum)]
    ranks = [p.signal_rank for p in layers if p.signal_rank is not None and p.frobenius > 0]
    return Group(
        layers=len(layers),
        frobenius=sum(p.frobenius**2 for p in parts) ** 0.5,
        relative=_relative(parts, base_energy),
        energy=_within(layers, raw_at(k)).mean_energy,
        signal_energy=_within(layers, signal_at(k)).mean_energy,
        median_signal_rank=float(median(ranks)) if ranks else None,
        identical_layers=sum(p.frobenius == 0 for p in layers),
    )


def _percent(share: float | None) -> str:
    return "0 %" if not share else "under 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _answer(k: int, big: int, changed: int, signal: Within, raw: Within, gaussian: Within) -> str:
    """One sentence; from signal energies where there are any."""
    if not big:
        return f"No matrix here has a short side above {k}, so the question does not arise."
    if not changed:
        return f"All {big} matrices with a short side above {k} are bit-identical."
    if not signal.layers:
        return f"The change of all {changed} matrices lies below storage precision: its rank cannot be told."
    rest = changed - signal.layers
    return (
        f"In {_percent(signal.layers_90)} of {signal.layers} matrices at least 90 % of the change lies within {k} "
        f"ranks, and in {_percent(signal.layers_99)} at least 99 %; on average {_percent(signal.mean_energy)} of the "
        f"change does ({_percent(raw.mean_energy)} with rounding noise counted, {_percent(gaussian.mean_energy)} for "
        f"pure noise)." + (f" {rest} more changed by less than storage precision can show." if rest else "")
    )
