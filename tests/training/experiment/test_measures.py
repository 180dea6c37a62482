"""Shapes, stories and the judge's frames: what the experiment measures with."""

from __future__ import annotations

from dataclasses import replace

import torch

from longtake.training.data.digit_stories import Shot, Story
from longtake.training.data.digits import Digits, scans_of
from longtake.training.data.held_out_stories import long_stories, returning_stories
from longtake.training.experiment.shape import ink_seen, iou, shapes, unmixed
from longtake.training.experiment.stories import scripts_of
from longtake.training.models.presets import TINY
from longtake.training.models.text.grammar import BACKGROUNDS, COLOURS, LIGHTS

SHOT = Shot(3, scans_of(3, "eval")[0], "yellow", "drifts right", "sea", "light from above", 1)


def ink(frames: torch.Tensor, shot: Shot) -> torch.Tensor:
    """How much of each pixel is the digit's colour."""
    return unmixed(frames, shot, (shot.colour,))[0][0]


def frames_of(shot: Shot, start: int = 0) -> torch.Tensor:
    return Digits(TINY, "eval").render([Story((shot,))], torch.device("cpu"), 2, [start])[0].transpose(0, 1)


def shape_of(shot: Shot, start: int = 0) -> torch.Tensor:
    found, there = shapes(ink(frames_of(shot, start), shot))
    assert there.all()
    return found


def test_the_same_scan_has_one_shape_wherever_and_over_whatever() -> None:
    elsewhere = replace(SHOT, colour="red", background="grey", light="soft light", x=0.7, y=-0.4)
    for start in (0, 30, 53, 75):  # 53: across the frame's edge
        assert iou(shape_of(SHOT), shape_of(elsewhere, start)).min() > 0.85
    assert iou(shape_of(SHOT), shape_of(replace(SHOT, motion="grows"), 200)).min() > 0.8


def test_another_scan_and_another_digit_are_less_alike() -> None:
    same_digit = [iou(shape_of(SHOT), shape_of(replace(SHOT, scan=scan))).mean() for scan in scans_of(3, "eval")[1:9]]
    one = replace(SHOT, digit=1, scan=scans_of(1, "eval")[0])
    assert torch.stack(same_digit).mean() < 0.75 and iou(shape_of(SHOT), shape_of(one)).max() < 0.5


def test_a_frame_without_a_subject_has_no_shape() -> None:
    red_ground = frames_of(replace(SHOT, digit=1, background="dark red"))  # nothing yellow but the digit
    assert not shapes(torch.zeros_like(ink(red_ground, SHOT)))[1].any()


def test_the_colour_is_seen_over_every_background() -> None:
    right = []
    for number, colour in enumerate(COLOURS):
        for background in BACKGROUNDS:
            shot = replace(SHOT, colour=colour, background=background, light=LIGHTS[number % 4])
            found, seen = ink_seen(frames_of(shot, 30), replace(shot, colour="red"))
            right.append((seen == number).float().mean())
            assert torch.equal(found[seen == number], ink(frames_of(shot, 30), shot)[seen == number])
    assert torch.stack(right).mean() > 0.98


def test_the_subject_returns_after_another_digit() -> None:
    for story in returning_stories(20, (2, 4, 3), seed=5):
        first, other, again = story.shots
        assert (first.digit, first.scan, first.colour) == (again.digit, again.scan, again.colour)
        assert other.digit != first.digit and again.background not in (first.background, other.background)
        assert first.scan in scans_of(first.digit, "eval") and other.colour != first.colour
        assert first.named and other.named and not again.named  # its colour only the first shot tells
    assert returning_stories(3, (2, 4, 3), seed=5) == returning_stories(4, (2, 4, 3), seed=5)[:3]


def test_scripts_announce_cuts_and_have_their_own_noise() -> None:
    scripts = scripts_of(returning_stories(2, (1, 2, 1), seed=0), seed=3)
    assert scripts[0].cuts == (False, True, False, True)
    assert [p.startswith("The scene transitions. ") for p in scripts[0].prompts] == [False, True, False, True]
    assert scripts[0].seed != scripts[1].seed


def test_long_stories_are_one_shot() -> None:
    assert [len(s.shots) for s in long_stories(11, 45, 0)] == [1] * 11
    assert {s.shots[0].digit for s in long_stories(10, 45, 0)} == set(range(10))
