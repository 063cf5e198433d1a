"""The handler of Hugging Face Inference Endpoints: a dictionary with a base64 image in, and such a dictionary out.

The file `handler.py` of a pipeline folder imports `EndpointHandler`.
"""

import base64
import secrets
import threading
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from ..checks import check_integer, check_number
from ..pipelines.pipeline_editar import EditARPipeline
from ..processing_editar import TEXT_TO_IMAGE
from . import MAX_PIXELS


TEXTS = ("prompt", "negative_prompt", "task", "preserve", "detail")
PARAMETERS = (*TEXTS, "guidance_scale", "seed", "mask", "target_size")


class EndpointHandler:
    """Load a pipeline, and edit one image for each request.

    Args:
        path (`str`): The pipeline folder. It is loaded on the GPU if there is one.
    """

    def __init__(self, path: str = "") -> None:
        self.pipeline = EditARPipeline.from_pretrained(path)
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
        # An endpoint may call its handler from several threads, but a pipeline runs one call at a time.
        self.lock = threading.Lock()

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Edit an image, or make an image from text.

        Args:
            data (`dict`): `inputs`, an image file in base64 (left out for the task `"text-to-image"`), and
                `parameters`, a dictionary of: `prompt` (required), `negative_prompt`, `guidance_scale`, `seed`, `mask`
                (an image file in base64, white where the image may change), `task`, `preserve`, `detail`, and
                `target_size`, a dictionary of `height` and `width` in pixels. The result has the target size; without
                one, an edit has the size of the image. Without a seed, each request gets a random one. For the others
                see `EditARPipeline.__call__`.

        Returns:
            `dict`: `image`, a PNG file in base64, and `seed`, which gives the same image again. With `preserve="auto"`,
            also `preserved`: False if the whole image may have changed.

        Raises:
            ValueError: If the request is wrong. The endpoint answers with status 400 and this message.
        """
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict) or (unknown := sorted(parameters.keys() - set(PARAMETERS))):
            wrong = ", ".join(unknown) if isinstance(parameters, dict) else repr(parameters)[:80]
            raise ValueError(f"`parameters` holds {wrong}; pass a dictionary of some of {', '.join(PARAMETERS)}.")
        call = {name: parameters[name] for name in TEXTS if name in parameters}
        for name, text in call.items():
            if not isinstance(text, str):
                raise ValueError(f"`{name}` is {text!r:.80}; pass a string.")
        if "prompt" not in call:
            raise ValueError("`prompt` is missing; pass it in `parameters`.")
        if data.get("inputs") is None and call.get("task") != TEXT_TO_IMAGE:
            raise ValueError(f"`inputs` is missing; pass an image file in base64, or the task {TEXT_TO_IMAGE!r}.")
        if parameters.get("guidance_scale") is not None:
            call["guidance_scale"] = check_number("guidance_scale", parameters["guidance_scale"])
        for name, content in (("image", data.get("inputs")), ("mask_image", parameters.get("mask"))):
            if content is not None:
                call[name] = decode_image("inputs" if name == "image" else "mask", content)
        if (size := parameters.get("target_size")) is not None:
            if not isinstance(size, dict) or size.keys() != {"height", "width"}:
                raise ValueError(f"`target_size` is {size!r:.80}; pass a dictionary of `height` and `width` in pixels.")
            for name, side in size.items():
                call[name] = check_integer(f"target_size.{name}", side)
            if call["height"] * call["width"] > MAX_PIXELS:
                raise ValueError(f"`target_size` is {size}; pass at most {MAX_PIXELS} pixels.")
        for name, value, other in (("preserve", "auto", "mask"), ("detail", "source", "target_size")):
            if call.get(name) == value and parameters.get(other) is not None:
                raise ValueError(f"`{name}` is {value!r} and `{other}` is given; leave one of them out.")
        seed = parameters.get("seed")
        seed = secrets.randbits(32) if seed is None else check_integer("seed", seed, 0, 2**63 - 1)
        generator = torch.Generator().manual_seed(seed)
        with self.lock:
            output: Any = self.pipeline(**call, generator=generator, size_policy="fit")
        file = BytesIO()
        output.images[0].save(file, "PNG")
        answer = {"image": base64.b64encode(file.getvalue()).decode(), "seed": seed}
        if output.preserved_mask is not None:
            answer["preserved"] = output.preserved_mask[0] is not None
        return answer


def decode_image(name: str, content: Any) -> Image.Image:
    """Read an image file in base64. Never open a path or URL: the text is from a client.

    Args:
        name (`str`): Name of the field, for messages.
        content: The text.

    Raises:
        ValueError: If the text is not base64, the file is not an image, or the image has too many pixels.
    """
    try:
        image = Image.open(BytesIO(base64.b64decode(content, validate=True)))
    except (TypeError, ValueError, OSError, Image.DecompressionBombError) as error:  # ValueError: not base64
        raise ValueError(f"`{name}` is {content!r:.80}; pass an image file in base64 ({error}).") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"`{name}` is {image.width}×{image.height}; pass an image of at most {MAX_PIXELS} pixels.")
    return image
