"""Public weight files of the metrics' networks → folders that `from_pretrained` loads.

| network | files, as their authors name them |
|---|---|
| LPIPS | `squeezenet1_1-b8a52dc0.pth`, the ImageNet classifier, and `squeeze.pth`, the heads of LPIPS 0.1 |
| FID's Inception | `pt_inception-2015-12-05-6726825d.pth` |

Files are opened without running any code in them, and every key is accounted for.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..conversion import check_output_dir, is_weights, open_checkpoint
from ..io import atomic_path
from ..pipelines.hub import describe_key_problems
from .metric_models import COMPARED_LAYERS, FIDInceptionConfig, FIDInceptionModel, LPIPSConfig, LPIPSModel


# The classifiers on top of both networks, of no use to a metric.
LPIPS_CLASSIFIER, INCEPTION_CLASSIFIER = "classifier.", "fc."
# FID's Inception was trained with 1008 classes, the one of torchvision with ImageNet's 1000.
NUM_INCEPTION_CLASSES = 1008
# A counter that batch normalisation keeps in training.
BATCH_COUNTER = "num_batches_tracked"


def convert_lpips(backbone: str | Path, heads: str | Path) -> LPIPSModel:
    """Convert LPIPS on SqueezeNet 1.1.

    Args:
        backbone (`str` or `Path`): The ImageNet classifier's weights.
        heads (`str` or `Path`): The weights of LPIPS 0.1's linear heads.

    Raises:
        ValueError: If a file does not open safely, or holds other weights.
    """
    weights = load_weights(backbone)
    found = {name: tensor for name, tensor in weights.items() if not name.startswith(LPIPS_CLASSIFIER)}
    names = {f"lin{k}.model.1.weight": f"heads.{k}.weight" for k in range(len(COMPARED_LAYERS))}
    found |= {names.get(name, name): tensor for name, tensor in load_weights(heads).items()}
    return fill(LPIPSModel(LPIPSConfig()), found, f"`{backbone}` and `{heads}` hold no SqueezeNet 1.1 and its heads")


def convert_fid_inception(weights: str | Path) -> FIDInceptionModel:
    """Convert FID's Inception of 2015-12-05.

    Args:
        weights (`str` or `Path`): The weights.

    Raises:
        ValueError: If the file does not open safely, holds other weights, or is the Inception of torchvision.
    """
    found = load_weights(weights)
    classifier = found.get(f"{INCEPTION_CLASSIFIER}weight")
    if classifier is not None and len(classifier) != NUM_INCEPTION_CLASSES:
        raise ValueError(
            f"`{weights}` is an Inception of {len(classifier)} classes, and FID's has {NUM_INCEPTION_CLASSES}; its "
            "figures would be others. Give pt_inception-2015-12-05-6726825d.pth."
        )
    found = {name: tensor for name, tensor in found.items() if not name.startswith(INCEPTION_CLASSIFIER)}
    return fill(FIDInceptionModel(FIDInceptionConfig()), found, f"`{weights}` holds no FID Inception")


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Load named tensors.

    Raises:
        ValueError: If the file is absent, does not open safely, or holds anything else.
    """
    weights = open_checkpoint(path)
    if not is_weights(weights):
        raise ValueError(f"`{path}` holds something else than named tensors; give the published weights.")
    return dict(weights)


def fill(model: PreTrainedModel, weights: dict[str, torch.Tensor], complaint: str) -> PreTrainedModel:
    """Put weights into a network; refuse them with the complaint if any is missing, left over or of another shape."""
    weights = {name: tensor.float() for name, tensor in weights.items() if not name.endswith(BATCH_COUNTER)}
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(BATCH_COUNTER)}
    found_shapes, expected_shapes = ({k: tuple(v.shape) for k, v in part.items()} for part in (weights, expected))
    if problems := describe_key_problems(found_shapes, expected_shapes):
        raise ValueError(f"{complaint}: {problems}.")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def save_metric_model(model: PreTrainedModel, output_dir: str | Path) -> None:
    """Write a network to a new folder, complete or not at all.

    Raises:
        ValueError: If the folder already holds something.
    """
    check_output_dir(Path(output_dir))
    with atomic_path(output_dir) as unfinished:
        model.save_pretrained(unfinished)
