"""The network against transformers' independent implementation of the same architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.emu3 import Emu3VQVAE, Emu3VQVAEConfig

from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig
from unimodal.tokenize.vision.weights import from_transformers, to_transformers


def _peer() -> Emu3VQVAE:
    torch.manual_seed(0)
    peer = Emu3VQVAE(
        Emu3VQVAEConfig(
            codebook_size=256,
            embed_dim=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1, 2, 2, 4],
            num_res_blocks=2,
            attn_resolutions=[3],
            hidden_size=128,
            num_attention_heads=1,
            temporal_downsample_factor=4,
        )
    ).eval()
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
    peer = _peer()
    ours = MoVQ(MoVQConfig(codebook_size=256, ch=32)).eval()
    ours.load_state_dict(from_transformers(peer.state_dict()))
    return peer, ours


def _codes(peer: Emu3VQVAE, x: Tensor) -> Tensor:
    sizes = torch.tensor([x.shape[-2:]] * len(x))
    tokens = peer.encode(x, sizes).image_tokens
    return tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))


@torch.no_grad()
def test_images_have_the_peers_codes_and_pixels(pair: tuple[Emu3VQVAE, MoVQ]) -> None:
    peer, ours = pair
    images = torch.randn(2, 3, 64, 48)
    codes = ours.encode(images[:, None])
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
    state = _peer().state_dict()
    there = from_transformers(state)
    back = to_transformers(there)
    assert len(there) == 495
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    inside = from_transformers(
        {f"model.vqmodel.{n}": t for n, t in state.items()} | {"x": there["encoder.conv_in.bias"]}
    )
    assert inside.keys() == there.keys()


def test_the_released_size_has_its_tensors_and_parameters() -> None:
    with torch.device("meta"):
        model = MoVQ(MoVQConfig())
    assert len(model.state_dict()) == 495
    assert sum(p.numel() for p in model.parameters()) == 270_740_287
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == [512, 256, 1, 1]
    assert shapes["encoder.time_conv.0.conv.conv.weight"] == [4, 4, 4, 3, 3]
    assert shapes["decoder.up.0.block.0.norm1.conv_y.weight"] == [512, 4, 1, 1]
    assert shapes["quantize.embedding.weight"] == [32768, 4]


def test_enlarging_has_the_gradient_of_nearest_neighbour() -> None:
    from unimodal.tokenize.vision.movq import _Enlarge

    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 16, 20, dtype=torch.float64)
    ours = torch.autograd.grad((_Enlarge.apply(x, 4) * weights).sum(), x)[0]
    torchs = torch.nn.functional.interpolate(x, scale_factor=4, mode="nearest")
    torch.testing.assert_close(ours, torch.autograd.grad((torchs * weights).sum(), x)[0])
