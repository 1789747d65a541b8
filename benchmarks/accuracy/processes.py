"""Runs of a study beside each other: the study's own command, started again, does the runs it is told to.

Nothing is forked: a process that has computed has threads and locks that a fork of it waits for in vain, and one that
has asked for an accelerator cannot use it after a fork.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.accuracy.study import Job, Store


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with `processes` and `answer`. Several processes have one thread each, and this one too, whose
    threads results name."""
    parser.add_argument("--processes", type=int, default=1, help="runs beside each other, one thread each")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.processes > 1:
        torch.set_num_threads(1)
    return given


def work_through(store: Store, jobs: Iterable[Job], processes: int, say: Callable[[str], None], apart: bool) -> None:
    """Do what `store` lacks of the jobs, here, or `apart` in so many processes of this command, which `answer`."""
    if apart:
        run_beside(store, jobs, [*sys.orig_argv, "--answer"], processes, say)
    else:
        store.run(jobs, say)


def run_beside(
    store: Store, jobs: Iterable[Job], command: Sequence[str], processes: int, say: Callable[[str], None]
) -> None:
    """Do what `store` lacks in so many processes of `command`, which `answer` the same jobs: the next to who is free.

    Raises RuntimeError where a process failed; what others had finished by then is kept.
    """
    missing, writing = store.missing(jobs), threading.Lock()
    todo = iter(missing)

    def attend() -> None:
        try:
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdin is not None and worker.stdout is not None
                for job in todo:
                    print(job.key, file=worker.stdin, flush=True)
                    told = worker.stdout.readline()
                    if not told:
                        raise BrokenPipeError
                    with writing:
                        store.keep(job, json.loads(told), say)
        except BrokenPipeError:
            raise RuntimeError("a process of the study failed; its traceback stands above") from None

    with ThreadPoolExecutor(processes) as pool:
        attended = [pool.submit(attend) for _ in missing[:processes]]
    for worker in attended:
        worker.result()


def answer(jobs: Iterable[Job]) -> None:
    """Do each job whose key is a line of standard input; its result, as JSON, is a line of standard output, where
    nothing else is written."""
    by_key = {job.key: job for job in jobs}
    with os.fdopen(os.dup(1), "w") as told:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps(by_key[line.rstrip("\n")].work()), file=told, flush=True)
