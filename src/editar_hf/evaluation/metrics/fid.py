"""FID of two sets of pictures, for `evaluate.load`."""

import torch

import editar_hf.evaluation.distribution_metrics as distribution_metrics
import editar_hf.evaluation.picture_metric as picture_metric
import editar_hf.evaluation.scorers as scorers


class FID(picture_metric.PictureMetric):
    """Compute the Fréchet distance, as clean-fid does, between the Inception features of two sets of equal size."""

    def _compute(self, predictions, references, model, device=None):
        """Compute the distance.

        Args:
            predictions, references (`list[str]`): Paths of pictures.
            model: What `InceptionScorer` takes; `editar-hf convert-metric-model fid-inception` writes it.
            device (`str`, *optional*): Where to compute.
        """
        scorer = scorers.InceptionScorer(model, device)
        features = [
            torch.cat([scorer(picture_metric.read_picture(path)) for path in paths])
            for paths in (predictions, references)
        ]
        return {"fid": distribution_metrics.compute_frechet_distance(*features), "num_samples": len(predictions)}
