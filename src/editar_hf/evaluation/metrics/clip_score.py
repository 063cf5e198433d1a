"""The CLIP score of pictures and prompts, for `evaluate.load`."""

import editar_hf.evaluation.picture_metric as picture_metric
import editar_hf.evaluation.scorers as scorers


class CLIPScore(picture_metric.PictureMetric):
    """Compute the mean CLIP score, in [0, 100], of pictures and prompts."""

    def _compute(self, predictions, references, model="openai/clip-vit-large-patch14", device=None, processor=None):
        """Compute the mean.

        Args:
            predictions (`list[str]`): Paths of pictures.
            references (`list[str]`): Their prompts.
            model, processor: What `CLIPScorer` takes.
            device (`str`, *optional*): Where to compute.
        """
        scorer, read = scorers.CLIPScorer(model, device, processor), picture_metric.read_picture
        return picture_metric.average(
            "clip_score", lambda path, prompt: scorer(read(path), [prompt]), predictions, references
        )
