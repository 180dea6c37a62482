"""The independent judge: a small CNN that says which digit a frame shows. It never sees a generated frame.

It learns from rendered frames of training scans, half of them as they are and half of them through the VAE, over all
backgrounds, colours, lights, motions and sizes. Its accuracy on held-out scans is part of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.training.data.digit_stories import Story
from longtake.training.data.digits import Digits, random_story
from longtake.training.data.latent_cache import encode
from longtake.training.models.presets import Preset
from longtake.training.models.wan.vae import CausalVAE

FRAMES = 5  # of a clip: the first latent and one more
LATEST = 600  # frame at which a clip may begin: the subject has drifted anywhere by then


class DigitClassifier(nn.Module):
    """Frames [N, 3, H, W] in [-1, 1] to logits [N, 10]. Edges wrap around, as the frames of the data set do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1, padding_mode="circular", bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1, padding_mode="circular", bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for a, b in zip(sizes, sizes[1:])
        )
        self.head = nn.Linear(sizes[-1], 10)

    def embed(self, frames: Tensor) -> Tensor:
        """Features [N, 4 width], the largest over the frame of each channel."""
        x = functional.avg_pool2d(frames, 2)
        for stage in self.stages:
            x = stage(x)
        return x.amax((2, 3))

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.embed(frames))


@dataclass(frozen=True)
class JudgeTraining:
    """Length of its training. batch: clips a step; a clip gives one frame as rendered and one through the VAE.

    width: of the network. pool: so many clips are rendered once and drawn from, rolled by random distances (frames wrap
    around); 0: every step renders its own. What `longtake evaluate` ships is `SMALL`, which two CPU cores can train.
    """

    steps: int = 700
    batch: int = 96
    lr: float = 2e-3
    seed: int = 77
    width: int = 32
    pool: int = 0


SMALL = JudgeTraining(steps=500, batch=24, width=24, pool=2400)
Labelled = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def labelled_frames(
    vae: CausalVAE, preset: Preset, split: str, batch: int, generator: torch.Generator, device: torch.device
) -> Labelled:
    """Frames as rendered and through the VAE, each [batch, 3, H, W], and the digits, int64 [batch]."""
    stories = [random_story(generator, 1, split, changes=False) for _ in range(batch)]
    starts = torch.randint(LATEST, (batch,), generator=generator).tolist()
    video = Digits(preset, split).render(stories, device, FRAMES, starts)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        again = vae.decode(encode(vae, video)).float()
    which = torch.randint(FRAMES, (batch,), generator=generator).to(device)
    rows = torch.arange(batch, device=device)
    return video[rows, :, which], again[rows, :, which], digits_of(stories).to(device)


def digits_of(stories: list[Story]) -> Tensor:
    """The digit of each story's first shot."""
    return torch.tensor([story.shots[0].digit for story in stories])


def trained_judge(vae: CausalVAE, preset: Preset, how: JudgeTraining, device: torch.device) -> DigitClassifier:
    """A judge trained from random weights; the same on every run on one kind of device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        judge = DigitClassifier(how.width).to(device)
    generator = torch.Generator().manual_seed(how.seed)
    pool = rendered_pool(vae, preset, how.pool, generator, device) if how.pool else None
    optimizer = torch.optim.AdamW(judge.parameters(), how.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=max(2, how.steps))
    for _ in range(how.steps):
        rendered, through, digits = (
            labelled_frames(vae, preset, "train", how.batch, generator, device)
            if pool is None
            else drawn(pool, how.batch, generator)
        )
        frames = blurred(torch.cat((rendered, through)), generator)
        loss = functional.cross_entropy(judge(frames), digits.repeat(2), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def rendered_pool(
    vae: CausalVAE, preset: Preset, clips: int, generator: torch.Generator, device: torch.device, part: int = 16
) -> Labelled:
    """`labelled_frames` of so many clips, rendered a few at a time."""
    parts = [labelled_frames(vae, preset, "train", part, generator, device) for _ in range(-(-clips // part))]
    rendered, through, digits = (torch.cat(each) for each in zip(*parts))
    return rendered, through, digits


def drawn(pool: Labelled, batch: int, generator: torch.Generator) -> Labelled:
    """Random clips of a pool, all of them rolled by one random distance."""
    rendered, through, digits = pool
    index = torch.randint(len(digits), (batch,), generator=generator).to(digits.device)
    shift = [int(torch.randint(size, (), generator=generator)) for size in rendered.shape[-2:]]
    return rendered[index].roll(shift, (2, 3)), through[index].roll(shift, (2, 3)), digits[index]


def blurred(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Now and then a little blur or noise, so that the judge doesn't hang on the renderer's sharp edges."""
    if float(torch.rand((), generator=generator)) < 0.3:
        frames = functional.avg_pool2d(functional.pad(frames, (1, 1, 1, 1), mode="circular"), 3, 1)
    if float(torch.rand((), generator=generator)) < 0.3:
        noise = torch.randn(frames.shape[-2:], generator=generator).to(frames.device)
        frames = frames + 0.08 * noise
    return frames


@torch.no_grad()
def judge_accuracy(
    judge: DigitClassifier, vae: CausalVAE, preset: Preset, clips: int, device: torch.device
) -> dict[str, float]:
    """Share of held-out frames it names rightly, as rendered and through the VAE."""
    generator = torch.Generator().manual_seed(404)
    right, size = torch.zeros(2), min(64, clips)
    for _ in range(clips // size):
        rendered, through, digits = labelled_frames(vae, preset, "eval", size, generator, device)
        right += torch.stack([(judge(x).argmax(1) == digits).float().mean() for x in (rendered, through)]).cpu()
    rendered_share, through_share = (right / (clips // size)).tolist()
    return {"rendered": rendered_share, "through_vae": through_share, "clips": float(clips)}
