"""`longtake evaluate`: how good a folder of checkpoints is on held-out data, and whether it follows its prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from longtake.devices import device_named
from longtake.errors import LongtakeError
from longtake.files import write_json
from longtake.formats.model_name import checkpoints_named
from longtake.options import Bounds, Command, OneOf, Text, option
from longtake.outputs import claim_outputs
from longtake.paths import REPOSITORY
from longtake.provenance import commit, cpu_name, versions
from longtake.training.data.base import Dataset
from longtake.training.data.folder import Folder
from longtake.training.data.latent_cache import cache_from_dataset
from longtake.training.data.named import dataset_from_name
from longtake.training.models.checkpoint import side_file, weights_digests
from longtake.training.models.families import preset_named
from longtake.training.models.load import Models, load_models
from longtake.training.models.presets import Preset, SamplingConfig
from longtake.training.models.side_file import SideFile
from longtake.training.stages.vae import HELD_OUT_SEED, reconstructed, reconstruction_psnr
from longtake.training.stages.validation import EVALUATION_SEED
from longtake.video_span import FITS

JUDGE = REPOSITORY / "training" / "checkpoints" / "judge" / "judge.safetensors"
DESCRIPTION = """Measure a folder of checkpoints: the VAE's PSNR on held-out clips, the DiT's flow loss on held-out stories, and
whether videos show what their prompts say. Of --data digits a shipped judge says which digit it sees; of clips of your
own it is counted how often the training clip nearest to a video's first frame is the one of its caption."""
EPILOG = """examples:
  longtake evaluate --checkpoints tiny
  longtake evaluate --checkpoints runs/own --data my_clips --held-out 0 --report runs/own/evaluation.json --sheet runs/own/evaluation.png
"""


@dataclass(frozen=True)
class EvaluateOptions:
    """What"""

    checkpoints: Annotated[Path, Text(checkpoints_named)] = option(metavar="FOLDER|NAME")
    """folder of dit, text_encoder and vae, or a shipped model's name"""
    preset: Annotated[Preset, Text(preset_named, lambda preset: preset.label)] | None = option(None, metavar="NAME")
    """sizes of the networks (default: as the checkpoint says)"""
    data: str = option("digits", metavar="NAME|FOLDER")
    """as in `longtake train`"""
    fit: Annotated[str, OneOf(FITS)] = option("crop")
    """as in `longtake train`"""
    held_out: Annotated[int, Bounds(0, name="--held-out")] | None = option(None, metavar="N")
    """as in `longtake train` (default: one in five); 0: measured on the training clips"""
    clips: Annotated[int, Bounds(1, 4096)] = option(8, metavar="N")
    """clips that the VAE is measured on"""
    stories: Annotated[int, Bounds(1, 4096)] = option(8, metavar="N")
    """stories that the flow loss is measured on"""
    prompts: Annotated[int, Bounds(0, 4096)] = option(16, metavar="N")
    """videos of one chunk that are generated, at most one a caption of own clips; 0: none"""
    seed: int = option(0)
    """of the videos"""
    device: str = option("auto")
    """auto, cpu, cuda or cuda:N"""
    report: Path | None = option(None, metavar="FILE")
    """write the figures as JSON (default: none)"""
    sheet: Path | None = option(None, metavar="FILE")
    """own clips: write a picture of clips and videos (default: none)"""


