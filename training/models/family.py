"""What a kind of video model fills in: its networks, what a chunk reads and writes of its state, and its conditions.

A family is an object with these members, in a folder of its own (`wan/`), and one line in `families.py`. Everything above
this floor asks it, and knows no family by name. docs/add-a-family.md walks through one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from longtake.training.models.network_spec import NetworkSpec
from longtake.training.models.presets import Preset


class Precision(Protocol):
    """What a family reads of a recipe (longtake/formats/recipe.py, a floor above): how networks are stored and computed."""

    @property
    def cache(self) -> str: ...
    @property
    def linears(self) -> str: ...
    @property
    def vae_ops(self) -> str: ...
    @property
    def vae_conv(self) -> str: ...


class ModelSet(Protocol):
    """The models of a preset with their weights, as `load.Models` holds them."""

    preset: Preset
    dit: Any
    vae: Any
    text: Any
    convs: Any


class Plan(Protocol):
    """One chunk's use of the state's slots. A chunk reads some slots; its clean pass writes one that no pass of it reads."""

    @property
    def inputs(self) -> Mapping[str, tuple[int, ...]]:
        """The network's int32 inputs that say which slots are read and which one is written, the same in all passes."""
        ...

    @property
    def visible(self) -> tuple[int, ...]:
        """The chunks that this one sees, itself last."""
        ...

    @property
    def after(self) -> Marker:
        """The marker once the chunk is committed."""
        ...


class Marker(Protocol):
    """Which slots hold what: small, immutable, kept in a session's position. Staging plans with it, committing replaces it."""

    def plan(self, cut: bool) -> Plan:
        """What the next chunk reads and writes; `cut`: it is the first of a new shot."""
        ...

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description, read back by `Family.marker`."""
        ...


class Family(Protocol):
    """A kind of model. Networks have the names of `network_spec.NETWORKS`; a family leaves out what it does not have.

    solver: what its chunks are sampled with unless a session says otherwise, a name in `sampler.SOLVERS`.
    keys: the layouts of released checkpoints that `longtake convert` knows, by the name of their publisher's code.
    can: what videos of it may have: "cut", scene cuts; "camera", a camera for every frame, which the network follows. A
        family with cameras has `camera_inputs` (see sana_wm/family.py) and a network "camera".
    """

    name: str
    solver: str
    keys: tuple[str, ...]
    can: frozenset[str]

    def networks(self, preset: Preset) -> tuple[str, ...]:
        """The networks of `preset` that are exported and built; PyTorch stands in for the others."""
        ...

    def spec(self, preset: Preset, recipe: Precision, network: str) -> NetworkSpec:
        """Bindings of one network as `recipe` wants it. Raises LongtakeError for one that it does not have."""
        ...

    def module(self, models: ModelSet, recipe: Precision, network: str, exported: bool = False) -> nn.Module:
        """A module that takes the spec's inputs and returns a tuple of its outputs; it shares `models`' parameters.

        exported: with the ops that the export is made of, instead of PyTorch's own arithmetic wherever that is simpler.
        """
        ...

    def linears(self, dit: nn.Module) -> list[str]:
        """Names of the linears that recipes quantize."""
        ...

    def network_of(self, parameter: str) -> str:
        """The network that reads a parameter of the transformer, by its name: "dit", or one that is computed less often."""
        ...

    def widest(self, preset: Preset) -> int:
        """Elements of the widest tensor inside a pass over the longest chunk: the feed-forward network's."""
        ...

    def largest(self, preset: Preset) -> int:
        """Elements of the largest activation in decoding one later latent."""
        ...

    def dit(self, preset: Preset) -> Any:
        """The untrained transformer."""
        ...

    def vae(self, preset: Preset) -> Any:
        """The untrained VAE."""
        ...

    def start(self, preset: Preset) -> Marker:
        """The marker of a video that has no chunk yet."""
        ...

    def marker(self, given: Mapping[str, Any]) -> Marker:
        """Read `Marker.as_json` back."""
        ...

    def chunk_inputs(self, preset: Preset, chunk: int, shot: int) -> dict[str, Tensor]:
        """The inputs of network "dit" that depend on the chunk alone, such as rotary tables; on the CPU."""
        ...

    def pass_inputs(self, preset: Preset, frames: int, timestep: float, clean_frames: int) -> dict[str, Tensor]:
        """The inputs of "dit" that depend on the timestep, for `frames` latents whose first `clean_frames` are at 0."""
        ...

    def prompt(self, caption: str, cut: bool, first: bool = False) -> str:
        """The text to encode for a chunk; `first`: of a video."""
        ...
