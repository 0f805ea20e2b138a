"""The decoder against transformers, and against itself in its other forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from unimodal.model.attention import Cached
from unimodal.model.decoder import Decoder, DecoderConfig, Shape, parameter_count

SHAPE = Shape(width=48, layers=3, heads=6, kv_heads=2, ffn=80, init_std=0.2)
CONFIG = DecoderConfig(SHAPE, vocabulary_size=97, context=64)
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "pad_token_id": 0,
}


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(1))


def _randomise_norms(model: torch.nn.Module) -> None:
    # With all ones, an error in the handling of a norm would stay invisible.
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)


@pytest.mark.parametrize(
    ("family", "qk_norm"), [("Llama", False), ("Emu3", False), ("Qwen3", True)]
)
@torch.no_grad()
def test_logits_equal_those_of_transformers_on_the_same_weights(family: str, qk_norm: bool) -> None:
    ours = Decoder(DecoderConfig(SHAPE.model_copy(update={"qk_norm": qk_norm}), 97, 64)).eval()
    _randomise_norms(ours)
    config_class = getattr(
        transformers, "Emu3TextConfig" if family == "Emu3" else f"{family}Config"
    )
    config = config_class(**LLAMA, **({"head_dim": 8} if qk_norm else {}))
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = _ids(2, 40)
    # float32 on the CPU; only the order of additions differs.
    torch.testing.assert_close(ours(ids), theirs(ids).logits.float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_directory_saved_by_transformers_loads(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**LLAMA, head_dim=8)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    _randomise_norms(theirs)
    theirs.save_pretrained(tmp_path)
    ids = _ids(2, 20)
    ours = Decoder.load(tmp_path)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_give_the_logits_they_give_alone() -> None:
    decoder = Decoder(CONFIG).eval()
    documents = [_ids(7), _ids(1), _ids(19)]
    marks = torch.tensor([0, 7, 8, 27])
    packed = decoder(torch.cat(documents), cu_seqlens=marks)
    alone = torch.cat([decoder(one[None])[0] for one in documents])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_no_gradient_flows_from_one_document_to_another() -> None:
    decoder = Decoder(CONFIG).eval()
    ids = _ids(12)
    embedded: list[torch.Tensor] = []

    def keep(_: object, __: object, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    decoder.model.embed_tokens.register_forward_hook(keep)
    logits = decoder(ids, cu_seqlens=torch.tensor([0, 5, 12]))
    logits[5:].sum().backward()
    assert embedded[0].grad is not None
    assert embedded[0].grad[:5].abs().max() == 0
    assert embedded[0].grad[5:].abs().min() > 0


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    deep = Decoder(CONFIG, seed=3).state_dict()
    shallow = Decoder(
        DecoderConfig(SHAPE.model_copy(update={"layers": 1}), 97, 64), seed=3
    ).state_dict()
    assert all(torch.equal(deep[name], tensor) for name, tensor in shallow.items())
    other = Decoder(CONFIG, seed=4).state_dict()
    assert not torch.equal(deep["lm_head.weight"], other["lm_head.weight"])
    assert deep["lm_head.weight"].std().item() == pytest.approx(0.2, rel=0.05)


@torch.no_grad()
def test_bfloat16_products_stay_near_float32() -> None:
    decoder = Decoder(DecoderConfig(Shape(width=64, heads=4, ffn=128), 97)).eval()
    ids = _ids(2, 30)
    exact = decoder(ids)
    decoder.compute = torch.bfloat16
    rounded = decoder(ids)
    assert rounded.dtype == torch.float32
    # bfloat16 keeps 8 bits: errors of about one part in a hundred of the logits' spread.
    assert (rounded - exact).abs().max() < 0.05 * exact.std()


def test_dropout_acts_while_training_only() -> None:
    decoder = Decoder(DecoderConfig(SHAPE.model_copy(update={"dropout": 0.5}), 97, 64))
    ids = _ids(1, 20)
    decoder.eval()
    assert torch.equal(decoder(ids), decoder(ids))
    decoder.train()
    assert not torch.equal(decoder(ids), decoder(ids))


def test_parameters_are_counted_by_part() -> None:
    decoder = Decoder(CONFIG)
    count = parameter_count(decoder)
    assert sum(count.values()) == sum(p.numel() for p in decoder.parameters())
    assert count["embedding"] == count["head"] == 97 * 48


def test_inconsistent_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kv_heads 3 must divide heads 4"):
        Shape(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="must be even"):
        Shape(width=12, heads=4, kv_heads=1)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence(qk_norm: bool) -> None:
    shape = SHAPE.model_copy(update={"qk_norm": qk_norm})
    decoder = Decoder(DecoderConfig(shape, 97, 64)).eval()
    _randomise_norms(decoder)
    lengths, ids = [5, 9], _ids(2, 20)
    whole = decoder(ids)
    cache = decoder.cache(rows=2, length=20)
    # Prompts of unequal length at once, then a few tokens, then one at a time: each row goes on
    # from a position of its own.
    starts = torch.zeros(2, dtype=torch.int64)
    for new in (9, 3, 1, 1, 2):
        context = Cached(cache, starts, new)
        fed = ids.gather(1, context.positions.clamp(max=19))
        hidden = decoder.hidden(fed.flatten(), context.positions.flatten(), context)
        logits = decoder.lm_head(hidden).view(2, new, -1)
        taken = [min(new, length) for length in lengths] if new == 9 else [new, new]
        for row, count in enumerate(taken):
            at = int(starts[row])
            expected = whole[row, at : at + count]
            torch.testing.assert_close(logits[row, :count], expected, atol=1e-5, rtol=1e-5)
        starts = starts + torch.tensor(taken)
