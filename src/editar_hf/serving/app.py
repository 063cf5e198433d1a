"""The HTTP application: OpenAI's image API in front of one worker.

The event loop reads requests, queues images and writes answers. It never runs the model, and it never opens a path or
a URL that a client names.
"""

import asyncio
import base64
import copy
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..checks import check_integer
from ..pipelines.pipeline_editar import EditARPipeline
from ..processing_editar import TEXT_TO_IMAGE, apply_task_prefix
from .requests import ImageFields, RequestError, decode_images, encode_image, read_form, read_json
from .worker import SECONDS, BatchSettings, Job, Outcome, Worker, log_failure


logger = logging.getLogger(__name__)
# A client that takes longer to send its request, or to receive a part of the answer, would hold its place in the queue.
CLIENT_SECONDS = 60
# The status of a request whose client left before the answer. Only the log shows it.
CLIENT_LEFT = 499


def create_app(worker: Worker, model_name: str, api_key: str | None = None, max_queue: int = 64) -> FastAPI:
    """Create the application. The worker loads its pipeline when the server starts.

    Args:
        worker (`Worker`): Makes the images. It must not be started.
        model_name (`str`): The name that clients can give as `model`.
        api_key (`str`, *optional*): The key that clients must send as `Authorization: Bearer KEY`.
        max_queue (`int`): The largest number of images that wait beside one full batch. Further requests get status
            429.

    Raises:
        ValueError: If `api_key` is empty, or `max_queue` is below 1.
    """
    if api_key == "":
        raise ValueError("`api_key` is empty; pass a key, or none to serve without one.")
    server = ImageServer(worker, model_name, api_key, check_integer("max_queue", max_queue))
    app = FastAPI(title="editar-hf", lifespan=server.run_worker, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestScope, request_seconds=server.request_seconds)
    app.add_api_route("/v1/images/edits", server.edit, methods=["POST"])
    app.add_api_route("/v1/images/generations", server.generate, methods=["POST"])
    app.add_api_route("/v1/models", server.list_models, methods=["GET"])
    app.add_api_route("/health", server.show_health, methods=["GET"])
    app.add_api_route("/metrics", server.show_metrics, methods=["GET"])
    app.add_exception_handler(RequestError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer with an error in OpenAI's shape."""
    if isinstance(error, HTTPException):
        error = RequestError(error.status_code, error.detail)
    assert isinstance(error, RequestError)
    return JSONResponse(error.to_dict(), error.status, error.headers)


class RequestScope:
    """Log one line for each request, without its content, and release what it holds, however it ends.

    `request.state.cleanup` is an `ExitStack` that is closed after the last byte of the answer. `request_seconds`
    measures all requests.
    """

    def __init__(self, app: ASGIApp, request_seconds: Histogram) -> None:
        self.app, self.request_seconds = app, request_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = 0, time.monotonic()

        async def send_noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            async with asyncio.timeout(CLIENT_SECONDS):
                await send(message)

        try:
            with ExitStack() as cleanup:
                scope.setdefault("state", {})["cleanup"] = cleanup
                await self.app(scope, receive, send_noted)
        except Exception as error:
            log_failure(error)
            if not status:
                refusal = RequestError(500, "The server failed. Its log has the reason.")
                await JSONResponse(refusal.to_dict(), 500)(scope, receive, send_noted)
        finally:
            # A path without a route is text of the client.
            path = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - start
            self.request_seconds.labels(path, status).observe(seconds)
            logger.info(json.dumps({"event": "request", "path": path, "status": status, "seconds": round(seconds, 3)}))


@dataclass
class ImageRequest:
    """A request whose images can be made.

    Args:
        fields (`ImageFields`): Its fields.
        event_name (`str`): The first part of the names of its events.
        jobs (`list[Job]`): One for each image.
        outcomes (`asyncio.Queue`): What the worker reports; None if the client has left.
        usage (`dict`): The numbers of tokens, in OpenAI's shape.
    """

    fields: ImageFields
    event_name: str
    jobs: list[Job]
    outcomes: asyncio.Queue[Outcome | None]
    usage: dict[str, Any]


class ImageServer:
    """Answer the requests of clients.

    Args:
        worker (`Worker`): Makes the images.
        model_name, api_key, max_queue: See `create_app`.
    """

    def __init__(self, worker: Worker, model_name: str, api_key: str | None, max_queue: int) -> None:
        self.worker = worker
        self.model_name = model_name
        self.api_key = api_key
        self.max_images = max_queue + worker.max_batch_size
        self.start_time = int(time.time())
        # Images of all requests that have begun and not ended.
        self.num_images = 0
        # Each thread that decodes or encodes an image holds its pixels.
        self.codec_threads = ThreadPoolExecutor(2, "editar-hf codec")
        self.tokenizer: Any = None
        self.request_seconds = Histogram(
            "editar_hf_request_seconds", "Requests", ["path", "status"], buckets=SECONDS, registry=None
        )
        waiting = Gauge("editar_hf_waiting_images", "Images that wait for a batch", registry=None)
        waiting.set_function(lambda: len(worker.waiting))
        self.metrics = CollectorRegistry()
        for metric in (self.request_seconds, waiting, worker.batch_images, worker.batch_seconds):
            self.metrics.register(metric)

    @asynccontextmanager
    async def run_worker(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the worker while the server runs. At the end, it makes the images that wait."""
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.close)
        self.codec_threads.shutdown()

    # Routes

    async def show_health(self) -> Response:
        status = "ok" if self.worker.pipeline else "loading" if self.worker.error is None else "failed"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def show_metrics(self) -> Response:
        return Response(generate_latest(self.metrics), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self, request: Request) -> Response:
        self.check_key(request)
        model = {"id": self.model_name, "object": "model", "created": self.start_time, "owned_by": "editar-hf"}
        return JSONResponse({"object": "list", "data": [model]})

    async def generate(self, request: Request) -> Response:
        self.admit(request)
        async with limit_upload_time():
            fields = await read_json(request)
        return await self.answer(request, fields, TEXT_TO_IMAGE)

    async def edit(self, request: Request) -> Response:
        self.admit(request)
        async with limit_upload_time():
            fields, image_file, mask_file = await read_form(request)
        return await self.answer(request, fields, fields.task, image_file, mask_file)

    async def answer(self, request: Request, fields: ImageFields, task: str, *files: bytes | None) -> Response:
        """Make the images of a request, and answer with them."""
        self.reserve(request, fields.n - 1)
        image_request = await self.prepare(fields, task, *files)
        request.state.cleanup.callback(self.worker.abandon, image_request.jobs)
        if fields.stream:
            return StreamingResponse(self.stream(request, image_request), media_type="text/event-stream")
        made: dict[int, Outcome] = {}
        async with aclosing(self.follow(request, image_request)) as outcomes:
            async for outcome in outcomes:
                made[outcome.job.index] = outcome
        if len(made) < fields.n:
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": [await self.describe_result(made[index], fields) for index in range(fields.n)],
                **describe_image(made[0], fields),
                "seed": image_request.jobs[0].seed,
                "usage": image_request.usage,
            }
        )

    async def stream(self, request: Request, image_request: ImageRequest) -> AsyncIterator[str]:
        """Make the image of a request, and yield its previews and itself as server-sent events."""
        fields, index = image_request.fields, 0
        async with aclosing(self.follow(request, image_request)) as outcomes:
            try:
                async for outcome in outcomes:
                    event = {
                        **await self.describe_result(outcome, fields),
                        "created_at": int(time.time()),
                        **describe_image(outcome, fields),
                    }
                    if outcome.preview is not None:
                        yield format_event(
                            f"{image_request.event_name}.partial_image", {**event, "partial_image_index": index}
                        )
                        index += 1
                    else:
                        end = {"seed": image_request.jobs[0].seed, "usage": image_request.usage}
                        yield format_event(f"{image_request.event_name}.completed", {**event, **end})
            except RequestError as error:
                yield format_event("error", error.to_dict())

    # Checks

    def check_key(self, request: Request) -> None:
        """Check the API key, in a time that does not depend on how much of it is right."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        # Starlette decodes headers as Latin-1.
        if self.api_key is not None and not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
            raise RequestError(401, "The API key is missing or wrong.", code="invalid_api_key")

    def get_pipeline(self) -> EditARPipeline:
        """Return the pipeline. Other threads may read its configuration."""
        if self.worker.pipeline is None:
            raise RequestError(503, "The model is loading.", code="loading", retry_after=5)
        return self.worker.pipeline

    def admit(self, request: Request) -> None:
        """Check whether a request for images can be served, before its body is read."""
        self.check_key(request)
        self.get_pipeline()
        self.reserve(request, 1)

    def reserve(self, request: Request, num_images: int) -> None:
        """Hold places for images until the request has ended."""
        if self.num_images + num_images > self.max_images:
            raise RequestError(
                429,
                "Too many images wait. Try again later.",
                code="queue_full",
                retry_after=max(1, round(self.worker.last_batch_seconds)),
            )
        self.num_images += num_images
        request.state.cleanup.callback(self.release, num_images)

    def release(self, num_images: int) -> None:
        self.num_images -= num_images

    def count_text_tokens(self, name: str, text: str, task: str) -> int:
        """Count the tokens of a prompt with its prefix. Refuse a prompt that the model would not read to its end."""
        pipeline = self.get_pipeline()
        if self.tokenizer is None:
            # A copy, because the worker uses the tokenizer of the pipeline in its own thread.
            self.tokenizer = copy.deepcopy(pipeline.processor.tokenizer)
        num_tokens = len(self.tokenizer(apply_task_prefix(text, task), verbose=False).input_ids)
        if num_tokens > pipeline.processor.num_text_tokens:
            raise RequestError(
                400,
                f"`{name}` has {num_tokens} tokens with the prefix of its task; the model reads at most "
                f"{pipeline.processor.num_text_tokens}.",
                name,
                "string_above_max_length",
            )
        return num_tokens

    # Images

    async def prepare(
        self, fields: ImageFields, task: str, image_file: bytes | None = None, mask_file: bytes | None = None
    ) -> ImageRequest:
        """Check everything that the pipeline would refuse, and prepare the jobs of a request."""
        pipeline = self.get_pipeline()
        if fields.model not in (None, self.model_name):
            message = f"`model` is {fields.model!r:.80}; this server has {self.model_name!r}."
            raise RequestError(404, message, "model", "model_not_found")
        if fields.lora is not None and fields.lora not in self.worker.loras:
            names = ", ".join(self.worker.loras) or "none"
            message = f"`lora` is {fields.lora!r:.80}; the adapters of this server are: {names}."
            raise RequestError(400, message, "lora", "invalid_value")
        size, own_aspect = fields.size_in_pixels, pipeline.processor.image_processor.aspect
        # The proportions of the image then decide at which size the model works.
        follows_image = image_file is not None and fields.size == "auto" and own_aspect == "source"
        resize_mode = "stretch" if follows_image else None
        num_text_tokens = self.count_text_tokens("prompt", fields.prompt, task)
        if fields.negative_prompt is not None:
            self.count_text_tokens("negative_prompt", fields.negative_prompt, task)
        image = mask_image = None
        if image_file is not None:
            asked = (given or own for given, own in zip(size, pipeline.resolve_size(*size, "fit"), strict=True))
            how = *asked, pipeline.resolve_resize_mode(resize_mode)
            image, mask_image = await self.run_codec(decode_images, image_file, mask_file, *how)
        if image is not None and follows_image:
            size = pipeline.choose_size([image])
        height, width = pipeline.resolve_size(*size, "fit")
        settings = BatchSettings(
            size=size,
            restore_size=fields.size == "auto" and (task == "edit" or follows_image),
            guidance_scale=fields.guidance_scale,
            has_image=image is not None,
            has_mask=mask_image is not None,
            has_negative_prompt=fields.negative_prompt is not None,
            num_previews=fields.partial_images,
            lora=fields.lora,
            resize_mode=resize_mode,
            preserve=getattr(fields, "preserve", "off"),
            detail=getattr(fields, "detail", "model"),
        )
        seed = secrets.randbelow(2**32) if fields.seed is None else fields.seed
        loop, outcomes = asyncio.get_running_loop(), asyncio.Queue[Outcome | None]()

        def report(outcome: Outcome) -> None:
            loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        inputs = fields.prompt, fields.negative_prompt, task, image, mask_image
        key = None if image_file is None else hashlib.sha256(image_file).digest()
        jobs = [Job(settings, *inputs, seed + index, report, key, index) for index in range(fields.n)]
        num_tokens = height * width // pipeline.vq_model.config.stride**2
        details = {"image_tokens": 0 if image is None else num_tokens, "text_tokens": num_text_tokens}
        num_input, num_output = sum(details.values()), fields.n * num_tokens
        usage = {
            "input_tokens": num_input,
            "input_tokens_details": details,
            "output_tokens": num_output,
            "total_tokens": num_input + num_output,
        }
        return ImageRequest(fields, "image_edit" if image is not None else "image_generation", jobs, outcomes, usage)

    async def follow(self, request: Request, image_request: ImageRequest) -> AsyncGenerator[Outcome, None]:
        """Submit the jobs, and yield their previews and images until all have ended or the client leaves.

        Raises:
            RequestError: With status 500, if the model fails.
        """

        async def watch_client() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            image_request.outcomes.put_nowait(None)

        watcher = asyncio.create_task(watch_client())
        try:
            self.worker.submit(image_request.jobs)
            num_running = len(image_request.jobs)
            while num_running and (outcome := await image_request.outcomes.get()) is not None:
                if outcome.error is not None:
                    raise RequestError(500, "The model failed. The log of the server has the reason.")
                num_running -= outcome.preview is None
                yield outcome
        finally:
            watcher.cancel()

    async def describe_result(self, outcome: Outcome, fields: ImageFields) -> dict[str, Any]:
        """Describe a preview or an image: the file in base64, and whether `preserve` has kept a part of the source."""
        how = fields.output_format, fields.output_compression
        file = await self.run_codec(encode_image, outcome.picture, *how)
        result: dict[str, Any] = {"b64_json": base64.b64encode(file).decode()}
        return result if outcome.is_preserved is None else {**result, "preserved": outcome.is_preserved}

    async def run_codec(self, function: Callable, *arguments: Any) -> Any:
        """Decode or encode images in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self.codec_threads, function, *arguments)


def describe_image(outcome: Outcome, fields: ImageFields) -> dict[str, str]:
    """Describe a preview or an image in OpenAI's words."""
    return {
        "background": "opaque",
        "output_format": fields.output_format,
        "quality": "auto",
        "size": "x".join(map(str, outcome.picture.size)),
    }


def format_event(name: str, data: dict[str, Any]) -> str:
    """Format a server-sent event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


@asynccontextmanager
async def limit_upload_time() -> AsyncIterator[None]:
    """Give a client a limited time to send its request."""
    try:
        async with asyncio.timeout(CLIENT_SECONDS):
            yield
    except TimeoutError:
        raise RequestError(408, f"The request took more than {CLIENT_SECONDS} seconds to arrive.") from None
