"""Keyframes: evenly chosen, few, and recognized again by their hashes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import cv2
import numpy as np

from unimodal.pipeline import media
from unimodal.pipeline.observers.keyframes import (
    Keyframes,
    KeyframeSettings,
    even,
    perceptual_hash,
)


def test_choices_are_even_and_in_the_middle_of_their_share() -> None:
    assert even(3, 12) == [0, 1, 2]
    assert even(12, 3) == [2, 6, 10]
    assert even(1, 3) == [0]
    steps = np.diff(even(40, 12))
    assert steps.max() - steps.min() <= 1


def test_a_span_gets_its_own_pictures_three_of_them_for_scorers() -> None:
    with tempfile.TemporaryFile() as spool:
        keyframes = Keyframes(KeyframeSettings(), spool)
        for i in range(100):
            image = np.full((8, 8, 3), i * 2, np.uint8)
            keyframes.see(i, i * 10, i / 2, [image])
        chosen = keyframes.choose(200, 600)  # samples 20 to 59
        assert len(chosen) == 40  # text is looked for in every sample
        assert sum(keyframe for _, keyframe, _ in chosen) == 12
        assert sum(keyframe and scoring for _, keyframe, scoring in chosen) == 3
        assert sum(scoring for _, _, scoring in chosen) == 3
        assert all(200 <= picture.pts < 600 for picture, _, _ in chosen)
        picture = chosen[0][0]
        spool.seek(picture.offset)
        read = cv2.imdecode(np.frombuffer(spool.read(picture.size), np.uint8), cv2.IMREAD_COLOR)
        assert abs(int(read[0, 0, 0]) - picture.pts // 10 * 2) <= 2
        assert keyframes.choose(995, 999) == []


def test_hashes_survive_scaling_and_compression_and_tell_pictures_apart(photos: Path) -> None:
    names = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png", "coins.png"]
    hashes = []
    for name in names:
        picture = media.read_image(photos / name)[..., ::-1].copy()
        small = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 50])
        again = cv2.imdecode(data, cv2.IMREAD_COLOR)
        whole, less = perceptual_hash(picture), perceptual_hash(again)
        assert (whole ^ less).bit_count() <= 6, name
        hashes.append(whole)
    for i, a in enumerate(hashes):
        for b in hashes[:i]:
            assert (a ^ b).bit_count() > 12
