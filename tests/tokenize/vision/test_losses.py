"""Every term against an independent computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.vision.discriminator import Discriminator, hinge
from unimodal.tokenize.vision.losses import sharpness
from unimodal.tokenize.vision.perceptual import LPIPS, WIDTHS, load_lpips


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """VGG16's layout and the heads', drawn at random: the published ones are no part of this."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None).features
    named = {f"features.{name}": t.clone() for name, t in vgg.state_dict().items()}
    return named | {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(WIDTHS)}


def _pictures() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    a = torch.rand(2, 3, 32, 40, generator=rng) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=rng)).clamp(-1, 1)


def test_lpips_is_its_formula_on_torchvisions_features(weights: dict[str, torch.Tensor]) -> None:
    torchvision = pytest.importorskip("torchvision")
    vgg = torchvision.models.vgg16(weights=None).features.eval()
    vgg.load_state_dict({n[9:]: t for n, t in weights.items() if n.startswith("features.")})
    model = LPIPS()
    model.load_state_dict(
        {n: t for n, t in weights.items() if n.startswith("features.")}
        | {f"heads.{i}": weights[f"lin{i}.model.1.weight"] for i in range(5)}
    )
    a, b = _pictures()
    taps: list[list[np.ndarray]] = []
    for x in (a, b):
        # ImageNet's normalization, from [-1, 1]: mean 0.485.., deviation 0.229.. of [0, 1].
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        x = ((x + 1) / 2 - mean) / deviation
        seen = []
        with torch.no_grad():
            for i, layer in enumerate(vgg):
                x = layer(x)
                if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                    seen.append(x.double().numpy().copy())
        taps.append(seen)
    expected = np.zeros(2)
    for i, (f, g) in enumerate(zip(*taps, strict=True)):
        f, g = (x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-10) for x in (f, g))
        w = weights[f"lin{i}.model.1.weight"].double().numpy()
        expected += ((f - g) ** 2 * w).sum(1).mean((1, 2))
    assert np.allclose(model(a, b).numpy(), expected, rtol=1e-4)
    assert torch.equal(model(a, a), torch.zeros(2))


def test_lpips_loads_from_every_layout_and_names_what_is_missing(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    a, b = _pictures()
    together = tmp_path / "all.safetensors"
    save_file(weights, together)
    expected = load_lpips(together)(a, b)
    parts = tmp_path / "parts"
    parts.mkdir()
    heads = {n: t for n, t in weights.items() if n.startswith("lin")}
    torch.save(heads, parts / "vgg.pth")  # as the package lpips publishes them
    with pytest.raises(UnimodalError, match=r"26 of LPIPS's 31 tensors.*features\.0\.bias"):
        load_lpips(parts)
    vgg = {n: t for n, t in weights.items() if n not in heads}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2)}, parts / "vgg16.pth")
    assert torch.equal(load_lpips(parts)(a, b), expected)
    with pytest.raises(UsageError, match="no LPIPS weights"):
        load_lpips(tmp_path / "nowhere")


def test_a_pickle_that_would_run_something_is_not_opened(tmp_path: Path) -> None:
    torch.save({"features.0.weight": Path}, tmp_path / "evil.pth")
    with pytest.raises(UnimodalError, match="cannot be read as weights"):
        load_lpips(tmp_path / "evil.pth")


def test_lpips_has_a_gradient_where_there_are_no_features() -> None:
    model = LPIPS()
    for parameter in model.features.parameters():
        parameter.zero_()
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    model(x, torch.ones(1, 3, 16, 16)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_sharpness_is_its_formula() -> None:
    a, b = (x[:1, :, :17, :17].double() for x in _pictures())

    def strength(x: np.ndarray) -> np.ndarray:
        """[3,17,17] -> root of the mean energy of gradients in windows of 8, 4 apart."""
        across, down = x[:, 1:, 1:] - x[:, 1:, :-1], x[:, 1:, 1:] - x[:, :-1, 1:]
        energy = (across**2 + down**2).mean(0)
        places = range(0, 9, 4)
        windows = [[energy[i : i + 8, j : j + 8].mean() for j in places] for i in places]
        return np.sqrt(np.array(windows) + 1e-4)

    whole = np.abs(strength(a[0].numpy()) - strength(b[0].numpy())).mean()
    assert np.isclose(sharpness(a, b).item(), whole / 3)  # the smaller scales are too small here
    blurred = F.avg_pool2d(F.pad(a, (1, 1, 1, 1), mode="replicate"), 3, 1)
    assert sharpness(a, a).item() == 0 < sharpness(a, blurred).item()


def test_the_discriminator_is_pix2pixs_and_its_step_lowers_the_hinge_loss() -> None:
    # 2,768,705 parameters are known of the one that sees six channels, 3,072 more.
    assert sum(p.numel() for p in Discriminator(3, 64).parameters()) == 2_768_705 - 3_072
    torch.manual_seed(0)
    judge = Discriminator(2, 16)
    assert judge(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 14, 14)
    real, fake = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32) - 1
    optimizer = torch.optim.Adam(judge.parameters(), 1e-3, (0.5, 0.9))
    losses = []
    for _ in range(12):
        loss = hinge(judge(real), judge(fake))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    logits = judge(real).detach().numpy(), judge(fake).detach().numpy()
    by_hand = np.maximum(0, 1 - logits[0]).mean() / 2 + np.maximum(0, 1 + logits[1]).mean() / 2
    assert np.isclose(hinge(judge(real), judge(fake)).item(), by_hand, rtol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) and m.track_running_stats for m in judge)
