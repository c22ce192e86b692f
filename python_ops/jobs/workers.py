"""Layers compressed at once: by processes of this machine, or as tasks of a Ray cluster.

Both run ``work(task)`` for every task, at most ``workers`` at a time, and call ``done()`` after each. What a task makes
it leaves on disk, whole or not at all, so a process may be lost at any moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

import torch

from resmoe_kernels.python_ops.jobs.memory import available_bytes, gib

T = TypeVar("T")

ENGINES = ("processes", "ray")


def check_workers(engine: str, workers: int) -> None:
    """Raises ValueError for an engine that is not known or not installed, and a number of workers below 1."""
    if engine not in ENGINES:
        raise ValueError(f"engine: must be one of {', '.join(ENGINES)}, got {engine!r}")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers: must be a whole number, at least 1, got {workers!r}")
    if engine == "ray":
        _import_ray()


def check_memory(workers: int, layer_bytes: int, advice: str | None = None) -> None:
    """Raises ValueError where this many layers at once need more memory than there is. Linux only: elsewhere the system
    does not say in one place what is available, and nothing is checked.

    layer_bytes: what one worker needs at its peak;  advice: what to do where one is too many
    """
    available = available_bytes()
    if available is None or workers * layer_bytes <= available:
        return
    if workers == 1:
        raise ValueError(
            f"memory: a layer needs about {gib(layer_bytes)}, and {gib(available)} are available; "
            + (advice or "free some, or use a machine with more, such as one of a cluster with engine='ray'")
        )
    fit = available // layer_bytes
    raise ValueError(
        f"workers: {workers} need {gib(workers * layer_bytes)} of memory, {gib(layer_bytes)} each, and "
        f"{gib(available)} are available; "
        + (f"use at most {fit} here" if fit > 1 else "use 1, which needs least, or more machines with engine='ray'")
    )


def in_processes(work: Callable[[T], Any], tasks: Iterable[T], workers: int, done: Callable[[], Any]) -> None:
    """Runs the tasks in new processes, which share this process's torch threads out among them.

    work, tasks: go to the processes by pickle
    Raises what a task raised, as it is, when the tasks that had begun are through; ChildProcessError if a process was
    killed.
    """
    remaining = iter(tasks)
    # spawn: a fork of a process whose torch has started threads may hang.
    with ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(max(1, torch.get_num_threads() // workers),),
    ) as pool:
        try:
            # No more than can run: a task may be large, and one in the pool's queue can no longer be called off.
            running = {pool.submit(work, task) for task in islice(remaining, workers)}
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                    done()
                running |= {pool.submit(work, task) for task in islice(remaining, len(ended))}
        except BrokenProcessPool as error:
            raise _lost_worker() from error


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    # An interrupt at the terminal reaches every process: these end at once and without a traceback of their own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the parent is killed, its lock is free and the same job may start anew: no worker may write on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def on_ray(
    work: Callable[[T], Any], tasks: Iterable[T], workers: int, done: Callable[[], Any], layer_bytes: int
) -> None:
    """Runs the tasks on the Ray cluster this process is connected to, else on the one that ``ray.init()`` finds
    (``RAY_ADDRESS``, a cluster on this machine), else on this machine alone.

    A task asks for ``layer_bytes`` of a machine's memory and its share of the cluster's CPUs, which become its torch
    threads. The tasks of a lost worker or machine run again elsewhere, as often as Ray retries.
    work, tasks: go to the workers by pickle, so what they name must be installed there
    Raises what a task raised, as it is; ValueError if no machine has the memory; ChildProcessError if a task lost its
    worker every time.
    """
    ray = _import_ray()
    connect = not ray.is_initialized()
    if connect:
        ray.init()
    running: list[Any] = []
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        memory = int(max(machine.get("memory", 0) for machine in machines))
        if layer_bytes > memory:
            raise ValueError(
                f"engine: a layer needs {gib(layer_bytes)} of memory, and Ray's largest machine offers "
                f"{gib(memory)}; add a larger one to the cluster"
            )
        cpus = [int(machine.get("CPU", 0)) for machine in machines]
        threads = max(1, min(sum(cpus) // workers, max(cpus)))
        remote = ray.remote(_with_threads).options(num_cpus=threads, memory=layer_bytes)
        remaining = iter(tasks)
        running = [remote.remote(threads, work, task) for task in islice(remaining, workers)]
        while running:
            ended, _ = ray.wait(running)
            ray.get(ended)
            running.remove(ended[0])
            done()
            running += [remote.remote(threads, work, task) for task in islice(remaining, 1)]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise _lost_worker() from error
    finally:
        for task in running:
            ray.cancel(task, force=True)
        if running:
            ray.wait(running, num_returns=len(running))
        if connect:
            ray.shutdown()


def _with_threads(threads: int, work: Callable[[T], Any], task: T) -> None:
    torch.set_num_threads(threads)
    work(task)


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise ValueError('engine: ray is not installed; run: pip install "resmoe_kernels[ray]"') from error
    return ray


def _lost_worker() -> ChildProcessError:
    return ChildProcessError(
        "workers: one was killed, perhaps for want of memory; finished layers are kept: "
        "run the same command again, with fewer workers if memory was short"
    )
