"""The web UI's merger on whole dictionaries, written from its described semantics; imports nothing of ours.

Each line reads its models from disk, merges, and saves; the next line reads that file back.
"""

from __future__ import annotations

import re
from pathlib import Path

import safetensors.torch
import torch

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
NAI = {
    f"cond_stage_model.transformer.{part}": f"cond_stage_model.transformer.text_model.{part}"
    for part in ("embeddings.", "encoder.", "final_layer_norm.")
}


def load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        found = safetensors.torch.load_file(path)
    else:
        found = torch.load(path, weights_only=True)
        found = dict(found.get("state_dict", found))
    return {
        next((new + k[len(old) :] for old, new in NAI.items() if k.startswith(old)), k): t for k, t in found.items()
    }


def weighted_sum(a, b, alpha):
    return ((1 - alpha) * a) + (alpha * b)


def add_difference(a, difference, alpha):
    return a + (alpha * difference)


def run_line(first, second, third, alpha, half):
    """theta_0 as the web UI leaves it."""
    formula = weighted_sum
    if third is not None:
        formula = add_difference
        for key in second:
            if key == POSITION_IDS or "model" not in key:
                continue
            second[key] = second[key] - third[key] if key in third else torch.zeros_like(second[key])
    for key in first:
        if "model" not in key or key not in second or key == POSITION_IDS:
            continue
        a, b = first[key], second[key]
        if a.shape != b.shape and a.shape[0:1] + a.shape[2:] == b.shape[0:1] + b.shape[2:]:
            assert a.shape[1] in (8, 9)
            assert b.shape[1] == 4
            first[key] = a.clone()
            first[key][:, 0:4, :, :] = formula(a[:, 0:4, :, :], b, alpha)
        else:
            first[key] = formula(a, b, alpha)
        if half and first[key].dtype == torch.float:
            first[key] = first[key].half()
    return first


def run(recipe: str, models: Path, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every line's output, by name; files are written to `folder` and read back between lines."""
    outputs: list[Path] = []
    for line in recipe.splitlines():
        line = line.split("#")[0].strip()
        if not line or line.startswith("_"):
            continue
        out, rest = (part.strip() for part in line.split("=", 1))
        operands, alpha, *flags = (part.strip() for part in rest.split(","))
        tensors = [load(_path(name.strip(), models, outputs)) for name in operands.split(" + ")]
        merged = run_line(
            tensors[0], tensors[1], tensors[2] if len(tensors) == 3 else None, float(alpha), "fp16" in flags
        )
        outputs.append(_save(merged, folder / out, "safetensors" if "safetensors" in flags else "ckpt"))
    return {path.stem: load(path) for path in outputs}


def _path(name: str, models: Path, outputs: list[Path]) -> Path:
    found = re.fullmatch(r"__O(\d+)__", name)
    if found:
        return outputs[int(found[1]) - 1]
    return next(p for p in models.iterdir() if name == p.stem)


def _save(tensors: dict[str, torch.Tensor], stem: Path, container: str) -> Path:
    path = stem.with_name(f"{stem.name}.{container}")
    if container == "safetensors":
        safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path
