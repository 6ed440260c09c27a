"""The folder of one training run: its settings, log, states, samples and files. The same settings continue or are done,
others are refused; every file appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lineage.errors import FileError, LineageError
from lineage.results import write_files
from lineage.target import Target
from train.config import Config

CONFIG, LOG, STATE = "config.toml", "log.jsonl", "state.pt"


class RunFolder:
    """The files of `config` in config.save.folder. LineageError where the folder holds something else."""

    def __init__(self, config: Config):
        self.path, self.config = config.save.folder, config
        if (self.path / CONFIG).exists():
            self._compare(Config.read(self.path / CONFIG))
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileError(self.path, "is not empty and not the folder of a training run.", "Name another with -o.")

    def _compare(self, there: Config) -> None:
        """Refuses another run; where the folder itself lies does not matter."""
        here = Config.parse(self.config.to_toml(), Path())
        old, new = (replace(c, save=replace(c.save, folder=Path())).changed() for c in (there, here))
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if differing:
            told = "; ".join(f"{k} is {_told(old, k)} there and {_told(new, k)} here" for k in differing[:3])
            raise LineageError(f"{self.path}: holds another run ({told}). Name another folder with -o.")

    @property
    def done(self) -> bool:
        """Whether the run has ended: its adapter is written last."""
        return self.adapter().exists()

    def adapter(self, step: int | None = None) -> Path:
        """The adapter after `step`, or the final one."""
        return self.path / f"{self._stem(step)}.safetensors"

    def embedding(self, word: str, step: int | None = None) -> Path:
        """A new word's vectors. Web UIs take the file's name for the word."""
        return self.path / (f"{word}.safetensors" if step is None else f"{word}-{step:06d}.safetensors")

    def sample(self, step: int, prompt: int, seed: int) -> Path:
        return self.path / "samples" / f"{self._stem(step)}-prompt{prompt + 1}-seed{seed}.png"

    def _stem(self, step: int | None) -> str:
        return self.config.name if step is None else f"{self.config.name}-{step:06d}"

    def begin(self) -> None:
        """Write the settings as they were resolved."""
        if not (self.path / CONFIG).exists():
            write_files(self.path, {CONFIG: self.config.to_toml()})

    def load(self) -> dict[str, Any] | None:
        """The last state, or None; the log is cut to it."""
        import torch

        file = self.path / STATE
        state = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
        self._cut(state["step"] if state else 0)
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the last state; what is in it must be tensors and plain values."""
        import torch

        with Target(self.path / STATE) as target:
            torch.save(dict(state), target.file)
            target.sync()
            target.commit()

    def finish(self) -> None:
        """The run has ended: no state is needed any more."""
        with suppress(OSError):
            (self.path / STATE).unlink(missing_ok=True)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        with open(self.path / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _cut(self, steps: int) -> None:
        """Keep the log's first `steps` lines: what follows the last state is done again."""
        file = self.path / LOG
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(True) if file.exists() else []
        if len(lines) > steps:
            write_files(self.path, {LOG: "".join(lines[:steps])}, force=True)


def _told(settings: Mapping[str, Any], key: str) -> Any:
    return settings.get(key, "the default")
