"""Protocols: named sets of switches, each the way in which figures in one table were computed.

Figures are comparable only within a protocol. The published ones contain quirks of the code that made them; they are
kept here behind names, beside a protocol without them. Pictures are scored as they were saved: how a system rounds
its pixels is an option of the system.
"""

from dataclasses import dataclass, replace

from .map_metrics import DepthVariant


@dataclass(frozen=True)
class Protocol:
    """How pictures are scored.

    Args:
        name (`str`): What the protocol is called.
        description (`str`): One sentence for the report.
        is_comparable (`bool`): Whether figures can stand beside published ones.
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
    ssim_border: int
    masked_mean: bool
    structure_pixel_scale: int
    structure_antialias: bool
    depth_variant: DepthVariant


EDITAR = Protocol(
    name="editar",
    description="As in the evaluation of EditAR (arXiv 2501.04699).",
    is_comparable=True,
    ssim_border=0,
    masked_mean=False,
    # Parity: the reference never divides pixels by 255 before it normalises them for DINO.
    structure_pixel_scale=255,
    structure_antialias=True,
    depth_variant="editar",
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        EDITAR,
        replace(
            EDITAR,
            name="pnp-2023",
            description="As PnPInversion's code scores (arXiv 2310.01506), with the libraries of 2023.",
            ssim_border=5,
            structure_antialias=False,
        ),
        # The tables of these two have depth, and no edits: all but depth is as in `editar`.
        replace(
            EDITAR,
            name="controlnet++",
            description="Depth as in the evaluation of ControlNet++ (arXiv 2404.07987), whose estimates are divided by "
            "their greatest value alone.",
            depth_variant="controlnet++",
        ),
        replace(
            EDITAR,
            name="controlar",
            description="Depth as in the evaluation of ControlAR (arXiv 2410.02705), estimated at the size of the "
            "picture and never rounded.",
            depth_variant="controlar",
        ),
        replace(
            EDITAR,
            name="corrected",
            description="Without the quirks of the published code; not comparable with published figures.",
            is_comparable=False,
            masked_mean=True,
            structure_pixel_scale=1,
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
