"""The structure distance of pictures, for `evaluate.load`."""

import editar_hf.evaluation.picture_metric as picture_metric
import editar_hf.evaluation.protocols as protocols
import editar_hf.evaluation.scorers as scorers


class StructureDistance(picture_metric.PictureMetric):
    """Compute the mean distance of the self-similarities that a DINO sees in pictures and references."""

    def _compute(self, predictions, references, model="facebook/dino-vitb8", device=None, protocol="editar"):
        """Compute the mean.

        Args:
            predictions, references (`list[str]`): Paths of pictures.
            model: What `StructureScorer` takes.
            device (`str`, *optional*): Where to compute.
            protocol (`str`): A name of `protocols.PROTOCOLS`.
        """
        switches = protocols.get_protocol(protocol)
        scorer = scorers.StructureScorer(model, device, switches.structure_pixel_scale, switches.structure_antialias)
        read = picture_metric.read_picture
        return picture_metric.average(
            "structure_distance", lambda a, b: scorer(read(a), read(b)), predictions, references
        )
