"""The session of one user of the app: images and their tokens, from an upload to the last edit.

An edit starts from the tokens of the image before. So nothing is encoded twice, and what no mask has marked stays the
same over all edits.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image

from ..pipelines.pipeline_editar import EditARPipeline, EditARPipelineOutput


# The images of a session have at most this many pixels together, 400 MB; the oldest are forgotten first.
MAX_SESSION_PIXELS = 2**27


@dataclass
class Step:
    """An image of a session, or several variants of it, and what they were made from.

    Args:
        images (`list[Image]`): The variants.
        image_tokens (`torch.LongTensor` of shape `(variants, N)`, *optional*): Their tokens; None for an upload.
        before (`Image`, *optional*): The image or condition map that was edited; None for an upload.
        prompt (`str`): The instruction.
        chosen (`int`): The variant that the next edit changes.
    """

    images: list[Image.Image]
    image_tokens: torch.Tensor | None = None
    before: Image.Image | None = None
    prompt: str = ""
    chosen: int = 0

    @property
    def image(self) -> Image.Image:
        """The chosen variant."""
        return self.images[self.chosen]

    @property
    def source_image_tokens(self) -> torch.Tensor | None:
        """The tokens of the chosen variant, `(1, N)`."""
        return None if self.image_tokens is None else self.image_tokens[self.chosen : self.chosen + 1]

    @property
    def num_pixels(self) -> int:
        return len(self.images) * self.image.width * self.image.height


class Session:
    """The images of one user.

    Attributes:
        steps (`list[Step]`): The upload and its edits.
        position (`int`): The step that is shown, and that the next edit changes.
        run (`int`): The number of the newest edit. An edit with another number is canceled.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.position = self.run = 0

    @property
    def step(self) -> Step | None:
        """The step that is shown; None before the first upload."""
        return self.steps[self.position] if self.steps else None

    def start(self, image: Image.Image | None) -> None:
        """Cancel an edit, forget all images, and begin with a new one."""
        self.run += 1
        self.steps, self.position = [] if image is None else [Step([image])], 0

    def add(self, step: Step) -> None:
        """Add the result of an edit. Steps behind the one that was shown are forgotten."""
        self.steps = [*self.steps[: self.position + 1], step]
        while len(self.steps) > 2 and sum(one.num_pixels for one in self.steps) > MAX_SESSION_PIXELS:
            del self.steps[0]
        self.position = len(self.steps) - 1

    def go_to(self, position: int) -> None:
        """Cancel an edit, and show another step. A position that does not exist changes nothing."""
        if position in range(len(self.steps)):
            self.run += 1
            self.position = position

    def choose(self, variant: int) -> None:
        """Cancel an edit, and go on with another variant. A variant that does not exist changes nothing."""
        if self.step is not None and variant in range(len(self.step.images)):
            self.run += 1
            self.step.chosen = variant


def stream_edit(
    pipeline: EditARPipeline, lock: threading.Lock, arguments: dict[str, Any]
) -> Iterator[list[Image.Image] | EditARPipelineOutput | None]:
    """Run the pipeline in a thread: yield None for a token, the images of a preview, and at the end the output.

    If the iterator is closed, the pipeline stops after the current decoder pass.

    Args:
        pipeline (`EditARPipeline`): The pipeline.
        lock (`threading.Lock`): Held until the pipeline has stopped, because it makes one edit at a time.
        arguments (`dict`): The arguments of the pipeline.
    """
    events: SimpleQueue = SimpleQueue()

    def report(pipeline: EditARPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        events.put(tensors.get("preview"))

    def work() -> None:
        try:
            events.put(pipeline(**arguments, callback_on_step_end=report))
        except Exception as error:
            events.put(error)

    with lock:
        thread = threading.Thread(target=work, name="editar-hf edit")
        thread.start()
        try:
            event = None
            while not isinstance(event, EditARPipelineOutput):
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            pipeline.interrupt()
            thread.join()
