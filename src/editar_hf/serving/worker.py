"""The worker: one thread that owns the pipeline and makes the images that wait, in batches.

The pipeline has state that changes during a call, so no other thread may call it. Images that wait together and have
equal settings are made in one call. The noise of an image depends only on its own seed, so an image is the same alone
and in a batch.
"""

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from prometheus_client import Histogram

from ..checks import check_integer
from ..generation.cache import SourceCache, copy_to_one_block, join_caches
from ..pipelines.pipeline_editar import EditARPipeline, EditARPipelineOutput


logger = logging.getLogger(__name__)
# How long the worker waits for more images before it begins a batch. Clients that wait for their results send their
# next requests at the same time.
GATHER_SECONDS = 0.02
# The largest size of all source caches together.
SOURCE_CACHE_BYTES = 2**30
# Limits of the histograms of durations.
SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class BatchSettings(NamedTuple):
    """What the images of a batch have in common.

    Attributes:
        size (`tuple`): Height and width of the images in pixels, or None twice for those of the model.
        restore_size (`bool`): Return images of the size of their sources.
        guidance_scale (`float`, *optional*): Weight of the prompt.
        has_image, has_mask, has_negative_prompt (`bool`): What each image comes with.
        num_previews (`int`): Number of previews before each image.
        lora (`str`, *optional*): Name of the adapter; None for the model without adapters.
        resize_mode (`str`, *optional*): How the images are resized; None for the way of the model.
        preserve (`str`): `"auto"` keeps what the instruction does not change; see `EditARPipeline.__call__`.
        detail (`str`): Where the fine detail of a large result comes from; see `EditARPipeline.__call__`.
    """

    size: tuple[int | None, int | None]
    restore_size: bool
    guidance_scale: float | None
    has_image: bool
    has_mask: bool
    has_negative_prompt: bool
    num_previews: int
    lora: str | None = None
    resize_mode: str | None = None
    preserve: str = "off"
    detail: str = "model"


class Outcome(NamedTuple):
    """What the worker reports about a job: a preview, the image, or an error. After the last two, the job has ended.

    With the setting `preserve="auto"`, `is_preserved` comes with the image. It is False if the edit may have changed
    the whole image.
    """

    job: "Job"
    preview: Image.Image | None = None
    image: Image.Image | None = None
    error: Exception | None = None
    is_preserved: bool | None = None

    @property
    def picture(self) -> Image.Image:
        """The preview or the image."""
        picture = self.image or self.preview
        assert picture is not None
        return picture


@dataclass(eq=False)
class Job:
    """One image to make.

    Args:
        settings (`BatchSettings`): Settings that only equal settings share a batch with.
        prompt, negative_prompt, task, image, mask_image: See `EditARPipeline.__call__`.
        seed (`int`): Seed of the image.
        report (`Callable`): Called by the worker's thread with every `Outcome`.
        source_key (`bytes`, *optional*): Equal for equal images.
        index (`int`): Place of the image in its request.
        is_abandoned (`bool`): True if nobody waits for the image any more.
    """

    settings: BatchSettings
    prompt: str
    negative_prompt: str | None
    task: str
    image: Image.Image | None
    mask_image: Image.Image | None
    seed: int
    report: Callable[[Outcome], Any]
    source_key: bytes | None = None
    index: int = 0
    is_abandoned: bool = False

    def report_outcome(self, **outcome: Any) -> None:
        """Report a preview, the image or an error, if somebody waits for it."""
        if not self.is_abandoned:
            self.report(Outcome(self, **outcome))


