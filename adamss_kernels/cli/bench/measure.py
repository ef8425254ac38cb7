"""How time is measured: in rounds, in which every contender has one turn.

A machine that slows down for a while slows all contenders, so what is compared are the times of one round: a ratio is
the median over rounds of (contender / base in the same round). Who comes after whom is drawn anew in every round.

A turn is one discarded call and then as many timed ones as fill `SAMPLE_SECONDS`, of which the median counts, so that
other programs that interrupt some of the calls do not. A single call that fills the time by itself warms itself, and
nothing is discarded. Switching at every call instead would time each contender with its caches filled by another one,
the slowest of them the most wasteful; running one contender to the end before the next would compare two different
minutes. Within a turn the contender is warm as a layer in a training loop is: its code and its parameters were used a
moment ago. Its input was not: on the CPU, calls take their operands in turn from a `Rotation`, which is larger than the
cache, as activations come from another layer; on a GPU the L2 cache is overwritten before every timed call.

Which pages tensors get is luck, and moves a ratio the same way for as long as they stay. So on the CPU operands and
layers are put elsewhere several times during a measurement, and the rounds of all places count together.

On the CPU the clock is the wall clock, and freed memory stays with the process (`compiled/allocator.py` says why), as
with the allocators that are recommended for training. On a GPU it is a pair of events around each call, queued while
the overwriting of the cache still runs, so that launches are timed only where Python is slower than the kernels; with
`graph` a call is the replay of a CUDA graph, which takes Python out altogether. Garbage collector and log rest
meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

SAMPLE_SECONDS = 0.01
"""Timed calls of one turn take at least about this long."""

PLACES = 8
"""Times that operands are put elsewhere in memory, at most: a place should last for some rounds."""

MIN_ROUNDS = 8
"""Rounds that are made however long they take."""


class Settings(NamedTuple):
    """How long and where to measure.

    Attributes:
        device: Where the contenders run.
        seconds: Time for each group of contenders, after warm-up; at least `MIN_ROUNDS` rounds are made.
        graph: Whether to time replays of CUDA graphs (layers on a GPU only).
    """

    device: torch.device
    seconds: float
    graph: bool = False


class Contender(NamedTuple):
    """What is timed, and what runs before each call without being timed."""

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def interleaved(
    contenders: Mapping[str, Contender], settings: Settings, move: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Give every contender a turn in each round; return the seconds of a call in each turn, in the order of rounds.

    `move` puts operands elsewhere in memory; it is called on the CPU only, up to `PLACES` times.
    """
    timer = _cpu_seconds if settings.device.type == "cpu" else gpu_timer(settings.device)
    if settings.graph:
        contenders = {name: Contender(captured(c.call), c.prepare) for name, c in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    with _undisturbed():
        calls, round_seconds = {}, 0.0
        for name, contender in contenders.items():
            # The first is warm-up. The shortest: an interrupted call must not pass for a long one.
            shortest = min([timer(contender, 1) for _ in range(4)][1:])
            calls[name] = max(1, min(1000, round(SAMPLE_SECONDS / shortest)))
            round_seconds += calls[name] * shortest
        places = max(2, min(PLACES, int(settings.seconds / (4 * round_seconds))))
        start = time.perf_counter()
        for place in range(places):
            if settings.device.type == "cpu":
                move()
                for contender in contenders.values():
                    timer(contender, 1)  # takes its memory there
            rounds = 0
            until = start + settings.seconds * (place + 1) / places
            while rounds < MIN_ROUNDS / places or time.perf_counter() < until:
                shuffle(order)
                for name in order:
                    times[name].append(timer(contenders[name], calls[name]))
                rounds += 1
    return times


def summary(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Return of each contender the ratios to `base` round by round, and median and quartiles of ratios and seconds."""
    result = {}
    for name, samples in times.items():
        ratios = [t / b for t, b in zip(samples, times[base], strict=True)]
        result[name] = {
            "ratio": _quartiles(ratios),
            "seconds": _quartiles(samples),
            "rounds": len(samples),
            "ratios": [float(f"{ratio:.5g}") for ratio in ratios],
        }
    return result


class Rotation:
    """An endless turn through as many tensors as exceed twice the CPU's last private cache (on a GPU: one)."""

    def __init__(self, make: Callable[[], torch.Tensor], device: torch.device) -> None:
        """Call `make` for each of the tensors; they are all alike."""
        self._make, self._device = make, device
        self.renew()

    def renew(self) -> None:
        """Make the tensors anew, before the old ones go."""
        first = self._make()
        size = max(1, first.numel() * first.element_size())
        copies = 1 if self._device.type != "cpu" else min(64, 1 + 2 * _l2_bytes() // size)
        self._turn = itertools.cycle([first, *(self._make() for _ in range(copies - 1))])

    def __next__(self) -> torch.Tensor:
        """Return the next tensor."""
        return next(self._turn)

    def __iter__(self) -> Rotation:
        """Return itself."""
        return self


def relocate(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """Copy parameters and buffers to other places in memory; what is shared stays shared.

    Returns:
        Tensors of random size that lie in between. Kept, they shift what is allocated later.
    """
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    between = []
    for t in tensors.values():
        between.append(torch.empty(4096 * random.randrange(1, 64), dtype=torch.uint8))
        t.data = t.data.clone()
    return between


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Run with `threads` threads, on as many cores of which each is used once; without so many, on all CPUs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    allowed = _affinity()
    cores: dict[str, int] = {}
    for cpu in sorted(allowed):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text().strip() if siblings.exists() else str(cpu), cpu)
    if threads <= len(cores):
        _allow(set(sorted(cores.values())[:threads]))
    try:
        yield
    finally:
        _allow(allowed)
        torch.set_num_threads(before)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _allow(cpus: set[int]) -> None:
    # Threads that exist already have an affinity of their own.
    for task in Path("/proc/self/task").glob("*") if cpus else ():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cpus)


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def _l2_bytes() -> int:
    try:
        return max(os.sysconf("SC_LEVEL2_CACHE_SIZE"), 1 << 20)
    except (AttributeError, ValueError, OSError):
        return 2 << 20


def _cpu_seconds(contender: Contender, calls: int) -> float:
    """Return the median seconds of `calls` calls, of several after one that is not timed."""
    times = []
    for index in range(-int(calls > 1), calls):
        contender.prepare()
        start = time.perf_counter()
        contender.call()
        elapsed = time.perf_counter() - start
        if index >= 0:
            times.append(elapsed)
    return statistics.median(times)


def gpu_timer(device: torch.device) -> Callable[[Contender, int], float]:
    """Return what takes the median seconds of several calls of a contender, each after the L2 was overwritten."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def seconds(contender: Contender, calls: int) -> float:
        pairs = []
        for index in range(-int(calls > 1), calls):
            contender.prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            start.record()
            contender.call()
            end.record()
            if index >= 0:
                pairs.append((start, end))
        torch.cuda.synchronize(device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    return seconds


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a CUDA graph of `call`.

    Raises:
        RuntimeError: `call` synchronises with the device, which no graph can hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
        # Before torch 2.12 a capture that fails takes every later one of the process with it, so none may.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the garbage collector and the log from running inside of what is timed."""
    level = logging.root.manager.disable
    gc.collect()
    gc.disable()
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(level)
        gc.enable()
