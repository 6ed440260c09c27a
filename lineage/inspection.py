"""What is in a file, from its header and its bytes' hash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lineage.adapters import is_adapter, kind_of
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.hashing import sha256, short_hash, size
from lineage.keys import Param
from lineage.raw import Spec
from lineage.results import ComponentFacts, InspectResult, provenance

PREFIXED = ("unet", "vae", "text_encoder", "text_encoder_2")
RECORDS = ("sd_merge_recipe", "sd_merge_models", "mecha_recipe")
RECORD_PREFIXES = ("modelspec.", "ss_", "sshs_")


def inspect(path: str | os.PathLike) -> InspectResult:
    """Layout, architecture, prediction type, components, dtypes, hashes and metadata of a model or adapter file.

    Tensors are not read, except for the hashes. FileError where it cannot be read."""
    path = Path(path)
    with open_checkpoint(path) as checkpoint:
        adapter = is_adapter(path)
        return InspectResult(
            provenance("inspect", {"file": {"path": path.name}}),
            name=path.name,
            layout="adapter" if adapter else checkpoint.layout,
            architecture=f"adapter:{kind_of(checkpoint.raw)}" if adapter else checkpoint.architecture,
            prediction_type=checkpoint.prediction_type,
            zero_terminal_snr=checkpoint.zero_terminal_snr,
            bytes=size(path),
            sha256=sha256(path),
            short_hash=short_hash(path) if path.is_file() else None,
            components=_components(checkpoint),
            tensors=len(checkpoint.raw),
            parameters=sum(p.numel for p in checkpoint.specs.values()),
            dtypes=_dtypes(checkpoint.raw.specs.values()),
            metadata=checkpoint.metadata,
            records=_records(checkpoint.metadata),
            notes=tuple(_notes(checkpoint)),
        )


def _components(checkpoint: Checkpoint) -> dict[str, ComponentFacts]:
    members: dict[str, list[Param]] = {}
    for param in checkpoint.specs.values():
        members.setdefault(param.component, []).append(param)
    found = {
        name: ComponentFacts(len(params), sum(p.numel for p in params), _dtypes(params))
        for name, params in members.items()
    }
    if checkpoint.ema:
        ema = [checkpoint.raw.specs[name] for name in checkpoint.ema]
        found["ema"] = ComponentFacts(len(ema), sum(s.nbytes // s.dtype.itemsize for s in ema), _dtypes(ema))
    return found


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    """What a user of the file should know and the other fields do not say."""
    first = checkpoint.specs.get("unet.conv_in.weight")
    special = {8: "an edit (pix2pix) model", 9: "an inpainting model"}
    if first and len(first.shape) == 4 and first.shape[1] in special:
        yield f"The UNet has {first.shape[1]} input channels: {special[first.shape[1]]}."
    if checkpoint.ema:
        yield f"{len(checkpoint.ema)} tensors are EMA copies: left out of analysis, kept by merges."
    if any(p.stored.startswith("cond_stage_model.model.") for p in checkpoint.specs.values()):
        yield "The text encoder is OpenCLIP in one file: SD2 does not use its last layer, diffusers drops it."
    renamed = [n for n, p in checkpoint.specs.items() if n == p.stored and p.component in PREFIXED]
    if checkpoint.layout == "ldm" and renamed:
        yield f"{len(renamed)} tensors are there twice under old and new names, such as {renamed[0][:200]!r}."


def _dtypes(specs: Iterable[Spec | Param]) -> dict[str, int]:
    """dtype -> how many tensors have it."""
    counts: dict[str, int] = {}
    for spec in specs:
        name = str(spec.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + 1
    return counts


def _records(metadata: dict[str, str]) -> dict[str, object]:
    """The entries that tell where a file comes from; JSON is read where it is JSON."""
    chosen = {k: v for k, v in metadata.items() if k in RECORDS or k.startswith(RECORD_PREFIXES)}
    return {k: _parsed(v) for k, v in sorted(chosen.items())}


def _parsed(text: str) -> object:
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
