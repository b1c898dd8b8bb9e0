"""Crews: processes that train the tickets of an experiment side by side, and one that leads them.

The leader has the workdir, its summary and the terminal. A hand has a laboratory of its own, does
one task at a time and tells what comes of it. A task is a replicate's steps, or the training of a
ticket for whose weights nothing waits. Every training writes into its ticket's folder what it would
write if it were alone.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from typing import Any

from lth_tf import datasets, distribute, edge
from lth_tf.callbacks.progress import Steps
from lth_tf.compat import tf
from lth_tf.distribute.shares import gpu_share, gpus
from lth_tf.errors import UserError
from lth_tf.execution import cores, number_of
from lth_tf.experiments.laboratory import Laboratory
from lth_tf.experiments.workdirs import threads
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec
from lth_tf.training import checkpoints
from lth_tf.training.states import Interrupted

_POLL = 0.2  # seconds between two looks at whether to stop
_MEMORY = 2**31  # bytes that a process may well take


def jobs_of(asked: str, spec: Spec) -> int:
    """Returns how many processes train side by side.

    Args:
      asked: a number, or 'auto': as many as there are cores, or GPUs where there are any, as
        memory suffices for, and as there is work for.
      spec: the experiment.

    Raises:
      UserError: it is neither, or more than there are cores or GPUs.
    """
    if asked == "1":
        return 1
    number = None if asked == "auto" else number_of("jobs", asked)
    found = _gpus()
    most, what = (len(found), "GPU(s)") if found else (cores(), "core(s)")
    if number is not None:
        if number > most:
            raise UserError(
                f"--jobs={asked} is more than the {most} {what} here; give {most} or fewer, or auto"
            )
        return number
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tickets = len(spec.density) if RECIPES[spec.recipe].picks else 1
    work = spec.replicates * tickets * (1 + len(spec.controls))
    return max(1, min(most, work, memory // _MEMORY))


@functools.cache
def _gpus() -> list[str]:
    """The GPUs, looked for in another process: who has looked may not fork."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(gpus).result()


@dataclasses.dataclass(eq=False)
class _Hand:
    """A process as the leader sees it; `doing` is '' while it waits."""

    process: Any
    connection: Any
    doing: str = "its beginning"


