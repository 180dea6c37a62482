"""Error recycling: a model's own errors of earlier steps, injected into what it is trained on.

In inference a chunk sees what the model made of the chunks before it, in teacher forcing the truth. So the errors of
its predictions are kept, on the CPU, and added to later batches:

  noise    E_noise of the block's timestep bucket to eps, and so to the target
  latent   E_latent of the bucket to what is noised; the target keeps the true latents
  context  E_latent of any bucket to a block of the clean part

each with its own probability, scaled by U(1 - modulate, 1 + modulate); a share `clean` of the samples gets none. After
the step E_latent = x0 predicted - x0 and E_noise = (v - target) (1 - sigma) of every block go into the bucket of its
timestep; those of clean samples only with probability `update_clean`. A full bucket forgets one at random.

What is decided at random depends on the trainer's generator alone. Given and padded frames get and leave no error.

Legend: B batch, N chunks, F latent frames of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.options import option
from longtake.training.objective.noise import GRID
from longtake.training.objective.teacher_forcing import Clips, Noise, noisy_part

Gather = Callable[[Tensor], Tensor]
BUFFERS = ("latent", "noise")


@dataclass(frozen=True)
class RecyclingConfig:
    """Error recycling

    Probabilities and sizes; the defaults are LongLive's. A bucket holds `capacity` errors of one chunk in bf16.

    warmup: steps in which all ranks' errors go into every rank's buffers. start: first step with injections.
    """

    capacity: int = option(500, metavar="N", names=("--error-capacity",))
    """errors of a chunk kept for each of 50 noise levels (at 704x1280, 500 are 135 GB all together)"""
    buckets: int = 50
    modulate: float = 0.3
    clean: float = 0.2
    context: float = 0.9
    latent: float = 0.9
    noise: float = 0.01
    update_clean: float = 0.1
    warmup: int = 50
    start: int = 0

    def __post_init__(self) -> None:
        chances = (self.clean, self.context, self.latent, self.noise, self.update_clean, self.modulate)
        if not (1 <= self.buckets <= GRID and self.capacity >= 1 and all(0 <= chance <= 1 for chance in chances)):
            raise LongtakeError(
                "bad error recycling", got=self, expected=f"1 to {GRID} buckets, capacity >= 1, probabilities 0 to 1"
            )


class ErrorBuffer:
    """Errors of chunks, [F, C, H, W] each, by timestep bucket.

    owner: (index, count) under sequence parallelism: only buckets b with b % count == index are kept here, and a look
    into another one goes to the nearest that is.
    """

    def __init__(self, buckets: int, capacity: int, owner: tuple[int, int] = (0, 1)) -> None:
        self.capacity = capacity
        self.owned = [bucket for bucket in range(buckets) if bucket % owner[1] == owner[0]]
        self.entries: dict[int, list[Tensor]] = {bucket: [] for bucket in self.owned}

    def __len__(self) -> int:
        return sum(map(len, self.entries.values()))

    def add(self, bucket: int, error: Tensor, generator: torch.Generator) -> None:
        """Keep a copy of `error` in bf16, in place of a random one when the bucket is full."""
        if bucket not in self.entries:
            return
        held, copied = self.entries[bucket], error.to("cpu", torch.bfloat16, copy=True)
        if len(held) < self.capacity:
            held.append(copied)
        else:
            held[_pick(len(held), generator)] = copied

    def matched(self, bucket: int, generator: torch.Generator) -> Tensor | None:
        """A random error of the bucket, or None."""
        held = self.entries[min(self.owned, key=lambda own: abs(own - bucket))]
        return held[_pick(len(held), generator)] if held else None

    def any(self, generator: torch.Generator) -> Tensor | None:
        """A random error, all equally likely, or None."""
        if not len(self):
            return None
        index = _pick(len(self), generator)
        for held in self.entries.values():
            if index < len(held):
                return held[index]
            index -= len(held)
        raise AssertionError("an index below the count is in some bucket")

    def state(self) -> dict[str, Tensor]:
        """All errors, bf16 [n, F, C, H, W], and their buckets, int64 [n]; nothing when empty."""
        pairs = [(bucket, error) for bucket, held in self.entries.items() for error in held]
        if not pairs:
            return {}
        return {"errors": torch.stack([e for _, e in pairs]), "buckets": torch.tensor([b for b, _ in pairs])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave, in its order."""
        for held in self.entries.values():
            held.clear()
        for bucket, error in zip(state.get("buckets", torch.empty(0)).tolist(), state.get("errors", ())):
            self.entries[int(bucket)].append(error.clone())


