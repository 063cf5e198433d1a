"""Optimisers: AdamW as published, and Muon for training from scratch."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    learning_rate: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.05,
) -> torch.optim.AdamW:
    """Build AdamW with weight decay on tensors of two or more dimensions only.

    Source: the defaults are those of EditAR (arXiv 2501.04699), section 4.1, and of its published training script.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def split_hidden_matrices(module: nn.Module) -> tuple[list[torch.Tensor], list[nn.Parameter]]:
    """Split trained parameters into the matrices of hidden layers, for Muon, and all others.

    Muon is not meant for embeddings, the output head and vectors. Source: Jordan et al., "Muon" (2024).
    """
    heads = [part.get_output_embeddings() for part in module.modules() if isinstance(part, PreTrainedModel)]
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and part not in heads]
    matrices = [linear.weight for linear in linears if linear.weight.requires_grad]
    ids = {id(matrix) for matrix in matrices}
    return matrices, [p for p in module.parameters() if p.requires_grad and id(p) not in ids]


def build_muon(parameters: Iterable[torch.Tensor], learning_rate: float, weight_decay: float) -> torch.optim.Muon:
    """Build Muon with steps as large as AdamW's, so that their learning rates compare.

    Source: Muon is Scalable for LLM Training (arXiv 2502.16982), section 2.2.
    """
    return torch.optim.Muon(parameters, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
