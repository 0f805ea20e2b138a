"""Fréchet distance of two sets of pictures by Inception's features: FID (arXiv 1706.08500).

Network and formula are those of `torch-fidelity`; its weights are a file that you give:
`weights-inception-2015-12-05-6726825d.pth` of its releases, or the same tensors as safetensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.scorers.weights import state_dict

Features = Callable[[Iterable[np.ndarray]], np.ndarray]


def load(weights: str, device: str = "cpu") -> Features:
    """A function from N pictures, uint8 [H, W, 3] of any sizes, to float64 [N, 2048].

    Raises `UsageError` if the library is missing, or the file holds other weights.
    """
    tensors = state_dict(weights)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UsageError(f"FID needs {error.name}: pip install 'unimodal[eval]'") from error
    import torch

    # The library unpickles the file it is given: it gets one that holds the tensors alone.
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tensors, clean := Path(folder) / "inception.pth")
        try:
            net = FeatureExtractorInceptionV3("inception", ["2048"], str(clean)).to(device)
        except RuntimeError as error:
            lines = " ".join(str(error).split())
            raise UsageError(
                f"{weights} is no Inception of torch-fidelity: {lines[:200]}"
            ) from error

    @torch.inference_mode()
    def features(pictures: Iterable[np.ndarray]) -> np.ndarray:
        found = [
            net(torch.from_numpy(one.transpose(2, 0, 1)[None].copy()).to(device))[0][0]
            for one in pictures
        ]
        return torch.stack(found).double().cpu().numpy()

    return features


def distance(one: np.ndarray, other: np.ndarray) -> float | None:
    """FID of features [N, 2048] and [M, 2048]; None of fewer than two pictures on a side."""
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    if min(len(one), len(other)) < 2:
        return None
    sides = [fid_features_to_statistics(torch.from_numpy(side)) for side in (one, other)]
    return float(fid_statistics_to_metric(*sides, False)["frechet_inception_distance"])
