"""What is measured on generated stories: prompt fidelity, identity across cuts; and the flow loss.

Legend: B stories, N chunks, T frames that are looked at in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from longtake.training.data.base import chunk_frames
from longtake.training.data.digit_stories import Story
from longtake.training.data.digits import Digits, scans_of
from longtake.training.data.latent_cache import LatentCache, encode
from longtake.training.experiment.arms import PRESET, shipped, vae_of
from longtake.training.experiment.batched import Rollout, Sampling, decoded
from longtake.training.experiment.classifier import DigitClassifier, JudgeTraining, trained_judge
from longtake.training.experiment.shape import ink_seen, iou, shapes
from longtake.training.experiment.stories import scripts_of, shots_by_chunk
from longtake.training.models.load import Models
from longtake.training.objective.teacher_forcing import draw_noise, predict_velocity
from longtake.training.stages.validation import EVALUATION_SEED

EVERY = 4  # one frame of so many is looked at
Result = dict[str, float | list[float]]


@dataclass(frozen=True)
class Eyes:
    """Who looks at frames: the judge and the VAE that makes frames of latents, on one device."""

    judge: DigitClassifier
    vae: torch.nn.Module
    device: torch.device


def judge_from(path: Path | None, device: torch.device) -> DigitClassifier:
    """The judge of a file of the experiment, of any width, or a new one."""
    if path is None:
        return trained_judge(vae_of(shipped(), device), PRESET, JudgeTraining(), device)
    state = load_file(path)
    judge = DigitClassifier(len(state["stages.0.0.weight"]))
    judge.load_state_dict(state)
    return judge.to(device).eval().requires_grad_(False)


def generated(
    models: Models, eyes: Eyes, stories: Sequence[Story], sampling: Sampling, given: int = 0
) -> Iterable[Tensor]:
    """Frames of each chunk, fp32 [B, 3, T, H, W], of stories that `models` makes up, after `given` chunks of the data."""
    latents = torch.cat(encoded(eyes, models, stories, given)[:given], 1) if given else None
    rollout = Rollout(models, scripts_of(stories, 0), sampling, eyes.device, latents)
    return (frames for _, frames in decoded(eyes.vae, rollout))


def rendered(eyes: Eyes, models: Models, stories: Sequence[Story]) -> Iterable[Tensor]:
    """The same of the data set itself, through the VAE: what a perfect generator would give."""
    return (frames for _, frames in decoded(eyes.vae, iter(encoded(eyes, models, stories))))


def encoded(eyes: Eyes, models: Models, stories: Sequence[Story], chunks: int | None = None) -> list[Tensor]:
    """Latents fp32 [B, F, C, h, w] of the first `chunks` chunks (None: all) of stories of the data set."""
    parts, size = [], 8 if eyes.device.type == "cuda" else 1
    frames = None if chunks is None else chunk_frames(models.preset, chunks)
    for start in range(0, len(stories), size):
        video = Digits(models.preset, "eval").render(stories[start : start + size], eyes.device, frames)
        parts.append(encode(eyes.vae, video).float())  # type: ignore[arg-type]
    return list(torch.cat(parts).split(models.preset.chunk_latents, 1))


@torch.no_grad()
def seen_digits(eyes: Eyes, frames_B3THW: Tensor) -> tuple[Tensor, Tensor]:
    """What the judge sees in every few frames: digits int64 [B, T] and unit embeddings [B, T, E]."""
    frames = frames_B3THW[:, :, ::EVERY].transpose(1, 2)
    features = torch.cat([eyes.judge.embed(part) for part in frames.flatten(0, 1).split(256)])
    digits = eyes.judge.head(features).argmax(1)
    return digits.unflatten(0, frames.shape[:2]), torch.nn.functional.normalize(features, dim=1).unflatten(
        0, frames.shape[:2]
    )


def prompted_share(frames_B3THW: Tensor, stories: Sequence[Story], chunk: int, eyes: Eyes) -> Tensor:
    """Share of the frames of chunk number `chunk` in which the judge sees the prompted digit, of each story: fp32 [B]."""
    wanted = torch.tensor([shots_by_chunk(story)[chunk].digit for story in stories], device=eyes.device)
    return (seen_digits(eyes, frames_B3THW)[0] == wanted[:, None]).float().mean(1)


def fidelity(chunks: Iterable[Tensor], stories: Sequence[Story], eyes: Eyes) -> Result:
    """Share of frames in which the judge sees the prompted digit: of all, of each chunk, of each story."""
    table = torch.stack(
        [prompted_share(frames, stories, number, eyes) for number, frames in enumerate(chunks)]
    )  # [N, B]
    return {
        "fidelity": float(table.mean()),
        "by_chunk": table.mean(1).tolist(),
        "fidelity_by_story": rounded(table.mean(0)),
    }


def rounded(values: Tensor) -> list[float]:
    """Short numbers, of which a result may hold hundreds."""
    return [round(value, 4) for value in values.tolist()]


def identity(chunks: Iterable[Tensor], stories: Sequence[Story], eyes: Eyes) -> Result:
    """How much the subject of the last shot is the one of the first: see `returning_stories` and `memory_stories`.

    agreement: share of the last shot's frames in which the judge sees the digit that it saw most often in the first.
    cosine: mean likeness of embeddings, frame of the last shot to the first shot's mean. iou: of the shape to the
    first shot's mean shape (0 in a frame without a subject). colour: share of the last shot's frames whose subject has the
    colour that was seen most often in the first; the last shot's prompt leaves it out. Each over the whole last shot;
    iou_first, colour_first, iou_last and colour_last over its first and last chunk. All stories have the same length, and
    so have their first shots, and their last ones.
    """
    shots = stories[0].shots
    begin, end = shots[0].chunks, shots[-1].chunks
    seen = [
        _chunk(frames, stories, number, eyes)
        for number, frames in enumerate(chunks)
        if number < begin or number >= stories[0].chunks - end
    ]
    first, last = _joined(seen[:begin]), _joined(seen[begin:])
    usual = first.digits.mode(1).values
    mean_embedding = torch.nn.functional.normalize(first.embeddings.mean(1), dim=1)
    weight = first.there.float()[..., None, None]
    shape = (first.shapes * weight).sum(1) / weight.sum(1).clamp(min=1)
    overlap = iou(shape[:, None], last.shapes) * last.there
    by_chunk = overlap.unflatten(1, (end, -1)).mean((0, 2))
    same_colour = ((last.colours == first.colours.mode(1).values[:, None]) & last.there).float()
    colour_by_chunk = same_colour.unflatten(1, (end, -1)).mean(2)
    prompted = torch.tensor([story.shots[-1].digit for story in stories], device=eyes.device)
    return {
        "agreement": float((last.digits == usual[:, None]).float().mean()),
        "cosine": float((last.embeddings * mean_embedding[:, None]).sum(-1).mean()),
        "iou": float(overlap.mean()),
        "colour": float(same_colour.mean()),
        "colour_first": float(colour_by_chunk[:, 0].mean()),
        "colour_last": float(colour_by_chunk[:, -1].mean()),
        "iou_first": float(by_chunk[0]),
        "iou_last": float(by_chunk[-1]),
        "iou_by_chunk": by_chunk.tolist(),
        "agreement_by_story": rounded((last.digits == usual[:, None]).float().mean(1)),
        "iou_by_story": rounded(overlap.mean(1)),
        "colour_by_story": rounded(same_colour.mean(1)),
        "colour_first_by_story": rounded(colour_by_chunk[:, 0]),
        "colour_last_by_story": rounded(colour_by_chunk[:, -1]),
        "fidelity_return": float((last.digits == prompted[:, None]).float().mean()),
        "subjects_found": float(last.there.float().mean()),
    }


@dataclass(frozen=True)
class _Seen:
    """digits [B, T], embeddings [B, T, E], shapes [B, T, SIZE, SIZE], there bool [B, T], colours int64 [B, T]."""

    digits: Tensor
    embeddings: Tensor
    shapes: Tensor
    there: Tensor
    colours: Tensor


def _chunk(frames: Tensor, stories: Sequence[Story], number: int, eyes: Eyes) -> _Seen:
    """What is seen in one chunk. The video's first chunk has 29 frames, the others 32: each gives 8."""
    digits, embeddings = seen_digits(eyes, frames)
    inks, colours = zip(
        *(
            ink_seen(video[:, ::EVERY].transpose(0, 1), shots_by_chunk(story)[number])
            for video, story in zip(frames, stories)
        )
    )
    found = [shapes(one) for one in inks]
    return _Seen(
        digits, embeddings, torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found]), torch.stack(colours)
    )