class SourceCaches:
    """Keep the source caches that were used last, up to `SOURCE_CACHE_BYTES`, for further edits of their images.

    Args:
        pipeline (`EditARPipeline`): Prepares the caches.
    """

    def __init__(self, pipeline: EditARPipeline) -> None:
        self.pipeline = pipeline
        # The cache that was used last is the last one.
        self.caches: dict[tuple, SourceCache] = {}

    def get(self, batch: Sequence[Job]) -> SourceCache | None:
        """Return the cache of the sources of a batch: one source for all images, or one for each. None without keys."""
        settings = batch[0].settings
        if any(job.source_key is None for job in batch):
            return None
        default = self.pipeline.processor.image_processor.size
        height, width = settings.size[0] or default.height, settings.size[1] or default.width
        if (height, width) != self.pipeline.resolve_size(height, width, "fit"):
            return None  # The pipeline resizes the image before it encodes it.
        caches: list[SourceCache] = []
        for job in batch:
            key = job.source_key, height, width, settings.resize_mode, settings.lora
            cache = self.caches.pop(key, None)
            if cache is None:
                how = job.image, height, width, settings.resize_mode
                cache = copy_to_one_block(self.pipeline.prepare_source_cache(*how))
            self.caches[key] = cache
            caches.append(cache)
        while sum(map(count_bytes, self.caches.values())) > SOURCE_CACHE_BYTES:
            self.caches.pop(next(iter(self.caches)))
        # A source that all images share is read once in each pass.
        return caches[0] if all(cache is caches[0] for cache in caches) else join_caches(caches)


def count_bytes(cache: SourceCache) -> int:
    """Count the bytes of the keys and values of a source and of the null text, which are nearly all of its cache."""
    parts = [part for part in (cache, cache.null_text) if part is not None]
    return sum(tensor.nbytes for part in parts for tensor in (*part.keys, *part.values))


def log_failure(error: Exception) -> None:
    """Log the type and the place of an error. Its message can quote a prompt, so the log does not have it."""
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error(json.dumps({"event": "failure", "error": type(error).__name__, "traceback": place}))


