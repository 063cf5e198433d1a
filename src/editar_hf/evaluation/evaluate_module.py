"""All metrics as one module for the library `evaluate`. `evaluate.load` loads it from its path, without a network.

```python
import evaluate
from editar_hf.evaluation import METRIC_PATH

metric = evaluate.load(METRIC_PATH)
metric.compute(predictions=["edited.png"], references=["source.png"], metric="structure_distance")
```
"""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import PIL.Image

import editar_hf.checks as checks
import editar_hf.evaluation.benchmarks as benchmarks
import editar_hf.evaluation.features as features
import editar_hf.evaluation.run as run
import editar_hf.evaluation.table as table


def read_gray(path: str) -> PIL.Image.Image:
    """Read a mask or a label map."""
    with PIL.Image.open(path) as image:
        return image.convert("L")


# Kind of a reference → function that reads it.
READERS: dict[str, Callable] = {
    "source_image": benchmarks.open_image,
    "target_image": benchmarks.open_image,
    "target_prompt": str,
    "labels": read_gray,
}


class EditMetric(evaluate.Metric):
    """Compute any metric of `editar_hf.evaluation` that compares a prediction with one reference."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=datasets.Features(columns),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        metric: str,
        masks: list[str] | None = None,
        protocol: str = "editar",
        model: Any = None,
        device: str | None = None,
    ) -> dict[str, float]:
        """Compute the mean over all pairs for which the metric is defined.

        Args:
            predictions (`list[str]`): Paths of images.
            references (`list[str]`): The references of the metric: paths of source images, target images, condition
                maps or label maps, or prompts for CLIP.
            metric (`str`): A key of `table.METRICS`.
            masks (`list[str]`, *optional*): Paths of masks, white inside the edit. Metrics of the unedited part need
                them.
            protocol (`str`, *optional*, defaults to `"editar"`): A key of `table.PROTOCOLS`.
            model (`str` or `Network`, *optional*): The network of the metric; defaults to the published one.
            device (`str`, *optional*): Device of the network.

        Returns:
            The unscaled mean under the name of the metric, and `num_samples`.
        """
        checks.check_choice("metric", metric, table.METRICS)
        checks.check_choice("protocol", protocol, table.PROTOCOLS)
        spec, networks = table.METRICS[metric], {}
        if spec.model:
            is_loaded = isinstance(model, features.Network)
            networks[spec.model] = model if is_loaded else features.load_network(spec.model, model, device)
        field = next((name for name in spec.needs if name in READERS), "source_image")
        found = []
        for index, (path, reference) in enumerate(zip(predictions, references, strict=True)):
            prediction = benchmarks.open_image(path)
            mask = read_gray(masks[index]) if masks else None
            values: dict[str, Any] = {"source_image": prediction, "mask": mask, field: READERS[field](reference)}
            pair = table.Pair(prediction, benchmarks.Sample("", "", **values), table.PROTOCOLS[protocol])
            found.append(spec.measure(pair, networks))
        figure = run.summarize_metric(metric, found)
        return {metric: run.decode_number(figure["mean"]), "num_samples": figure["n"]}
