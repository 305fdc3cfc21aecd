"""How long something may be waited for: one timer for many rounds. It knows tasks and seconds, and nothing of what is waited for.

Not `asyncio.wait_for`: that starts a task for every round (Python 3.11), which costs more than reading a piece of an answer does, and it
loses a cancellation that comes together with the result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Patience:
    """`with patience:` stops what is awaited inside when that takes too long, and raises what `error` makes.

    The seconds are those of each round; `once`: of all rounds together, from now on. One task at a time may wait. `end` it when done.
    """

    def __init__(self, seconds: float, error: Callable[[], Exception], *, once: bool = False) -> None:
        self._seconds, self._error, self._once = seconds, error, once
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        """who waits; None between two rounds"""
        self._deadline = self._loop.time() + seconds
        self._expired = False

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return self._expired or self._loop.time() >= self._deadline

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        if not self._once:
            self._deadline = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._ring)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        task, self._task = self._task, None
        ours = self._expired and isinstance(error, asyncio.CancelledError)
        # Python 3.11 counts: where one cancellation is left besides ours, somebody else has cancelled the task, too
        if ours and (task is None or not hasattr(task, "uncancel") or not task.uncancel()):
            raise self._error() from error

    def _ring(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._ring)
        else:
            self._expired = True
            self._task.cancel()

    def extend(self, seconds: float) -> None:
        """Wait so much longer, in all."""
        self._deadline += seconds

    def end(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
