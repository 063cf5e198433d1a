"""The Gradio app: edit images by instruction in a browser.

Each browser has a `Session` of its own. All browsers share one pipeline, which makes one edit at a time.
"""

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from PIL import Image, ImageChops

from ..condition_maps import make_canny_map
from ..generation.inputs import resolve_settings
from ..image_processing_editar import compute_crop_geometry, prepare_rgb_image
from ..io import atomic_path
from ..pipelines.pipeline_editar import EditARPipeline, EditARPipelineOutput
from ..processing_editar import apply_task_prefix
from .requests import MAX_BODY_BYTES, RequestError, decode_images
from .sessions import Session, Step, stream_edit


logger = logging.getLogger(__name__)
# Browsers show images of at most this side, in pixels. Downloads have the full size.
MAX_SHOWN_SIDE = 1024
# Sessions that the app remembers; the oldest are forgotten first.
MAX_SESSIONS = 100
NUM_PREVIEWS = 8
# Color and opacity of the brush. A pixel is marked if its alpha, 0 to 255, is at least `MIN_ALPHA`.
BRUSH, MIN_ALPHA = ("#10b981", 0.55), 64
HINT = "1. Brush over the part that may change, or leave this out.\n2. Say what to change.\n3. Press **Edit**."
NOTES = {
    "crop": "The model edits the largest centered square. The rest of the image stays as it is.",
    "stretch": "The model sees the image resized to a square. The result has the size of the image again.",
}
CSS = """
.gradio-container {width: 100%; max-width: 1120px !important; margin: 0 auto !important}
#title h1 {font-weight: 650; letter-spacing: -0.02em; margin-bottom: 0.1em}
#title p, #status p, #note p {color: var(--body-text-color-subdued)}
#note p {font-size: var(--text-sm)}
#status {min-height: 1.6em}
.caption-label {font-size: 11px !important; padding: 1px 6px !important}
"""


class Example(NamedTuple):
    """An image and an instruction that the app offers."""

    image: Image.Image
    prompt: str


