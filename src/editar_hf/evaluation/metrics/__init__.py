"""The metrics for those who use `evaluate`: each file here is a metric that `evaluate.load(path)` loads, offline too.

```python
import evaluate
from editar_hf.evaluation.metrics import find_metric

metric = evaluate.load(find_metric("image_fidelity"))
metric.compute(predictions=["edited.png"], references=["source.png"])
```

Pictures are given as paths. The functions and scorers of `editar_hf.evaluation` do all that these do, and more.
"""

from pathlib import Path


def find_metric(name: str) -> str:
    """Find the file of a metric, for `evaluate.load`.

    Raises:
        ValueError: If there is none of that name.
    """
    files = {path.stem: path for path in Path(__file__).parent.glob("[!_]*.py")}
    if name not in files:
        raise ValueError(f"`name` is {name!r}; choose one of {', '.join(sorted(files))}.")
    return str(files[name])
