"""When a worker of a sweep counts as gone."""

import subprocess
import sys
import threading

import pytest

from cxr_fastai.lives import SILENT, Watch, here, runs_here, signature, signs_of_life


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_process_of_this_machine_is_seen_to_end_at_once() -> None:
    ours = signature()
    assert ours["place"] == here()
    assert runs_here(ours)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        theirs = {"place": here(), "pid": child.pid, "began": None}
        assert runs_here(theirs)
        child.kill()
    assert not runs_here(theirs)
    assert Watch().left(0, theirs, 5)
    assert not Watch().left(0, ours, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not tell when it began")
def test_another_process_that_got_the_same_number_is_not_taken_for_the_worker() -> None:
    assert not runs_here({**signature(), "began": "12"})


def test_a_worker_elsewhere_is_left_when_its_signs_stop_for_long_enough() -> None:
    clock = Clock()
    watch, worker = Watch(clock), {"place": "another machine", "pid": 1, "began": "1"}
    assert not watch.left(7, worker, 0)
    clock.now = SILENT
    assert not watch.left(7, worker, 0)
    clock.now = SILENT + 1
    assert not watch.left(7, worker, 1)  # a new sign
    clock.now = 2 * SILENT + 1
    assert not watch.left(7, worker, 1)
    clock.now = 2 * SILENT + 2
    assert watch.left(7, worker, 1)
    assert not watch.left(8, None, None)  # killed before it could sign


def test_signs_go_on_where_one_cannot_be_given() -> None:
    given, twice = [], threading.Event()

    def give(count: int) -> None:
        given.append(count)
        if count == 2:
            twice.set()
        raise OSError("database is locked")

    with signs_of_life(give, every=0.01):
        assert twice.wait(10)
    assert given[:3] == [0, 1, 2]
