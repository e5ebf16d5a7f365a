"""Counter-based random numbers: a hash of (seed, chain, iteration), in wrapping 32-bit integer arithmetic.

Nothing is drawn in sequence, so that a chain's numbers do not depend on the batch, on the order of the
scenarios or on where a run was stopped; scenarios share the stream. The mixer is a multiply-xorshift
permutation of 32-bit words ("lowbias32" family, C. Wellons, Prospecting for Hash Functions, 2018, with the
improved constants found there). Only integer operations and one table of logarithms are used, so that
compiled and eager code agree to the bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_FIRST = 0x21F0AAAD
_SECOND = 0xD35A2D97 - (1 << 32)
_OTHER = 0x5BD1E995
LEVELS = 1 << 16


def mix(word: Tensor) -> Tensor:
    """Permute int32 words so that every input bit changes every output bit with probability near a half; any shape."""
    word = word ^ ((word >> 16) & 0xFFFF)
    word = word * _FIRST
    word = word ^ ((word >> 15) & 0x1FFFF)
    word = word * _SECOND
    return word ^ ((word >> 15) & 0x1FFFF)


def seed_word(seed: int) -> int:
    """A signed 32-bit word from an integer seed of any size (splitmix64 finaliser, low half)."""
    word = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return ((word ^ (word >> 31)) & 0xFFFFFFFF) - (1 << 31)


def chain_words(chains: int, device: torch.device) -> Tensor:
    """One word a chain, shape (R,), int32.

    Args:
        chains: Chains R of a scenario.
        device: Where they go.
    """
    return mix(torch.arange(1, chains + 1, dtype=torch.int32, device=device) * 0x3C6EF372)


def iteration_words(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """One word an iteration, shape (count, 1), int32; negative iterations are for starting points.

    Args:
        seed: Any integer.
        first: First iteration.
        count: Iterations from there on.
        device: Where they go.
    """
    counter = torch.arange(first, first + count, dtype=torch.int64).to(torch.int32)
    return mix(mix(counter) ^ seed_word(seed)).to(device)[:, None]


def words(chain: Tensor, iteration: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent words for every iteration and chain, each of shape (T, R), int32.

    Args:
        chain: Words of the chains, shape (R,), int32.
        iteration: Words of the iterations, shape (T, 1), int32.
    """
    first = mix(chain ^ iteration)
    return first, mix(first ^ _OTHER)


def below(word: Tensor, limit: Tensor | int) -> Tensor:
    """A whole number in [0, limit) from the low 16 bits of a word; ``limit`` is at most 32,767.

    Args:
        word: Any shape, int32.
        limit: At most 32,767, a number or a tensor that broadcasts.
    """
    return ((word & 0xFFFF) * limit) >> 16


@lru_cache(maxsize=4)
def _log_table(device: torch.device) -> Tensor:
    level = torch.arange(LEVELS, dtype=torch.float64)
    return ((level + 0.5) / LEVELS).log().float().to(device)


def log_table(device: torch.device) -> Tensor:
    """log u at the 65,536 values of u that acceptance compares with, shape (65536,), float32."""
    return _log_table(device)


def draws(
    chain: Tensor, iteration: Tensor, limit: Tensor, reach: Tensor, far: Tensor, logs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What every chain proposes at T iterations, before its state is known.

    Args:
        chain: Words of the chains, shape (R,).
        iteration: Words of the iterations, shape (T, 1).
        limit: Number of options of each iteration's move, shape (T, 1), int32.
        reach: Longest step to a neighbouring option, shape (T, 1), int32.
        far: How many of 8 proposals go anywhere, shape (T, 1), int32.
        logs: :func:`log_table`.

    Returns:
        ``jump``, the option proposed or −1 where a neighbour is; ``shift``, the signed step to that
        neighbour; ``threshold``, the log of a uniform number, with which the Metropolis rule compares. Each
        of shape (T, R).
    """
    first, second = words(chain, iteration)
    anywhere = ((first >> 17) & 7) < far
    jump = torch.where(anywhere, below(first, limit), -1)
    shift = (1 + below(first, reach)) * (((first >> 19) & 2) - 1)
    return jump, shift, logs[(second & 0xFFFF).long()]
