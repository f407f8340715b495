"""Workers of a launch on a Ray cluster: an actor each, with a GPU of its own where there are any.

Ray starts them on nodes with free resources, also on nodes that join later, and notices when a node is gone. Whatever
concerns trials is as with local workers: the shared storage decides who runs which one.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError

from trainer.errors import UserError, first_line
from tuner.study.keys import write_unopened_trial
from tuner.study.supervisor import POLL_S, Display, Supervisor
from tuner.study.worker import Line, PipeWarnings, work
from tuner.study.worker_process import GRACE_S, Job, Worker

PENDING_S = 60.0
"""Seconds without any started worker after which the log says what they wait for."""

log = logging.getLogger(__name__)


def share_resources(num_workers: int, cluster: Mapping[str, float], *, device: str) -> dict[str, float]:
    """What Ray reserves for each worker: a GPU if the cluster has any, and its share of the cores. A pure function.

    Args:
        cluster: "CPU" and "GPU" of all nodes together.
        device: `train.device`.
    """
    gpus, cores = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 1))
    if device != "cpu" and gpus:
        return {"num_gpus": 1, "num_cpus": max(1, cores // gpus)}
    return {"num_gpus": 0, "num_cpus": max(1, cores // num_workers)}


class QueueLine(Line):
    """A line to the supervisor through a queue of Ray's."""

    def __init__(self, key: str, queue: Any) -> None:
        super().__init__()
        self._key, self._queue = key, queue

    def send(self, *message: object) -> None:
        from ray.exceptions import RayError

        try:
            self._queue.put((self._key, message))
        except RayError:
            self.stopped.set()


class RemoteWorker:
    """The actor. `stop` is called while `run` is busy: it has two threads."""

    def __init__(self, key: str, queue: Any, path: list[str]) -> None:
        sys.path[:] = path
        self._line = QueueLine(key, queue)

    def run(self, job: Job) -> None:
        logging.getLogger().addHandler(PipeWarnings(self._line))
        self._line.send("alive")
        self._line.send("exit", *work(job, self._line))

    def stop(self) -> None:
        self._line.stopped.set()


class RayWorker(Worker):
    """A worker on some node of the cluster."""

    def __init__(self, index: int, job: Job, queue: Any, resources: Mapping[str, float]) -> None:
        import ray

        super().__init__(index)
        self.key = uuid.uuid4().hex
        self.trial: int | None = None
        """Number of the trial that it runs."""
        # No sign of life is expected before Ray has found a node for it.
        self.alive_at = math.inf
        remote = ray.remote(max_concurrency=2, **resources)(RemoteWorker)
        self.actor = remote.remote(self.key, queue, sys.path)
        self.ended = self.actor.run.remote(job)

    @property
    def is_pending(self) -> bool:
        return math.isinf(self.alive_at)

    def note_life(self) -> None:
        if self.is_pending:
            self.alive_at = time.monotonic()
        super().note_life()

    def request_stop(self) -> None:
        if self.is_pending:
            self.kill()
        else:
            self.actor.stop.remote()

    def kill(self) -> None:
        import ray

        ray.kill(self.actor)

    def close(self) -> None:
        self.kill()

    def describe_death(self) -> str:
        import ray

        try:
            ray.get(self.ended, timeout=0)
        except Exception as error:  # whatever ended the actor
            return first_line(error)
        return "without a message"


