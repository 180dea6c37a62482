"""The engine spec: every binding's name, dtype, shape and alias. Export, build and runtime read this one place.

Legend: C latent channels, F latent frames of a chunk, T tokens of a chunk, D head_dim, E text length, W window length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The parts of a video model, by their use. "context" is run once a prompt, "camera" once a chunk. "dit" takes the latents first and gives the velocity first; "..._first" is for
# the first call of a stream, "..._steady" for all later ones.
NETWORKS = (
    "text_encoder", "context", "camera", "dit", "vae_first", "vae_steady", "vae_encoder_first", "vae_encoder_steady",
)  # fmt: skip


def rank_network(ranks: int, network: str = "dit") -> str:
    """The name of what one of `ranks` GPUs that share `network` runs of it."""
    return f"{network}_of{ranks}"


def ranks_of(network: str) -> int:
    """How many ranks share the network of which `network` is one's part; 1 of any other network."""
    name, _, ranks = network.partition("_of")
    return int(ranks) if name in NETWORKS and ranks.isdecimal() else 1


def shared_network(network: str) -> str:
    """The network of which `network` is a rank's part; any other one is itself."""
    return network.partition("_of")[0] if ranks_of(network) > 1 else network


@dataclass(frozen=True)
class Binding:
    """One network input or output. dtype is "fp32", "bf16", "int32" or "int8"; a str dimension is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class NetworkSpec:
    """Bindings of one network. `aliases` maps an output to the input it is written over.

    `profile` gives (min, opt, max) for each dynamic dimension. `carried` maps an output of this call to the input
    of the next one that it becomes (VAE caches), without being in place. `slot` names the int32 input that says which slot (index of the first axis) of
    what is written in place a pass writes, -1 for none; "" where all of it is written. A state of fewer slots takes it modulo
    their number. `ops`: how many nodes of each op of ours the exported network has, where the family says so.
    """

    name: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    carried: tuple[tuple[str, str], ...] = ()
    profile: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    slot: str = ""
    ops: tuple[tuple[str, int], ...] = ()

    @property
    def kept(self) -> dict[str, str]:
        """(output -> input of the next call) of all that outlives a call: carried, and written in place."""
        return dict((*self.carried, *self.aliases))

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description, for manifests and digests."""
        return {
            "name": self.name,
            "inputs": [[b.name, b.dtype, list(b.shape)] for b in self.inputs],
            "outputs": [[b.name, b.dtype, list(b.shape)] for b in self.outputs],
            "aliases": [list(pair) for pair in self.aliases],
            "carried": [list(pair) for pair in self.carried],
            "profile": [[name, list(sizes)] for name, sizes in self.profile],
        }
