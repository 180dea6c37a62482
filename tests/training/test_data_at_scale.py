"""Order, workers, caches on disk: the same data whoever reads it, wherever a run goes on, whatever is broken."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_writer import write_digits_folder
from safetensors.torch import load_file
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.training.data.digits import Digits
from longtake.training.data.folder import Folder
from longtake.training.data.loader import Loader, read_in_order
from longtake.training.data.named import dataset_from_name
from longtake.training.data.order import Order
from longtake.training.data.shards import Shards, key_of
from longtake.training.data.stored_stories import StoredStories, Takes, stored_from_dataset
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import text_encoder_for
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.trainer import TrainConfig, Trainer

CPU = torch.device("cpu")


def first(order: Order, count: int, position: int = 0) -> list[int]:
    return [order.at(place) for place in range(position, position + count)]


def test_every_epoch_has_every_item_once() -> None:
    taken = first(Order(11, 7), 66)
    epochs = [taken[start : start + 11] for start in range(0, 66, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs) and epochs[0] != epochs[1]
    assert first(Order(11, 7), 20, position=13) == taken[13:33]


class Squares:
    """Item i is i * i; 13 is broken."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 13:
            raise LongtakeError("13 is broken", fix="take 14")
        return torch.tensor(index * index)


def test_workers_change_neither_order_nor_place_nor_messages() -> None:
    plain, many = Loader(Squares(), Order(13, 5)), Loader(Squares(), Order(13, 5), workers=2)
    assert [int(x) for x in plain.take(20)] == [int(x) for x in many.take(20)] and many.position == 20
    assert many.take(1) == plain.take(1)
    with pytest.raises(LongtakeError, match="^13 is broken") as caught:
        list(read_in_order(Squares(), [2, 13], workers=1))
    assert "Traceback" not in str(caught.value) and "fix: take 14" in str(caught.value)


@pytest.fixture
def clips(tmp_path: Path, small: Preset) -> Path:
    write_digits_folder(tmp_path / "clips", small, 7, seed=1, chunks=2)
    return tmp_path / "clips"


@pytest.fixture
def small(small_preset: Preset) -> Preset:
    return replace(small_preset, height=32, width=32)


class Counting(CausalVAE):
    """How often was encoded? Optionally dies on the way."""

    calls, last = 0, 1 << 30

    def encode(self, video: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.last:
            raise KeyboardInterrupt
        return super().encode(video)


def vae_of(preset: Preset) -> Counting:
    torch.manual_seed(0)
    return Counting(preset.vae)


def stored(data: Any, preset: Preset, vae: Counting, cache: Path, **more: Any) -> StoredStories:
    text = text_encoder_for(preset)
    settings = {"stories": 6, "chunks": 1, "context": "window", "seed": 3, **more}
    return stored_from_dataset(data, vae, "d" * 64, text, preset, cache_dir=cache, **settings)


def latents_of(stories: StoredStories) -> Tensor:
    return stories.clips(torch.arange(len(stories)), 1).latents


def test_stories_of_a_folder_depend_on_their_number_only(clips: Path, small: Preset) -> None:
    one, other = Folder(clips, small), Folder(clips, small)
    wanted = [one.take(index, 0, 1) for index in range(6)]
    found = {index: other.take(index, 0, 1) for index in (5, 0, 3)}
    for index, take in found.items():
        assert take.key == wanted[index].key and (take.frames == wanted[index].frames).all()
        assert take.prompts == wanted[index].prompts
    assert other.take(0, 0, 1, {take.key for take in wanted}).frames is None
    assert one.take(0, 1, 1).key != wanted[0].key


def test_no_sample_is_left_out_of_as_many_stories(clips: Path, small: Preset) -> None:
    folder = Folder(clips, small)
    used = [next(iter(folder.take(index, 9, 1).facts.digests)) for index in range(2 * len(folder.samples))]
    assert set(Counter(Path(path).parent.name for path in used).values()) == {2}


def test_a_cut_off_build_goes_on_and_a_finished_one_encodes_nothing(tmp_path: Path, clips: Path, small: Preset) -> None:
    vae = vae_of(small)
    vae.last = 4
    with pytest.raises(KeyboardInterrupt):
        stored(Folder(clips, small), small, vae, tmp_path / "cache")
    vae.last = 1 << 30
    built = stored(Folder(clips, small), small, vae, tmp_path / "cache")
    assert vae.calls == 5 + 2  # four were kept, the fifth was cut off
    again = stored(Folder(clips, small), small, vae, tmp_path / "cache")
    assert vae.calls == 7 and torch.equal(latents_of(built), latents_of(again))
    fresh = stored(Folder(clips, small), small, vae_of(small), tmp_path / "other")
    assert torch.equal(latents_of(built), latents_of(fresh)) and torch.equal(built.tokens, fresh.tokens)
    assert not list((tmp_path / "cache").rglob(".*"))


def test_workers_build_the_same_cache(tmp_path: Path, clips: Path, small: Preset) -> None:
    one = stored(Folder(clips, small), small, vae_of(small), tmp_path / "a", workers=0)
    two = stored(Folder(clips, small), small, vae_of(small), tmp_path / "b", workers=2)
    assert one.stored.keys == two.stored.keys and torch.equal(latents_of(one), latents_of(two))
    assert torch.equal(one.tokens, two.tokens)


def test_what_changed_is_encoded_anew(
    tmp_path: Path, clips: Path, small: Preset, caplog: pytest.LogCaptureFixture
) -> None:
    vae = vae_of(small)
    built = stored(Folder(clips, small), small, vae, tmp_path / "cache")
    sources = sorted(clips.glob("video/*/*.mp4"))
    for source in sources:  # other content, and so another digest, even under the same name
        if source.parent.name == Folder(clips, small).samples[0][0].path.parent.name:
            source.write_bytes(source.read_bytes() + b"\0\0\0\x08free")
    calls = vae.calls
    stored(Folder(clips, small), small, vae, tmp_path / "cache")
    assert 1 <= vae.calls - calls < 6
    before = latents_of(built)
    for shard in (tmp_path / "cache").rglob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-7])
    again = stored(Folder(clips, small), small, vae_of(small), tmp_path / "cache")
    assert "cannot be read and is left out" in caplog.text
    assert torch.allclose(latents_of(again), before)  # the picture is the same


