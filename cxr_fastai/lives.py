"""Which worker of a sweep still lives: so that what a killed one left half done is done again.

A worker signs a trial with where and who it is, and gives a sign of life while it is at it. Whoever shares its machine
sees at once when it has ended; from elsewhere it counts as ended when no sign has come for `SILENT` seconds by the
watcher's own clock, since the clocks of two machines need not agree. Standard library only.

Optuna's own heartbeat knows databases only, not journal files, and waits on the same machine, too.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIGN_EVERY, SILENT = 20.0, 120.0  # seconds


def here() -> str:
    """Return a name for this machine, this start of it, and the space in which process ids are told apart."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # containers may share the first, but not the others
        boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        parts += [boot.read_text().strip(), str(space.readlink())]
    return " ".join(parts)


def signature() -> dict[str, Any]:
    """Return what tells this process from any other, on any machine."""
    return {"place": here(), "pid": os.getpid(), "began": _beginning(os.getpid())}


def _beginning(pid: int) -> str | None:
    """Return when a process began, as Linux counts; None elsewhere, or where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def runs_here(worker: dict[str, Any]) -> bool:
    """Tell whether a process of this machine, by its signature, is still running."""
    if worker["began"] is not None:
        return _beginning(worker["pid"]) == worker["began"]
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Watch:
    """Remembers the last sign of life of each trial, and since when there was no other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.seen = clock, dict[int, tuple[Any, float]]()

    def left(self, number: int, worker: dict[str, Any] | None, sign: Any) -> bool:
        """Tell whether trial `number`, last signed by `worker` with `sign`, has been left by its worker."""
        if worker is not None and worker["place"] == here():
            return not runs_here(worker)
        last, since = self.seen.get(number, (None, None))
        if since is None or sign != last:
            self.seen[number] = (sign, self.clock())
            return False
        return self.clock() - since > SILENT


@contextlib.contextmanager
def signs_of_life(give: Callable[[int], None], every: float = SIGN_EVERY) -> Iterator[None]:
    """Call `give` with 0, 1, 2 ... while the body runs; a sign that cannot be given is left out."""
    ended = threading.Event()

    def sign() -> None:
        count = 0
        while not ended.wait(every if count else 0):
            with contextlib.suppress(Exception):
                give(count)
            count += 1

    thread = threading.Thread(target=sign, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
