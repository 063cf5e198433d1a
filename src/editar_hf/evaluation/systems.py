"""The systems that make predictions: EditAR, any command line, and two baselines.

`SYSTEMS` maps names to functions that build a `System` from its options. The scripts in `examples/baselines/` run other
editors, from diffusers.
"""

import inspect
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image

from ..checks import check_choice
from ..pipelines.hub import check_folder_or_hub_id
from .benchmarks import Sample, open_image
from .processes import get_process


DTYPES = ("float32", "bfloat16", "float16")
# Options whose values are folders or Hub ids.
MODEL_OPTIONS = ("model", "lora", "controlnet")
Edit = Callable[[list[Sample], list[int]], list[Image.Image]]


@dataclass
class System:
    """A system that makes predictions.

    Args:
        name (`str`): The name of the system in configurations and reports.
        load (`Callable`): Loads the system, and returns a function that maps samples and their seeds to predictions.
            Each prediction has the size of its source image.
        options (`dict`): All options that the results depend on. Those in `MODEL_OPTIONS` are folders or Hub ids.
        needs (`str`, *optional*): The field of `Sample` with an image that every sample must have, such as `"mask"`.
    """

    name: str
    load: Callable[[], Edit]
    options: dict = field(default_factory=dict)
    needs: str | None = None

    def __post_init__(self) -> None:
        for option in MODEL_OPTIONS:
            if (model := self.options.get(option)) is not None:
                check_folder_or_hub_id(model, option)

    def describe(self) -> dict:
        """Return the name and the options, with absolute paths of folders and commits of Hub ids."""
        options = dict(self.options)
        for option in MODEL_OPTIONS:
            if (model := self.options.get(option)) is not None:
                options[option] = str(Path(model).resolve()) if Path(model).exists() else str(model)
                options[f"{option}_commit"] = find_commit(model)
        return {"system": self.name, **options}


def find_commit(model: str | Path) -> str | None:
    """Find the commit of a Hub id. Return `None` for a folder or file."""
    if Path(model).exists():
        return None
    # The last part of the path of a snapshot is its commit. To find it, only small files are downloaded.
    return Path(snapshot_download(str(model), allow_patterns=["*.json"])).name


def build_system(name: str, **options: Any) -> System:
    """Build a system from its name and its options. Options that are `None` are ignored.

    Raises:
        ValueError: If the name is unknown, or an option is unknown, missing or out of range, or a folder is missing.
    """
    check_choice("system", name, SYSTEMS)
    given = {option: value for option, value in options.items() if value is not None}
    try:
        inspect.signature(SYSTEMS[name]).bind(**given)
    except TypeError as error:
        raise ValueError(f"`system` {name}: {error}.") from error
    return SYSTEMS[name](**given)


