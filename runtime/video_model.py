"""What a video model is, made once of a backend's networks: text, context, velocity, decoder and encoder.

PyTorch stands in for the encoders that a backend does not have. Legend: B = 1, F latent frames of a chunk, C latent
channels, H, W latent size, E text length, T video frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.runtime.backends.base import Backend, State
from longtake.runtime.backends.torch_parts import TextRunner, TorchEncoder, text_runner, vae_from_checkpoints
from longtake.training.models.families import family_of
from longtake.training.models.family import Plan

Tensors = Mapping[str, Tensor]


class Decoder(Protocol):
    """Streaming VAE decoder of one video: one latent frame in, one (the first) or a group of video frames out."""

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Normalized latent fp32 [1, C, H, W] to frames fp32 [3, T, H, W] in [-1, 1]; advances the state.

        The result may be a buffer that the next call overwrites.
        """
        ...

    def state(self) -> list[Tensor]:
        """The feature caches, not copied; an empty list before the first latent."""
        ...

    def load_state(self, tensors: list[Tensor]) -> None:
        """Continue from `tensors` (any device, any float dtype), copied; an empty list starts a new video."""
        ...


class Encoder(Protocol):
    """Streaming VAE encoder of one video: one video frame in (the first) or a group, one latent frame out."""

    def encode(self, frames_CTHW: Tensor) -> Tensor:
        """Frames fp32 [3, T, H, W] in [-1, 1], any device, T = 1 at the start and a group after it; advances the state.

        Returns the normalized latent, the distribution's mean, fp32 [1, C, h, w]; the next call may overwrite it.
        """
        ...


class VideoModel:
    """The model of a backend: see each method. Its tensors are on `device`."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.preset, self.recipe = backend, backend.preset, backend.recipe
        self.device, self.family = backend.device, family_of(backend.preset)
        self._text: TextRunner | None = None
        self.closed = False  # by its generator: sessions must not go on
        spec = backend.specs["dit"]
        self._latents, self._velocity, self._slot = spec.inputs[0].name, spec.outputs[0].name, spec.slot

    def text(self, tokens: Tensor) -> Tensor:
        """Token ids int32 [1, E] to embeddings fp32 [1, E, text_dim]; rows of padding are zero."""
        if not self.backend.has("text_encoder"):
            if self._text is None:
                self._text = text_runner(self.preset, self.backend.checkpoints, self.device)
            return self._text(tokens)
        spec = self.backend.specs["text_encoder"]
        return self.backend.run("text_encoder", {spec.inputs[0].name: tokens})[spec.outputs[0].name]

    def context(self, embeddings: Tensor) -> Tensors:
        """Embeddings to what the transformer reads of a prompt, by its inputs' names. The caller keeps them."""
        return self.backend.run("context", {self.backend.specs["context"].inputs[0].name: embeddings})

    def camera(self, maps: Tensors) -> Tensors:
        """A chunk's cameras to what the transformer reads of them, by its inputs' names. The caller keeps them."""
        return self.backend.run("camera", maps)

    def new_state(self) -> State:
        """The transformer's state of one video: the slots that chunks read and write."""
        return self.backend.new_state("dit")

    def slots(self, plan: Plan) -> Tensors:
        """A plan's inputs as int32 tensors; the slot that is written stays on the host, see Backend.run."""
        tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in plan.inputs.items()}
        return {name: tensor if name == self._slot else tensor.to(self.device) for name, tensor in tensors.items()}

    def velocity(self, latents_BCFHW: Tensor, inputs: Tensors, state: State, commit: bool) -> Tensor:
        """One pass: velocity fp32 [1, C, F, H, W], which the next call may overwrite. `commit`: it writes its slot."""
        outputs = self.backend.run("dit", {self._latents: latents_BCFHW, **inputs}, state, commit)
        return outputs[self._velocity]

    def decoder(self) -> Decoder:
        """A decoder at the start of a video. Raises LongtakeError if there is no VAE."""
        if not self.backend.has("vae_first"):
            got, fix = f"no vae.safetensors in {self.backend.checkpoints}", "pass decode=False, or copy the VAE there"
            raise LongtakeError("there is no VAE to decode with", got=got, expected="a VAE, or latents only", fix=fix)
        return NetworkDecoder(self.backend)

    def encoder(self) -> Encoder:
        """An encoder at the start of a video. It may hold device memory for as long as it is referenced.

        Raises:
            LongtakeError: there is no VAE encoder; says what would give one.
        """
        if self.backend.has("vae_encoder_first") and self.backend.has("vae_encoder_steady"):
            return NetworkEncoder(self.backend)
        return TorchEncoder(vae_from_checkpoints(self.preset, self.backend.checkpoints), self.device)


class _Stream:
    """Two networks, for the first call of a stream and for all later ones; they share a state."""

    def __init__(self, backend: Backend, first: str, steady: str) -> None:
        self.backend, self.first, self.steady = backend, first, steady
        self.kept, self.started = backend.new_state(steady), False

    @torch.no_grad()
    def step(self, tensor: Tensor) -> Tensor:
        """The first output for the first input `tensor`, perhaps a buffer that the next call overwrites."""
        name = self.steady if self.started else self.first
        spec = self.backend.specs[name]
        outputs = self.backend.run(name, {spec.inputs[0].name: tensor}, self.kept)
        self.started = True
        return outputs[spec.outputs[0].name]


class NetworkDecoder(_Stream):
    """See Decoder; by the backend's networks. The caches are in the spec's order."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend, "vae_first", "vae_steady")

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        return self.step(latent_BCHW[:, :, None])[0]

    def state(self) -> list[Tensor]:
        return list(self.kept.whole().values()) if self.started else []

    @property
    def past_latents(self) -> int | None:
        """How many latents its state depends on at most, where going back by decoding them again is the way (see
        rewind.py): on a GPU. A cache is some of the last frames that a layer read, of which a latent gives one or more."""
        steady = self.backend.specs[self.steady]
        shapes = [binding.shape for binding in steady.inputs if binding.name in steady.kept.values()]
        if self.backend.decode_device.type != "cuda" or not {len(shape) for shape in shapes} <= {4, 5}:
            return None
        return sum(int(shape[-3] if len(shape) == 5 else shape[0]) for shape in shapes)

    def load_state(self, tensors: list[Tensor]) -> None:
        own = self.kept.shapes()
        if tensors and [tuple(t.shape) for t in tensors] != list(own.values()):
            raise IntegrityError(
                "the decoder's state does not fit",
                got=f"{len(tensors)} tensors",
                expected=f"{len(own)}, of the preset's sizes",
                fix="start a new session",
            )
        self.started = bool(tensors)
        if self.started:
            self.kept.load(dict(zip(own, tensors, strict=True)))


class NetworkEncoder(_Stream):
    """See Encoder; by the backend's networks."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend, "vae_encoder_first", "vae_encoder_steady")

    def encode(self, frames_CTHW: Tensor) -> Tensor:
        return self.step(frames_CTHW[None])[:, :, 0]
