"""Being asked to stop: a signal to any rank sets a flag, the ranks agree on it at a step boundary, save and leave."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 85
"""Exit status of a run that a signal stopped with its state saved: start it again with the same command."""

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Interrupted(BaseException):
    """A signal came while this rank waited for data, when the last step is complete and the next one has not begun.

    No Exception, so that what tries again after all sorts of them lets it pass.
    """


class StopRequest:
    """Catches TERM, INT, HUP, USR1 and USR2 from now on; `name` is the signal that came, empty before that.

    Nothing is saved inside the handler, since the step that it interrupts is half done. A second INT ends the process
    at once, for the user who does not want to wait for the step.

    In a thread that is not the main one, which is the only one that Python lets install handlers, it catches nothing:
    the program around it has its own way to be stopped.
    """

    def __init__(self) -> None:
        self.name = ""
        self._at_once = False
        self._handle(self._receive)

    def check(self) -> None:
        """Raises Interrupted where a signal came."""
        if self.name:
            raise Interrupted

    @contextmanager
    def at_once(self, enabled: bool) -> Iterator[None]:
        """Where `enabled`, a signal raises Interrupted in whatever the block does; for what may wait for ever."""
        try:
            self._at_once = enabled
            yield
        finally:
            self._at_once = False

    def ignore_further(self) -> None:
        """Before leaving: Python drops handlers while it exits, and a late signal would replace the exit status."""
        self._handle(signal.SIG_IGN)

    def _handle(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for name in SIGNALS:
            # What is ignored already stays so: nohup has a run outlive its terminal.
            if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN or name != "SIGHUP":
                signal.signal(getattr(signal, name), handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.name == "SIGINT" and number == signal.SIGINT:
            sys.exit(130)
        self.name = self.name or signal.Signals(number).name
        if self._at_once:
            raise Interrupted
