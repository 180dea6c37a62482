"""Stage "vae": the causal video VAE, trained on short clips rendered as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.options import recorded
from longtake.training.data.base import told
from longtake.training.models.checkpoint import load_into
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset
from longtake.training.options import VAE
from longtake.training.stages.base import Loss, Stage
from longtake.training.stages.options import StageOptions

CLIP_FRAMES = (17, 29)  # of a VAE of stride 4
HELD_OUT_SEED = 10_000_019
HELD_OUT_CLIPS = 8
STATISTICS_CLIPS = 32
LATENT_NOISE = 0.1  # std of the noise the decoder must shrug off: keeps nearby latents close in pixels
SCALE_WEIGHT = 1e-3  # on the mean square of the latents, so that they can't outgrow that noise
MSE_WEIGHT = 1.0
EDGE_WEIGHT = 0.5


class VAEStage(Stage):
    """See `stages.base.Stage`."""

    name = "vae"

    def __init__(self, options: StageOptions) -> None:
        self.options, self.preset = options, options.preset
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.vae = family_of(self.preset).vae(self.preset)
        if options.init is not None:
            load_into(self.vae, options.init / "vae.safetensors", kind="vae", preset=self.preset)
        self.vae.encoder.requires_grad_(not options.decoder_only)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        self.train, self.eval = (
            options.dataset(split, max_bad_share=options.max_bad_share) for split in ("train", "eval")
        )
        self.line = told(self.train, self.eval, frames=max(clip_frames(self.preset)))

    def prepare(self, device: torch.device) -> None:
        """Data sets, and the VAE on `device` (channels last on a GPU)."""
        self.device = device
        self.vae.to(device)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # two clip lengths only
            self.vae.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.device_generator = torch.Generator(device)
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        self.held_out = self.eval.clips(generator, max(clip_frames(self.preset)), HELD_OUT_CLIPS, device)

    def autocast(self) -> torch.autocast:
        enabled = self.options.computes_in_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def losses(self, step: int, generator: torch.Generator) -> Iterator[Loss]:
        """Of batches of one length, their mean in parts: L1 + MSE + edges of the reconstruction from noised latents, and a
        pull of the latents towards unit scale."""
        frames, share = self.frames(generator), 1 / self.options.accumulate
        for _ in range(self.options.accumulate):
            loss, metrics = self.clip_loss(frames, generator)
            yield loss * share, {name: value * share for name, value in metrics.items()}

    def frames(self, generator: torch.Generator) -> int:
        """A random length."""
        return clip_frames(self.preset)[int(torch.randint(len(CLIP_FRAMES), (), generator=generator))]

    def clip_loss(self, frames: int, generator: torch.Generator) -> Loss:
        """The loss of clips of so many frames."""
        video = self.train.clips(generator, frames, self.options.batch, self.device)
        self.device_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        with self.autocast():
            raw = self.vae.encode_raw(video, self.vae.stream()).float()
            noise = torch.randn(raw.shape, generator=self.device_generator, device=self.device)
            again = self.vae.decode_raw(raw + LATENT_NOISE * noise, self.vae.stream()).float()
        l1, mse, edge = (again - video).abs().mean(), F.mse_loss(again, video), edge_loss(again, video)
        total = l1 + MSE_WEIGHT * mse + EDGE_WEIGHT * edge + SCALE_WEIGHT * raw.square().mean()
        return total, {"l1": l1.detach(), "mse": mse.detach(), "latent_std": raw.detach().std()}

    @torch.no_grad()
    def reconstruct(self) -> Tensor:
        """The held-out clips through encoder and decoder, fp32 [B,3,T,H,W] in [-1,1]."""
        with self.autocast():
            return reconstructed(self.vae, self.held_out)

    def evaluate(self) -> dict[str, float]:
        """PSNR of the held-out clips."""
        return reconstruction_psnr(self.held_out, self.reconstruct())

    def samples(self) -> Tensor | None:
        """A held-out clip above its reconstruction."""
        video = torch.cat((self.held_out[:1], self.reconstruct()[:1]), 3)
        return ((video * 0.5 + 0.5) * 255).round().to(torch.uint8).transpose(1, 2)

    def metadata(self) -> dict[str, dict[str, Any]]:
        """Measures the latents' mean and std with the present encoder, which puts them into the checkpoint."""
        options = self.options
        if not options.decoder_only:
            self.measure_latents()
        return {"vae": {**recorded(options, VAE), "clip_frames": list(clip_frames(self.preset))}}

    @torch.no_grad()
    def measure_latents(self) -> None:
        """Set the buffers that bring latents to zero mean and unit std per channel, over training clips."""
        generator = torch.Generator().manual_seed(self.options.seed)
        count = STATISTICS_CLIPS if self.device.type == "cuda" else 4
        latents = []
        for _ in range(count):
            clip = self.train.clips(generator, max(clip_frames(self.preset)), 4, self.device)
            with self.autocast():
                latents.append(self.vae.encode_raw(clip, self.vae.stream()).float())
        table = torch.cat(latents).transpose(0, 1).flatten(1)
        self.vae.latent_mean.copy_(table.mean(1))
        self.vae.latent_std.copy_(table.std(1).clamp_min(1e-3))


def clip_frames(preset: Preset) -> tuple[int, ...]:
    """Lengths of the clips that a VAE is trained on: a first frame, and whole groups after it, about as many."""
    stride = preset.vae.stride[0]
    return tuple(1 + (frames - 1) // stride * stride for frames in CLIP_FRAMES)


def reconstructed(vae: Any, clips: Tensor) -> Tensor:
    """Clips [B,3,T,H,W] in [-1, 1] through encoder and decoder."""
    return torch.cat([vae.decode(vae.encode(clip)) for clip in clips.split(2)])


def reconstruction_psnr(clips: Tensor, again: Tensor) -> dict[str, float]:
    """Mean over frames of the PSNR in dB, of pixels in [0, 1], and the worst frame's."""
    error = ((again - clips) / 2).square().mean((1, 3, 4)).clamp_min(1e-10)
    return {"psnr_db": float((-10 * error.log10()).mean()), "worst_frame_psnr_db": float(-10 * error.max().log10())}


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 of the differences between neighbouring pixels, so that outlines stay firm."""
    error = a - b
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
