from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtake.training.data.base import chunk_frames
from longtake.training.data.digit_stories import Shot, Story
from longtake.training.data.digits import Digits, caption, chunk_prompts, random_story, returning_story, scans_of
from longtake.training.data.named import dataset_from_name
from longtake.training.data.render import CIRCLE, DRIFT, RGB, TURN
from longtake.training.models.presets import TINY
from longtake.training.models.text.grammar import BACKGROUNDS, COLOURS, DIGITS, LIGHTS, MOTIONS, caption_words
from longtake.training.models.wan.prompts import CUT_PREFIX

CPU = torch.device("cpu")
GRAMMAR = re.compile(
    rf"(?:{re.escape(CUT_PREFIX)})?an? (?:{'|'.join(COLOURS)}) (?:{'|'.join(DIGITS)}) (?:{'|'.join(MOTIONS)})"
    rf" over a (?:{'|'.join(BACKGROUNDS)}) background, (?:{'|'.join(LIGHTS)})"
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stories(count: int, chunks: int = 6, split: str = "train") -> list[Story]:
    draws = generator()
    return [random_story(draws, chunks, split) for _ in range(count)]


def shot(motion: str = "stands still", chunks: int = 1, **more: str) -> Shot:
    """A white zero on black unless said otherwise."""
    given = {"colour": "white", "background": "black", "light": "soft light"} | more
    return Shot(digit=0, scan=scans_of(0, "train")[0], motion=motion, chunks=chunks, **given)


def render(*shots: Shot) -> Tensor:
    return Digits(TINY).render([Story(shots)], CPU)[0]


def ink(video_3THW: Tensor) -> Tensor:
    """How much of the digit each pixel holds, [T,H,W]; the black ground is below the threshold."""
    return (video_3THW.mean(0) + 0.8).clamp_min(0)


def centre(video_3THW: Tensor) -> Tensor:
    """Centre of the ink of each frame in half frames, [T,2] = x, y; for a digit that does not cross the border."""
    weights = ink(video_3THW)
    axis = (torch.arange(128) * 2 + 1) / 128 - 1
    total = weights.sum((1, 2))
    return torch.stack([(weights.sum(1) * axis).sum(1) / total, (weights.sum(2) * axis).sum(1) / total], 1)


def test_captions_follow_the_grammar_and_the_vocabulary() -> None:
    words = set(caption_words())
    seen = set()
    for story in stories(200):
        prompts, cuts = chunk_prompts(story)
        assert len(prompts) == len(cuts) == 6 and not cuts[0]
        for prompt, cut in zip(prompts, cuts):
            assert GRAMMAR.fullmatch(prompt), prompt
            assert prompt.startswith(CUT_PREFIX) == cut
            assert set(re.findall(r"\w+", prompt.lower())) <= words
            seen.update(re.findall(r"\w+", prompt.lower()))
    assert seen == words  # no word stays untrained
    assert caption(shot(colour="orange")).startswith("an orange zero stands still over a black background")


def test_a_subject_that_returns_after_a_cut_is_the_same_scan() -> None:
    returns = 0
    for story in stories(200):
        scans: dict[int, int] = {}
        for earlier, later in zip(story.shots, story.shots[1:]):
            assert later.joined or earlier.background != later.background  # a cut shows
        for one in story.shots:
            returns += one.digit in scans
            assert scans.setdefault(one.digit, one.scan) == one.scan
        assert len(scans) <= 2 and story.chunks == 6
    assert returns > 50


def test_a_returning_subject_s_colour_is_left_to_the_past() -> None:
    draws, back, left_out, in_turn = generator(), 0, 0, 0
    for _ in range(300):
        story = returning_story(draws, 8)
        assert story.chunks == 8
        colours: dict[int, str] = {}
        for one in story.shots:
            assert one.named or colours[one.digit] == one.colour  # an earlier shot told it
            colours[one.digit] = one.colour
            words = caption(one).split()
            assert (one.colour in words[:2]) == one.named and words[0] == ("an" if words[1][0] in "aeiou" else "a")
            assert set(re.findall(r"\w+", caption(one).lower())) <= set(caption_words())
        first, last = story.shots[0], story.shots[-1]
        if len(story.shots) == 3 and first.digit == last.digit != story.shots[1].digit and story.shots[1].chunks >= 3:
            back += first.scan == last.scan and first.colour == last.colour != story.shots[1].colour
            left_out += not last.named
        digits = [one.digit for one in story.shots]
        in_turn += len(digits) >= 4 and digits[::2] == digits[:1] * len(digits[::2]) and len(set(digits)) == 2
    assert back > 80 and left_out > 60 and in_turn > 80
    assert caption(replace(shot(), digit=8, named=False)).startswith("an eight stands still over")
    short = [returning_story(draws, chunks) for chunks in (1, 2, 5) for _ in range(20)]
    assert {story.chunks for story in short} == {1, 2, 5}


def test_held_out_scans_are_never_trained_on() -> None:
    for digit in range(10):
        train, held_out = set(scans_of(digit, "train")), set(scans_of(digit, "eval"))
        assert not train & held_out and len(train) > 2 * len(held_out) > 40
    for split in ("train", "eval"):
        shots = [one for story in stories(50, split=split) for one in story.shots]
        assert all(one.scan in scans_of(one.digit, split) for one in shots)


def test_the_seed_decides_everything() -> None:
    data = dataset_from_name("digits", TINY)
    one, again, other = (data.sample(generator(seed), 2, 2, CPU) for seed in (1, 1, 2))
    assert torch.equal(one.video, again.video) and one.prompts == again.prompts and one.cuts == again.cuts
    assert not torch.equal(one.video, other.video)
    assert one.video.shape == (2, 3, 61, 128, 128) and one.video.dtype == torch.float32
    assert -1 <= one.video.min() < -0.5 and 0.5 < one.video.max() <= 1
    assert torch.equal(data.clips(generator(1), 5, 3, CPU), data.clips(generator(1), 5, 3, CPU))


def test_cuts_are_between_chunks_and_visible() -> None:
    first, second = shot(chunks=2), shot(background="sea")
    video = render(first, second)
    assert video.shape[1] == chunk_frames(TINY, 3) == 93
    change = video.diff(dim=1).abs().mean((0, 2, 3))
    assert change.argmax() == 60 and change[60] > 0.1 and change[:60].max() < 1e-3
    assert chunk_prompts(Story((first, second)))[1] == [False, False, True]


def test_a_clip_is_a_part_of_the_whole_rendering() -> None:
    story = stories(1, chunks=3)[0]
    data = Digits(TINY)
    part = data.render([story], CPU, frames=9, starts=[41])
    assert torch.allclose(part, data.render([story], CPU)[:, :, 41:50], atol=1e-5)


@pytest.mark.parametrize(
    ("motion", "axis", "speed"),
    [("drifts left", 0, -DRIFT), ("drifts right", 0, DRIFT), ("rises", 1, -DRIFT), ("sinks", 1, DRIFT)],
)
def test_what_drifts_goes_where_the_caption_says(motion: str, axis: int, speed: float) -> None:
    moved = centre(render(shot(motion)))[24] - centre(render(shot(motion)))[0]
    assert abs(moved[axis] - speed) < 0.03 and abs(moved[1 - axis]) < 0.03


def test_other_motions() -> None:
    still = render(shot("stands still"))
    assert torch.equal(still[:, 0], still[:, -1])
    area = {motion: ink(render(shot(motion, chunks=2))).sum((1, 2)) for motion in ("grows", "shrinks")}
    assert (area["grows"].diff() > 0).all() and area["grows"][-1] > 1.8 * area["grows"][0]
    assert (area["shrinks"].diff() < 0).all() and area["shrinks"][-1] < 0.6 * area["shrinks"][0]
    circle = centre(render(shot("circles", chunks=2)))
    offset = circle - (circle.amax(0) + circle.amin(0)) / 2
    assert torch.allclose(offset.norm(dim=1), torch.tensor(CIRCLE), atol=0.06)
    assert (circle[round(TURN * 24)] - circle[0]).norm() < 0.06
    sway = centre(render(shot("sways", chunks=2)))
    assert sway[:, 0].max() > 0.15 and sway[:, 0].min() < -0.15 and sway[:, 1].abs().max() < 0.1


def test_colours_grounds_and_lights_are_what_they_are_called() -> None:
    mask = ink(render(shot()))[0] > 1.4
    assert mask.sum() > 200
    for colour in COLOURS:
        seen = render(shot(colour=colour))[:, 0, mask].mean(1) / 2 + 0.5
        nearest = min(RGB, key=lambda name: float((torch.tensor(RGB[name]) - seen).square().sum()))
        assert nearest == colour
    left, right, above = (
        render(shot(background="grey", light=f"light from {side}"))[:, 0].mean(0)
        for side in ("the left", "the right", "above")
    )
    assert left[:, :20].mean() > left[:, -20:].mean() + 0.3 and right[:, :20].mean() < right[:, -20:].mean() - 0.3
    assert above[:20].mean() > above[-20:].mean() + 0.3
    assert len({tuple(render(shot(background=name))[:, 0, 5, 5].tolist()) for name in BACKGROUNDS}) == len(BACKGROUNDS)


def test_a_joined_part_goes_on_without_a_cut_under_its_own_prompt() -> None:
    first, second = shot("drifts right"), shot("drifts right", colour="red")
    joined = Story((first, replace(second, joined=True)))
    prompts, cuts = chunk_prompts(joined)
    assert cuts == [False, False] and "white zero" in prompts[0] and prompts[1].startswith("a red zero")
    whole = render(shot("drifts right", chunks=2))
    parts = Digits(TINY).render([joined], CPU)[0]
    start = chunk_frames(TINY, 1)
    assert torch.equal(parts[:, :start], whole[:, :start])
    assert torch.allclose(parts[0, start:], whole[0, start:], atol=0.12)  # red is nearly as much ink in both
    assert (parts[1, start:] - whole[1, start:]).abs().max() > 1


def test_one_shot_in_three_changes_half_way() -> None:
    parts = [part for story in stories(200) for part in story.shots]
    joined = [(a, b) for story in stories(200) for a, b in zip(story.shots, story.shots[1:]) if b.joined]
    assert 0.1 < len(joined) / len(parts) < 0.35
    assert all((a.colour != b.colour) + (a.light != b.light) == 1 for a, b in joined)
    assert all((a.scan, a.motion, a.background) == (b.scan, b.motion, b.background) for a, b in joined)