class Crew:
    """Processes that wait for an experiment to train; a context, at whose end they are gone.

    They are forked off this one, which must not have computed anything with TensorFlow before:
    its threads would be missing in them.

    Args:
      jobs: how many.
      data_dir: folder of the data sets.

    Attributes:
      share: how many of the cores each of them has.
    """

    def __init__(self, jobs: int, data_dir: str | None):
        self.share = max(1, cores() // jobs)
        found, context = _gpus(), multiprocessing.get_context("fork")
        self._hands: list[_Hand] = []
        self._data_dir, self._alive = data_dir, os.pipe()
        for slot in range(jobs):
            ours, theirs = context.Pipe()
            not_his = [*(hand.connection for hand in self._hands), ours]
            given = theirs, not_his, self._alive, gpu_share(found, slot, jobs)
            process = context.Process(target=_hand, args=given, daemon=True)
            process.start()
            theirs.close()
            self._hands.append(_Hand(process, ours))
        os.close(self._alive[0])
        # What depends on the number of GPUs is the same for the leader as for its hands.
        os.environ.update(gpu_share(found, 0, jobs))
        if found:  # the leader trains nothing, and must not take the first one's memory from it
            os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: Any) -> None:
        for hand in self._hands:
            hand.connection.close()
            hand.process.kill()
            hand.process.join()
        os.close(self._alive[1])

    def lead(self, lab: Laboratory, dataset: str) -> None:
        """Has all replicates of an experiment done.

        Args:
          lab: the leader's, which writes the summary and has the terminal.
          dataset: name of the data set.

        Raises:
          UserError: what a hand ended with, or that it was killed. The others have kept their
            states by then.
          Interrupted: SIGTERM or Ctrl-C came.
        """
        setup = (
            lab.spec, lab.workdir, dataset, self._data_dir, lab.trunk, lab.trains, lab.execution,
            threads(),
        )  # fmt: skip
        queue: collections.deque[tuple[str, Any]] = collections.deque(
            ("replicate", replicate) for replicate in range(lab.spec.replicates)
        )
        if lab.progress:
            many = f"{len(self._hands)} trainings side by side"
            lab.progress.say(f"{many}, {threads()} thread(s) each")
        error: BaseException | None = None
        with lab.asked.patiently():
            for hand in self._hands:
                self._give(hand, setup)
            told = False
            while True:
                stops = error is not None or lab.asked()
                for hand in self._hands:
                    if queue and not hand.doing and not stops:
                        hand.doing = " ".join(map(str, queue[0]))
                        self._give(hand, queue.popleft())
                busy = {hand.connection: hand for hand in self._hands if hand.doing}
                if not busy:
                    break
                if stops and not told:
                    told = True
                    for hand in busy.values():
                        os.kill(hand.process.pid, lab.asked.number or signal.SIGTERM)
                for ready in multiprocessing.connection.wait(list(busy), _POLL):
                    ended = self._hear(busy[ready], lab, queue)
                    error = error or (None if stops else ended)
        if error:
            raise error
        if lab.asked():
            raise Interrupted("stopped; the states of all trainings are kept")

    def _give(self, hand: _Hand, what: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, which is seen when it is heard
            hand.connection.send(what)

    def _hear(
        self, hand: _Hand, lab: Laboratory, queue: collections.deque
    ) -> BaseException | None:
        """Does what a hand asks for; returns what it ended with, if it did."""
        try:
            what, *given = hand.connection.recv()
        except (EOFError, OSError):
            self._hands.remove(hand)
            hand.connection.close()
            hand.process.join()
            code = hand.process.exitcode
            how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            return UserError(
                f"a process of --jobs ended with {how} while it was at {hand.doing}; if the memory "
                "is too small for all, give fewer; what is finished is kept, the same command "
                "goes on from there"
            )
        if what == "ended":
            self._hands.remove(hand)
            hand.process.join()
            return given[0]
        if what == "done":
            hand.doing = ""
        elif what == "later":
            queue.append(("ticket", *given))
        elif what == "note":
            lab.note(*given)
        elif lab.progress:
            if what == "describe":
                hand.doing = given[0]
                lab.progress.describe("; ".join(h.doing for h in self._hands if h.doing))
            else:
                getattr(lab.progress, what)(*given)
        return None


class _Heard(Steps):
    """A hand's progress, which is the leader's to show."""

    def __init__(self, tell: Any):
        super().__init__()
        self._tell = tell

    def describe(self, what: str) -> None:
        self._tell("describe", what)

    def say(self, text: str) -> None:
        self._tell("say", text)

    def skip(self, steps: int) -> None:
        self._tell("skip", steps)

    def advance(self, steps: int) -> None:
        self._tell("advance", steps)


def _hand(connection: Any, not_mine: list[Any], alive: tuple[int, int], share: dict) -> None:
    """A hand's life: waits for what there is to do and does it, until nobody asks any more."""
    os.setsid()  # a terminal's Ctrl-C is for the leader
    for each in not_mine:
        each.close()
    os.close(alive[1])
    threading.Thread(target=_end_with, args=(alive[0],), daemon=True).start()
    os.environ.update(share)

    def tell(*what: Any) -> None:
        connection.send(what)

    try:
        _work(connection, tell)
    except EOFError:
        pass  # there is no more to do
    except BaseException as error:
        if isinstance(error, (UserError, KeyboardInterrupt)):
            ended: BaseException = error
        elif said := edge.told(error):
            ended = UserError(said[0].removeprefix("error: "))
        else:
            ended = RuntimeError(f"in a process of --jobs:\n{traceback.format_exc()}")
        tell("ended", ended)


def _end_with(leader: int) -> None:
    """Ends this process when the leader is gone, however it went: nobody would hold the workdir."""
    os.read(leader, 1)
    os._exit(1)


def _work(connection: Any, tell: Any) -> None:
    spec, workdir, name, data_dir, trunk, trains, execution, count = connection.recv()
    tf.config.threading.set_intra_op_parallelism_threads(count)
    with checkpoints.terminations() as asked, distribute.lost():
        dataset = datasets.load(name, data_dir)
        lab = Laboratory(
            spec, workdir, dataset, distribute.strategy_of(spec), asked, trunk, trains,
            execution=execution,
        )  # fmt: skip
        lab.leader, lab.progress = tell, _Heard(tell)
        steps = RECIPES[spec.recipe].steps
        while True:
            tell("done")
            what, given = connection.recv()
            if what == "replicate":
                steps(lab, given)
            else:
                lab.train(given, lab.ticket(given, lab.dense, 0))
