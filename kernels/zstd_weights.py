"""Weights of Huffman codes, as a Zstandard frame holds those of more than 128 symbols: coded by FSE, tabled ANS.

A weight is 0 where a symbol does not occur, else one more than the bits by which its code is shorter than the longest.

    u4 (accuracy - 5), frequencies of the weights in as many bits as can still be needed, then their stream, backwards

Reference: RFC 8878, sections 4.1 and 4.2.1.
"""

from typing import Any

import numpy as np
from numba import njit

__all__ = ["compress_weights"]

_ACCURACY = 6
_STATES = 1 << _ACCURACY
_KINDS = 13
# what a byte can say
_MOST_BYTES = 127


@njit(nogil=True, cache=True, error_model="numpy")
def compress_weights(weights: Any, out: Any) -> int:
    """Coded weights [n] to ``out``, of 256 bytes at least; how many bytes, or 0 where they cannot be coded so."""
    counts = np.zeros(_KINDS, np.int64)
    for weight in weights:
        counts[weight] += 1
    if counts.max() > weights.size - 2:
        return 0
    frequency = _frequencies(counts, weights.size)
    out[:256] = 0
    head = (_describe(frequency, out) + 7) // 8
    size = head + _stream(weights, frequency, out[head:256])
    return size if size <= _MOST_BYTES else 0


@njit(nogil=True, cache=True, error_model="numpy")
def _frequencies(counts: Any, total: int) -> Any:
    """How many of 64 states each weight gets: at least one, if it occurs."""
    frequency = np.zeros(_KINDS, np.int64)
    for kind in range(_KINDS):
        if counts[kind]:
            frequency[kind] = max(1, (counts[kind] * _STATES + total // 2) // total)
    while frequency.sum() != _STATES:
        frequency[np.argmax(frequency)] += 1 if frequency.sum() < _STATES else -1
    return frequency


@njit(nogil=True, cache=True, error_model="numpy")
def _put(out: Any, position: int, value: int, width: int) -> int:
    """Bits to where there are zeros; the next position."""
    for i in range(position, position + width):
        out[i >> 3] |= (value & 1) << (i & 7)
        value >>= 1
    return position + width


@njit(nogil=True, cache=True, error_model="numpy")
def _describe(frequency: Any, out: Any) -> int:
    """Frequencies to ``out``; how many bits."""
    position = _put(out, 0, _ACCURACY - 5, 4)
    remaining, threshold, width = _STATES + 1, _STATES, _ACCURACY + 1
    kind = 0
    while remaining > 1:
        count = frequency[kind]
        kind += 1
        # small numbers take a bit less, as far as the larger ones leave room
        spare = 2 * threshold - 1 - remaining
        remaining -= count
        value = count + 1
        if value >= threshold:
            value += spare
        position = _put(out, position, value, width - (1 if value < spare else 0))
        if count == 0:
            # how many more are zero, by threes
            zeros = 0
            while frequency[kind] == 0:
                kind += 1
                zeros += 1
            while zeros >= 3:
                position = _put(out, position, 3, 2)
                zeros -= 3
            position = _put(out, position, zeros, 2)
        while remaining < threshold:
            width -= 1
            threshold >>= 1
    return position


@njit(nogil=True, cache=True, error_model="numpy")
def _stream(weights: Any, frequency: Any, out: Any) -> int:
    """Two states in turns, from the last weight to the first, and a one at the end; how many bytes."""
    # states are dealt out to the weights over the whole range, and a weight's own states stand together
    first = np.cumsum(frequency) - frequency
    taken = first.copy()
    owner = np.empty(_STATES, np.int64)
    place = 0
    for kind in range(_KINDS):
        for _ in range(frequency[kind]):
            owner[place] = kind
            place = (place + (_STATES >> 1) + (_STATES >> 3) + 3) & (_STATES - 1)
    state_of = np.empty(_STATES, np.int64)
    for state in range(_STATES):
        state_of[taken[owner[state]]] = _STATES + state
        taken[owner[state]] += 1
    states = np.zeros(2, np.int64)
    position = 0
    for i in range(weights.size - 1, -1, -1):
        kind, turn = weights[i], i & 1
        count = frequency[kind]
        if states[turn]:
            # the state loses bits until it is below twice the weight's frequency
            width = 0
            while states[turn] >> width >= 2 * count:
                width += 1
            position = _put(out, position, states[turn], width)
            states[turn] = state_of[first[kind] + (states[turn] >> width) - count]
        else:
            # any of the weight's states would do to begin with
            states[turn] = state_of[first[kind]]
    position = _put(out, position, states[1], _ACCURACY)
    position = _put(out, position, states[0], _ACCURACY)
    return (_put(out, position, 1, 1) + 7) // 8
