"""Three drivers for the same jobs: in this process, in a pool of processes, or on Ray.

All three end in `worker.do`, which commits a part's files in one place, so their results are
the same bytes. The pool and Ray go through `Supervised`: a file that crashes or hangs a worker
costs that file. Parts may finish in any order; nothing depends on it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from unimodal.pipeline.errors import UnimodalError, UsageError, first_line
from unimodal.pipeline.processors import processors
from unimodal.pipeline.supervise import Patience, Supervised
from unimodal.pipeline.tell import Tell
from unimodal.pipeline.worker import Job, do

Engine = Literal["auto", "inline", "local", "ray"]


def choose(engine: str, address: str | None) -> str:
    """Which driver runs: "auto" is Ray where an address is configured, else the local pool.

    On one machine Ray does what the pool does, after 10 to 30 s of starting up.
    """
    if engine not in get_args(Engine):
        raise UsageError(f"unknown engine {engine}: it is one of {', '.join(get_args(Engine))}")
    if engine != "auto":
        return engine
    return "ray" if address or os.environ.get("RAY_ADDRESS") else "local"


def run_jobs(
    jobs: Sequence[Job],
    engine: str,
    tell: Tell,
    patience: Patience,
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Do all jobs; raises `UnimodalError` when the work cannot go on (a full disk, no cluster)."""
    if not jobs:
        return
    if engine == "inline":
        for job in jobs:
            do(job, tell)
    elif engine == "local":
        _local(jobs, tell, patience, workers or processors())
    else:
        _ray(jobs, tell, patience, workers, address)


def _local(jobs: Sequence[Job], tell: Tell, patience: Patience, workers: int) -> None:
    gpus = gpus_here()
    if gpus and _with(jobs, models=True):
        # A model per process would fill the GPU with copies: first everybody decodes, then a
        # process per GPU runs the models.
        _pool(_with(jobs, models=False), tell, patience, workers, [])
        _pool(_with(jobs, models=True), tell, patience, len(gpus), gpus)
    else:
        _pool(jobs, tell, patience, workers, [])


def _with(jobs: Sequence[Job], models: bool) -> list[Job]:
    """The steps of jobs that run a model, or those that do not."""
    halves = [replace(job, steps=[s for s in job.steps if s.model == models]) for job in jobs]
    return [job for job in halves if job.steps]


def gpus_here() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return [name.strip() for name in shown.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def _pool(
    jobs: Sequence[Job], tell: Tell, patience: Patience, workers: int, gpus: Sequence[str]
) -> None:
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    workers = min(workers, len(jobs))
    # With fewer parts than processors, as for one long video, each decoder takes several.
    threads = max(1, processors() // max(1, workers))
    failures: list[BaseException] = []
    crew = [Supervised(patience, gpu=gpus[i] if gpus else None) for i in range(workers)]

    def drive(worker: Supervised) -> None:
        try:
            while not failures:
                worker.do(replace(waiting.get_nowait(), threads=threads), tell)
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)
            for other in crew:  # what they are at is lost anyway if this is a full disk
                other.stop()
        finally:
            worker.close()

    drivers = [threading.Thread(target=drive, args=(worker,), daemon=True) for worker in crew]
    for driver in drivers:
        driver.start()
    try:
        for driver in drivers:
            driver.join()
    except BaseException:  # Ctrl-C: nobody may go on writing once the lock is released
        for worker in crew:
            worker.stop()
        raise
    if failures:
        raise failures[0]


def _ray(
    jobs: Sequence[Job], tell: Tell, patience: Patience, workers: int | None, address: str | None
) -> None:
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise UsageError("the ray engine needs Ray: pip install 'ray[data]'") from error
    mine = not ray.is_initialized()
    if mine:
        connect(address or os.environ.get("RAY_ADDRESS"), workers)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        common = {
            "patience": patience.model_dump_json(),
            "failed": "",
            "seconds": 0.0,
            "done": "[]",
        }
        rows = [{**common, "job": job.text()} for job in jobs]
        # A block per part: a part is the unit of scheduling, and of retry when a node is lost.
        parts = ray.data.from_items(rows, override_num_blocks=len(rows))
        pool = ray.data.TaskPoolStrategy(size=min(workers, len(rows)) if workers else None)
        heavy = gpus > 0 and bool(_with(jobs, models=True))
        done: ray.data.Dataset = parts
        if not heavy or _with(jobs, models=False):
            task = partial(_ray_part, models=False if heavy else None)
            done = parts.map(task, num_cpus=1, compute=pool)
        if heavy:  # while some parts are decoded, others are at the models already
            actors = ray.data.ActorPoolStrategy(size=min(gpus, len(rows)))
            done = done.map(_RayModels, num_cpus=0, num_gpus=1, compute=actors)  # type: ignore[arg-type]
        for row in done.iter_rows():
            if row["failed"]:
                raise UnimodalError(row["failed"])
            tell.seconds(row["seconds"])
            for stage, thing, why in json.loads(row["done"]):
                tell.done(stage, thing, why)
    except ray.exceptions.RayError as error:
        raise UnimodalError(
            f"Ray gave up ({first_line(error)}); what is done is kept: run the same command again"
        ) from error
    finally:
        if mine:
            ray.shutdown()


def connect(address: str | None, workers: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        _knock(address)
        if address:
            ray.init(address=address, **quiet)
        else:
            # Loopback only, and no usage reports: a laptop's Ray is nobody else's business.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                address="local",  # not a cluster that somebody else started on this machine
                num_cpus=workers,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UnimodalError(
            f"no Ray at {address or 'this machine'} ({first_line(error)}): start one, or use "
            "--engine local"
        ) from error


def _knock(address: str | None) -> None:
    """Raise `OSError` if nobody listens at host:port; Ray itself would try for five minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


_IN_RAY: dict[str, Supervised] = {}
"""The worker process of this Ray worker, kept from part to part; it ends with its parent."""


def _ray_part(row: dict[str, Any], models: bool | None) -> dict[str, Any]:
    """The steps of one part inside a Ray task: with models only, without them, or all (None).

    Errors come back as rows: an exception would end the run.
    """
    if row["failed"]:
        return row
    worker = _IN_RAY.setdefault(
        row["patience"], Supervised(Patience.model_validate_json(row["patience"]))
    )
    told: dict[tuple[str, str], str] = {}  # a thing that is tried again is told of once
    seconds: list[float] = []
    tell = Tell(
        seconds=seconds.append,
        done=lambda stage, thing, why: told.update({(stage, thing): why}),
    )
    job = Job.parse(row["job"])
    job.steps = [step for step in job.steps if models is None or step.model == models]
    failed = ""
    try:
        worker.do(job, tell)
    except Exception as error:
        failed = str(error) or type(error).__name__
    done = json.loads(row["done"]) + [[*thing, why] for thing, why in told.items()]
    total = row["seconds"] + sum(seconds)
    return {**row, "failed": failed, "seconds": total, "done": json.dumps(done)}


class _RayModels:
    """An actor that holds a GPU, and the models in its worker process, from part to part."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _ray_part(row, models=True)
