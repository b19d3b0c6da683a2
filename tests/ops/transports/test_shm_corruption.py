"""Nonsense in shared memory: every rank must end with an error, and none read or write where it should not.

Rank 1 plays its part of an op by hand: it writes its half and its control lines itself, through its mappings. The layouts below are those
of csrc/cpu/arena.cpp, exchange.cpp and returns.cpp.
"""

import contextlib
import ctypes
import random
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import native
from megatron_scalemoe.ops.transports import shm, shm_memory
from tests.ops.transports.test_shm import error_of
from tests.rank_pool import pool

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not("cpu")))
CONTROL_BYTES, RANK_BYTES, POISON_AT = 128, 320, 64
FIELDS = ("op", "number", "confirms", "row_bytes", "dtype", "value_bytes", "columns", "num_local", "tokens")


class SharedHalf(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int32), ("generation", ctypes.c_uint32), ("size", ctypes.c_uint64))


class RankControl(ctypes.Structure):
    _fields_ = (
        ("epoch", ctypes.c_int32),
        ("left", ctypes.c_uint32),
        ("_to_line", ctypes.c_char * 56),
        ("calls", ctypes.c_int64 * len(FIELDS) * 2),
        ("_to_line_again", ctypes.c_char * 48),
        ("halves", SharedHalf * 2),
        ("_to_end", ctypes.c_char * 32),
    )


def writable(label: str) -> list[int]:
    """Addresses of this process's own memory with the label."""
    with open("/proc/self/maps") as maps:
        return [int(line.split("-")[0], 16) for line in maps if f"memfd:scalemoe-{label}" in line and " rw-s " in line]


class Player:
    """Rank 1 by hand, on a transport with one gather_counts behind it (open_arena's) and another one that it makes."""

    def __init__(self, transport: shm.ShmTransport):
        (self.half,) = writable("rows")  # of op 1, and of the coming op 3
        transport.gather_counts(torch.arange(4))
        dist.barrier()  # rank 0 has left op 2
        self.control = RankControl.from_address(writable("control")[0] + CONTROL_BYTES + RANK_BYTES)
        self.poison = ctypes.c_uint64.from_address(writable("control")[0] + POISON_AT)

    def write(self, offset: int, *values: int, of=ctypes.c_int32) -> None:
        for i, value in enumerate(values):
            of.from_address(self.half + offset + i * ctypes.sizeof(of)).value = value

    def come(self, to: str, epochs: int = 1, **fields: int) -> None:
        """To the barrier of op 3, with a call of 3 tokens of 4 float32, 2 columns and 1 expert for each rank."""
        call = {"op": shm_memory.OPS.index(to), "number": 3, "row_bytes": 16, "columns": 2, "num_local": 1, "tokens": 3, "value_bytes": 4}
        values = call | fields
        lines = self.control.calls[(self.control.epoch + 1) & 1]
        for i, name in enumerate(FIELDS):
            lines[i] = values.get(name, 0)
        self.control.epoch += epochs


def dispatch_honestly(transport: shm.ShmTransport) -> torch.Tensor:
    experts = torch.tensor([[0, 1]] * 3, dtype=torch.int32)
    return transport.dispatch(torch.zeros(3, 4), experts, torch.zeros(3, 2), 1, 1)[3]


# What rank 1 writes into its half, int32, in a dispatch: its experts come first.
EXPERTS = {
    "slot beyond the last": (0, 2),
    "huge slot": (0, 2**31 - 1),
    "negative slot": (-7, 1),
    "descending": (1, 0),
    "twice": (1, 1),
    "after the end": (-1, 0),
}
CALLS = {
    "honest": {},  # the others fail for what they name
    "more tokens than fit": {"tokens": 200_000},
    "tokens that overflow": {"tokens": 2**62},
    "negative tokens": {"tokens": -1},
    "other op": {"op": 3},
    "unknown op": {"op": 77},
    "other number": {"number": 4},
    "other row bytes": {"row_bytes": 2**50},
    "far ahead": {"epochs": 5},
    "far behind": {"epochs": -2},
}
HALVES = {
    "no descriptor": (-1, 2 << 20),
    "no memfd": (0, 2 << 20),
    "no size": (0, 0),
    "huge size": (0, 2**60),
}