class ErrorRecycling:
    """Both buffers, and what happens to them in a step."""

    def __init__(self, config: RecyclingConfig, shift: float, owner: tuple[int, int] = (0, 1)) -> None:
        self.config, self.shift = config, shift
        self.buffers = {name: ErrorBuffer(config.buckets, config.capacity, owner) for name in BUFFERS}
        self.clean: list[bool] = []

    def inject(self, clips: Clips, noise: Noise, step: int, generator: torch.Generator) -> Noise:
        """`noise` with errors in eps, start and context; which samples stay clean is remembered for `record`."""
        config, latent = self.config, self.buffers["latent"]
        buckets = self.buckets(noise.levels)
        added = {name: torch.zeros(clips.latents.shape) for name in ("noise", "latent", "context")}
        self.clean = []
        for sample, row in enumerate(buckets):
            clean = step < config.start or _chance(config.clean, generator)
            self.clean.append(clean)
            wanted = {name: not clean and _chance(getattr(config, name), generator) for name in added}
            for chunk, bucket in enumerate(row):
                found = {
                    "noise": self.buffers["noise"].matched(bucket, generator) if wanted["noise"] else None,
                    "latent": latent.matched(bucket, generator) if wanted["latent"] else None,
                    "context": latent.any(generator) if wanted["context"] else None,
                }
                for name, error in found.items():
                    if error is not None:
                        part = added[name][sample].unflatten(0, (len(row), -1))[chunk]
                        part.copy_(error.float() * self.factor(generator))
        device, counted = clips.latents.device, clips.counted
        moved = {name: errors.to(device) for name, errors in added.items()}
        if counted is not None:
            moved = {name: errors * counted[..., None, None, None] for name, errors in moved.items()}
        eps = noise.eps + moved["noise"]
        return replace(noise, eps=eps, start=clips.latents + moved["latent"], context=clips.latents + moved["context"])

    @torch.no_grad()
    def record(
        self,
        clips: Clips,
        noise: Noise,
        velocity: Tensor,
        step: int,
        generator: torch.Generator,
        gather: Gather | None = None,
    ) -> None:
        """Keep the errors of a step.

        Args:
            noise: as `inject` gave it. velocity: predicted, like the latents.
            gather: stacks a tensor of every rank along its first dimension; torch.distributed's if it runs.
        """
        kept = [not clean or _chance(self.config.update_clean, generator) for clean in self.clean]
        chunks = clips.chunks
        found = [
            errors.cpu().unflatten(1, (chunks, -1)).flatten(0, 1) for errors in self.errors(clips, noise, velocity)
        ]
        buckets = torch.tensor(self.buckets(noise.levels)).flatten()
        keep = torch.tensor(kept).repeat_interleave(chunks)
        if clips.valid is not None:
            keep &= clips.valid.cpu().unflatten(1, (chunks, -1)).all(2).flatten()
        gather = gather or (gather_ranks if dist.is_initialized() else None)
        if gather is not None and step < self.config.warmup:
            *found, buckets, keep = (gather(x) for x in (*found, buckets, keep))
        for index in keep.nonzero().flatten().tolist():
            for name, errors in zip(BUFFERS, found):
                self.buffers[name].add(int(buckets[index]), errors[index], generator)

    def errors(self, clips: Clips, noise: Noise, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """x0 predicted - x0, and (v - target) (1 - sigma), both bf16 like the latents; 0 where no frame counts."""
        sigma = noise.levels[..., 1].repeat_interleave(clips.latents.shape[1] // clips.chunks, 1)[..., None, None, None]
        noisy, _ = noisy_part(clips, noise)
        latent = noisy - sigma * velocity.float() - clips.latents
        error = (velocity.float() - (noise.eps - clips.latents)) * (1 - sigma)
        if clips.counted is not None:
            latent, error = (x * clips.counted[..., None, None, None] for x in (latent, error))
        return latent.bfloat16(), error.bfloat16()

    def buckets(self, levels: Tensor) -> list[list[int]]:
        """The bucket of each chunk: of its place on the noise grid, which its sigma gives back."""
        sigma = levels[..., 1].double().cpu()
        index = GRID * (1 - sigma / (self.shift - (self.shift - 1) * sigma))
        return (index.round() * self.config.buckets / GRID).long().clamp(0, self.config.buckets - 1).tolist()

    def factor(self, generator: torch.Generator) -> float:
        """U(1 - modulate, 1 + modulate)."""
        return 1 + self.config.modulate * (2 * float(torch.rand((), generator=generator)) - 1)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resume point must hold, by name."""
        return {f"{name}/{key}": x for name, buffer in self.buffers.items() for key, x in buffer.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for name, buffer in self.buffers.items():
            own = {key.removeprefix(f"{name}/"): x for key, x in state.items() if key.startswith(f"{name}/")}
            buffer.load_state(own)

    def bytes_at_most(self, chunk_shape: tuple[int, ...]) -> int:
        """Host memory of full buffers whose errors have this shape."""
        return len(BUFFERS) * self.config.buckets * self.config.capacity * math.prod(chunk_shape) * 2


def gather_ranks(x: Tensor) -> Tensor:
    """`x` of every rank, one after the other; shapes are equal on all ranks."""
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    own = x.to(device, torch.uint8 if x.dtype == torch.bool else x.dtype)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return torch.cat(everyone).to("cpu", x.dtype)


def _chance(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _pick(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
