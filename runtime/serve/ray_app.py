"""The same over many machines: fronts and workers as deployments of Ray Serve, the registry as one named actor.

The only file that imports ray. All that counts is in the store, which all machines see: whoever dies, the others go on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica
from ray.util import metrics

from longtake.errors import LongtakeError, UnavailableError
from longtake.runtime.serve.app import app_from
from longtake.runtime.serve.contract import ServeError
from longtake.runtime.serve.desk import Desk
from longtake.runtime.serve.front import Front
from longtake.runtime.serve.grants import ElsewhereError, Event, Grant, WorkerLostError
from longtake.runtime.serve.jobs import Jobs, JobsElsewhere
from longtake.runtime.serve.local import LocalWorkers
from longtake.runtime.serve.meters import ray_meters, silent
from longtake.runtime.serve.server import Open, Say, Settings, Size, free_port, listening, slots_of
from longtake.runtime.serve.worker import Worker
from longtake.settings import ray_address, ray_auth_mode, ray_cluster_file

log = logging.getLogger(__name__)

APP, DESK, NAMESPACE = "longtake", "longtake-desk", "longtake"
HEARTBEAT_S, PATIENCE_S, PATIENT_CALLS = 1.0, 30.0, 10


def _ask_desk(method: str, *words: Any, otherwise: Any = None, seconds: float = PATIENCE_S) -> Any:
    """What the registry answers; `otherwise` while it is not there."""
    try:
        return ray.get(getattr(ray.get_actor(DESK, NAMESPACE), method).remote(*words), timeout=seconds)
    except (RayError, ValueError):
        return otherwise


def _has_desk() -> bool:
    """Whether there is a registry, be it one that restarts just now."""
    try:
        ray.get_actor(DESK, NAMESPACE)
    except ValueError:
        return False
    except RayError:
        pass  # the cluster does not answer now
    return True


class DeskProxy:
    """The registry's actor, by the methods of `Desk`. While it restarts it is asked again for `PATIENCE_S`."""

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*words: Any) -> Any:
            until = time.monotonic() + PATIENCE_S
            while True:
                try:
                    return await getattr(ray.get_actor(DESK, NAMESPACE), name).remote(*words)
                except RayTaskError as error:
                    raise error.cause from None
                except (RayActorError, ValueError):
                    if time.monotonic() > until:
                        how: Any = {"status": 503, "close": 4503, "detail": {"fix": "try again in some seconds"}}
                        raise ServeError("not_ready", "the registry is away", **how) from None
                    await asyncio.sleep(0.2)

        return call


@contextlib.contextmanager
def _lost_if_gone() -> Iterator[None]:
    """What a worker raised as it was; that it is gone as WorkerLostError."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from None
    except (RayActorError, RayServeException, ConnectionError) as error:
        raise WorkerLostError(type(error).__name__) from None


def _asking(method: str) -> Any:
    """A method that is the worker's own, called where the grant says."""

    async def call(self: RayWorkers, grant: Grant, *words: Any) -> Any:
        with _lost_if_gone():
            return await getattr(self.worker(grant), method).remote(grant, *words)

    return call


class RayWorkers:
    """Workers as replicas of a deployment; a call goes to the one that the grant names."""

    interact, control, advance = _asking("interact"), _asking("control"), _asking("advance")

    @cached_property
    def _handle(self) -> Any:
        return serve.get_deployment_handle("Maker", app_name=APP)

    def worker(self, grant: Grant, **how: Any) -> Any:
        return self._handle.options(session_id=grant.worker, **how)

    async def stream(self, grant: Grant, window: int | None) -> AsyncIterator[Event]:
        for _ in range(PATIENT_CALLS):
            try:
                with _lost_if_gone():
                    async for event in self.worker(grant, stream=True).stream.remote(grant, window):
                        yield event
                return
            except ElsewhereError:  # the router has not heard of that replica yet, or no more
                await asyncio.sleep(0.5)
        raise WorkerLostError(grant.worker)


