"""The mean intersection over union of pictures and label maps, for `evaluate.load`."""

import editar_hf.evaluation.map_metrics as map_metrics
import editar_hf.evaluation.picture_metric as picture_metric
import editar_hf.evaluation.scorers as scorers


class MeanIoU(picture_metric.PictureMetric):
    """Compute the mean intersection over union of the classes seen in pictures and the true ones, over all pixels."""

    def _compute(
        self, predictions, references, model="facebook/maskformer-resnet101-coco-stuff", device=None, processor=None
    ):
        """Compute the mean over the classes that occur.

        Args:
            predictions (`list[str]`): Paths of pictures.
            references (`list[str]`): Paths of label maps, whose grey levels are classes and 255 is left out.
            model, processor: What `SegmentationScorer` takes.
            device (`str`, *optional*): Where to compute.
        """
        scorer = scorers.SegmentationScorer(model, device, processor)
        matrices = [
            scorer(picture_metric.read_picture(path), picture_metric.read_labels(labels))
            for path, labels in zip(predictions, references, strict=True)
        ]
        return {"mean_iou": map_metrics.compute_mean_iou(sum(matrices)), "num_samples": len(matrices)}
