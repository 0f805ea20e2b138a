"""Checkpoints: exact, whole or absent, and never a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from unimodal.model import checkpoint
from unimodal.model.checkpoint import find, latest_step, load_step, save_step
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.naming import config_record
from unimodal.pipeline.errors import UnimodalError

SHAPE = Shape(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=24)
CONFIG = DecoderConfig(SHAPE, 40, 64)


def _trained(seed: int = 0) -> tuple[Decoder, torch.optim.AdamW]:
    decoder = Decoder(CONFIG, seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        decoder(torch.arange(12)[None]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder, optimizer


def test_weights_and_moments_come_back_bit_for_bit(tmp_path: Path) -> None:
    decoder, optimizer = _trained()
    step = save_step(tmp_path, 2, decoder, [optimizer], {"step": 2}, keep=2)
    again, other = _trained(seed=9)
    assert load_step(step, again, [other]) == {"step": 2}
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    for mine, theirs in zip(decoder.parameters(), again.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[mine][moment], other.state[theirs][moment])
    assert torch.equal(Decoder.load(tmp_path).lm_head.weight, decoder.lm_head.weight)
    assert Decoder.load(step).config == CONFIG


def test_a_step_directory_loads_in_transformers_with_the_same_logits(tmp_path: Path) -> None:
    decoder, optimizer = _trained()
    step = save_step(tmp_path, 2, decoder, [optimizer], {"step": 2}, keep=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(step).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_only_the_newest_steps_are_kept(tmp_path: Path) -> None:
    decoder, optimizer = _trained()
    for step in (1, 2, 3):
        save_step(tmp_path, step, decoder, [optimizer], {"step": step}, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-00000002", "step-00000003"]
    assert latest_step(tmp_path) == tmp_path / "step-00000003"


@pytest.mark.parametrize("dies_in", ["_write_json", "_sync", "atomic"])
def test_dying_in_a_save_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    decoder, optimizer = _trained()
    save_step(tmp_path, 1, decoder, [optimizer], {"step": 1}, keep=1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            save_step(tmp_path, 2, decoder, [optimizer], {"step": 2}, keep=1)
    assert latest_step(tmp_path) == tmp_path / "step-00000001"
    Decoder.load(tmp_path)
    save_step(tmp_path, 2, decoder, [optimizer], {"step": 2}, keep=1)
    assert latest_step(tmp_path) == tmp_path / "step-00000002"


def test_what_is_no_checkpoint_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnimodalError, match=r"no checkpoint at .*nowhere: make one with"):
        find(tmp_path / "nowhere")
    with pytest.raises(UnimodalError, match="no finished checkpoint"):
        find(tmp_path)
    (tmp_path / "latest").write_text("../../etc\n")
    with pytest.raises(UnimodalError, match="no complete step"):
        find(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    config = config_record(CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(UnimodalError, match=r"pytorch_model\.bin is a pickle"):
        Decoder.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_size": "wide"}, "describes no decoder"),
        ({"intermediate_size": 25}, r"config\.json asks for \[16, 25\]"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    decoder, optimizer = _trained()
    step = save_step(tmp_path, 1, decoder, [optimizer], {"step": 1}, keep=1)
    config = json.loads((step / "config.json").read_text())
    (step / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnimodalError, match=message):
        Decoder.load(step)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    decoder, optimizer = _trained()
    step = save_step(tmp_path, 1, decoder, [optimizer], {"step": 1}, keep=1)
    file = step / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UnimodalError, match=r"model\.safetensors cannot be read"):
        Decoder.load(step)
