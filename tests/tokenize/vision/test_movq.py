"""The network against transformers' independent implementation of the same architecture."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from transformers.models.emu3 import Emu3VQVAE, Emu3VQVAEConfig

from unimodal.tokenize.vision import movq
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.weights import from_transformers, to_transformers

TINY = {"codebook_size": 256, "base_channels": 32, "hidden_size": 128}


def _peer(**shape: int) -> Emu3VQVAE:
    torch.manual_seed(0)
    peer = Emu3VQVAE(Emu3VQVAEConfig(**shape)).eval()
    # Fresh norms are the identity, under which a wrong norm would go unseen.
    with torch.no_grad():
        for name, buffer in peer.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.2, 0.2)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for name, parameter in peer.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peer


@pytest.fixture(scope="module")
def pair() -> tuple[Emu3VQVAE, MoVQ]:
    peer = _peer(**TINY)
    ours = MoVQ(MoVQConfig(codebook_size=256, ch=32)).eval()
    ours.load_state_dict(from_transformers(peer.state_dict()))
    return peer, ours


def _codes(peer: Emu3VQVAE, x: Tensor) -> Tensor:
    sizes = torch.tensor([x.shape[-2:]] * len(x))
    tokens = peer.encode(x, sizes).image_tokens
    return tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))


@torch.no_grad()
@pytest.mark.parametrize(
    "side", [(64, 48), (48, 80), (8, 24), (36, 44), (33, 47)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_images_have_the_peers_codes_and_pixels(
    pair: tuple[Emu3VQVAE, MoVQ], side: tuple[int, int]
) -> None:
    peer, ours = pair
    images = torch.randn(2, 3, *side)
    codes = ours.encode(images[:, None])
    assert codes.shape == (2, 1, side[0] // 8, side[1] // 8)
    assert torch.equal(codes[:, 0], _codes(peer, images))
    painted = ours.decode(codes, image=True)[:, 0]
    # Float32 sums in another order: 1e-4 of a range of two is a fortieth of a grey level.
    torch.testing.assert_close(painted, peer.decode(codes[:, 0]), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("frames", [4, 8])
def test_clips_have_the_peers_codes_and_pixels(pair: tuple[Emu3VQVAE, MoVQ], frames: int) -> None:
    peer, ours = pair
    # Wide, and few latent frames: the peer crops clips wrongly otherwise.
    clip = torch.randn(1, frames, 3, 48, 64)
    codes = ours.encode(clip)
    assert torch.equal(codes, _codes(peer, clip))
    torch.testing.assert_close(ours.decode(codes), peer.decode(codes), atol=1e-4, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_the_released_size_has_the_peers_codes_and_pixels() -> None:
    peer = _peer()
    with torch.device("meta"):
        ours = MoVQ(MoVQConfig()).eval()
    ours.load_state_dict(from_transformers(peer.state_dict()), assign=True)
    image, clip = torch.randn(1, 3, 64, 64), torch.randn(1, 4, 3, 32, 64)
    codes = ours.encode(image[:, None])
    assert torch.equal(codes[:, 0], _codes(peer, image))
    painted = ours.decode(codes, image=True)[:, 0]
    torch.testing.assert_close(painted, peer.decode(codes[:, 0]), atol=1e-4, rtol=0)
    codes = ours.encode(clip)
    assert torch.equal(codes, _codes(peer, clip))
    torch.testing.assert_close(ours.decode(codes), peer.decode(codes), atol=1e-4, rtol=0)


@torch.no_grad()
def test_slices_and_parts_and_their_sizes_change_nothing(
    pair: tuple[Emu3VQVAE, MoVQ], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = pair[1]
    torch.manual_seed(1)
    clip = torch.randn(2, 4, 3, 44, 49)
    latents, codes = ours.latents(clip), ours.encode(clip)
    painted = ours.decode(codes)
    monkeypatch.setattr(movq, "SLICE", {"cpu": 2048})  # a few norm groups
    monkeypatch.setattr(movq, "PART_PIXELS", 1)  # one frame
    monkeypatch.setattr(movq, "BAND", 2048)  # a few rows
    monkeypatch.setattr(movq, "QUANTIZE_ROWS", 7)
    # torch takes another SiLU at a tensor's end, and another convolution for one small frame:
    # float32 noise, of latents around 5.
    torch.testing.assert_close(ours.latents(clip), latents, atol=2e-5, rtol=0)
    assert torch.equal(ours.encode(clip), codes)
    torch.testing.assert_close(ours.decode(codes), painted, atol=1e-4, rtol=0)


def test_with_and_without_gradients_are_the_same_network(pair: tuple[Emu3VQVAE, MoVQ]) -> None:
    ours = pair[1]
    torch.manual_seed(2)
    clip = torch.randn(1, 4, 3, 24, 40)
    with torch.no_grad():
        latents = ours.latents(clip)
        zq = ours.quantize.lookup(ours.quantize(latents))
        painted = ours.paint(zq)
    torch.testing.assert_close(ours.latents(clip), latents, atol=2e-5, rtol=0)
    trained = ours.paint(zq)
    assert trained.requires_grad
    torch.testing.assert_close(trained.detach(), painted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_trunk_sees_a_bounded_number_of_frames_and_repeated_ones_once(
    pair: tuple[Emu3VQVAE, MoVQ], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = pair[1]
    monkeypatch.setattr(movq, "PART_PIXELS", 3 * 16 * 24)
    seen: list[int] = []
    hooks = [
        half.conv_in.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
        for half in (ours.encoder, ours.decoder)
    ]
    try:
        clip = torch.randn(4, 4, 3, 16, 24)
        ours.decode(ours.encode(clip))
        assert sum(seen) == 2 * 16 and max(seen) == 3
        seen.clear()
        clip[:, 1:3] = clip[:, :1]  # three equal frames, then another
        still = ours.encode(clip)
        assert sum(seen) == 4 * 2
    finally:
        for hook in hooks:
            hook.remove()
    alone = torch.cat([ours.quantize(ours.latents(c[None])) for c in clip])
    assert torch.equal(still, alone)


@torch.no_grad()
def test_a_still_image_is_four_equal_frames_at_a_quarter_of_the_work(
    pair: tuple[Emu3VQVAE, MoVQ],
) -> None:
    ours = pair[1]
    torch.manual_seed(5)
    image = torch.randn(1, 1, 3, 40, 48)
    still = ours.encode(image.expand(-1, 4, -1, -1, -1).contiguous())
    assert torch.equal(ours.encode(image), still)
    first = ours.decode(still)[:, :1]
    torch.testing.assert_close(ours.decode(still, image=True), first, atol=1e-4, rtol=0)


def test_names_map_one_to_one_both_ways() -> None:
    state = _peer(**TINY).state_dict()
    there = from_transformers(state)
    back = to_transformers(there)
    assert len(there) == 495
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    for prefix in ("vqmodel.", "model.vqmodel."):
        inside = {prefix + n: t for n, t in state.items()} | {"x": there["encoder.conv_in.bias"]}
        assert from_transformers(inside).keys() == there.keys()


# All names of the released file, by hand: braces stand for alternatives.
RELEASED = """
encoder.{conv_in,norm_out,conv_out}.{weight,bias}
encoder.down.{0,1,2,3}.block.{0,1}.{norm1,conv1,norm2,conv2}.{weight,bias}
encoder.down.{1,3}.block.0.nin_shortcut.{weight,bias}
encoder.down.{0,1,2}.downsample.conv.{weight,bias}
encoder.down.3.attn.{0,1}.{norm,q,k,v,proj_out}.{weight,bias}
encoder.mid.attn_1.{norm,q,k,v,proj_out}.{weight,bias}
encoder.mid.block_{1,2}.{norm1,conv1,norm2,conv2}.{weight,bias}
{encoder,decoder}.time_conv.{0,1}.conv.conv.{weight,bias}
{encoder,decoder}.time_res_stack.{0,1}.norm{1,2}.{weight,bias,running_mean,running_var}
{encoder,decoder}.time_res_stack.{0,1}.norm{1,2}.num_batches_tracked
{encoder,decoder}.time_res_stack.{0,1}.conv{1,2}.conv.{weight,bias}
decoder.{conv_in,conv_out}.{weight,bias}
decoder.norm_out.{norm_layer,conv_y,conv_b}.{weight,bias}
decoder.mid.block_{1,2}.norm{1,2}.{norm_layer,conv_y,conv_b}.{weight,bias}
decoder.mid.block_{1,2}.conv{1,2}.{weight,bias}
decoder.up.{0,1,2,3}.block.{0,1,2}.norm{1,2}.{norm_layer,conv_y,conv_b}.{weight,bias}
decoder.up.{0,1,2,3}.block.{0,1,2}.conv{1,2}.{weight,bias}
decoder.up.{0,2}.block.0.nin_shortcut.{weight,bias}
decoder.up.{1,2,3}.upsample.conv.{weight,bias}
decoder.mid.attn_1.norm.{norm_layer,conv_y,conv_b}.{weight,bias}
decoder.mid.attn_1.{q,k,v,proj_out}.{weight,bias}
decoder.up.3.attn.{0,1,2}.norm.{norm_layer,conv_y,conv_b}.{weight,bias}
decoder.up.3.attn.{0,1,2}.{q,k,v,proj_out}.{weight,bias}
{quant_conv,post_quant_conv}.conv.{weight,bias}
quantize.embedding.weight
"""
SHAPES = {
    "encoder.conv_in.weight": [256, 3, 3, 3],
    "encoder.down.1.block.0.nin_shortcut.weight": [512, 256, 1, 1],
    "encoder.down.3.block.0.nin_shortcut.weight": [1024, 512, 1, 1],
    "encoder.down.3.attn.1.q.weight": [1024, 1024, 1, 1],
    "encoder.conv_out.weight": [4, 1024, 3, 3],
    "encoder.time_conv.0.conv.conv.weight": [4, 4, 4, 3, 3],
    "decoder.time_conv.1.conv.conv.weight": [4, 4, 3, 3, 3],
    "decoder.time_res_stack.0.norm1.running_var": [4],
    "quant_conv.conv.weight": [4, 4, 3, 1, 1],
    "decoder.conv_in.weight": [1024, 4, 3, 3],
    "decoder.up.0.block.0.norm1.conv_y.weight": [512, 4, 1, 1],
    "decoder.up.0.block.0.nin_shortcut.weight": [256, 512, 1, 1],
    "decoder.up.3.upsample.conv.weight": [1024, 1024, 3, 3],
    "decoder.up.1.upsample.conv.weight": [512, 512, 3, 3],
    "decoder.conv_out.weight": [3, 256, 3, 3],
    "quantize.embedding.weight": [32768, 4],
}


def _expand(pattern: str) -> list[str]:
    if (braces := re.search(r"\{([^}]*)\}", pattern)) is None:
        return [pattern]
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [name for one in braces[1].split(",") for name in _expand(head + one + tail)]


def test_the_released_size_has_its_names_shapes_and_parameters() -> None:
    with torch.device("meta"):
        ours, peer = MoVQ(MoVQConfig()), Emu3VQVAE(Emu3VQVAEConfig())
    shapes = {name: list(t.shape) for name, t in ours.state_dict().items()}
    names = [name for line in RELEASED.split() for name in _expand(line)]
    assert len(names) == 495 and shapes.keys() == set(names)
    assert {name: shapes[name] for name in SHAPES} == SHAPES
    theirs = from_transformers(peer.state_dict())
    assert shapes == {name: list(t.shape) for name, t in theirs.items()}
    assert sum(p.numel() for p in ours.parameters()) == 270_740_287
    halves = [sum(p.numel() for p in half.parameters()) for half in (ours.encoder, ours.decoder)]
    assert halves == [109_488_252, 161_120_859]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ch": 10**12}, "ch is 1000000000000, not a whole number from 1 to 4096"),
        ({"ch": 32.0}, "ch is 32.0"),
        ({"ch": True}, "ch is True"),
        ({"ch": 48}, "multiples of 32"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"ch_mult": "1224"}, "ch_mult is '1224', not a list"),
        ({"ch_mult": [1, 10**9]}, "ch_mult is 1000000000"),
        ({"ch_mult": []}, "len.ch_mult. is 0"),
        ({"num_res_blocks": 10**9}, "num_res_blocks is 1000000000"),
        ({"attn_resolutions": [None]}, "attn_resolutions is None"),
        ({"temporal_downsample_factor": 3}, "temporal factor 3: a power of two"),
        ({"embed_dim": 8}, "z_channels 4 is not embed_dim 8"),
    ],
)
def test_a_configuration_of_no_network_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoVQConfig(**values)  # type: ignore[arg-type]


def test_enlarging_has_the_gradient_of_nearest_neighbour() -> None:
    from unimodal.tokenize.vision.movq import _Enlarge

    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 16, 20, dtype=torch.float64)
    ours = torch.autograd.grad((_Enlarge.apply(x, 4) * weights).sum(), x)[0]
    torchs = torch.nn.functional.interpolate(x, scale_factor=4, mode="nearest")
    torch.testing.assert_close(ours, torch.autograd.grad((torchs * weights).sum(), x)[0])