def run_played(kind: str, name: str) -> tuple[str, str]:
    """The error of the dispatch on rank 0, and that of the next op on this rank."""
    with shm.open_shm(dist.group.WORLD, 0.3 if name == "far behind" else 10.0) as transport:
        if dist.get_rank() == 0:
            transport.gather_counts(torch.arange(4))
            dist.barrier()
            error = error_of(dispatch_honestly, transport)
        else:
            player = Player(transport)
            if kind == "experts":
                player.write(0, *EXPERTS[name] * 3)
                player.come("dispatch")
            elif kind == "call":
                player.write(0, *(0, 1) * 3)
                player.come("dispatch", **CALLS[name])
            elif kind == "half":
                player.write(0, *(0, 1) * 3)
                player.control.halves[1].fd, player.control.halves[1].size = HALVES[name]
                player.control.halves[1].generation += 1
                player.come("dispatch")
            else:
                player.poison.value = 0xFFFF_FFFF_FFFF_FFFF
            error = ""
        dist.barrier()  # rank 0 has its error
        later = error_of(transport.gather_counts, torch.arange(4)) if name != "honest" else ""
        return error, later


PLAYED = [
    (kind, name) for kind, names in (("experts", EXPERTS), ("call", CALLS), ("half", HALVES), ("poison", {"garbage"})) for name in names
]


@pytest.mark.parametrize(("kind", "name"), PLAYED)
def test_a_dispatch_by_hand_is_an_error_everywhere_unless_it_is_honest(kind, name):
    (error, later), (_, other) = pool(2).run(run_played, kind, name)
    assert bool(error) == (name != "honest")
    assert error == later == other
    assert kind == "poison" or name == "honest" or "rank 1" in error


# What rank 1 says of where rank 0's rows are: byte offset and number of the rows, of the values.
BLOCKS = {
    "honest": (64, 3, 64, 3),
    "beyond the end": ((2 << 20) - 16, 3, 64, 3),
    "negative": (-4096, 3, 64, 3),
    "overflow": (2**63 - 8, 3, 64, 3),
    "too few": (64, 2, 64, 3),
    "too many": (64, 2**60, 64, 3),
}


def run_block(name: str) -> str:
    with shm.open_shm(dist.group.WORLD, 10.0) as transport:
        (half,) = writable("rows")  # of op 1, and of the coming op 3
        map = dispatch_honestly(transport)
        if dist.get_rank() == 0:
            error = error_of(transport.combine, torch.zeros(6, 4), map, torch.tensor([[0, 1]] * 3, dtype=torch.int32), 1)
        else:
            player = object.__new__(Player)
            player.control, player.half = RankControl.from_address(writable("control")[0] + CONTROL_BYTES + RANK_BYTES), half
            player.write(0, *BLOCKS[name], of=ctypes.c_int64)
            player.come("combine", value_bytes=0)
            error = ""
        dist.barrier()
        return error


@pytest.mark.parametrize("name", BLOCKS)
def test_corrupt_returns_are_an_error(name):
    error = pool(2).run(run_block, name)[0]
    assert error == "" if name == "honest" else "what rank 1 put into shared memory makes no sense" in error


def scribble(stop: threading.Event, seed: int) -> None:
    """Random bytes at random places of this rank's own lines and halves, until told to stop."""
    draw = random.Random(seed)
    areas = [(writable("control")[0] + CONTROL_BYTES + RANK_BYTES, RANK_BYTES), *((at, 256) for at in writable("rows"))]
    while not stop.is_set():
        start, size = draw.choice(areas)
        ctypes.c_uint8.from_address(start + draw.randrange(size)).value = draw.choice((0, 1, 2, 127, 128, 255))
        time.sleep(draw.random() * 2e-4)


def run_scribbled(rounds: int) -> int:
    """How many rounds of up to 50 ops ended in an error."""
    errors = 0
    for seed in range(rounds):
        with shm.open_shm(dist.group.WORLD, 0.3) as transport, contextlib.suppress(ScaleMoEError):
            transport.gather_counts(torch.arange(4))
            stop = threading.Event()
            scribbler = threading.Thread(target=scribble, args=(stop, seed))
            try:
                if dist.get_rank() == 1:
                    scribbler.start()
                errors += 1
                for _ in range(50):
                    map = dispatch_honestly(transport)
                    transport.combine(torch.zeros(6, 4), map, torch.tensor([[0, 1]] * 3, dtype=torch.int32), 1)
                errors -= 1
            finally:
                stop.set()
                if scribbler.ident:
                    scribbler.join()
        dist.barrier()
    return errors


def test_scribbling_ends_in_errors_not_in_crashes():
    of_rank_0, of_rank_1 = pool(2).run(run_scribbled, 8)
    assert of_rank_0 > 0
    assert of_rank_1 > 0
