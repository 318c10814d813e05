"""From raw measurements to rows and the figures they stand on: arithmetic only."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmark.table import Row, at_most

DECODE_GOAL = 1.05
PREFILL_GOAL = 1.10
FIRST_TOKEN_GOAL = 1.15
ACCELERATE_GOAL = 4.5
MEMORY_GOAL_NBYTES = 500 << 20
FITS_GOAL_SHARE = 0.01
FITS_GOAL_SECONDS_PER_UNIT = 20e-6

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Streaming:
    """What a streaming job took beside what it could have taken at best.

    The disk's speed drifts, so each group of passes is held against the mean of the rates just before and after it. The
    first pass of a group is left out: it finds the ring full.
    """

    wall_seconds: float
    transfer_seconds: float
    ratio: float

    @classmethod
    def of(cls, found: Found, compute_seconds: float) -> Streaming:
        """``found["rates"]`` are bytes per second: before the start, after the first pass, then around the groups."""
        rates = found["rates"][2:]
        groups = [statistics.fmean(group[1:] or group) for group in found["groups"]]
        transfers = [2 * found["streamed_nbytes"] / (before + after) for before, after in pairwise(rates)]
        ratios = [wall / max(compute_seconds, transfer) for wall, transfer in zip(groups, transfers, strict=True)]
        return cls(statistics.median(groups), statistics.median(transfers), statistics.median(ratios))


def compute_seconds(resident: Found) -> float:
    """Of one token, everything in memory: the median after the first passes."""
    return float(statistics.median(resident["seconds"][4:]))


def decode_rows(decode: Found, resident: Found, checkpoint_nbytes: int, hbm: int) -> Iterator[Row]:
    """Decoding within the budget."""
    compute = compute_seconds(resident)
    streaming = Streaming.of(decode, compute)
    yield Row("decode: compute alone, all resident", _seconds(compute))
    yield Row("decode: transfer alone", f"{_gib(decode['streamed_nbytes'])}, {_seconds(streaming.transfer_seconds)}")
    yield Row("decode: wall per token", _seconds(streaming.wall_seconds))
    yield at_most("decode: wall / max(compute, transfer)", streaming.ratio, DECODE_GOAL)
    yield from _equal("decode: tokens and logits equal to the plain model", decode, resident)
    first, ideal = decode["first_token_seconds"], 2 * checkpoint_nbytes / sum(decode["rates"][:2])
    yield Row("first token from cold, imports apart", _seconds(first))
    yield Row("imports", _seconds(decode["import_seconds"]))
    yield at_most("first token / (checkpoint bytes / disk rate)", first / ideal, FIRST_TOKEN_GOAL)
    yield Row("first token: streamed", f"{_gib(decode['moved_nbytes'][0])} of {_gib(checkpoint_nbytes)}")
    above = decode["peak_nbytes"] - hbm
    goal = f"<= {MEMORY_GOAL_NBYTES >> 20} MiB"
    yield Row("memory: process peak above the budget", f"{above >> 20} MiB", goal, above <= MEMORY_GOAL_NBYTES)
    if decode.get("cgroup_peak_nbytes") is not None:
        above = decode["cgroup_peak_nbytes"] - hbm
        yield Row("memory: cgroup peak above the budget, page cache included", f"{above >> 20} MiB")
    written = decode["written_nbytes"]
    yield Row("bytes written", str(written), "0", written == 0)


def prefill_rows(prefill: Found, resident: Found) -> Iterator[Row]:
    """A prompt whose compute takes about as long as the transfer."""
    compute = statistics.median(resident["prefill"]["seconds"][1:])
    streaming = Streaming.of(prefill, compute)
    yield Row(f"prefill of {resident['length']} tokens: compute alone", _seconds(compute))
    yield Row("prefill: transfer alone", f"{_gib(prefill['streamed_nbytes'])}, {_seconds(streaming.transfer_seconds)}")
    yield Row("prefill: wall", _seconds(streaming.wall_seconds))
    yield at_most("prefill: wall / max(compute, transfer)", streaming.ratio, PREFILL_GOAL)
    equal = set(prefill["digests"]) == set(resident["prefill"]["digests"])
    yield Row("prefill: logits equal to the plain model", "yes" if equal else "no", "yes", equal)


def accelerate_rows(accelerate: Found, decode: Found, resident: Found) -> Iterator[Row]:
    """Accelerate's disk offload beside ours."""
    if "error" in accelerate:
        yield Row("Accelerate disk offload", accelerate["error"].splitlines()[0])
        return
    theirs = statistics.median(accelerate["seconds"][1:] or accelerate["seconds"])
    faster = theirs / Streaming.of(decode, compute_seconds(resident)).wall_seconds
    yield Row("Accelerate disk offload: wall per token", _seconds(theirs))
    yield Row("Accelerate / tierstore", f"{faster:.2f}", f">= {ACCELERATE_GOAL}", faster >= ACCELERATE_GOAL)
    same = accelerate["digests"] == resident["digests"][: len(accelerate["digests"])]
    yield Row("Accelerate: logits equal to the plain model", "yes" if same else "no")


def fits_rows(fits: Found) -> Iterator[Row]:
    """A module that fits in hbm."""
    bare = fits["seconds"]["bare"]
    for way, units in fits["units"].items():
        extra = fits["seconds"][way] - bare
        met = extra <= FITS_GOAL_SHARE * bare or extra <= FITS_GOAL_SECONDS_PER_UNIT * units
        per_unit = 1e6 * extra / max(units, 1)
        said = f"{100 * extra / bare:+.2f} %, {per_unit:+.2f} us per unit"
        yield Row(f"{way}, all fits: pass beside the bare module", said, "<= 1 % or 20 us per unit", met)
    yield Row("all fits: logits equal", "yes" if fits["equal"] else "no", "yes", fits["equal"])


def _equal(what: str, ours: Found, reference: Found) -> Iterator[Row]:
    count = min(len(ours["tokens"]), len(reference["tokens"]))
    equal = all(ours[key][:count] == reference[key][:count] for key in ("tokens", "digests"))
    yield Row(what, f"{'yes' if equal else 'no'}, {count} tokens", "yes", equal)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s"


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**27 else f"{nbytes / 2**20:.2f} MiB"