def make_generators(seeds: list[int]) -> list[torch.Generator]:
    """Make a generator for each seed. The generators are on the CPU, so they draw the same numbers for every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def edit_batch(pipe: Callable, samples: list[Sample], seeds: list[int], **options: Any) -> list[Image.Image]:
    """Edit a batch with a diffusers pipeline, and resize each result to the size of its source image."""
    prompts, sources = zip(*((sample.prompt, sample.source_image) for sample in samples), strict=True)
    images = pipe(list(prompts), image=list(sources), generator=make_generators(seeds), **options).images
    return [fit(image, source.size) for image, source in zip(images, sources, strict=True)]


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image unless it already has the size."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def copy_source() -> System:
    """A baseline that returns the source image unchanged."""
    return System("copy-source", lambda: lambda samples, seeds: [sample.source_image for sample in samples])


def vq_reconstruction(model: str, reconstruct: str = "source") -> System:
    """A baseline that encodes and decodes an image with the VQ model of a pipeline.

    An editor should score higher than the reconstruction of the source image. It can hardly score higher than the
    reconstruction of the target image.
    """
    check_choice("reconstruct", reconstruct, ("source", "target"))

    def load() -> Edit:
        from ..pipelines.pipeline_editar import EditARPipeline

        pipeline = EditARPipeline.from_pretrained(model, dtype=torch.float32, text_encoder=None)
        pipeline.to(get_process().device)

        def reconstruct_image(image: Image.Image) -> Image.Image:
            size, resize_mode = pipeline.plan_size([image])
            tokens = pipeline.encode_image(image, *size, resize_mode)
            decoded = pipeline.decode_image_tokens(tokens, *size)[0]
            return pipeline.processor.image_processor.restore(decoded, image, resize_mode)

        return lambda samples, seeds: [reconstruct_image(getattr(sample, f"{reconstruct}_image")) for sample in samples]

    return System("vq-reconstruction", load, {"model": model, "reconstruct": reconstruct}, needs=f"{reconstruct}_image")


def editar(
    model: str,
    lora: str | None = None,
    use_masks: bool = False,
    preserve: str | None = None,
    dtype: str = "float32",
    quantize: str = "round",
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> System:
    """EditAR.

    Args:
        model (`str`): Folder or Hub id of a pipeline.
        lora (`str`, *optional*): Folder or Hub id of an adapter.
        use_masks (`bool`, *optional*, defaults to `False`): Pass the masks of the benchmark to the pipeline. Reports
            call this run mask-assisted.
        preserve (`str`, *optional*): `"auto"` keeps what the instruction does not change, without the masks. Reports
            say so beside the name of the run. Defaults to `"off"`.
        dtype (`str`, *optional*, defaults to `"float32"`): `"float32"`, `"bfloat16"` (published) or `"float16"`.
        quantize (`str`, *optional*, defaults to `"round"`): How pixels are converted to 8 bits: `"round"`, or
            `"truncate"` as in the reference, which needs `use_masks` and `preserve` off.
        guidance_scale, image_guidance_scale, do_sample, temperature, top_k, top_p (*optional*): Arguments of the
            pipeline.
    """
    options = dict(locals())
    check_choice("dtype", dtype, DTYPES)
    check_choice("quantize", quantize, ("round", "truncate"))
    if preserve is not None:
        check_choice("preserve", preserve, ("off", "auto"))
    if preserve == "auto" and use_masks:
        raise ValueError("`preserve` is 'auto' and `use_masks` is True; the masks say what may change: leave one out.")
    if quantize == "truncate" and (use_masks or preserve == "auto"):
        kept_by = "`use_masks` is True" if use_masks else "`preserve` is 'auto'"
        raise ValueError(
            f"`quantize` is 'truncate', which also changes pixels of the source, but {kept_by}, which keeps such "
            "pixels; leave one out."
        )
    others = ("model", "lora", "use_masks", "preserve", "dtype", "quantize")
    knobs = {name: value for name, value in options.items() if name not in others}

    def load() -> Edit:
        from ..pipelines.pipeline_editar import EditARPipeline

        pipeline = EditARPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
        if lora is not None:
            pipeline.load_lora_weights(lora)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(get_process().device)

        def edit(samples: list[Sample], seeds: list[int]) -> list[Image.Image]:
            plans = [pipeline.plan_size([sample.source_image]) for sample in samples]
            results: dict[int, Image.Image] = {}
            # A call has one size.
            for plan in dict.fromkeys(plans):
                places = [place for place, other in enumerate(plans) if other == plan]
                batch = edit_same_size(
                    [samples[place] for place in places], [seeds[place] for place in places], plan[1]
                )
                results |= dict(zip(places, batch, strict=True))
            return [results[place] for place in range(len(samples))]

        def edit_same_size(samples: list[Sample], seeds: list[int], resize_mode: str) -> list[Image.Image]:
            inputs: dict[str, Any] = {"image": [sample.source_image for sample in samples], **knobs}
            inputs["preserve"] = preserve or "off"
            if use_masks:
                inputs["mask_image"] = [sample.mask for sample in samples]
            prompts, inputs["task"] = [sample.prompt for sample in samples], [sample.task for sample in samples]
            inputs["generator"] = make_generators(seeds)
            if quantize == "round":
                return pipeline(prompts, **inputs, restore_size=True)[0]
            pixels = pipeline(prompts, **inputs, output_type="pt")[0].float().cpu().clamp(0, 1)
            images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in (255 * pixels).floor().to(torch.uint8)]
            restore = pipeline.processor.image_processor.restore
            return [restore(*pair, resize_mode) for pair in zip(images, inputs["image"], strict=True)]

        return edit

    return System("editar", load, options, needs="mask" if use_masks else None)


def command(command: str) -> System:
    """Any system with a command line. The command is called once for each sample.

    Args:
        command (`str`): A command such as `python edit.py {image} {prompt} {output}`. It may also use `{seed}`,
            `{task}` and `{mask}`. It must write the PNG file `{output}`, which is resized to the size of the source
            image.
    """
    if "{output}" not in command or "{image}" not in command:
        raise ValueError(
            f"`command` is {command!r}; it must contain {{image}} and {{output}}, as in "
            "python edit.py {image} {prompt} {output}."
        )

    def edit_one(sample: Sample, seed: int) -> Image.Image:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: str(Path(folder) / f"{name}.png") for name in ("image", "mask", "output")}
            sample.source_image.save(files["image"])
            if sample.mask is not None:
                sample.mask.save(files["mask"])
            words = {"prompt": sample.prompt, "seed": str(seed), "task": sample.task, **files}
            subprocess.run([word.format_map(words) for word in shlex.split(command)], check=True)
            return fit(open_image(Path(files["output"])), sample.source_image.size)

    def edit(samples: list[Sample], seeds: list[int]) -> list[Image.Image]:
        return [edit_one(sample, seed) for sample, seed in zip(samples, seeds, strict=True)]

    return System("command", lambda: edit, {"command": command})


SYSTEMS: dict[str, Callable[..., System]] = {
    "editar": editar,
    "copy-source": copy_source,
    "vq-reconstruction": vq_reconstruction,
    "command": command,
}
