"""A rank's part of a backend: its tokens, heads and rows. The first rank and the others run the same calls.

Legend: F latent frames of a chunk, T its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longtake.plugins.cache_format import cache_tensors
from longtake.runtime.backends.base import NO_SLOT, Backend, State
from longtake.runtime.backends.torch_modules import TorchModules
from longtake.runtime.parallel.comm import Comm, shares
from longtake.runtime.parallel.networks import ROWS, SplitDiTStep, vae_of_rows
from longtake.runtime.profile.gpu import pass_ms
from longtake.training.models.wan.networks import VAE_STEPS, DiTStep

LATENT_FRAMES, VIDEO_ROWS = 2, 3  # axes: of [1, C, F, H, W], and rows of both
STREAM_ROWS = 1  # axis of a decoder's [T, Y, X, C]
TOKENS = ("timestep_sinusoid", "rope_cos", "rope_sin")  # inputs whose first axis is frames or tokens
ROW_NETWORKS = ("vae_first", "vae_steady")


class Rank(Backend):
    """`inner`, a backend of one process, cut for one rank. shared: the networks that ranks run together."""

    name = "rank"
    inner: Backend
    shared: frozenset[str]
    by_rows = False

    def cut(self, inner: Backend, comm: Comm) -> None:
        """Say what of `inner` is this rank's."""
        self.inner, self.comm, preset = inner, comm, inner.preset
        self.frames = shares(preset.chunk_latents, comm.world)
        self.rows = shares(preset.latent_hw[0], comm.world)
        self.heads = shares(preset.dit.heads, comm.world)

    def cut_of(self, network: str, name: str) -> tuple[int, list[int]] | None:
        """Along which axis tensor `name` of a network's state is cut, and into what; None: all ranks have all of it."""
        if network == "dit":
            axes = {t.name: t.shape.index("H") for t in cache_tensors(self.recipe.cache) if "H" in t.shape}
            axis = axes.get(name.rpartition("_")[0])
            return None if axis is None else (axis, self.heads)
        return (ROWS, self.rows) if network in self.shared else None

    def whole_shapes(self, network: str) -> dict[str, tuple[int, ...]]:
        """Of the tensors of a network's state."""
        spec = self.specs[network]
        kept = [binding for binding in spec.inputs if binding.name in spec.kept.values()]
        return {binding.name: tuple(int(size) for size in binding.shape) for binding in kept}

    def pass_ms(self) -> dict[str, float]:
        """See ShardedBackend.pass_ms."""
        return {}

    def release(self) -> None:
        """Give up what was captured with the communicator, which would wait for it."""

    def parts_of(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A pass's whole inputs with this rank's frames and tokens of those that ranks share."""
        part = self.comm.part
        mine = {name: part(inputs[name], 0, self.frames) for name in TOKENS}
        return {**inputs, **mine, "latents": part(inputs["latents"], LATENT_FRAMES, self.frames)}

    def whole(self, network: str, state: State) -> dict[str, Tensor]:
        """A state's tensors, gathered on the first rank."""
        cuts = {name: self.cut_of(network, name) for name in state.tensors}
        return {name: self.comm.collected(t, *cut) if (cut := cuts[name]) else t for name, t in state.tensors.items()}

    def from_first(self, shape: tuple[int, ...], like: Tensor, whole: Tensor | None) -> Tensor:
        """The first rank's `whole` on every rank, in the dtype of `like`."""
        given = torch.empty(shape, dtype=like.dtype, device=self.device)
        if whole is not None:
            given.copy_(whole)
        return self.comm.send_all(given)

    def load(self, network: str, state: State, tensors: Mapping[str, Tensor] | None) -> None:
        """Take this rank's part of the first rank's `tensors`."""
        state.loads += 1
        for name, shape in self.whole_shapes(network).items():
            own = state.tensors[name]
            given = self.from_first(shape, own, tensors[name] if tensors is not None else None)
            cut = self.cut_of(network, name)
            own.copy_(self.comm.part(given, *cut) if cut else given)


class RankBackend(Rank, TorchModules):
    """A rank in PyTorch. What is not shared runs as `inner` runs it."""

    inner: TorchModules

    def __init__(self, inner: TorchModules, comm: Comm) -> None:
        super().__init__(inner.recipe, inner.reason, inner.device, inner.preset, inner.checkpoints)
        self.cut(inner, comm)
        step = inner._modules["dit"]
        assert isinstance(step, DiTStep)
        self._modules = {**inner._modules, "dit": SplitDiTStep(step, comm).eval(), **self._row_networks()}
        self.shared = frozenset({"dit", "context", *(ROW_NETWORKS if self.by_rows else ())}) & self._modules.keys()
        if comm.rank:  # a text encoder may be larger than all the rest
            self._modules = inner._modules = {name: self._modules[name] for name in self.shared}

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """Whether the decoder's rows are shared: not one made of ops of ours, which look at whole frames."""
        return self.recipe.vae_ops == "engine"

    def _row_networks(self) -> dict[str, nn.Module]:
        there = [name for name in ROW_NETWORKS if name in self.inner._modules and self.by_rows]
        if not there:
            return {}
        vae = vae_of_rows(self.inner._modules[there[0]].vae, self.comm, self.rows)  # type: ignore[arg-type]
        return {name: VAE_STEPS[name](vae).eval() for name in there}

    def stored(self, dtype: str) -> torch.dtype:
        """See HostBackend.stored."""
        return self.inner.stored(dtype)

    def new_state(self, network: str) -> State:
        """This rank's part of it."""
        spec, tensors = self.specs[network], {}
        dtypes = {binding.name: self.stored(binding.dtype) for binding in spec.inputs}
        for name, shape in self.whole_shapes(network).items():
            if cut := self.cut_of(network, name):
                axis, parts = cut
                size = shape[axis] // sum(parts) * parts[self.comm.rank]
                shape = (*shape[:axis], size, *shape[axis + 1 :])
            tensors[name] = torch.zeros(shape, dtype=dtypes[name], device=self.device)
        return State(tensors)

    @torch.no_grad()
    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """See Backend.run. Inputs are whole; of what ranks share, outputs are whole on the first one only."""
        if network == "dit" and state is not None:
            return self._dit(inputs, state, commit)
        if network not in self.shared or network == "context":
            return super().run(network, inputs, state, commit)
        latent = self.comm.part(inputs["latent"], VIDEO_ROWS, self.rows)
        outputs = super().run(network, {"latent": latent}, state, commit)
        return {"frames": self.comm.collected(outputs["frames"], VIDEO_ROWS, self.rows)}

    def _dit(self, inputs: Mapping[str, Tensor], state: State, commit: bool) -> Mapping[str, Tensor]:
        """In place: the module writes its slot itself. The slot stays on the host."""
        spec, comm = self.specs["dit"], self.comm
        slot = inputs["write_slot"] if commit else NO_SLOT
        feeds = {**self.parts_of(inputs), **state.tensors, "write_slot": slot.cpu()}
        arguments = (feeds[b.name] if b.name == "write_slot" else feeds[b.name].to(self.device) for b in spec.inputs)
        velocity = self._modules["dit"](*arguments)[0]
        return {"velocity": comm.collected(velocity, LATENT_FRAMES, self.frames)}


class EngineRank(Rank):
    """A rank on TensorRT's segments, opened with the same `comm`: the exchanges lie between them, in the pass's CUDA graph.

    The encoders are the first rank's alone, and so is a decoder that is not built by rows.
    """

    def __init__(self, inner: Backend, comm: Comm) -> None:
        self.recipe, self.preset, self.device, self.checkpoints = (
            inner.recipe,
            inner.preset,
            inner.device,
            inner.checkpoints,
        )
        self.cut(inner, comm)
        self.by_rows = inner.specs["vae_steady"] != self.specs["vae_steady"]
        self.shared = frozenset({"dit", "context", *(ROW_NETWORKS if self.by_rows else ())})
        self.rows = [1] * comm.world

    def has(self, network: str) -> bool:
        """See Backend.has."""
        return self.inner.has(network)

    def new_state(self, network: str) -> State:
        """This rank's part of it."""
        return self.inner.new_state(network)

    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """See Backend.run. Inputs are whole; a velocity, and frames by rows, are whole on the first rank only."""
        if network in ROW_NETWORKS and self.by_rows:
            frames = self.inner.run(network, inputs, state, commit)["frames"]
            own = without_ghosts(frames, VIDEO_ROWS, self.preset.height // self.comm.world)
            return {"frames": self.comm.collected(own, VIDEO_ROWS, self.rows)}
        if network != "dit":
            return self.inner.run(network, inputs, state, commit)
        velocity = self.inner.run(network, self.parts_of(inputs), state, commit)["velocity"]
        return {"velocity": self.comm.collected(velocity, LATENT_FRAMES, self.frames)}

    def whole(self, network: str, state: State) -> dict[str, Tensor]:
        """See Rank.whole; of a decoder's histories the rows without ghosts, and those that every rank has whole."""
        if network == "dit":
            return super().whole(network, state)
        made = {}
        for name, shape in self.whole_shapes(network).items():
            own = state.tensors[name]
            if own.shape[STREAM_ROWS] != shape[STREAM_ROWS]:
                own = without_ghosts(own, STREAM_ROWS, shape[STREAM_ROWS] // self.comm.world)
                own = self.comm.collected(own, STREAM_ROWS, self.rows)
            made[name] = own
        return made

    def load(self, network: str, state: State, tensors: Mapping[str, Tensor] | None) -> None:
        """See Rank.load. Ghost rows are renewed before they are read."""
        if network == "dit":
            return super().load(network, state, tensors)
        for name, shape in self.whole_shapes(network).items():
            own = state.tensors[name]
            given = self.from_first(shape, own, tensors[name] if tensors is not None else None)
            if own.shape == given.shape:
                own.copy_(given)
            else:
                part = self.comm.part(given, STREAM_ROWS, self.rows)
                without_ghosts(own.zero_(), STREAM_ROWS, part.shape[STREAM_ROWS]).copy_(part)

    def pass_ms(self) -> dict[str, float]:
        """See ShardedBackend.pass_ms."""
        return pass_ms(self.inner)

    def release(self) -> None:
        """See Rank.release."""
        if passes := getattr(self.inner, "passes", None):
            passes.release()

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes."""
        return self.inner.peak_bytes()

    def close(self) -> None:
        """See Backend.close."""
        self.inner.close()


def without_ghosts(x: Tensor, axis: int, rows: int) -> Tensor:
    """A rank's own `rows` of x along `axis`, which has as many ghost rows before as behind them; a view."""
    return x.narrow(axis, (x.shape[axis] - rows) // 2, rows)
