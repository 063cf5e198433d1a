"""The systems that are compared: EditAR, diffusers' editors, and two floors, behind one interface.

A system is a dataclass whose fields are its options. `describe()` says all that its results depend on, before anything
is loaded; `load()` loads it; `edit(samples, seeds)` makes a picture for each sample, of the size of its source.
"""

from abc import ABC, abstractmethod
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from ..pipelines.hub import check_folder_or_hub_id
from .image_metrics import quantize_pixels
from .models import find_revision
from .processes import get_process
from .samples import Sample


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class System(ABC):
    """What every system has.

    Attributes:
        name (`str`): What it is called on the command line.
        model_fields (tuple of `str`): The options that name models, whose revisions are described too.
        needs (dict): Pictures that every sample must have, by the option that asks for them.
    """

    name: ClassVar[str]
    model_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> dict[str, str]:
        return {}

    def describe(self) -> dict:
        """Say what the results depend on: the options, and the revisions of the models they name."""
        models = {name: getattr(self, name) for name in self.model_fields}
        revisions = {name: find_revision(model) for name, model in models.items() if model is not None}
        return {"name": self.name, **asdict(self), "revisions": revisions}

    def load(self) -> None:  # noqa: B027 (a floor has nothing to load)
        """Load what `edit` needs onto this process's device."""

    @abstractmethod
    def edit(self, samples: list[Sample], seeds: list[int]) -> list[Image.Image]:
        """Make the pictures of samples, each with its own seed."""


@dataclass
class CopySource(System):
    """The floor of every editor: the source, untouched."""

    name: ClassVar[str] = "copy-source"

    def edit(self, samples: list[Sample], seeds: list[int]) -> list[Image.Image]:
        return [sample.source_image for sample in samples]


@dataclass
class VQReconstruction(System):
    """What EditAR's tokenizer makes of a picture: of the source, a floor; of the true result, a ceiling.

    Args:
        model (`str`): The pipeline whose tokenizer it is.
        reconstruct (`str`): `"source"` or `"target"`.
    """

    name: ClassVar[str] = "vq-reconstruction"
    model_fields: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    reconstruct: str = "source"

    def __post_init__(self):
        if self.reconstruct not in ("source", "target"):
            raise ValueError(f"`reconstruct` is {self.reconstruct!r}; choose source or target.")

    @property
    def needs(self) -> dict[str, str]:
        return {"reconstruct": f"{self.reconstruct}_image"}

    def load(self) -> None:
        from ..pipelines.pipeline_editar import EditARPipeline

        self.pipeline = EditARPipeline.from_pretrained(self.model, dtype=torch.float32, text_encoder=None)
        self.pipeline.to(get_process().device)

    def edit(self, samples: list[Sample], seeds: list[int]) -> list[Image.Image]:
        pictures = [getattr(sample, f"{self.reconstruct}_image") for sample in samples]
        reconstructed = self.pipeline.decode_image_tokens(self.pipeline.encode_image(pictures), output_type="pt")
        return restore_pictures(self.pipeline, reconstructed, pictures, "round")


@dataclass
class EditAR(System):
    """EditAR.

    Args:
        model (`str`): A pipeline's folder or Hub id.
        lora (`str`, *optional*): Folder or Hub id of an adapter.
        use_masks (`bool`): Whether it is given the benchmark's own masks. Such a run is no instruction-based editing:
            reports call it mask-assisted, not comparable.
        guidance_scale, image_guidance_scale, do_sample, temperature, top_k, top_p (*optional*): As of the pipeline.
        dtype (`str`): `"float32"`, `"bfloat16"` (published) or `"float16"`.
        quantize (`str`): `"round"`, or as the reference's arrays, `"truncate"`: how pixels become 8 bits.
    """

    name: ClassVar[str] = "editar"
    model_fields: ClassVar[tuple[str, ...]] = ("model", "lora")

    model: str
    lora: str | None = None
    use_masks: bool = False
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    dtype: str = "float32"
    quantize: str = "round"

    def __post_init__(self):
        check_dtype(self.dtype)
        if self.quantize not in ("round", "truncate"):
            raise ValueError(f"`quantize` is {self.quantize!r}; choose round or truncate.")

    @property
    def needs(self) -> dict[str, str]:
        return {"use_masks": "mask"} if self.use_masks else {}

    def load(self) -> None:
        from ..pipelines.pipeline_editar import EditARPipeline

        self.pipeline = EditARPipeline.from_pretrained(self.model, dtype=getattr(torch, self.dtype))
        if self.lora is not None:
            self.pipeline.load_lora_weights(self.lora)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(get_process().device)

    def edit(self, samples: list[Sample], seeds: list[int]) -> list[Image.Image]:
        sources = [sample.source_image for sample in samples]
        knobs = ("guidance_scale", "image_guidance_scale", "do_sample", "temperature", "top_k", "top_p")
        masks = {"mask_image": [sample.mask for sample in samples]} if self.use_masks else {}
        pixels = self.pipeline(
            [sample.prompt for sample in samples],
            image=sources,
            task=[sample.task for sample in samples],
            generator=make_generators(seeds),
            output_type="pt",
            **{knob: getattr(self, knob) for knob in knobs},
            **masks,
        ).images
        return restore_pictures(self.pipeline, pixels, sources, self.quantize)