class PinnedRouter(FIFOMixin, RequestRouter):
    """A request goes to the replica that it names; one that is gone is answered by any, which says so."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        named = pending_request.metadata.session_id if pending_request else ""
        pinned = [replica for replica in candidate_replicas if replica.replica_id.unique_id == named]
        return [pinned or candidate_replicas]


class Maker(LocalWorkers):
    """A worker as a replica. It tells the registry that it lives, and what it makes."""

    def __init__(self, settings: Settings, open_model: Open, generation: int) -> None:
        generator, name = open_model(lambda words: None), serve.get_replica_context().replica_tag
        worker = self.worker = settings.worker(generator, settings.shared_store(), name, ray_meters(metrics))
        facts = (settings, name, slots_of(generator, settings.slots), generation, worker.describe())
        threading.Thread(target=_beat, args=(worker, facts), daemon=True).start()

    async def stream(self, grant: Grant, window: int | None) -> AsyncGenerator[Event]:
        async with contextlib.aclosing(super().stream(grant, window)) as events:
            async for event in events:
                _end_if_failed(self._worker(grant))
                yield event


def _end_if_failed(worker: Worker) -> None:
    """Ranks that have lost each other make no more chunks. The worker ends as if it was killed: Serve puts another one in its
    place, and its sessions move."""
    if failure := worker.generator.backend.failure:
        log.error("worker %s ends: %s", worker.name, failure)
        os._exit(failure.exit_code)


def _beat(worker: Worker, facts: tuple[Any, ...]) -> None:
    while True:
        _end_if_failed(worker)
        worker.meters.worker(facts[-1], worker.generator.backend.peak_bytes())  # Ray forgets what is not said again
        if not _ask_desk("register", *facts, worker.running(), otherwise=True):
            worker.drain()
        time.sleep(HEARTBEAT_S)


class DeskActor(Desk):
    """The registry; jobs are driven from here, too. It restarts for ever, and fills itself from the store and the workers."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.limits, ray_meters(metrics))
        self.jobs, self._begun = Jobs(self._front(settings)), False

    def _front(self, settings: Settings) -> Front:
        """Obey these settings from now on."""
        front = settings.front(settings.shared_store(), self, RayWorkers(), silent())
        limits, self.settings = settings.limits, settings
        self.registry.user_sessions, self.registry.user_jobs = limits.user_sessions, limits.user_jobs
        self.registry.queue = limits.queue
        return front

    async def register(self, settings: Settings, *facts: Any) -> bool:  # type: ignore[override]
        """See `Desk`. settings: of the worker's deployment; those of the newest one count, also after a restart."""
        current = await super().register(*facts)
        if current and settings != self.settings:
            self._begun = self._begun and settings.store == self.settings.store  # else there may be other jobs
            self.jobs.front = self._front(settings)
        if not self._begun:
            self._begun = True
            try:
                await self.jobs.begin()
            except BaseException:
                self._begun = False  # the next heartbeat tries again
                raise
        return current

    async def add_job(self, session: str) -> None:
        """Drive a job that is in the store. Raises QuotaError."""
        await self.jobs.add(self.jobs.front.store.journal(session))


@serve.ingress()
class Entrance:
    """A front as a replica: no model, no GPU."""

    def __init__(self, settings: Settings, generation: int, _: Any) -> None:
        self.front = settings.front(settings.shared_store(), DeskProxy(), RayWorkers(), ray_meters(metrics))
        self.front.jobs, self.generation = JobsElsewhere(self.front.desk), generation

    def __serve_build_asgi_app__(self) -> Any:
        return app_from(self.front)

    async def check_health(self) -> None:
        """Called by Serve now and then: sockets move once a newer deployment has begun. A front without a registry is not ill."""
        with contextlib.suppress(TimeoutError, ServeError):
            self.front.count_socket("", 0)  # Ray forgets what is not said again
            newest = await asyncio.wait_for(self.front.desk.generation(), HEARTBEAT_S)
            self.front.leaving = self.front.leaving or newest > self.generation
        for connection in list(self.front.connections) if self.front.leaving else ():
            await connection.close(1001)


