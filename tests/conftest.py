"""What every test stands on: one thread unless told otherwise, no network, and a Hub cache that is nobody's.

The environment is set before anything imports torch or huggingface_hub, which read it once.
"""

import os
import tempfile


_hub_home = tempfile.TemporaryDirectory(prefix="editar-hf-tests-")

for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_"))]:
    del os.environ[_name]  # A user's token, endpoint or cache would decide what the tests see.
os.environ.update(
    HF_HOME=_hub_home.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    TOKENIZERS_PARALLELISM="false",
)

import torch  # noqa: E402


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# After the environment is set: fixtures of several files.
pytest_plugins = ["scripts", "scenes_bank"]
