"""What a backend is: the networks of one recipe on one device, run by name, with their state in place.

Every tensor is a torch tensor on `Backend.device` (a decoder's on `decode_device`), except where said. A backend raises
LongtakeError when it cannot be had; anything it raises during a call leaves no trace that the session would read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import NetworkSpec
from longtake.training.models.presets import Preset

NO_SLOT = torch.tensor([-1], dtype=torch.int32)  # in the place of `spec.slot`: nothing is written


class State:
    """What a network keeps from call to call: tensors by the names of its inputs. They are used in place and never move.

    In a network with slots the first axis is the slot's: a call reads some slots and writes at most one.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.loads = 0  # how often other tensors were copied over it

    # What several ranks hold parts of (runtime/parallel), these know as a whole.

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(math.prod(shape) * self.tensors[name].element_size() for name, shape in self.shapes().items())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def whole(self) -> dict[str, Tensor]:
        """The tensors by name; not copied where this process has all of them."""
        return self.tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy whole tensors of these names and shapes over the state, in place; the dtype may differ."""
        self.loads += 1
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


class Backend(ABC):
    """The networks of one recipe, ready to run.

    name: "reference", "segmented" or "fused" (tests add their own). reason: why this one was chosen, one clause.
    checkpoints: where what is no network here comes from, the preset's own folder if None.
    weights: digests of the weights that it runs, by what they are of ("dit", "vae"); those that are known.
    made_of: where it was opened from an export: the model's name ("model") and the export's state ("export").
    failure: why it runs no more networks, whoever asks; None while it does.
    networks, sizes, twice_bytes, memory_rows: of a backend on TensorRT plans, what the memory budget is compared with: the
    loaded networks by name, bytes by the name of the budget's term, bytes of caches kept twice, and `MemoryLog.rows`.
    windows: how many layers keep their attention's window between passes ("layers", "of"), and why so many ("chosen").
    """

    name: str = ""
    reason: str = ""
    device: torch.device
    preset: Preset
    recipe: Recipe
    checkpoints: Path | None = None
    weights: Mapping[str, str] = {}
    made_of: Mapping[str, Any] = {}
    failure: LongtakeError | None = None
    networks: Mapping[str, Any] = {}
    sizes: Mapping[str, int] = {}
    twice_bytes: int = 0
    memory_rows: Sequence[Mapping[str, Any]] = ()
    windows: Mapping[str, Any] = {}

    @cached_property
    def decode_device(self) -> torch.device:
        """Where the VAE decoder runs."""
        return self.device

    @cached_property
    def vae_conv(self) -> Mapping[str, int]:
        """How many convolutions of the VAE decoder's later steps run in what, where that is known without its segments."""
        return {}

    @cached_property
    def specs(self) -> dict[str, NetworkSpec]:
        """The spec of every network that the preset's model consists of, whether or not it can be run here."""
        family = family_of(self.preset)
        names = dict.fromkeys(("text_encoder", *family.networks(self.preset)))
        return {name: family.spec(self.preset, self.recipe, name) for name in names}

    @abstractmethod
    def has(self, network: str) -> bool:
        """Whether `network` can be run here."""

    @abstractmethod
    def new_state(self, network: str) -> State:
        """Allocate the state of `network`, zeroed: its spec's in-place and carried inputs.

        A stream's two networks ("vae_first", "vae_steady") share one state, made for the later one's name.
        """

    @abstractmethod
    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """Run `network` once; its outputs by name, but for those that went into `state`.

        Args:
            inputs: by the spec's names, without what is in `state`. The one called `spec.slot` stays on the host, so that
                nobody waits for the device.
            state: what `new_state` returned. Outputs may then be buffers that the next call overwrites; without a state
                the caller keeps them.
            commit: False leaves the state alone. Otherwise it takes the outputs: all of them, or of a network with slots
                only slot `inputs[spec.slot]`, so that a call that fails half-way damages at most that one.
        """

    @abstractmethod
    def peak_bytes(self) -> int:
        """Peak memory so far in bytes: device memory on a GPU, resident memory of the process on a CPU."""

    def close(self) -> None:  # noqa: B027  (an override is not required)
        """Release engines and buffers. Calling it twice is harmless."""
