"""Turn what train.py left into the folder that is shipped: parts joined, and defaults for sampling chosen.

    python projects/scenes/ship.py --parts runs/scenes --bank bank --output-dir examples/scene-editor \
        --guidance-scale 1.5 --temperature 0.3

The editor was trained at several aspect ratios, so by default it edits an image at the image's own. The bank's
`ATTRIBUTION.md` goes along: the weights have seen nothing but its objects and photographs.
"""

import io
import shutil
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from editar_hf import EditARPipeline


@dataclass
class Arguments:
    parts: Path = field(metadata={"help": "folder with `pipeline.tar.0`, `pipeline.tar.1` …"})
    bank: Path = field(metadata={"help": "folder that build_bank.py wrote"})
    output_dir: Path
    guidance_scale: float = 1.5
    do_sample: bool = True
    temperature: float = 0.3


def unpack_pipeline(parts: Path, folder: Path) -> Path:
    """Join the parts of a packed pipeline and unpack them into `folder`; return the pipeline's folder.

    Raises:
        ValueError: If there are no parts, or some are missing.
    """
    paths = sorted(parts.glob("pipeline.tar.*"), key=lambda path: int(path.suffix[1:]))
    if not paths or [int(path.suffix[1:]) for path in paths] != list(range(len(paths))):
        names = [path.name for path in paths]
        raise ValueError(f"`parts` {str(parts)!r} holds {names}; give the folder that train.py wrote, whole.")
    content = io.BytesIO(b"".join(path.read_bytes() for path in paths))
    with tarfile.open(fileobj=content) as archive:
        archive.extractall(folder, filter="data")
    return folder / "pipeline"


def main(arguments=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = EditARPipeline.from_pretrained(unpack_pipeline(args.parts, Path(folder)), dtype=torch.bfloat16)
    for name in ("guidance_scale", "do_sample", "temperature"):
        setattr(pipeline.transformer.generation_config, name, getattr(args, name))
    pipeline.processor.image_processor.aspect = "source"
    # Where the weights lay is nobody's business.
    pipeline.register_to_config(_name_or_path="scene-editor")
    pipeline.save_pretrained(args.output_dir, max_shard_size="14MB")
    shutil.copy(args.bank / "ATTRIBUTION.md", args.output_dir)


if __name__ == "__main__":
    main()
