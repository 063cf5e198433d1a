"""LPIPS of pictures, for `evaluate.load`."""

import editar_hf.evaluation.picture_metric as picture_metric
import editar_hf.evaluation.scorers as scorers


class LPIPS(picture_metric.PictureMetric):
    """Compute the mean perceptual distance (LPIPS 0.1, SqueezeNet) of pictures and references."""

    def _compute(self, predictions, references, model, device=None):
        """Compute the mean.

        Args:
            predictions, references (`list[str]`): Paths of pictures.
            model: What `LPIPSScorer` takes; `editar-hf convert-metric-model lpips` writes it.
            device (`str`, *optional*): Where to compute.
        """
        scorer, read = scorers.LPIPSScorer(model, device), picture_metric.read_picture
        return picture_metric.average("lpips", lambda a, b: scorer(read(a), read(b)), predictions, references)
