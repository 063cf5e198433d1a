"""The depth RMSE of pictures and condition maps, for `evaluate.load`."""

import editar_hf.evaluation.picture_metric as picture_metric
import editar_hf.evaluation.scorers as scorers


class DepthRMSE(picture_metric.PictureMetric):
    """Compute the mean depth RMSE, in [0, 255], of pictures and the depth maps they were made from."""

    def _compute(self, predictions, references, model="Intel/dpt-large", device=None, processor=None, variant="editar"):
        """Compute the mean.

        Args:
            predictions (`list[str]`): Paths of pictures.
            references (`list[str]`): Paths of depth maps.
            model, processor, variant: What `DepthScorer` takes.
            device (`str`, *optional*): Where to compute.
        """
        scorer, read = scorers.DepthScorer(model, device, processor, variant), picture_metric.read_picture
        return picture_metric.average(
            "depth_rmse", lambda a, b: scorer(read(a), read(b)[:, :1]), predictions, references
        )