@dataclass
class InstructPix2Pix(System):
    """diffusers' InstructPix2Pix, with its published settings; its safety checker, which blackens, is left out.

    Args:
        model (`str`): Folder or Hub id.
        num_inference_steps (`int`), guidance_scale, image_guidance_scale (`float`): As of diffusers' pipeline.
        dtype (`str`): `"float32"`, `"bfloat16"` or `"float16"`.

    Source: InstructPix2Pix (arXiv 2211.09800), its published settings.
    """

    name: ClassVar[str] = "instruct-pix2pix"
    model_fields: ClassVar[tuple[str, ...]] = ("model",)

    model: str = "timbrooks/instruct-pix2pix"
    num_inference_steps: int = 100
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    dtype: str = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)

    def load(self) -> None:
        from diffusers import StableDiffusionInstructPix2PixPipeline

        self.pipeline = load_diffusers(StableDiffusionInstructPix2PixPipeline, self.model, self.dtype)

    def edit(self, samples: list[Sample], seeds: list[int]) -> list[Image.Image]:
        knobs = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
        images = self.pipeline(
            [sample.prompt for sample in samples],
            image=[sample.source_image for sample in samples],
            generator=make_generators(seeds),
            **{knob: getattr(self, knob) for knob in knobs},
        ).images
        return resize_pictures(images, samples)


@dataclass
class ControlNet(System):
    """A ControlNet of diffusers, or of ControlNet++: one for each condition.

    Args:
        controlnet (`str`): Folder or Hub id of the ControlNet.
        model (`str`): The Stable Diffusion it belongs to.
        num_inference_steps (`int`), guidance_scale (`float`): As of diffusers' pipeline.
        dtype (`str`): `"float32"`, `"bfloat16"` or `"float16"`.
    """

    name: ClassVar[str] = "controlnet"
    model_fields: ClassVar[tuple[str, ...]] = ("model", "controlnet")

    controlnet: str
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    dtype: str = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)

    def load(self) -> None:
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

        controlnet = ControlNetModel.from_pretrained(self.controlnet, dtype=getattr(torch, self.dtype))
        self.pipeline = load_diffusers(StableDiffusionControlNetPipeline, self.model, self.dtype, controlnet=controlnet)

    def edit(self, samples: list[Sample], seeds: list[int]) -> list[Image.Image]:
        images = self.pipeline(
            [sample.prompt for sample in samples],
            image=[sample.source_image for sample in samples],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=make_generators(seeds),
        ).images
        return resize_pictures(images, samples)


SYSTEMS = {system.name: system for system in (EditAR, InstructPix2Pix, ControlNet, CopySource, VQReconstruction)}


def build_system(name: str, **options) -> System:
    """Build a system from its name and those options that are not `None`.

    Raises:
        ValueError: If there is none of that name, or an option is not its own, is missing or out of range, or names a
            folder that is missing.
    """
    if name not in SYSTEMS:
        raise ValueError(f"`system` is {name!r}; choose one of {', '.join(SYSTEMS)}.")
    given = {option: value for option, value in options.items() if value is not None}
    known = {field.name: field for field in fields(SYSTEMS[name])}
    if unknown := [option for option in given if option not in known]:
        raise ValueError(f"`{unknown[0]}` is {given[unknown[0]]!r}; the system {name} has no such option.")
    if missing := [option for option, field in known.items() if field.default is MISSING and option not in given]:
        raise ValueError(f"`{missing[0]}` is missing; the system {name} needs it, a folder or Hub id.")
    system = SYSTEMS[name](**given)
    for option in system.model_fields:
        if (model := getattr(system, option)) is not None:
            check_folder_or_hub_id(model, option)
    return system


def check_dtype(dtype: str) -> None:
    """Refuse a number type that no system runs in."""
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}; choose one of {', '.join(DTYPES)}.")


def make_generators(seeds: list[int]) -> list[torch.Generator]:
    """Make a generator for each seed, on the CPU: its draws are the same wherever the system runs."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def load_diffusers(pipeline_class, model: str | Path, dtype: str, **components):
    """Load a Stable Diffusion pipeline without its safety checker onto this process's device."""
    pipeline = pipeline_class.from_pretrained(
        model,
        dtype=getattr(torch, dtype),
        safety_checker=None,
        requires_safety_checker=False,
        **components,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(get_process().device)


def restore_pictures(pipeline, pixels: torch.Tensor, sources: list[Image.Image], quantize: str) -> list[Image.Image]:
    """Bring an EditAR pipeline's pixels (batch, 3, height, width) in [0, 1] to pictures of their sources' sizes."""
    steps = (quantize_pixels(pixels.float().cpu(), quantize) * 255).round().to(torch.uint8)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in steps]
    image_processor, (height, width) = pipeline.processor.image_processor, pixels.shape[2:]
    return [
        image_processor.restore(image, source, height, width, image_processor.resize_mode)
        for image, source in zip(images, sources, strict=True)
    ]


def resize_pictures(images: list[Image.Image], samples: list[Sample]) -> list[Image.Image]:
    """Bring pictures of a diffusers pipeline, whose sides are multiples of 8, to their sources' sizes."""
    sizes = [sample.source_image.size for sample in samples]
    return [
        image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
        for image, size in zip(images, sizes, strict=True)
    ]
