"""Engines side by side: answers find their questions, also when an engine dies in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.answering import digest_of, saying
from unimodal.pipeline.captioning.captioner import Answer, Ask, Captioner
from unimodal.pipeline.captioning.fleet import side_by_side
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.errors import UnimodalError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _parrots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def _settings(**engine: Any) -> CaptionSettings:
    return CaptionSettings(
        source="vllm", model="parrot", data_parallel=2, in_flight=3, engine=engine
    )


def _asks(count: int) -> list[Ask]:
    schema = {"required": ["dense"]}
    return [
        Ask(f"k{i}", "", "", (bytes([i]), b"x" * i), "", schema, 9, 0.0, 1.0, 0)
        for i in range(count)
    ]


def _all(captioner: Captioner, asks: list[Ask]) -> dict[str, str]:
    waiting, found, held = list(asks), {}, 0
    while len(found) < len(asks):
        while waiting and held < captioner.in_flight:
            captioner.submit(waiting.pop())
            held += 1
        for key, answer in captioner.collect():
            held -= 1
            assert isinstance(answer, Answer) and key not in found
            found[key] = json.loads(answer.text)["dense"]
    return found


def test_every_answer_comes_back_to_its_question() -> None:
    asks = _asks(40)
    fleet = side_by_side(_settings(), "parrot:Parrot")
    try:
        assert fleet.in_flight == 6
        assert _all(fleet, asks) == {a.key: saying(digest_of(a.frames), "dense") for a in asks}
    finally:
        fleet.close()


def test_an_engine_that_dies_is_replaced_and_its_questions_asked_again(tmp_path: Path) -> None:
    asks = _asks(24)
    settings = _settings(dies_after=9, note=str(tmp_path))
    fleet = side_by_side(settings, "parrot:Parrot")
    try:
        assert _all(fleet, asks) == {a.key: saying(digest_of(a.frames), "dense") for a in asks}
    finally:
        fleet.close()
    assert len(list(tmp_path.iterdir())) >= 1


@pytest.mark.parametrize(
    ("engine", "told"),
    [({"start": "no room: lower caption.max_model_len"}, "lower caption.max_model_len; what is")],
)
def test_an_engine_that_cannot_start_ends_the_run_with_its_reason(
    engine: dict[str, Any], told: str
) -> None:
    fleet = side_by_side(_settings(**engine), "parrot:Parrot")
    try:
        with pytest.raises(UnimodalError, match=told):
            _all(fleet, _asks(3))
    finally:
        fleet.close()


def test_an_engine_that_dies_before_it_answers_ends_the_run(tmp_path: Path) -> None:
    settings = _settings(dies_after=0.5, note=str(tmp_path))
    fleet = side_by_side(settings, "parrot:Parrot")
    try:
        with pytest.raises(UnimodalError, match=r"engine died \(exit code 9\); what is done is"):
            _all(fleet, _asks(3))
    finally:
        fleet.close()
