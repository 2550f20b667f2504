"""Where the jobs of a packing run. All give the same bytes: a job depends on its number alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from fastclr.config import ConfigError
from pipelines.plan import Job

Executor = Callable[[Job, str, Sequence[int], int], Iterator[int]]


def run_in_processes(job: Job, work: str, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Run jobs in processes of this machine; yield what each returns, as they finish.

    Args:
        job: Module-level function of the work folder and a number.
        work: Work folder.
        numbers: The jobs.
        workers: Processes; with 1 the jobs run in this one.

    Raises:
        OSError: If a process is killed from outside; whatever a job raises is raised again.
    """
    workers = min(workers, len(numbers))
    if workers <= 1:
        for number in numbers:
            yield job(work, number)
        return
    # Spawned, not forked: the caller may have threads, whose locks a fork would copy.
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(job, work, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        yield from _hand_out(numbers, processes)
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.join()


def _hand_out(numbers: Sequence[int], processes: dict[Connection, SpawnProcess]) -> Iterator[int]:
    """Give every process one job at a time until none is left."""
    waiting = iter(numbers)
    busy = []
    for connection, number in zip(processes, waiting, strict=False):
        connection.send(number)
        busy.append(connection)
    while busy:
        for connection in wait(busy):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except EOFError:
                processes[connection].join()
                code = processes[connection].exitcode
                raise OSError(
                    f"a packing process ended with {code}: it was killed, perhaps for want of "
                    "memory; use fewer --workers"
                ) from None
            if isinstance(result, BaseException):
                raise result
            busy.remove(connection)
            if (number := next(waiting, None)) is not None:
                connection.send(number)
                busy.append(connection)
            yield result


def _serve(job: Job, work: str, connection: Connection) -> None:
    """Run jobs until the other end is closed, which it also is if that process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started us ends us
    while True:
        try:
            number = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result: Any = job(work, number)
        except Exception as error:  # raised again over there
            result = error
        connection.send(result)


def run_in_ray(job: Job, work: str, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Run jobs on a Ray cluster (``RAY_ADDRESS``), or on a Ray started here for as long.

    Every node has to see the source and the work folder under the same paths.

    Args:
        job: Module-level function of the work folder and a number.
        work: Work folder.
        numbers: The jobs.
        workers: Processors of a Ray started here.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise ConfigError("--executor ray needs Ray: pip install 'fastclr[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        here = None if os.environ.get("RAY_ADDRESS") else workers
        ray.init(num_cpus=here, include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(job)
        pending = [remote.remote(work, number) for number in numbers]
        while pending:
            done, pending = ray.wait(pending)
            try:
                yield from ray.get(done)
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                raise OSError(f"Ray lost a packing job: {error}") from error
    finally:
        if started:
            ray.shutdown()


EXECUTORS: dict[str, Executor] = {"processes": run_in_processes, "ray": run_in_ray}