@contextmanager
def explain_errors() -> Iterator[None]:
    """Show the words of an error to the user, and never a traceback."""
    try:
        yield
    except (ValueError, ImportError, RequestError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        logger.exception("An edit failed.")
        raise gr.Error("The model failed. The log of the app has the reason.", print_exception=False) from error


def read_mask(editor_value: Mapping[str, Any] | None, size: tuple[int, int]) -> Image.Image | None:
    """Read what the brush marked: a gray image of `size` (width, height), white where it marked; None without marks.

    Only the alpha channels of the layers count, because the color of transparent pixels is arbitrary.
    """
    mask = None
    for layer in (editor_value or {}).get("layers", []):
        marks = layer.getchannel("A").point(lambda alpha: 255 * (alpha >= MIN_ALPHA))
        mask = marks if mask is None else ImageChops.lighter(mask, marks)
    return None if mask is None or mask.getbbox() is None else mask.resize(size, Image.Resampling.NEAREST)


class EditApp:
    """What the app shows and does. The arguments are those of `create_demo`.

    A method that answers the browser returns new values for components.
    """

    def __init__(
        self,
        pipeline: EditARPipeline,
        examples: Sequence[Example],
        condition_maps: Mapping[str, Callable[[Image.Image], Image.Image]],
        gpu: Callable[[Callable], Callable],
    ) -> None:
        self.pipeline = pipeline
        # A model of several aspect ratios resizes each image to the nearest one, and its result back.
        self.keeps_aspect = pipeline.processor.image_processor.aspect == "source"
        self.size = pipeline.resolve_size(None, None)
        self.resize_mode = pipeline.resolve_resize_mode(None, pipeline.processor.image_processor.aspect)
        self.examples = [Example(prepare_rgb_image(image), prompt) for image, prompt in examples]
        # For each choice the task, and what makes its map from the image. None: the image is the map.
        self.tasks: dict[str, tuple[str, Callable[[Image.Image], Image.Image] | None]] = {"Edit": ("edit", None)}
        for task, name in {"canny": "edges", "depth": "depth", "segmentation": "segments"}.items():
            if task in condition_maps:
                self.tasks[f"Make a new image from the {name} of this one"] = (task, condition_maps[task])
            self.tasks[f"Make a new image; this one is a map of {name}"] = (task, None)
        # A process of the GPU gets copies of the arguments, so the pipeline is not among them.
        lock = threading.Lock()
        self.stream_edit: Callable = gpu(lambda arguments: stream_edit(pipeline, lock, arguments))
        self.demo = self.build()

    # Answers to the browser

    def upload(self, session: Session, path: str) -> dict:
        """Begin a session with a file that the browser has uploaded."""
        with explain_errors():
            image, _ = decode_images(Path(path).read_bytes(), None, *self.size, self.resize_mode)
        session.start(image)
        return self.show(session)

    def load_example(self, session: Session, index: int) -> dict:
        session.start(self.examples[index].image)
        return self.show(session) | {self.prompt: gr.update(value=self.examples[index].prompt, interactive=True)}

    def click_example(self, session: Session, event: gr.SelectData) -> dict:
        return self.load_example(session, event.index)

    def clear(self, session: Session) -> dict:
        session.start(None)
        return self.show(session)

    def undo(self, session: Session) -> dict:
        """Show the image before the last edit, and the instruction of this edit, to change it."""
        undone = session.step
        session.go_to(session.position - 1)
        if undone is None or undone is session.step:
            return self.show(session)
        return self.show(session) | {self.prompt: gr.update(value=undone.prompt, interactive=True)}

    def go_to(self, session: Session, event: gr.SelectData) -> dict:
        session.go_to(event.index)
        return self.show(session)

    def choose(self, session: Session, event: gr.SelectData) -> dict:
        session.choose(event.index)
        return self.show(session)

    def begin(self, session: Session) -> dict:
        """Number an edit when its button is pressed, before it waits for its turn."""
        session.run += 1
        return {self.run: session.run, self.status: "", **self.show_buttons(is_running=True)}

    def cancel(self, session: Session) -> dict:
        """Cancel the edit of this session, whether it runs or waits."""
        session.run += 1
        return self.show_slider(session) | self.show_buttons(is_running=False) | {self.status: "Canceled."}

    def edit(
        self,
        session: Session,
        run: int,
        editor_value: dict[str, Any] | None,
        prompt: str,
        choice: str,
        seed: float | None,
        num_images: int,
        guidance_scale: float,
        preserve: bool,
        keep_detail: bool,
    ) -> Iterator[dict]:
        """Edit the image that is shown. Answer with previews and the result, until the edit is canceled."""
        if session.run != run:
            return
        with explain_errors():
            source = session.step
            if source is None:
                raise ValueError("There is no image yet. Upload one.")
            before, arguments = self.prepare_edit(source, editor_value, prompt, choice, preserve, keep_detail)
            seed = secrets.randbelow(2**31) if seed is None else int(seed)
            arguments["generator"] = [torch.Generator().manual_seed(seed + k) for k in range(num_images)]
            arguments |= {"num_images_per_prompt": num_images, "guidance_scale": guidance_scale}
            start = time.monotonic()
            with closing(self.stream_edit(arguments)) as events:
                for event in events:
                    if session.run != run:
                        yield self.show_slider(session)
                        return
                    if isinstance(event, EditARPipelineOutput):
                        # On the CPU, so that sessions need no memory of the GPU.
                        session.add(Step(list(event.images), event.image_tokens.cpu(), before, prompt))
                        status = f"Done in {time.monotonic() - start:.1f} seconds with seed {seed}."
                        masks = event.preserved_mask or []
                        if None in masks:
                            status += " The instruction changes the whole image, so nothing of it was kept."
                        elif any(mask is not None and mask.getextrema() == (255, 255) for mask in masks):
                            status += (
                                " The model found no part to change. Brush over it, or let the whole image change."
                            )
                        yield self.show(session) | {self.status: status}
                    elif event is not None:
                        yield {self.slider: (self.save(before), self.save(event[0])), self.status: "Editing …"}

    def prepare_edit(
        self,
        source: Step,
        editor_value: dict[str, Any] | None,
        prompt: str,
        choice: str,
        preserve: bool,
        keep_detail: bool,
    ) -> tuple[Image.Image, dict[str, Any]]:
        """Return the image before the edit, and arguments of the pipeline.

        Raises:
            ValueError: If the pipeline would refuse the edit, or make another one than the user expects.
        """
        task, make_map = self.tasks[choice]
        processor, image = self.pipeline.processor, source.image
        if not prompt.strip():
            raise ValueError("Write what to change, for example: make the car red.")
        num_tokens = len(processor.tokenizer(apply_task_prefix(prompt, task), verbose=False).input_ids)
        if num_tokens > processor.num_text_tokens:
            limit = processor.num_text_tokens
            raise ValueError(f"The instruction is too long: it has {num_tokens} tokens, and the model reads {limit}.")
        mask_image = read_mask(editor_value, image.size)
        num_rows = self.size[0] // self.pipeline.vq_model.config.stride
        arguments = {"prompt": prompt, "task": task, "preview_every": max(num_rows // NUM_PREVIEWS, 1)}
        if task != "edit":
            if mask_image is not None:
                raise ValueError("The brush is only for edits. Erase its marks, or choose the task Edit.")
            condition_map = image if make_map is None else make_map(image)
            before = condition_map
            if not self.keeps_aspect:
                before = processor.image_processor.resize_and_crop(condition_map, *self.size, self.resize_mode)
            return before, arguments | {"image": condition_map}
        if mask_image is not None:
            crop = compute_crop_geometry(image.height, image.width, *self.size, self.resize_mode)
            if mask_image.crop(crop.box).getbbox() is None:
                raise ValueError("The brush marks nothing inside the centered square that the model edits.")
        tokens = source.source_image_tokens
        edit: dict[str, Any] = {"image": image, "source_image_tokens": tokens, "mask_image": mask_image}
        edit |= {"preserve": "auto" if preserve and mask_image is None else "off"}
        edit |= {"restore_size": True, "detail": "source" if keep_detail else "model"}
        return image, arguments | edit

    # What is shown

    def save(self, image: Image.Image, side: int = MAX_SHOWN_SIDE) -> str:
        """Write an image, with at most `side` pixels per side, to a file for the browser, and return the path.

        Gradio would write the same file again while browsers read it.
        """
        image = image.copy()
        image.thumbnail((side, side))
        digest = hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()
        path = Path(self.demo.GRADIO_CACHE) / digest / "edited.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as unfinished:
                image.save(unfinished, "PNG", compress_level=1)
        return str(path)

    def show(self, session: Session) -> dict:
        """Show the current step of a session."""
        step = session.step
        history = [(self.save(one.image, 160), one.prompt or "Start") for one in session.steps]
        variants = [] if step is None else [self.save(image, 320) for image in step.images]
        return {
            self.session: session,
            self.drop_zone: gr.update(value=None, visible=step is None),
            self.editor: gr.update(value=step and self.save(step.image), visible=step is not None),
            self.variants: gr.update(value=variants, selected_index=step and step.chosen, visible=len(variants) > 1),
            self.history: gr.update(value=history, selected_index=session.position, visible=len(history) > 1),
            self.toolbar: gr.update(visible=step is not None),
            self.undo_button: gr.update(interactive=session.position > 0),
            self.download: step and self.save(step.image, max(step.image.size)),
            self.status: "" if step is None or step.before is not None else HINT,
            **self.show_slider(session),
            **self.show_buttons(is_running=False),
        }

    def show_slider(self, session: Session) -> dict:
        step = session.step
        if step is None or step.before is None:
            return {self.slider: None}
        return {self.slider: (self.save(step.before), self.save(step.image))}

    def show_buttons(self, is_running: bool) -> dict:
        return {
            self.prompt: gr.update(interactive=not is_running),
            self.edit_button: gr.update(visible=not is_running),
            self.cancel_button: gr.update(visible=is_running),
        }

    def build(self) -> gr.Blocks:
        """Lay out the page."""
        settings = resolve_settings(self.pipeline.transformer.generation_config, None, {"guidance_scale": None})
        thumbnails: dict[str, Any] = {"format": "png", "columns": 6, "height": 128, "fit_columns": False}
        thumbnails |= {"allow_preview": False, "interactive": False, "show_label": False, "buttons": []}
        # Files that the app has sent are deleted after an hour.
        with gr.Blocks(title="EditAR", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
            # With a function as its value, `gr.State` would begin another session once the page has loaded, maybe after
            # the example has. The number is a component, because it must be that of the press, not a newer one.
            self.session, self.run = gr.State(Session()), gr.Number(0, precision=0, visible=False)
            text = "# EditAR\nSay what to change. Brush over a part, and everything else stays exactly as it is."
            gr.Markdown(text, elem_id="title")
            with gr.Row():
                with gr.Column():
                    self.drop_zone = gr.File(
                        label="Image", file_types=["image"], type="filepath", height=380, elem_id="drop-zone"
                    )
                    self.editor = gr.ImageEditor(
                        label="Image",
                        type="pil",
                        format="png",
                        sources=(),
                        transforms=(),
                        layers=False,
                        brush=gr.Brush(colors=[BRUSH], color_mode="fixed"),
                        height=380,
                        visible=False,
                        elem_id="editor",
                    )
                    self.prompt = gr.Textbox(
                        label="Instruction", placeholder="make the car red", max_lines=3, elem_id="prompt"
                    )
                    self.edit_button = gr.Button("Edit", variant="primary", elem_id="edit")
                    self.cancel_button = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
                    with gr.Accordion("Settings", open=False):
                        self.task = gr.Dropdown(list(self.tasks), value="Edit", label="Task")
                        self.seed = gr.Number(
                            0, label="Seed", info="Empty: a random seed", precision=0, minimum=0, maximum=2**53
                        )
                        self.num_images = gr.Slider(1, 4, 1, step=1, label="Variants")
                        self.guidance_scale = gr.Slider(
                            1, 10, settings.guidance_scale, step=0.1, label="Guidance", info="Weight of the instruction"
                        )
                        self.preserve = gr.Checkbox(
                            label="Keep what the instruction does not change",
                            info="For edits without brush marks",
                            elem_id="preserve",
                        )
                        self.keep_detail = gr.Checkbox(
                            label="Keep the fine detail of a large image",
                            info="For edits of light and colors; a removed object leaves traces",
                            elem_id="detail",
                        )
                    if not self.keeps_aspect:
                        gr.Markdown(NOTES[self.resize_mode], elem_id="note")
                with gr.Column():
                    self.slider = gr.ImageSlider(
                        label="Before and after",
                        format="png",
                        height=380,
                        buttons=["fullscreen"],
                        interactive=False,
                        elem_id="slider",
                    )
                    self.status = gr.Markdown(HINT, elem_id="status")
                    self.variants = gr.Gallery(label="Variants", visible=False, **thumbnails)
                    with gr.Row(visible=False) as self.toolbar:
                        self.undo_button = gr.Button("Undo", size="md", min_width=80, elem_id="undo")
                        self.download = gr.DownloadButton("Download", size="md", min_width=80, elem_id="download")
                        self.upload_button = gr.UploadButton(
                            "Upload", file_types=["image"], type="filepath", size="md", min_width=80
                        )
                    self.history = gr.Gallery(label="History", visible=False, elem_id="history", **thumbnails)
            examples = [(image, prompt) for image, prompt in self.examples]
            thumbnails["columns"] = 8  # On the whole width.
            self.gallery = gr.Gallery(examples, label="Examples", visible=len(examples) > 1, **thumbnails)
            self.connect(demo)
        return demo

    def connect(self, demo: gr.Blocks) -> None:
        """Connect the components with the answers."""
        shown = [
            *(self.session, self.run, self.drop_zone, self.editor, self.prompt, self.edit_button, self.cancel_button),
            *(self.slider, self.status, self.variants, self.toolbar, self.undo_button, self.download, self.history),
        ]
        # Only edits wait for each other.
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        queued = options | {"concurrency_limit": None}
        # Gradio closes the stream of the queue with its last event, and can lose an event that joins meanwhile, as an
        # edit would right after `begin`. So `begin` and the other clicks do not join the queue.
        at_once = options | {"queue": False}
        for listen, answer in (
            (self.editor.clear, self.clear),
            (self.undo_button.click, self.undo),
            (self.cancel_button.click, self.cancel),
            (self.history.select, self.go_to),
            (self.variants.select, self.choose),
            (self.gallery.select, self.click_example),
        ):
            listen(answer, self.session, shown, trigger_mode="multiple", **at_once)
        for component in (self.drop_zone, self.upload_button):
            # Only the queue shows errors.
            uploaded = component.upload(self.upload, [self.session, component], shown, **queued)
            uploaded.failure(lambda: None, None, component, **at_once)
        if self.examples:
            demo.load(partial(self.load_example, index=0), self.session, shown, **at_once)
        begun = gr.on([self.edit_button.click, self.prompt.submit], self.begin, self.session, shown, **at_once)
        settings = [self.prompt, self.task, self.seed, self.num_images, self.guidance_scale]
        settings += [self.preserve, self.keep_detail]
        edited = begun.then(
            self.edit,
            [self.session, self.run, self.editor, *settings],
            shown,
            concurrency_limit=1,
            trigger_mode="multiple",  # Else an edit is lost while a canceled one waits.
            show_progress="minimal",
            show_progress_on=self.status,
            api_visibility="private",
        )
        edited.then(partial(self.show_buttons, is_running=False), None, shown, **at_once)


def create_demo(
    pipeline: EditARPipeline,
    examples: Sequence[Example] = (),
    condition_maps: Mapping[str, Callable[[Image.Image], Image.Image]] | None = None,
    gpu: Callable[[Callable], Callable] = lambda function: function,
) -> gr.Blocks:
    """Create the app. `launch_demo` starts it.

    Args:
        pipeline (`EditARPipeline`): Makes the images. Nothing else may call it while the app runs.
        examples (sequence of `Example`, *optional*): Images with instructions. The app starts with the first one.
        condition_maps (`Mapping`, *optional*): For each task the function that makes its condition map from an image;
            *defaults to* `{"canny": make_canny_map}`.
        gpu (`Callable`, *optional*): Decorates the function that needs a GPU, such as `spaces.GPU`.
    """
    condition_maps = {"canny": make_canny_map} if condition_maps is None else condition_maps
    return EditApp(pipeline, examples, condition_maps, gpu).demo


def launch_demo(demo: gr.Blocks, **options: Any) -> None:
    """Start an app. It has no public link, and neither the app nor its page contacts other hosts.

    Args:
        demo (`gr.Blocks`): The app.
        options: Further options of `gr.Blocks.launch`, such as `server_name` and `server_port`.
    """
    # Gradio's own fonts come from Google.
    fonts: dict[str, Any] = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    theme = gr.themes.Soft(primary_hue="indigo", secondary_hue="indigo", neutral_hue="gray", **fonts).set(
        body_background_fill="*neutral_50",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color_subdued",
        block_title_text_color_dark="*body_text_color_subdued",
    )
    demo.queue(api_open=False).launch(
        theme=theme,
        css=CSS,
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        max_file_size=MAX_BODY_BYTES,
        state_session_capacity=MAX_SESSIONS,
        **options,
    )
