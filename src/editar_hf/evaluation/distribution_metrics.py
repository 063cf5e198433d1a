"""Metrics of two sets of pictures: the Fréchet distance between their features."""

import torch


def compute_frechet_distance(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """Compute the Fréchet distance between the normal distributions that two sets of features have.

    The trace of (Σ₁Σ₂)^½ is the sum of the singular values of A₁A₂ᵀ, where A is a set's centred features over √(n − 1),
    so that Σ = AᵀA. No root of a matrix is taken: sets with fewer pictures than dimensions are no harder than others.

    Args:
        features, reference_features (`torch.Tensor` of shape `(n, dim)`): Of all pictures of a set, in an order that
            does not depend on how they were computed. The sets may differ in size.

    Raises:
        ValueError: If a set has fewer than two pictures, or the dimensions differ.

    Source: Heusel et al. (arXiv 1706.08500), equation 6, with unbiased covariances.
    """
    check_features("features", features, features.shape[-1])
    check_features("reference_features", reference_features, features.shape[-1])
    mean, root = compute_moments(features)
    reference_mean, reference_root = compute_moments(reference_features)
    spread = root.square().sum() + reference_root.square().sum()
    shared = torch.linalg.svdvals(root @ reference_root.T).sum()
    return ((mean - reference_mean).square().sum() + spread - 2 * shared).item()


def compute_moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean (dim,) of features (n, dim), and a matrix R (min(n, dim), dim) whose RᵀR is their covariance."""
    features = features.cpu().double()
    mean = features.mean(0)
    root = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
    return mean, root


def check_features(name: str, features: torch.Tensor, dim: int) -> None:
    """Refuse what is no set of features with a covariance."""
    if features.ndim != 2 or len(features) < 2 or features.shape[1] != dim:
        raise ValueError(
            f"`{name}` has shape {tuple(features.shape)}; give two pictures or more: (n, {dim}), both sets alike."
        )