def _joined(parts: Sequence[_Seen]) -> _Seen:
    return _Seen(*(torch.cat([getattr(p, field.name) for p in parts], 1) for field in fields(_Seen)))


@torch.no_grad()
def held_out_flow(models: Models, cache: LatentCache, device: torch.device, draws: int = 1) -> Result:
    """Plain flow loss of teacher forcing on held-out stories, each noised `draws` times, always with the same noise."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    chunks, found = cache.tokens.shape[1], []
    for index in torch.arange(len(cache)).split(16):
        clips, own = cache.clips(index.to(device), chunks), []
        for _ in range(draws):
            noise = draw_noise(clips, models.preset.sampling.shift, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                embeddings = models.text(clips.tokens.flatten(0, 1)).unflatten(0, clips.tokens.shape[:2])
                velocity = predict_velocity(models.dit, models.preset, embeddings, clips, noise)
            own.append((velocity.float() - (noise.eps - clips.latents)).square().mean((1, 2, 3, 4)))
        found.append(torch.stack(own).mean(0))
    by_story = torch.cat(found).double()
    return {"flow": float(by_story.mean()), "flow_by_story": [round(x, 6) for x in by_story.tolist()]}


def with_another_scan(stories: Sequence[Story]) -> list[Story]:
    """The stories with another writer's digit in the last shot: how alike two subjects of one class are anyway."""

    changed = []
    for story in stories:
        first, middle, last = story.shots
        scans = scans_of(last.digit, "eval")
        other = scans[(scans.index(last.scan) + 1) % len(scans)]
        changed.append(Story((first, middle, replace(last, scan=other))))
    return changed
