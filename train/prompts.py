"""Prompts with weights, in the notation of the web UI, and their text states.

(tag) counts 1.1 times, (tag:1.3) 1.3 times, [tag] 1 / 1.1 times; brackets nest and multiply, what is not closed lasts
to the end, and a backslash before a bracket makes it plain. Weights multiply the states of their tokens, then all
states are scaled so that their mean is what it was. Prompts longer than 75 tokens are encoded in chunks; a chunk ends
at a comma among its last 20 tokens, if there is one, and at the word BREAK.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

STEP = 1.1
CHUNK, BACK = 75, 20
_PARTS = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|[:\\]")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")

CENTRED = 0.01
"""Of the standard deviation: a smaller mean says nothing."""

Weighted = list[tuple[int, float]]
"""Token numbers, each with its weight."""


def parse(prompt: str) -> list[tuple[str, float]]:
    """Pieces of text in order, each with its weight; neighbours of one weight are joined. Takes any text."""
    pieces: list[tuple[str, float]] = []
    open_at: list[tuple[str, int]] = []
    for part in _PARTS.finditer(prompt):
        text, weight = part[0], part[1]
        closed = "(" if weight else {")": "(", "]": "["}.get(text)
        if text in ("(", "["):
            open_at.append((text, len(pieces)))
        elif closed and any(bracket == closed for bracket, _ in open_at):
            _scale(pieces, _close(open_at, closed), float(weight) if weight else _factor(closed))
        else:
            pieces.append((text[1:] if text[0] == "\\" else text, 1.0))
    for bracket, start in open_at:
        _scale(pieces, start, _factor(bracket))
    return _joined(pieces)


def _factor(bracket: str) -> float:
    return STEP if bracket == "(" else 1 / STEP


def _close(open_at: list[tuple[str, int]], bracket: str) -> int:
    """Where the innermost `bracket` opened; it is not open any more."""
    at = max(i for i, (found, _) in enumerate(open_at) if found == bracket)
    return open_at.pop(at)[1]


def _scale(pieces: list[tuple[str, float]], start: int, factor: float) -> None:
    pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]


def _joined(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined


def chunks(tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token numbers and weights (chunks, n, 77): as many chunks for each prompt as the longest needs, at least one."""
    cut = [_cut(tokenizer, prompt) for prompt in prompts]
    count = max(map(len, cut))
    rows = [[_row(tokenizer, parts[c] if c < len(parts) else []) for parts in cut] for c in range(count)]
    ids, weights = zip(*(zip(*row, strict=True) for row in rows), strict=True)
    return torch.tensor(ids), torch.tensor(weights)


def _cut(tokenizer: Any, prompt: str) -> list[Weighted]:
    """At least one chunk of at most CHUNK tokens."""
    [comma] = _ids(tokenizer, ",")
    done: list[Weighted] = []
    current: Weighted = []
    for token, weight in _tokens(tokenizer, prompt):
        if token is None:
            done.append(current)
            current = []
            continue
        if len(current) == CHUNK:
            end = CHUNK if token == comma else _end(current, comma)
            done.append(current[:end])
            current = current[end:]
        current.append((token, weight))
    return [*done, current] if current or not done else done


def _end(full: Weighted, comma: int) -> int:
    """Behind the last comma of a full chunk, if that is among its last tokens; else its end."""
    return next((i + 1 for i in range(CHUNK - 1, CHUNK - 1 - BACK, -1) if full[i][0] == comma), CHUNK)


def _tokens(tokenizer: Any, prompt: str) -> Iterator[tuple[int | None, float]]:
    """Numbers with weights; None for a BREAK."""
    for text, weight in parse(prompt):
        for n, part in enumerate(_BREAK.split(text)):
            yield from [(None, 1.0)] if n else []
            yield from ((i, weight) for i in _ids(tokenizer, part))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer([text], add_special_tokens=False, verbose=False).input_ids[0]


def _row(tokenizer: Any, part: Weighted) -> tuple[list[int], list[float]]:
    """One chunk between its start and end tokens, filled up."""
    rest = CHUNK - len(part)
    ids = [tokenizer.bos_token_id, *(i for i, _ in part), tokenizer.eos_token_id, *[tokenizer.pad_token_id] * rest]
    return ids, [1.0, *(w for _, w in part), *[1.0] * (rest + 1)]


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """States (n, tokens, width) times the weights (n, tokens) of their tokens, their mean restored for each prompt; not
    where that mean is next to nothing beside the states, so that the quotient of two means would be noise."""
    weights = weights.to(states.device)
    if bool((weights == 1).all()):
        return states
    scaled = states.float() * weights[..., None]
    mean, now = (z.mean((1, 2), keepdim=True) for z in (states.float(), scaled))
    told = torch.minimum(mean.abs(), now.abs()) > CENTRED * scaled.std((1, 2), keepdim=True)
    return torch.where(told, scaled * (mean / now), scaled).to(states.dtype)
