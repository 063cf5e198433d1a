"""Read the requests of the HTTP API: fields, images, limits and errors.

The fields are those of OpenAI's image API, and `seed`, `guidance_scale`, `negative_prompt`, `task`, `preserve`,
`detail` and `lora`. A field that the server cannot honor is refused by its name.
"""

import json
import math
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any, Literal, TypeVar

from fastapi import Request
from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from ..image_processing_editar import MAX_SILENT_CUT, compute_crop_geometry, prepare_rgb_image
from ..io import SAVE_OPTIONS
from . import MAX_PIXELS


MAX_BODY_BYTES = 32 * 2**20
# The model reads about 120 tokens. This limit protects the tokenizer; `app.py` checks the number of tokens.
MAX_PROMPT_LENGTH = 4_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


class RequestError(Exception):
    """An error that the client gets.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What is wrong, and what to do.
        param (`str`, *optional*): The field that is wrong.
        code (`str`, *optional*): A word for programs.
        retry_after (`int`, *optional*): Seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def to_dict(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ImageFields(BaseModel):
    """The fields of a request for images from text."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(
        min_length=1, max_length=MAX_PROMPT_LENGTH, pattern=r"\S", description="text that is not only white space"
    )
    model: str | None = None
    n: int = Field(1, ge=1, le=10)
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,3}x[1-9]\d{0,3})$", description='"auto" or "WIDTHxHEIGHT"')
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of webp and jpeg")
    seed: int | None = Field(None, ge=0, le=2**63 - 11, description="image k of n has the seed `seed + k`")
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    negative_prompt: str | None = Field(None, min_length=1, max_length=MAX_PROMPT_LENGTH)
    lora: str | None = Field(None, description="name of an adapter of the server")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="previews before the image, with `stream`")
    user: str | None = Field(None, description="accepted and not used")
    # The server has one choice for each of these, which some clients send explicitly.
    quality: Literal["auto"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    response_format: Literal["b64_json"] = "b64_json"

    @property
    def size_in_pixels(self) -> tuple[int | None, int | None]:
        """Height and width in pixels, or None twice for `auto`."""
        if self.size == "auto":
            return None, None
        width, height = map(int, self.size.split("x"))
        return height, width


class EditFields(ImageFields):
    """The fields of a request for edits, except the files `image` and `mask`."""

    task: Literal["edit", "canny", "depth", "segmentation"] = "edit"
    preserve: Literal["off", "auto"] = "off"
    detail: Literal["model", "source"] = "model"


Fields = TypeVar("Fields", bound=ImageFields)


def parse_fields(kind: type[Fields], values: dict[str, Any]) -> Fields:
    """Check the fields of a request.

    Raises:
        RequestError: With status 400 and the name of the first field that cannot be used.
    """
    try:
        fields = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise RequestError(
                400, f"`{name:.80}` is not supported; leave it out.", name, "unknown_parameter"
            ) from None
        if first["type"] == "missing":
            raise RequestError(400, f"`{name}` is missing.", name, "missing_required_parameter") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] == "string_pattern_mismatch":
            message = f"send {kind.model_fields[name].description}"
        raise RequestError(400, f"`{name}` is {first['input']!r:.80}: {message}.", name, "invalid_value") from None
    if fields.output_compression is not None and fields.output_format == "png":
        raise RequestError(
            400,
            "`output_compression` is for webp and jpeg, but `output_format` is png; leave one of them out.",
            "output_compression",
            "invalid_value",
        )
    if fields.size != "auto" and math.prod(map(int, fields.size.split("x"))) > MAX_PIXELS:
        message = f"`size` is {fields.size}; ask for at most {MAX_PIXELS} pixels."
        raise RequestError(400, message, "size", "invalid_value")
    if fields.stream and fields.n > 1:
        raise RequestError(400, f"`n` is {fields.n}; with `stream`, ask for one image.", "n", "invalid_value")
    if fields.partial_images and not fields.stream:
        message = f"`partial_images` is {fields.partial_images}; it needs `stream`."
        raise RequestError(400, message, "partial_images", "invalid_value")
    return fields


def limit_body(request: Request) -> Request:
    """Return the request with a limit on its body, which holds whatever length the client announces.

    Raises:
        RequestError: With status 413, now or while the body is read.
    """
    error = RequestError(413, f"The request is larger than {MAX_BODY_BYTES} bytes; send smaller images.")
    receive: Callable[[], Awaitable[Any]] = request.receive
    num_bytes = 0

    async def receive_limited() -> Any:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise error
        return message

    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise error
    return Request(request.scope, receive_limited)


async def read_json(request: Request) -> ImageFields:
    """Read a request for images from text.

    Raises:
        RequestError: If the body is not a JSON object, or a field cannot be used.
    """
    body = await limit_body(request).body()
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RequestError(400, "The body is not a JSON object.")
    return parse_fields(ImageFields, {name: value for name, value in values.items() if value is not None})


