"""What a network carries before it has learned anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unimodal.tokenize.vision.init import start
from unimodal.tokenize.vision.movq import MoVQ, MoVQConfig


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Smooth random colour fields, whose patches have a few large components."""
    noise = torch.randn(24, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    fields = torch.nn.functional.interpolate(noise, size=96, mode="bicubic")
    return (0.4 * fields).clamp(-1, 1)


@pytest.mark.parametrize(("size", "mult"), [(16, (1, 1, 2, 4)), (4, (1, 2, 4, 4))])
@torch.no_grad()
def test_latents_keep_the_distances_of_patches(
    pictures: Tensor, size: int, mult: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    shape = {"embed_dim": size, "z_channels": size, "ch_mult": mult, "num_res_blocks": 1}
    model = MoVQ(MoVQConfig(codebook_size=64, ch=32, **shape)).eval()
    start(model, pictures)
    latents = model.latents(pictures[:, None])[:, :, 0].movedim(1, -1).flatten(0, -2)
    patches = torch.nn.functional.pixel_unshuffle(pictures, 8).movedim(1, -1).flatten(0, -2)
    # The reference: principal components of whole patches, as one decomposition gives them.
    _, _, axes = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    kept = (patches - patches.mean(0)) @ axes[:size].T
    ours = torch.pdist(latents[::7]) * 192**0.5 / 2  # a latent of 2 is a patch of one colour at 1
    torch.testing.assert_close(ours, torch.pdist(kept[::7]), rtol=0.1, atol=0.25)


@torch.no_grad()
def test_the_decoder_paints_the_mean_colour_of_every_patch(pictures: Tensor) -> None:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "z_channels": 16, "ch_mult": (1, 1, 2, 4), "num_res_blocks": 1}
    model = MoVQ(MoVQConfig(codebook_size=64, ch=32, **shape)).eval()
    start(model, pictures)
    painted = model.paint(model.latents(pictures[:, None]), image=True)[:, 0]
    means = torch.nn.functional.avg_pool2d(pictures, 8)
    found = torch.nn.functional.avg_pool2d(painted, 8)
    assert (found - means).square().mean() < 0.1 * means.var()


def test_a_network_without_room_keeps_its_random_start(pictures: Tensor) -> None:
    torch.manual_seed(0)
    model = MoVQ(MoVQConfig(codebook_size=64, ch=32, ch_mult=(1, 1), num_res_blocks=1))
    before = model.encoder.conv_in.weight.clone()
    assert not start(model, pictures)
    assert torch.equal(model.encoder.conv_in.weight, before)
