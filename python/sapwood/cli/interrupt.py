"""Ctrl-C in the middle of a training: once to stop cleanly, twice to stop at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from sapwood.cli import console


def _to_stderr(text: str) -> None:
    console.stderr().print(text, markup=False)


class Interrupts:
    """While it is entered, the first SIGINT is only noted; the next one interrupts as usual.

    The training asks ``check`` after every step, where everything is consistent.

    Args:
        say: prints a line; that of progress bars, where there are some.
    """

    def __init__(self, say: Callable[[str], None] = _to_stderr) -> None:
        self.requested = False
        self._say = say
        self._told = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def asked(self) -> bool:
        """Whether there was a first SIGINT; says once what happens now."""
        if self.requested and not self._told:
            self._told = True
            self._say("finishing this step; Ctrl-C again stops at once")
        return self.requested

    def check(self) -> None:
        """Raises when there was a first SIGINT.

        Raises:
            KeyboardInterrupt: then.
        """
        if self.asked():
            raise KeyboardInterrupt