async def read_form(request: Request) -> tuple[EditFields, bytes, bytes | None]:
    """Read a request for edits: its fields, the image file, and the mask file if there is one.

    Raises:
        RequestError: If the body is no such form, or a field cannot be used.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError(400, "The body is not a form; send it as multipart/form-data.")
    async with limit_body(request).form(max_files=4, max_fields=40, max_part_size=2**16) as form:
        values: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            is_image = name in ("image", "mask")
            if is_image != isinstance(value, UploadFile):
                kind, remedy = ("text", "upload the file itself") if is_image else ("a file", "send text")
                raise RequestError(400, f"`{name:.80}` is {kind}; {remedy}.", name, "invalid_value")
            if name in values or name in files:
                reason = "the model edits one image" if name == "image" else "send it once"
                raise RequestError(400, f"`{name:.80}` is given several times; {reason}.", name, "invalid_value")
            if isinstance(value, UploadFile):
                files[name] = await value.read()
            else:
                values[name] = value
    fields = parse_fields(EditFields, values)
    if "image" not in files:
        raise RequestError(400, "`image` is missing.", "image", "missing_required_parameter")
    if fields.preserve == "auto" and ("mask" in files or fields.task != "edit"):
        reason = "`mask` says what may change" if "mask" in files else f"`task` is {fields.task}"
        raise RequestError(
            400, f"`preserve` is auto, but {reason}; leave one of them out.", "preserve", "invalid_value"
        )
    if fields.detail == "source" and (fields.task != "edit" or fields.size != "auto"):
        reason = f"`task` is {fields.task}" if fields.task != "edit" else f"`size` is {fields.size}"
        raise RequestError(400, f"`detail` is source, but {reason}; leave one of them out.", "detail", "invalid_value")
    return fields, files["image"], files.get("mask")


def open_upload(data: bytes, name: str) -> Image.Image:
    """Open an uploaded file as an image, and check its size before any pixel is decoded.

    Raises:
        RequestError: If the file is not an image of `IMAGE_FORMATS`, or has more than `MAX_PIXELS` pixels.
    """
    too_large = RequestError(413, f"`{name}` has more than {MAX_PIXELS} pixels; send a smaller image.", name)
    try:
        image = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise too_large from None
    except Exception:  # Pillow's readers raise many types of errors for damaged files.
        raise RequestError(400, f"`{name}` is not a PNG, JPEG or WebP image.", name, "invalid_image_format") from None
    if image.width * image.height > MAX_PIXELS:
        raise too_large
    return image


def decode_images(
    image_file: bytes, mask_file: bytes | None, height: int, width: int, resize_mode: str
) -> tuple[Image.Image, Image.Image | None]:
    """Decode the image as RGB, and the mask as a gray image that is white where its alpha is below one half.

    Args:
        image_file, mask_file (`bytes`): The uploaded files.
        height, width, resize_mode: The size that the image is resized to, and how.

    Raises:
        RequestError: If a file is damaged, too large or too thin, the mask does not fit the image, or it marks nothing
            that the model can edit.
    """
    opened = open_upload(image_file, "image")
    try:
        image = prepare_rgb_image(opened, name="image")
        crop = compute_crop_geometry(image.height, image.width, height, width, resize_mode)
    except ValueError:
        message = "`image` is damaged, or too thin for the model or for `size`."
        raise RequestError(400, message, "image", "invalid_image_format") from None
    if mask_file is None:
        return image, None

    def refuse(reason: str) -> RequestError:
        return RequestError(400, f"`mask` {reason}", "mask", "invalid_value")

    mask = open_upload(mask_file, "mask")
    if mask.size != image.size:
        raise refuse(
            f"has {mask.width}×{mask.height} pixels and `image` {image.width}×{image.height}; send a mask of the size "
            "of the image."
        )
    if not mask.has_transparency_data:
        raise refuse("has no alpha channel; send a PNG that is transparent where the image may change.")
    try:
        alpha = mask.convert("RGBA").getchannel("A")
    except Exception:
        raise refuse("is damaged.") from None
    is_free = ImageChops.invert(alpha).point(lambda value: 255 * (value >= 128))
    num_free, num_seen = (part.histogram()[255] for part in (is_free, is_free.crop(crop.box)))
    if num_free == 0:
        raise refuse("is nowhere transparent; make it transparent where the image may change.")
    if num_seen < (1 - MAX_SILENT_CUT) * num_free:
        raise refuse(
            f"marks pixels outside the part that the model sees, left {crop.box[0]}, top {crop.box[1]}, right "
            f"{crop.box[2]}, bottom {crop.box[3]}; send a crop of the image, or a `size` of its proportions."
        )
    return image, is_free


def encode_image(image: Image.Image, output_format: str, output_compression: int | None) -> bytes:
    """Encode an image as a file, with its color profile."""
    options = SAVE_OPTIONS.get(output_format.upper(), {})
    if output_compression is not None:
        options = {**options, "quality": output_compression, "lossless": False}
    file = BytesIO()
    image.save(file, output_format, icc_profile=image.info.get("icc_profile"), **options)
    return file.getvalue()