class Worker:
    """Load a pipeline and make images with it, in a thread of its own.

    Args:
        load_pipeline (`Callable`): Returns the pipeline.
        max_batch_size (`int`): The largest number of images in one call.
        on_failure (`Callable`): Called if the pipeline does not load.
        loras (sequence of `str`): Names of the adapters of the pipeline that a job can choose. If there are any, no
            other adapter is used.

    Raises:
        ValueError: If `max_batch_size` is below 1.

    Attributes:
        pipeline (`EditARPipeline`, *optional*): The pipeline; None until it is loaded.
        error (`Exception`, *optional*): Why the pipeline did not load.
        waiting (`list[Job]`): The jobs that wait, in the order of their arrival.
        last_batch_seconds (`float`): Duration of the last batch.
        batch_images, batch_seconds (`Histogram`): Sizes and durations of all batches.
    """

    def __init__(
        self,
        load_pipeline: Callable[[], EditARPipeline],
        max_batch_size: int = 8,
        on_failure: Callable[[], Any] = lambda: None,
        loras: Sequence[str] = (),
    ) -> None:
        self.load_pipeline = load_pipeline
        self.max_batch_size = check_integer("max_batch_size", max_batch_size)
        self.pipeline: EditARPipeline | None = None
        self.source_caches: SourceCaches
        self.error: Exception | None = None
        self.on_failure = on_failure
        self.loras = loras
        self.waiting: list[Job] = []
        self.last_batch_seconds = 1.0
        sizes = [2**power for power in range(8)]
        self.batch_images = Histogram("editar_hf_batch_images", "Images per batch", buckets=sizes, registry=None)
        self.batch_seconds = Histogram("editar_hf_batch_seconds", "Batches", buckets=SECONDS, registry=None)
        self.is_closing = False
        self.condition = threading.Condition()
        # A daemon, so that a process that does not call `close` can end.
        self.thread = threading.Thread(target=self.run, name="editar-hf worker", daemon=True)

    def start(self) -> None:
        """Begin to load the pipeline."""
        self.thread.start()

    def close(self) -> None:
        """Make the images that wait, then end the thread."""
        with self.condition:
            self.is_closing = True
            self.condition.notify()
        self.thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for the next batches."""
        with self.condition:
            self.waiting += jobs
            self.condition.notify()

    def abandon(self, jobs: Sequence[Job]) -> None:
        """Drop jobs that wait, and the results of those that run. A batch without other jobs stops after its pass."""
        with self.condition:
            for job in jobs:
                job.is_abandoned = True
            self.waiting = [job for job in self.waiting if not job.is_abandoned]

    def run(self) -> None:
        try:
            pipeline = self.load_pipeline()
            self.source_caches = SourceCaches(pipeline)
            self.pipeline = pipeline
        except Exception as error:
            self.error = error
            self.on_failure()
            return
        while batch := self.take_batch():
            start = time.monotonic()
            self.make_images(batch)
            self.last_batch_seconds = seconds = time.monotonic() - start
            self.batch_images.observe(len(batch))
            self.batch_seconds.observe(seconds)
            logger.info(json.dumps({"event": "batch", "images": len(batch), "seconds": round(seconds, 3)}))

    def take_batch(self) -> list[Job]:
        """Wait for jobs, and take the first one and those that share its settings. Return [] to end the thread."""
        with self.condition:
            while True:
                self.condition.wait_for(lambda: self.waiting or self.is_closing)
                if not self.waiting:
                    return []
                self.condition.wait_for(lambda: len(self.waiting) >= self.max_batch_size, GATHER_SECONDS)
                if self.waiting:  # The jobs can be abandoned meanwhile.
                    break
            settings = self.waiting[0].settings
            batch = [job for job in self.waiting if job.settings == settings][: self.max_batch_size]
            self.waiting = [job for job in self.waiting if job not in batch]
        return batch

    def make_images(self, batch: Sequence[Job]) -> None:
        """Make the images of a batch in one call, and report them. If the call fails, make each image alone."""
        try:
            output = self.call_pipeline(batch)
        except Exception as error:
            if len(batch) > 1:
                for job in batch:
                    self.make_images([job])
                return
            log_failure(error)
            batch[0].report_outcome(error=error)
            return
        for index, (job, image) in enumerate(zip(batch, output.images, strict=True)):
            masks = output.preserved_mask
            job.report_outcome(image=image, is_preserved=None if masks is None else masks[index] is not None)

    def call_pipeline(self, batch: Sequence[Job]) -> EditARPipelineOutput:
        assert self.pipeline is not None
        settings = batch[0].settings
        num_rows, num_columns = self.pipeline.compute_grid(*self.pipeline.resolve_size(*settings.size, "fit"))
        # The last preview is the image itself, so there is one more than the clients get.
        preview_every = -(-num_rows // (settings.num_previews + 1)) if settings.num_previews else None

        def report_step(pipeline: EditARPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> None:
            if all(job.is_abandoned for job in batch):
                pipeline.interrupt()
            if "preview" in tensors and step + 1 < num_rows * num_columns:
                for job, preview in zip(batch, tensors["preview"], strict=True):
                    job.report_outcome(preview=preview)

        if self.loras:
            self.pipeline.set_adapters([] if settings.lora is None else settings.lora)
        source_cache = self.source_caches.get(batch)
        # With a cache, the pipeline takes an image only to put the result back into it.
        is_composed = settings.has_mask or settings.preserve == "auto"
        needs_image = source_cache is None or settings.restore_size or is_composed
        output: Any = self.pipeline(
            prompt=[job.prompt for job in batch],
            negative_prompt=[job.negative_prompt or "" for job in batch] if settings.has_negative_prompt else None,
            task=[job.task for job in batch],
            image=[job.image for job in batch] if settings.has_image and needs_image else None,
            source_cache=source_cache,
            mask_image=[job.mask_image for job in batch] if settings.has_mask else None,
            height=settings.size[0],
            width=settings.size[1],
            size_policy="fit",
            resize_mode=settings.resize_mode,
            restore_size=settings.restore_size,
            preserve=settings.preserve,
            detail=settings.detail,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(job.seed) for job in batch],
            callback_on_step_end=report_step,
            callback_on_step_end_tensor_inputs=(),
            preview_every=preview_every,
        )
        return output