def wanted_workers(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many workers as running and waiting sessions ask for."""
    now, load = context.current_num_replicas, _ask_desk("load", seconds=2)
    return now if load is None else max(1, -int(-load * now // 1)), {}


def deployed(settings: Settings, open_model: Open, size: Size, generation: int) -> Any:
    """The application for `serve.run`."""
    router: Any = RequestRouterConfig(request_router_class=PinnedRouter)  # type: ignore[arg-type]
    policy = AutoscalingPolicy(policy_function=wanted_workers)
    scaling: Any = AutoscalingConfig(min_replicas=size.least, max_replicas=size.most, policy=policy)
    making: Any = serve.deployment(
        name="Maker",
        max_ongoing_requests=settings.slots * 4 + 16,
        ray_actor_options={"num_cpus": 0.1, "num_gpus": size.gpus},
        request_router_config=router,
        **({"autoscaling_config": scaling} if size.most > size.least else {"num_replicas": size.least}),
    )
    brief: Any = {"ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 5, "health_check_period_s": 1}
    sockets = 1000 + settings.limits.queue
    entering: Any = serve.deployment(name="Entrance", max_ongoing_requests=sockets, num_replicas=size.fronts, **brief)
    return entering(Entrance).bind(settings, generation, making(Maker).bind(settings, open_model, generation))


def serve_ray(settings: Settings, open_model: Open, announce: Say, size: Size) -> int:
    """Serve over Ray until a signal comes, or a newer deployment; returns the exit code.

    Raises:
        LongtakeError: without a store, or on a cluster that anybody may run code on.
    """
    settings.door(settings.shared_store())
    own = _connected()
    require_gpus(size.gpus, ray.nodes())
    if len(ray.nodes()) > 1 and ray_auth_mode() != "token":
        fix = "set RAY_AUTH_MODE=token on every machine"
        raise LongtakeError("whoever reaches this cluster runs code on it", got="no RAY_AUTH_MODE", fix=fix)
    host, port = settings.host, settings.port or free_port(settings.host, 8000)
    if not _has_desk():  # nothing is deployed yet: whoever has the port is somebody else
        listening(host, port).close()
    kept = {"name": DESK, "get_if_exists": True, "max_restarts": -1, "lifetime": "detached", "num_cpus": 0}
    desk: Any = ray.remote(DeskActor).options(**kept, max_concurrency=1000).remote(settings)  # type: ignore[arg-type]
    generation = ray.get(desk.begin_generation.remote())
    serve.start(http_options=HTTPOptions(host=host, port=port))
    serve.run(deployed(settings, open_model, size, generation), name=APP, route_prefix="/")
    announce(f"http://{host}:{port}/")
    return _until_ended(desk, generation, own)


def require_gpus(gpus: int, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise UnavailableError if no machine of the cluster has as many GPUs as are to share a video: Ray would wait for one."""
    most = max((int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]), default=0)
    if gpus > max(1, most):
        raise UnavailableError(
            f"{gpus} GPUs are asked for each worker and no machine of this cluster has as many",
            got=f"--gpus {gpus}, at most {most} on one machine",
            expected="GPUs of one machine, which share a video",
            fix="fewer --gpus, or add such a machine to the cluster",
        )


def _connected() -> bool:
    """Join the cluster that is there, else begin one of this machine, which ends with this process. Whether it was begun.

    Raises:
        LongtakeError: the cluster that RAY_ADDRESS names does not answer.
    """
    named, kept = ray_address(), ray_cluster_file()
    away = "://" not in named and ":" in named and not _answers(named)
    if named != "local" and not away and (named or not kept.exists() or _answers(kept.read_text().strip())):
        try:
            ray.init("auto", namespace=NAMESPACE, log_to_driver=False)
            return False
        except ConnectionError:
            away = named not in ("", "auto")
    if away:
        fix = "begin it with `ray start --head`, or unset RAY_ADDRESS to serve on this machine alone"
        raise LongtakeError("no Ray cluster answers", got=f"RAY_ADDRESS={named}", fix=fix)
    ray.init("local", namespace=NAMESPACE, log_to_driver=False, include_dashboard=False)
    return True


def _answers(address: str) -> bool:
    """Whether anybody listens at "host:port". Ray itself would ask for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def _until_ended(desk: Any, generation: int, own: bool) -> int:
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    while not ending.wait(HEARTBEAT_S):
        if not _has_desk():
            return 0  # another command has ended all
        if not own and _ask_desk("generation", otherwise=0) > generation:
            return 0  # a newer deployment has taken over
    if _ask_desk("begin_generation"):
        time.sleep(3 * HEARTBEAT_S)  # in which every session is parked
    serve.shutdown()
    ray.kill(desk)
    return 0