@dataclass
class Evaluation:
    """What is evaluated: models on a device, data, and how the DiT is sampled."""

    options: EvaluateOptions
    models: Models
    side: SideFile
    device: torch.device
    figures: dict[str, Any] = field(default_factory=dict)

    def data(self, split: str) -> Dataset:
        """A split of the data set."""
        options = self.options
        return dataset_from_name(options.data, self.models.preset, split, fit=options.fit, held_out=options.held_out)

    @property
    def sampling(self) -> SamplingConfig:
        """As the checkpoint records, else the preset's."""
        return self.side.sampled or self.models.preset.sampling

    def vae(self) -> str:
        """PSNR on held-out clips."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        clips = self.data("eval").clips(generator, 29, self.options.clips, self.device)
        with torch.no_grad():
            figures = reconstruction_psnr(clips, reconstructed(self.models.vae, clips))
        self.figures |= figures
        return f"VAE: {figures['psnr_db']:.1f} dB PSNR on {len(clips)} clips (worst frame {figures['worst_frame_psnr_db']:.1f})"

    def flow(self) -> str:
        """Flow loss on held-out stories."""
        from longtake.training.experiment.evaluate import held_out_flow

        models, options = self.models, self.options
        cache = cache_from_dataset(
            self.data("eval"),
            models.vae,
            models.text,
            models.preset,
            stories=options.stories,
            chunks=1,
            context=str(self.side.facts.get("context", "full")),
            seed=EVALUATION_SEED,
        )
        flow = self.figures["flow"] = held_out_flow(models, cache, self.device)["flow"]
        return f"DiT: flow loss {flow:.4f} on {options.stories} stories of one chunk"

    def prompts(self) -> str:
        """Whether videos show what their prompts say."""
        train = self.data("train")
        return self._own_clips(train) if isinstance(train, Folder) else self._digits()

    def _digits(self) -> str:
        from longtake.training.data.held_out_stories import mixed_stories
        from longtake.training.experiment.batched import Sampling
        from longtake.training.experiment.evaluate import Eyes, fidelity, generated, judge_from

        sampling = Sampling(self.sampling.steps, self.sampling.guidance, self.sampling.shift)
        eyes = Eyes(judge_from(JUDGE, self.device), self.models.vae, self.device)
        stories = mixed_stories(self.options.prompts, 1, self.options.seed)
        share = fidelity(generated(self.models, eyes, stories, sampling), stories, eyes)["fidelity"]
        accuracy = SideFile.read(side_file(JUDGE)).facts["accuracy"]["through_vae"]
        self.figures |= {"fidelity": share, "judge_accuracy": accuracy}
        return (
            f"prompts: the judge sees the prompted digit in {100 * float(share):.1f} % of the frames of {len(stories)} "  # type: ignore[arg-type]
            f"videos (it names {100 * accuracy:.1f} % of real frames rightly)"
        )

    def _own_clips(self, train: Folder) -> str:
        from longtake.training.data.clips import ClipReader
        from longtake.training.experiment.batched import Sampling
        from longtake.training.experiment.own_clips import nearest_clips, sheet, videos_of

        options = self.options
        clips = list({clip.caption: clip for shots in train.samples for clip in shots}.values())
        captions = [clip.caption for clip in clips[: options.prompts]]
        sampling = Sampling(self.sampling.steps, self.sampling.guidance, self.sampling.shift)
        videos = videos_of(self.models, captions, sampling, options.seed, self.device)
        reader = ClipReader(self.models.preset, options.fit)
        found = nearest_clips(videos, captions, clips, reader)
        if options.sheet:
            sheet(videos, found, clips, reader, options.sheet)
        self.figures["nearest"] = {**asdict(found), "right": found.right, "of": len(captions), "clips": len(clips)}
        return (
            f"prompts: of {found.right} of {len(captions)} captions the nearest of {len(clips)} training clips is the prompted "
            f"one (chance: {len(captions) / len(clips):.1f})"
        )


def run(options: EvaluateOptions) -> int:
    """Measure, print, write the report."""
    claim_outputs({"--report": options.report, "--sheet": options.sheet}, {"--checkpoints": options.checkpoints})
    side = dit_side(options.checkpoints)
    preset = options.preset or preset_named(side.preset)
    device = device_named(options.device)
    train = dataset_from_name(options.data, preset, "train", fit=options.fit, held_out=options.held_out)
    models = load_models(preset, options.checkpoints)
    for module in (models.dit, models.vae, models.text):
        module.to(device)
    evaluation = Evaluation(options, models, side, device)
    if train.line:
        print(train.line)
    for said in parts(evaluation):
        print(said)
    if options.report:
        facts = {
            "kind": "evaluate",
            "checkpoints": str(options.checkpoints),
            "weights": weights_digests(options.checkpoints),
        }
        told = {"data": options.data, "seed": options.seed, "sampling": asdict(evaluation.sampling), "commit": commit()}
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        machine = {"cpu": cpu_name(), "gpu": gpu, "versions": versions(), "made_by": "longtake"}
        write_json(options.report, {**facts, **told, **machine, **evaluation.figures})
        print(f"wrote {options.report}")
    return 0


def parts(evaluation: Evaluation) -> Iterator[str]:
    """One line a part."""
    yield evaluation.vae()
    yield evaluation.flow()
    if evaluation.options.prompts:
        yield evaluation.prompts()


def dit_side(folder: Path) -> SideFile:
    """What goes with the DiT in `folder`. Raises LongtakeError if there is none."""
    path = side_file(folder / "dit.safetensors")
    with suppress(OSError):
        if path.is_file():
            return SideFile.read(path)
    raise LongtakeError(
        f"{folder} holds no checkpoint",
        got="no dit.json",
        expected="dit, text_encoder and vae as `longtake train` writes them",
        fix="pass the --out of a training run of stage dit",
    )


COMMAND = Command(run, (EvaluateOptions,), DESCRIPTION, EPILOG)
