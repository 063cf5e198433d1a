"""ComfyUI nodes that load an EditAR pipeline and edit images with it.

Install `editar-hf` into the Python environment of ComfyUI, and copy this file to `ComfyUI/custom_nodes/`. It needs a
ComfyUI with the V3 node API. ComfyUI and its module `comfy_api` are not packages that pip can install, so this file has
not been run. The tests run `editar_hf.serving.comfyui`, which does the work of the nodes.
"""

import torch
from comfy_api.latest import ComfyExtension, io

from editar_hf import EditARPipeline
from editar_hf.serving.comfyui import edit_tensor


Pipeline = io.Custom("EDITAR_PIPELINE")
TASKS = ["edit", "canny", "depth", "segmentation"]
RESIZE_MODES = ["of the model", "crop", "stretch"]


class EditARLoad(io.ComfyNode):
    """Load a pipeline from a folder or the Hub. ComfyUI keeps it until the path changes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditARLoad",
            display_name="Load EditAR",
            category="image/EditAR",
            inputs=[io.String.Input("path", tooltip="pipeline folder or Hub id")],
            outputs=[Pipeline.Output(display_name="pipeline")],
        )

    @classmethod
    def execute(cls, path: str) -> io.NodeOutput:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return io.NodeOutput(EditARPipeline.from_pretrained(path).to(device))


class EditAREdit(io.ComfyNode):
    """Edit images by instruction, with or without a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditAREdit",
            display_name="Edit with EditAR",
            category="image/EditAR",
            inputs=[
                Pipeline.Input("pipeline"),
                io.Image.Input("image", tooltip="the image to edit, or a condition map"),
                io.String.Input("prompt", multiline=True),
                io.Combo.Input("task", options=TASKS, default="edit"),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Float.Input("guidance_scale", default=0.0, min=0.0, max=20.0, step=0.1, tooltip="0: of the model"),
                io.Combo.Input("resize_mode", options=RESIZE_MODES, tooltip="crop edits the center"),
                io.Combo.Input(
                    "preserve", options=["off", "auto"], tooltip="auto keeps what the prompt does not change"
                ),
                io.Mask.Input("mask", optional=True, tooltip="where the image may change; zeros: everywhere"),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(
        cls, pipeline, image, prompt, task, seed, guidance_scale, resize_mode, preserve, mask=None
    ) -> io.NodeOutput:
        call = {"task": task, "guidance_scale": guidance_scale or None}
        call |= {"resize_mode": None if resize_mode == "of the model" else resize_mode, "preserve": preserve}
        return io.NodeOutput(edit_tensor(pipeline, image, prompt, seed, mask, **call))


class EditARExtension(ComfyExtension):
    """The list of the nodes, for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [EditARLoad, EditAREdit]


async def comfy_entrypoint() -> EditARExtension:
    """Return the extension. ComfyUI calls this function when it loads the file."""
    return EditARExtension()
