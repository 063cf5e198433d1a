"""Protocols: named sets of switches, each the way in which figures in one table were computed.

Figures are comparable only within a protocol. The published ones contain quirks of the code that made them; they are
kept here behind names, beside a protocol without them.
"""

from dataclasses import dataclass
from typing import Literal

from .map_metrics import DepthVariant


@dataclass(frozen=True)
class Protocol:
    """How pictures are scored.

    Args:
        name (`str`): What the protocol is called.
        description (`str`): One sentence for the report.
        is_comparable (`bool`): Whether figures can stand beside published ones.
        quantize (`str`): How pixels that do not come from a file are brought to 256 steps: `"round"` or `"truncate"`.
        ssim_border (`int`): Pixels left out of the structural similarity at each side.
        masked_mean (`bool`): Whether metrics of the unedited region average over it alone, and not over the whole
            picture with the edited pixels set to 0.
        structure_pixel_scale (`int`): The value of white where DINO's input is normalised: 1, or 255.
        structure_antialias (`bool`): Whether DINO's input is filtered as it is made smaller.
        depth_variant (`str`): A variant of `compute_depth_rmse`.

    Example:

    ```python
    >>> from editar_hf.evaluation.protocols import get_protocol
    >>> get_protocol("pnp-2023").ssim_border
    5
    ```
    """

    name: str
    description: str
    is_comparable: bool
    quantize: Literal["round", "truncate"]
    ssim_border: int
    masked_mean: bool
    structure_pixel_scale: int
    structure_antialias: bool
    depth_variant: DepthVariant


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="editar",
            description="As EditAR's code scores (arXiv 2501.04699), quirks included.",
            is_comparable=True,
            quantize="truncate",
            ssim_border=0,
            masked_mean=False,
            # Parity: the reference never divides pixels by 255 before it normalises them for DINO.
            structure_pixel_scale=255,
            structure_antialias=True,
            depth_variant="editar",
        ),
        Protocol(
            name="pnp-2023",
            description="As PnPInversion's code scores (arXiv 2310.01506), with the libraries of 2023.",
            is_comparable=True,
            quantize="round",
            ssim_border=5,
            masked_mean=False,
            structure_pixel_scale=255,
            structure_antialias=False,
            depth_variant="editar",
        ),
        Protocol(
            name="corrected",
            description="Without the quirks of the published code; not comparable with published figures.",
            is_comparable=False,
            quantize="round",
            ssim_border=0,
            masked_mean=True,
            structure_pixel_scale=1,
            structure_antialias=True,
            depth_variant="editar",
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """Find a protocol by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"`protocol` is {name!r}; choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
