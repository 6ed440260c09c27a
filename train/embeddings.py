"""New words for a base: learned beside a network while all else of the vocabulary is frozen (pivotal tuning), or read
from textual-inversion files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineage.checkpoint import open_checkpoint
from lineage.errors import FileError, LineageError
from train.config import NetworkConfig
from train.models import Base
from train.pipeline import write_tensors

KEYS = {"sd1": ("emb_params",), "sd2": ("emb_params",), "sdxl": ("clip_l", "clip_g")}
"""Names under which web UIs and ComfyUI read a word's vectors, one for each text encoder."""


class Words:
    """The words of config.pivotal, taught to a base: its tokenizers know them and its text encoders embed them.

    LineageError for what cannot be a new word."""

    def __init__(self, base: Base, config: NetworkConfig):
        self.base, self.names, self.count = base, config.pivotal, config.pivotal_vectors
        for name in self.names:
            _check(name, base.tokenizers[0], "network.pivotal")
        self._plain = base.tokenizers
        starts = [
            _start(encoder.get_input_embeddings(), tokenizer, config)
            for encoder, tokenizer in zip(base.text_encoders, base.tokenizers, strict=True)
        ]
        vectors = [start.repeat(len(self.names), 1) for start in starts]
        self._embeddings = _teach(base, dict.fromkeys(self.names, self.count), vectors)

    def parameters(self) -> list[nn.Parameter]:
        """One (words * vectors, width) float32 parameter for each text encoder."""
        return [embedding.new for embedding in self._embeddings]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """word -> {key: vectors (n, width)}, as its file holds them."""
        keys = KEYS[self.base.architecture]
        split = [e.new.detach().cpu().split(self.count) for e in self._embeddings]
        return {
            word: {key: parts[i].contiguous() for key, parts in zip(keys, split, strict=True)}
            for i, word in enumerate(self.names)
        }

    def save(self, place: Callable[[str], Path], metadata: Mapping[str, str]) -> None:
        """One textual-inversion file for each word, at place(word)."""
        for word, tensors in self.tensors().items():
            write_tensors(place(word), tensors, metadata)

    def remove(self) -> None:
        """Leave the base as it was."""
        self.base.tokenizers = self._plain
        for encoder, embedding in zip(self.base.text_encoders, self._embeddings, strict=True):
            encoder.set_input_embeddings(embedding.known)


def wear(base: Base, files: Sequence[Path]) -> None:
    """Teach a base the words of textual-inversion files, each named as its file, for good.

    LineageError where a file holds no vectors for these text encoders, or its name cannot be a new word."""
    if not files:
        return
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in base.text_encoders]
    words = {file.stem: _vectors(file, dict(zip(KEYS[base.architecture], widths, strict=True))) for file in files}
    for file in files:
        _check(file.stem, base.tokenizers[0], str(file))
    counts = {word: len(vectors[0]) for word, vectors in words.items()}
    _teach(base, counts, [torch.cat(parts) for parts in zip(*words.values(), strict=True)])


def _vectors(file: Path, widths: Mapping[str, int]) -> list[Tensor]:
    """One (vectors, width) for each text encoder, equally many."""
    with open_checkpoint(file) as checkpoint:
        found = [checkpoint.raw[key].clone() if key in checkpoint.raw.specs else None for key in widths]
    shapes = [None if f is None else tuple(f.shape) for f in found]
    counts = {shape[0] for shape in shapes if shape}
    if len(counts) != 1 or shapes != [(*counts, width) for width in widths.values()]:
        wanted = " and ".join(f"{key} (n, {width})" for key, width in widths.items())
        raise FileError(file, f"is no embedding for this model, which takes {wanted}.", "Was it made for another one?")
    return [f for f in found if f is not None]


def _teach(base: Base, counts: Mapping[str, int], vectors: Sequence[Tensor]) -> list[_Extended]:
    """Words of so many tokens each; `vectors`: (all of them, width) for each text encoder."""
    base.tokenizers = tuple(_Tokenizer(t, counts) for t in base.tokenizers)
    made = [
        _Extended(encoder.get_input_embeddings(), tokenizer.first, new.to(base.device))
        for encoder, tokenizer, new in zip(base.text_encoders, base.tokenizers, vectors, strict=True)
    ]
    for encoder, embedding in zip(base.text_encoders, made, strict=True):
        encoder.set_input_embeddings(embedding)
    return made


class _Extended(nn.Module):
    """An embedding whose rows from `first` on are parameters of their own."""

    def __init__(self, known: nn.Embedding, first: int, new: Tensor):
        super().__init__()
        self.known, self.first = known, first
        self.new = nn.Parameter(new.float().clone())

    @property
    def weight(self) -> Tensor:
        return self.known.weight

    def forward(self, ids: Tensor) -> Tensor:
        found = self.known(ids.clamp(max=self.first - 1))
        learned = self.new[(ids - self.first).clamp(min=0)].to(found.dtype)
        return torch.where((ids >= self.first)[..., None], learned, found)


class _Tokenizer:
    """A CLIP tokenizer for which each new word is so many tokens, numbered from `first` on in the words' order."""

    def __init__(self, plain: Any, counts: Mapping[str, int]):
        import copy

        from tokenizers import AddedToken

        self.inner, self.first = copy.deepcopy(plain), len(plain)
        spelt = {name: [name, *(f"{name}_{i}" for i in range(1, count))] for name, count in counts.items()}
        for parts in spelt.values():
            self.inner.add_tokens([AddedToken(part, single_word=True, normalized=True) for part in parts])
        self._spelt = {name.casefold(): " ".join(parts) for name, parts in spelt.items()}
        self._any = re.compile(
            rf"(?<!\w)({'|'.join(map(re.escape, sorted(counts, key=len, reverse=True)))})(?!\w)", re.I
        )

    def __call__(self, prompts: Sequence[str], **options: Any) -> Any:
        spelt = [self._any.sub(lambda m: self._spelt[m[0].casefold()], prompt) for prompt in prompts]
        return self.inner(spelt, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _check(word: str, tokenizer: Any, where: str) -> None:
    if not re.fullmatch(r"\w[\w-]*", word):
        raise LineageError(
            f"{where}: {word!r} cannot be a new word: only a single one of letters, digits, _ and - can."
        )
    if len(tokenizer(word).input_ids) == 3:
        raise LineageError(f"{where}: {word!r} cannot be a new word: CLIP knows it already. Choose another name.")


def _start(known: nn.Embedding, tokenizer: Any, config: NetworkConfig) -> Tensor:
    """(vectors, width): those of the words in pivotal_init, in turn, or the mean of all."""
    if not config.pivotal_init:
        return known.weight.detach().mean(0, keepdim=True).repeat(config.pivotal_vectors, 1)
    ids = tokenizer(config.pivotal_init).input_ids[1:-1]
    return known.weight.detach()[[ids[i % len(ids)] for i in range(config.pivotal_vectors)]]
