"""L1, MSE, PSNR and SSIM of pictures, for `evaluate.load`."""

import editar_hf.evaluation.image_metrics as image_metrics
import editar_hf.evaluation.picture_metric as picture_metric
import editar_hf.evaluation.protocols as protocols


class ImageFidelity(picture_metric.PictureMetric):
    """Compute L1, MSE, PSNR and SSIM of pictures and references; MSE, PSNR and SSIM of what a mask spares."""

    def _compute(self, predictions, references, masks=None, protocol="editar"):
        """Compute the means.

        Args:
            predictions, references (`list[str]`): Paths of pictures.
            masks (`list[str]`, *optional*): Paths of masks, white where edited.
            protocol (`str`): A name of `protocols.PROTOCOLS`.
        """
        switches = protocols.get_protocol(protocol)
        columns = [predictions, references, [None] * len(predictions) if masks is None else masks]
        average, mean = picture_metric.average, {"masked_mean": switches.masked_mean}
        return {
            **average("l1", score(image_metrics.compute_l1), predictions, references),
            **average("mse", score(image_metrics.compute_mse, **mean), *columns),
            **average("psnr", score(image_metrics.compute_psnr, **mean), *columns),
            **average("ssim", score(image_metrics.compute_ssim, border=switches.ssim_border, **mean), *columns),
        }


def score(compute, **switches):
    """Make a metric of tensors one of paths."""

    def score_paths(prediction, reference, mask=None):
        pair = [picture_metric.read_picture(path) for path in (prediction, reference)]
        masks = [] if mask is None else [picture_metric.read_mask(mask)]
        return compute(*pair, *masks, **switches)

    return score_paths
