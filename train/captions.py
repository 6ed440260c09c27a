"""Captions as lists of tags: which tags stay first, which are taken out, and what one training step shows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lineage.errors import FileError
from train.config import DataConfig

SUFFIXES = (".txt", ".caption")
LONGEST = 1 << 16
"""Bytes of a caption file; CLIP reads some 300."""


@dataclass(frozen=True)
class Caption:
    """`kept` tags (trigger words among them) that always stand first, in their order, and `free` ones."""

    kept: tuple[str, ...]
    free: tuple[str, ...]

    @property
    def tags(self) -> tuple[str, ...]:
        return self.kept + self.free

    def drawn(self, data: DataConfig, random: Random) -> str:
        """What one step shows: free tags dropped and shuffled as `data` says; or nothing, where the caption is dropped.

        Takes the same number of draws from `random` whatever is drawn."""
        chances = [random.random() for _ in range(1 + len(self.free))]
        order = random.sample(range(len(self.free)), len(self.free))
        if chances[0] < data.caption_dropout:
            return ""
        order = order if data.shuffle else sorted(order)
        return ", ".join((*self.kept, *(self.free[i] for i in order if chances[1 + i] >= data.tag_dropout)))


def read_caption(picture: Path, class_tokens: str) -> str:
    """The first line of the .txt or .caption file beside `picture`, or the class tokens. FileError if unreadable."""
    for file in map(picture.with_suffix, SUFFIXES):
        try:
            with open(file, "rb") as stream:
                text = stream.read(LONGEST + 1)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise FileError(file, f"cannot be read: {e.strerror}.") from e
        if len(text) > LONGEST:
            raise FileError(file, "is too long for a caption.", "One line of tags is expected.")
        return _decoded(file, text)
    return class_tokens


def _decoded(file: Path, text: bytes) -> str:
    try:
        return next((line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()), "")
    except UnicodeDecodeError as e:
        raise FileError(file, f"is not UTF-8 text (byte {e.start}).", "Save it as UTF-8.") from e


def parse(text: str, data: DataConfig) -> Caption:
    """Split at commas, prune, and put the first data.keep_tokens tags and all trigger words first, as they come."""
    tags = pruned(filter(None, (tag.strip() for tag in text.split(","))), data.prune)
    triggers = set(map(plain, data.trigger_words))
    stays = [i < data.keep_tokens or plain(tag) in triggers for i, tag in enumerate(tags)]
    kept, free = ([tag for tag, s in zip(tags, stays, strict=True) if s is side] for side in (True, False))
    return Caption(tuple(kept), tuple(free))


def pruned(tags: Iterable[str], prune: Mapping[str, Iterable[str]]) -> list[str]:
    """`tags` without those that ought to attach to a trigger that stands among them ("*" always does)."""
    tags = list(tags)
    there = {*map(plain, tags), "*"}
    out = {plain(tag) for trigger, listed in prune.items() if plain(trigger) in there for tag in listed}
    return [tag for tag in tags if plain(tag) not in out]


def plain(tag: str) -> str:
    """A tag as it is compared: `White_Hair` is `white hair`."""
    return tag.strip().replace("_", " ").casefold()
