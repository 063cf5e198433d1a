"""The F1 score of canny edges, for `evaluate.load`."""

import editar_hf.evaluation.map_metrics as map_metrics
import editar_hf.evaluation.picture_metric as picture_metric


class EdgeF1(picture_metric.PictureMetric):
    """Compute the mean F1 score of the canny edges of pictures and references."""

    def _compute(self, predictions, references):
        """Compute the mean.

        Args:
            predictions, references (`list[str]`): Paths of pictures.
        """

        def score(prediction, reference):
            edges = [map_metrics.apply_canny(picture_metric.read_picture(path)) for path in (prediction, reference)]
            return map_metrics.compute_edge_f1(*edges)

        return picture_metric.average("edge_f1", score, predictions, references)