class RaySupervisor(Supervisor):
    """Runs the workers of one launch on a Ray cluster.

    Args:
        address: Of the cluster. Default: $RAY_ADDRESS, else a cluster of this machine alone.

    Raises:
        UserError: Ray is not installed, there is no cluster at the address, or its nodes can't share the storage.
    """

    def __init__(
        self,
        job: Job,
        num_workers: int,
        *,
        study: optuna.Study,
        stop: Callable[[], bool],
        display: Display | None,
        on_trial_end: Callable[[], None],
        device: str,
        address: str | None = None,
    ) -> None:
        super().__init__(job, [{}] * num_workers, study=study, stop=stop, display=display, on_trial_end=on_trial_end)
        self._device, self._address = device, address
        self._queue: Any = None
        self._resources: dict[str, float] = {}
        self._started_at, self._has_ended = time.monotonic(), False

    def run(self) -> bool:
        try:
            import ray
            from ray.util.queue import Queue
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError:
            raise UserError("--engine ray: Ray is not installed: pip install 'prodigy-tuner[ray]'.") from None
        is_ours = not ray.is_initialized()
        if is_ours:
            try:
                ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"--address {self._address}: no Ray cluster there ({first_line(error)}).") from error
        try:
            _check_storage(self.job, [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]])
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
            self._resources = share_resources(len(self.environments), ray.cluster_resources(), device=self._device)
            return super().run()
        finally:
            if self._queue is not None:
                self._queue.shutdown(force=True)
            if is_ours:
                ray.shutdown()

    def _start_worker(self, index: int) -> Worker:
        return RayWorker(index, self.job, self._queue, self._resources)

    def _interrupt(self) -> None:
        import ray

        workers = [worker for worker in self._workers if isinstance(worker, RayWorker)]
        for worker in workers:
            worker.request_stop()
        if workers:
            ray.wait([worker.ended for worker in workers], num_returns=len(workers), timeout=GRACE_S)
        for worker in workers:
            worker.kill()

    def _receive(self) -> list[tuple[Worker, tuple[Any, ...] | None]]:
        import ray
        from ray.util.queue import Empty

        workers = {worker.key: worker for worker in self._workers if isinstance(worker, RayWorker)}
        # Before the messages: a worker that has ended has sent its last one.
        ended, _ = ray.wait([worker.ended for worker in workers.values()], num_returns=len(workers), timeout=0)
        received: list[tuple[Worker, tuple[Any, ...] | None]] = []
        messages: list[tuple[str, tuple[Any, ...]]] = []
        with suppress(Empty):
            messages.append(self._queue.get(timeout=POLL_S))
            messages += self._queue.get_nowait_batch(self._queue.qsize())
        received += [(workers[key], message) for key, message in messages if key in workers]
        received += [(worker, None) for worker in workers.values() if worker.ended in ended]
        if self._has_ended and all(worker.is_pending for worker in workers.values()):
            # No trial is left for those that still wait for a node.
            received += [(worker, message) for worker in workers.values() for message in (("exit", "done", ""), None)]
        self._warn_of_waiting(list(workers.values()))
        return received

    def _handle(self, worker: Worker, message: tuple[Any, ...]) -> None:
        assert isinstance(worker, RayWorker)
        if message[0] in ("started", "ended"):
            worker.trial = message[1] if message[0] == "started" else None
        self._has_ended |= message[:2] == ("exit", "done")
        super()._handle(worker, message)

    def _handle_death(self, worker: Worker) -> None:
        assert isinstance(worker, RayWorker)
        if worker.trial is not None and not worker.has_exited:
            # Its node is gone, or its process: another machine need not wait for a sign of life. It may have ended the
            # trial just before.
            with suppress(UpdateFinishedTrialError):
                write_unopened_trial(self.study, worker.trial, alive=0.0)
        super()._handle_death(worker)

    def _warn_of_waiting(self, workers: Sequence[RayWorker]) -> None:
        if time.monotonic() - self._started_at > PENDING_S and workers and all(each.is_pending for each in workers):
            self._started_at = math.inf
            needs = ", ".join(f"{value:g} {name.removeprefix('num_')}" for name, value in self._resources.items())
            log.warning("no worker has started: each waits for a node with %s free (ray status shows the nodes)", needs)


def _check_storage(job: Job, nodes: Sequence[str]) -> None:
    machines = len(set(nodes))
    is_file = isinstance(job.storage, str) and sqlalchemy.make_url(job.storage).get_backend_name() == "sqlite"
    if machines > 1 and is_file:
        raise UserError(
            f"--engine ray: {machines} machines can't share an SQLite file: use PostgreSQL (tuner storage copy moves "
            "studies), or tuner storage serve."
        )
