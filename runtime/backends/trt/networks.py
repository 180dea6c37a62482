"""The networks of a bundle on one GPU: one plan each, or cut at our ops, or (a stream's first step) by another's parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.formats.bundle import Bundle
from longtake.formats.onnx_file import WeightSource
from longtake.formats.segmented_graph import SegmentedGraph, segment_spec
from longtake.machine.flavour import Flavour
from longtake.runtime.backends.segments.exchanges import Exchanges
from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.backends.segments.vae_first import FirstStep, first_steps
from longtake.runtime.backends.trt.engine import EngineHost, ReadPlan, Scratch, TrtEngine, plan_of
from longtake.runtime.parallel.comm import Comm
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import NETWORKS, rank_network


class Network(Protocol):
    """A network on the device, whole or cut. weight_tensors: on the device, where they are not inside a plan."""

    @property
    def weight_tensors(self) -> Sequence[Tensor]: ...

    def prepare(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None: ...


class WholeNetwork:
    """A network that is one plan, plugins inside or not."""

    weight_tensors: Sequence[Tensor] = ()

    def __init__(self, engine: TrtEngine, arena: Scratch) -> None:
        self.engine, self.arena = engine, arena
        arena.reserve(engine.scratch_bytes)

    def prepare(self) -> None:
        self.context = self.engine.context(self.arena)
        self.engine.keep_compiled_kernels()

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        """Enqueue on torch's current stream; `write` makes no difference inside an engine."""
        self.context.run(tensors)


def network_from_bundle(
    bundle: Bundle,
    name: str,
    host: EngineHost,
    arena: Scratch,
    shared: dict[str, Tensor],
    weights: WeightSource | None = None,
    steady: Network | None = None,
    comm: Comm | None = None,
    kept_windows: int = 0,
) -> Network:
    """Load one network: verified plans; a cut network's weights come from `weights`, or its verified ONNX file. A stream's
    first step needs none if `steady`, its later ones' network, can do it. comm: of a rank, whose part of it is loaded.
    kept_windows: see SegmentedNetwork."""
    if name == "vae_first" and isinstance(steady, SegmentedNetwork) and (first := first_steps(steady.exported)):
        return FirstStep(steady, first)
    part = part_of(name, comm, bundle)
    cut = bundle.folder / f"{part}.segments.json"
    if not cut.is_file():
        if weights is not None:
            raise LongtakeError(f"{name}.plan holds its own weights", got="other ones", fix="use a segmented recipe")
        return WholeNetwork(host.load(name, _spec(bundle, name), bundle), arena)
    bundle.check_file(cut)
    graph, attention = SegmentedGraph.read(cut), bundle.recipe.attention
    exchanges = Exchanges(comm) if comm and part != name else None
    network = SegmentedNetwork(
        host, graph, arena, attention=attention, shared=shared, bundle=bundle, exchanges=exchanges,
        kept_windows=kept_windows,
    )  # fmt: skip
    network.load_weights_from(weights or bundle.onnx_file(f"{name}.onnx"))
    return network


def part_of(network: str, comm: Comm | None, bundle: Bundle) -> str:
    """The network that is run in place of `network`: by one of several ranks, its part, if that is built."""
    part = rank_network(comm.world, network) if comm else network
    return part if f"{part}.segments.json" in bundle.files else network


def verified_plans(
    bundle: Bundle, networks: Sequence[str], flavour: Flavour, compute_capability: str
) -> dict[str, ReadPlan]:
    """The plans of networks by name, each read once and compared with its manifest, this machine and the bundle.

    So a folder that was altered anywhere is refused before any plan of it is deserialised.
    """
    bundle.require_flavour(flavour, bundle.folder)
    wanted: dict[str, dict[str, Any]] = {}
    for name in networks:
        cut = bundle.folder / f"{name}.segments.json"
        if cut.is_file():
            graph = SegmentedGraph.read(bundle.check_file(cut))
            wanted |= {segment.name: segment_spec(segment) for segment in graph.segments}
        else:
            wanted[name] = _spec(bundle, name)
    folder = bundle.folder
    return {name: plan_of(folder, name, flavour, compute_capability, spec, bundle) for name, spec in wanted.items()}


def _spec(bundle: Bundle, name: str) -> dict[str, Any]:
    recipe = bundle.recipe
    return family_of(recipe.model).spec(recipe.model, recipe, name).as_json()


def networks_in(bundle: Bundle) -> tuple[str, ...]:
    """The networks that a bundle has plans of. Raises IntegrityError if those are missing that nothing can stand for."""
    listed = tuple(n for n in NETWORKS if f"{n}.plan" in bundle.files or f"{n}.segments.json" in bundle.files)
    camera = ("camera",) if "camera" in family_of(bundle.recipe.model).can else ()
    wanted = ("context", *camera, "dit")
    if missing := [name for name in wanted if name not in listed]:
        raise IntegrityError(
            f"the engines in {bundle.folder} lack networks",
            got=f"no {', '.join(missing)}",
            expected=", ".join(wanted),
            fix=bundle.fix,
        )
    return listed