def test_broken_clips_are_skipped_counted_and_remembered(
    tmp_path: Path, clips: Path, small: Preset, caplog: pytest.LogCaptureFixture
) -> None:
    broken = sorted(clips.glob("video/0001/*.mp4"))
    for path in broken:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])  # the header says nothing about it
    caplog.set_level(logging.INFO)
    built = stored(Folder(clips, small), small, vae_of(small), tmp_path / "cache", stories=10)
    assert len(built) == 10 and latents_of(built).isfinite().all()
    named = [record.getMessage() for record in caplog.records if "skipped a clip" in record.getMessage()]
    assert named and len(set(named)) == len(named) and all("0001" in line for line in named)
    facts = read_json(tmp_path / "cache" / "clips.json")
    assert facts["short"] and all("0001" in path for path in facts["short"])
    vae = vae_of(small)
    again = stored(Folder(clips, small), small, vae, tmp_path / "cache", stories=10)
    assert vae.calls == 0 and again.stored.keys == built.stored.keys
    with pytest.raises(LongtakeError, match="too many clips") as caught:
        stored(Folder(clips, small, max_bad_share=0.01), small, vae, tmp_path / "third", stories=10)
    assert "--max-bad-share" in str(caught.value) and "0001" in str(caught.value)
    (clips / "caption" / "0002" / "0.json").write_text("no json")
    with pytest.raises(LongtakeError, match="too many clips"):
        dataset_from_name(clips, small, max_bad_share=0.01)


def test_digits_are_cached_by_story(tmp_path: Path, small: Preset) -> None:
    vae = vae_of(small)
    built = stored(Digits(small), small, vae, tmp_path / "cache", stories=3)
    more = stored(Digits(small), small, vae, tmp_path / "cache", stories=4)
    assert vae.calls == 4 and torch.equal(latents_of(built), latents_of(more)[:3])
    source = Takes(Digits(small), 3, 1)
    assert source[2].prompts == source[2].prompts and source[2].frames is not None


def test_shards_keep_what_they_were_given(tmp_path: Path) -> None:
    tensors = {key_of(i): torch.randn(3, i + 1, dtype=torch.bfloat16) for i in range(70)}
    with Shards(tmp_path) as shards:
        for key, tensor in tensors.items():
            shards.add(key, tensor)
            assert torch.equal(shards[key], tensor)
    assert len(list(tmp_path.iterdir())) == 2
    again = Shards(tmp_path)
    assert len(again) == 70 and all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def run(out: Path, preset: Preset, vae: Path, cache: Path, **more: Any) -> dict[str, Tensor]:
    options = StageOptions(
        preset, batch=2, vae=vae, stories=5, chunks=(1,), seed=5, context="window", cache_dir=cache
    )  # fmt: skip
    config = TrainConfig(out=out, preset=preset.name, steps=4, seed=5, evaluate_steps=0, **more)
    Trainer(DiTStage(options), config, CPU).fit()
    return load_file(sorted(out.glob("resume-*.safetensors"))[-1])


def test_a_run_resumed_in_the_middle_of_an_epoch_is_bit_identical(
    tmp_path: Path, small: Preset, vae_folder: Path
) -> None:
    cache = tmp_path / "cache"
    straight = run(tmp_path / "a", small, vae_folder, cache)
    run(tmp_path / "b", small, vae_folder, cache, stop_at=2)
    position = read_json(tmp_path / "b" / "resume-0000002.json")["position"]
    assert position["stories"] == 5 and position["taken"] % 5 != 0
    resumed = run(tmp_path / "b", small, vae_folder, cache, resume=True)
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[k], resumed[k]) for k in straight)


def test_the_order_is_the_epochs(tmp_path: Path, small: Preset) -> None:
    stories = stored(Digits(small), small, vae_of(small), tmp_path / "cache", stories=4)

    def numbers() -> Iterator[int]:
        while True:
            stories.take(1, 1)
            yield int(stories.batch_name.split("[")[1].rstrip("]"))

    taken = list(itertools.islice(numbers(), 8))
    assert sorted(taken[:4]) == sorted(taken[4:]) == [0, 1, 2, 3]
    assert taken == first(Order(4, 3), 8)
