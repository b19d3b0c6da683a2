"""Which rank died or hangs? A collective that fails says only that some peer is gone, and some ranks go on waiting in it.

So every rank has a thread beside the training loop that answers roll calls, whatever the main thread waits for; a process that was killed
or stopped cannot answer. A rank whose collective fails calls the roll, and all survivors raise its verdict.

torchrun sends SIGTERM to the survivors a moment after a rank died, and kills what is left 30 s later. So SIGTERM calls the roll first, too,
and takes effect after it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import rank_text
from megatron_scalemoe.faults.roll_call import POLL_S, Lost, RollCall
from megatron_scalemoe.ops.ragged import is_communication_failure

ANSWER_S = 5.0  # how long ranks have to answer
EXIT_S = 5.0  # how long a rank may stay blocked when one is known to be lost; the others' exits should wake it
_TERMINATED = "was terminated by SIGTERM"
_CLOSE, _CALL = b"\xfe", b"\xff"  # what wakes the thread, beside a signal's number


@contextlib.contextmanager
def naming_dead_ranks(timeout_s: float = ANSWER_S) -> Iterator[None]:
    """Put around a training loop, this turns a failed collective into a `ScaleMoEError` that names the ranks that died, hang or left.

    All ranks enter it. A rank is lost that does not answer within `timeout_s`, at most 5 s, after some rank's collective failed, which is
    at once for a broken connection, and after the process group's timeout for a rank that hangs. A survivor that stays blocked even then
    prints the same message and exits with code 1. Other exceptions pass unchanged, as do failed collectives that no rank is to blame for.

    While inside, a SIGTERM that has no handler calls the roll before it takes effect. Once a rank is lost it is ignored.
    """
    if dist.get_world_size() == 1:
        yield
        return
    watch = _Watch(min(timeout_s, ANSWER_S))
    try:
        yield
    except BaseException as error:
        failure = _communication_failure(error)
        if failure is None:
            watch.close(leaving=f"left after {type(error).__name__}: {_first_line(error)}")
            raise
        lost = watch.call_roll(str(failure))
        watch.close()
        if not lost:
            raise
        raise _lost_error(lost, watch.rank, _first_line(failure)) from error
    watch.close(leaving="has finished")


class _Watch:
    """Owns the thread that answers for this rank, what wakes it, and the handling of SIGTERM."""

    def __init__(self, answer_s: float):
        self._roll_call = RollCall(answer_s)
        self.rank, self._answer_s = self._roll_call.rank, answer_s
        self._lost: Lost = {}
        self._decided = threading.Event()
        self._failure = self._leaving = ""
        self._wake_end, self._waker = os.pipe()
        os.set_blocking(self._waker, False)  # as set_wakeup_fd demands
        self._poll = select.poll()  # not select(), which refuses the file numbers of a large job
        self._poll.register(self._wake_end, select.POLLIN)
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._owns_sigterm = in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if self._owns_sigterm:
            # The signal's number wakes the thread even if the main thread, where handlers run, is blocked in a collective.
            signal.signal(signal.SIGTERM, lambda number, frame: None)
            signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
            os.register_at_fork(before=self._hold_sigterm, after_in_parent=self._pass_sigterm, after_in_child=self._become_child)
        self._thread = threading.Thread(target=self._run, name="scalemoe-roll-call", daemon=True)
        self._thread.start()

    def call_roll(self, failure: str) -> Lost:
        """The ranks that are lost; empty if all are there or it cannot be known. Bounded in time, even if the store hangs."""
        self._failure = failure
        os.write(self._waker, _CALL)
        if not self._decided.wait(self._answer_s + 4 * POLL_S):
            self._lost = self._roll_call.loss_of_store()
        if self._lost and self._roll_call.store_host == self.rank:
            time.sleep(2 * POLL_S)  # the store ends with this process: let the others read the verdict
        return self._lost

    def close(self, leaving: str = "") -> None:
        """End the thread. `leaving`: what the other ranks are told, if this rank leaves for a reason of its own."""
        self._leaving = leaving
        os.write(self._waker, _CLOSE)
        self._thread.join(2 * POLL_S)
        # torchrun's SIGTERM can come at any moment, and would cut off the message about the lost rank.
        self._release_sigterm(signal.SIG_IGN if self._lost else signal.SIG_DFL)
        if not self._thread.is_alive():
            os.close(self._wake_end)
            os.close(self._waker)

    def _release_sigterm(self, handler: signal.Handlers = signal.SIG_DFL) -> None:
        if self._owns_sigterm:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, handler)
            self._owns_sigterm = False

    # A forked child has the pipe, too. A SIGTERM for the child must not wake the parent, so it has to wait until the child let go.
    def _hold_sigterm(self) -> None:
        if self._owns_sigterm:
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _pass_sigterm(self) -> None:
        if self._owns_sigterm:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _become_child(self) -> None:
        if self._owns_sigterm:
            self._release_sigterm()
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _run(self) -> None:
        while _CLOSE not in (woken := self._sleep(POLL_S)):
            called, terminated = _CALL in woken, bytes([signal.SIGTERM]) in woken
            lost = self._call(_TERMINATED if terminated else "") if called or terminated else self._look()
            if terminated and lost.keys() <= {self.rank}:
                os._exit(128 + signal.SIGTERM)
            self._lost = lost
            if called or lost:
                self._decided.set()
            if lost:
                self._exit_unless_closed()
                return
        if self._leaving:
            with contextlib.suppress(RuntimeError):  # no store, so nobody will ask
                self._roll_call.leave(self._leaving)

    def _sleep(self, seconds: float) -> bytes:
        """What woke the thread; empty after that time."""
        return os.read(self._wake_end, 1024) if self._poll.poll(seconds * 1000) else b""

    def _look(self) -> Lost:
        try:
            return self._roll_call.look()
        except RuntimeError:  # No store. Harmless if nothing else fails, as when the rank whose process has it is the first to finish.
            return {}

    def _call(self, leaving: str) -> Lost:
        try:
            return self._roll_call.call(failure=self._failure, leaving=leaving)
        except RuntimeError:
            return self._roll_call.loss_of_store()

    def _exit_unless_closed(self) -> None:
        """A collective on CUDA, or with peers that are blocked too, does not notice that a rank is lost."""
        deadline = time.monotonic() + EXIT_S
        while (left_s := deadline - time.monotonic()) > 0:
            if _CLOSE in self._sleep(left_s):
                return
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
        message = _lost_error(self._lost, self.rank, "still blocked here:\n" + "".join(stack).rstrip())
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


def _communication_failure(error: BaseException | None) -> BaseException | None:
    """The backend's error that this exception is, or comes from; None for any other exception."""
    while error is not None:
        if is_communication_failure(error):
            return error
        error = error.__cause__
    return None


def _lost_error(lost: Lost, rank: int, found: str) -> ScaleMoEError:
    ranks_by_fate: dict[str, list[int]] = {}
    for lost_rank, known in lost.items():
        ranks_by_fate.setdefault(known, []).append(lost_rank)
    return ScaleMoEError(
        "; ".join(f"{rank_text(ranks)} {known}" for known, ranks in ranks_by_fate.items()),
        found=f"on rank {rank}, {found}",
        try_="see the end of that rank's log, and dmesg on its machine if it was killed for memory; restart from the last checkpoint",
    )


def _first_line(error: BaseException) -> str:
    """Without gloo's source file in front and its advice behind."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[\S*gloo/\S*\] ", "", line).partition(". This is typically")[0]
