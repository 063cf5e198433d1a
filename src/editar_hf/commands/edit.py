"""`editar-hf edit`: edit one image, or the images of a folder."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io import SAVE_OPTIONS, atomic_path
from .loading import add_loading_options, add_lora_option, check_device, choose_device, load_pipeline


if TYPE_CHECKING:
    from PIL import Image


# Options that are passed to the pipeline under the same names.
PIPELINE_OPTIONS = (
    *("aspect", "resize_mode", "crop_to_mask", "preserve", "restore_size", "detail", "guidance_scale"),
    *("image_guidance_scale", "negative_prompt", "num_images_per_prompt", "task"),
)
# The tasks of `processing_editar.TASK_PREFIXES` that need an image. They are copied here, because that import is slow.
TASKS = ("edit", "canny", "depth", "segmentation")
# The keys that a line of `--prompts` may have, and the types of their values.
LINE_KINDS = {"image": str, "prompt": str, "output": str, "task": str, "seed": int, "mask": str}
# A file in the output folder. Each line is a JSON object that describes from what an output was made. If an output has
# several lines, the last one counts.
RECORD_FILE = ".editar-edits.jsonl"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf edit` to the command's parser."""
    summary = "edit an image, or a folder of images"
    description = (
        f"{summary.capitalize()}. With a folder and --prompt, every image gets the same edit. With a folder and "
        "--prompts, each line of the file is a JSON object that describes one edit: `image` (a name in the folder) and "
        "`prompt`, and optionally `output`, `task`, `seed` and `mask` (a name in the folder). If a line has no `task`, "
        "`seed` or `mask`, the option of that name is used. You can stop the command and start it again: it skips "
        "edits that are already in the output folder and were made from the same image, prompt and options. Edits "
        "that fail are listed at the end, and the exit status is then 1."
    )
    parser = subparsers.add_parser("edit", help=summary, description=description)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add_loading_options(parser)
    add_lora_option(parser)
    add("--image", metavar="PATH", type=parse_path, required=True, help="image to edit, or folder of images")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="P", help="instruction: what to change")
    prompt.add_argument("--prompts", metavar="FILE", type=parse_path, help="file with one edit on each line")
    output = "image to write, such as edited.png; a folder if --image is a folder"
    add("--output", metavar="PATH", type=parse_path, required=True, help=output)
    add("--mask", metavar="FILE", type=parse_path, help="mask image, white where the image may change")
    task = "edit the image, or generate an image from a canny, depth or segmentation map (default: edit)"
    add("--task", choices=TASKS, default="edit", help=task)
    add("--seed", metavar="S", type=int, default=0, help="seed of the sampling (default: 0)")
    aspect = "model edits at the model's size, source at the proportions of the image; default: that of the model"
    add("--aspect", choices=("model", "source"), help=aspect)
    resize_mode = "how to resize images to the model's size: crop edits the center, stretch edits the whole image"
    add("--resize-mode", choices=("crop", "stretch"), help=f"{resize_mode}; default: that of the model")
    crop_to_mask = "cut out a window around the mask, and edit it at the model's size"
    add("--crop-to-mask", action="store_true", help=crop_to_mask)
    preserve = "auto keeps what the instruction does not change, without a mask (default: off)"
    add("--preserve", choices=("off", "auto"), default="off", help=preserve)
    restore_size = "write results at the size of the image (default for --task edit), or at that of the model"
    add("--restore-size", action=argparse.BooleanOptionalAction, help=restore_size)
    detail = "model resizes results to the size of the image; source keeps the image's fine detail (default: model)"
    add("--detail", choices=("model", "source"), default="model", help=detail)
    add("--guidance-scale", metavar="X", type=float, help="weight of the prompt; default: that of the model")
    add("--image-guidance-scale", metavar="X", type=float, help="weight of the source image; default: none")
    add("--negative-prompt", metavar="P", help="what the result should not show")
    num_images = "results per edit (default: 1); if several, they are named edited-0.png, edited-1.png, ..."
    add("--num-images", metavar="N", type=int, default=1, dest="num_images_per_prompt", help=num_images)
    pack_weights = "pack the weights in 16 bits, which is faster on a CPU; --lora is fused; computes in float32"
    add("--pack-weights", action="store_true", help=pack_weights)
    quality = "quality of .jpg, .avif and .webp, 1 to 100; default: 95 for .jpg and .avif, lossless for .webp"
    add("--quality", metavar="Q", type=int, help=quality)


def parse_path(text: str) -> Path:
    """Read a path, and refuse an empty path, which would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """List the edits, check them and run them. Return 1 if an edit failed."""
    jobs = list(list_jobs(args))
    check_jobs(args, jobs)
    return run_jobs(args, jobs)


def run_jobs(args: argparse.Namespace, jobs: list[argparse.Namespace]) -> int:
    """Run the edits that are not done yet, and list the edits that failed. Return 1 if an edit failed.

    Several processes may write to one folder, each with its own part of the edits.
    """
    from tqdm import tqdm

    is_folder = args.image.is_dir()
    folder = args.output if is_folder else args.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    record = read_record(folder) if is_folder else {}
    waiting = [job for job in jobs if not is_done(folder, job, record)]
    if is_folder:
        print(f"{len(jobs)} edits, {len(jobs) - len(waiting)} of them done before")
    pipeline = load_pipeline(args) if waiting else None
    failures = []
    for job in tqdm(waiting, unit="edit", disable=None if is_folder else True):
        if is_folder:
            write_record(folder, job, None)
        try:
            edit(pipeline, job)
            if is_folder:
                write_record(folder, job, describe_job(job))
        except Exception as error:  # An error in one edit must not stop the other edits.
            failures.append(f"{job.image}: {type(error).__name__}: {error}")
    for failure in failures:
        print(failure, file=sys.stderr)
    if is_folder:
        print(f"{len(waiting) - len(failures)} done, {len(failures)} failed")
    return 1 if failures else 0


# Edits to do. A job holds the options of the command, with the values of one edit.


def list_jobs(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """List the edits: one for each line of `--prompts`, one for each image of a folder by name, or a single one."""
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"`--prompts` is {args.prompts}, which is not UTF-8: {error}") from error
        yield from (read_line(args, number, line) for number, line in enumerate(lines, 1) if line.strip())
    elif args.image.is_dir():
        from PIL import Image

        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        for path in sorted(args.image.iterdir()):
            if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith("."):
                output = args.output / f"{path.stem}.png"
                yield argparse.Namespace(**{**vars(args), "image": path, "output": output})
    else:
        yield args


def read_line(args: argparse.Namespace, number: int, line: str) -> argparse.Namespace:
    """Read a line of `--prompts`."""
    entry: Any = None
    with suppress(ValueError):
        entry = json.loads(line)
    is_sound = isinstance(entry, dict) and {"image", "prompt"} <= entry.keys() <= LINE_KINDS.keys()
    # `type`, because `True` is an instance of `int`.
    if not is_sound or not all(type(value) is LINE_KINDS[name] and value != "" for name, value in entry.items()):
        raise ValueError(
            f"`--prompts` {args.prompts}, line {number} is {line.strip()!r}; pass a JSON object with `image` and "
            "`prompt`, and optionally `output`, `task`, `seed`, `mask`. `seed` is an integer; the other values are "
            "text that is not empty."
        )
    entry["output"] = args.output / entry.get("output", f"{Path(entry['image']).stem}.png")
    entry |= {name: args.image / entry[name] for name in ("image", "mask") if name in entry}
    return argparse.Namespace(**{**vars(args), **entry})


def check_jobs(args: argparse.Namespace, jobs: list[argparse.Namespace]) -> None:
    """Check the options before any edit runs, and refuse edits that would overwrite images."""
    if args.prompts is not None and not args.image.is_dir():
        raise ValueError(
            f"`--image` is {args.image}, which is not a folder; with `--prompts`, pass the folder of the images."
        )
    if args.prompts is None and not jobs:
        raise ValueError(
            f"`--image` is {args.image}, a folder without images; pass an image, or a folder that contains images."
        )
    for option in ("image", "mask"):
        path = getattr(args, option)
        if path is not None and not path.is_file() and not (option == "image" and path.is_dir()):
            raise ValueError(f"`--{option}` is {path}, which is not a file; pass the path of an image.")
    if args.num_images_per_prompt < 1:
        raise ValueError(f"`--num-images` is {args.num_images_per_prompt}; pass an integer of at least 1.")
    check_device(args)
    if args.pack_weights:
        import torch

        from ..packing import explain_missing_kernel

        if args.dtype in ("bfloat16", "float16"):
            raise ValueError(
                f"`--dtype` is {args.dtype}, but with `--pack-weights` the pipeline computes in float32; leave one out."
            )
        if torch.device(choose_device(args)).type != "cpu":
            raise ValueError(
                f"`--pack-weights` is for CPUs, but the device is {choose_device(args)}; pass `--device cpu`."
            )
        if (reason := explain_missing_kernel()) is not None:
            raise ValueError(f"`--pack-weights` does not work here: {reason}. Leave it out.")
    for job in jobs:
        choose_save_options(job)
        if not job.prompt.strip():
            raise ValueError(f"`prompt` for {job.image} is empty; pass an instruction.")
        if job.task not in TASKS:
            raise ValueError(f"`task` for {job.image} is {job.task!r}; choose one of {', '.join(TASKS)}.")
        if job.preserve == "auto" and (job.mask is not None or job.task != "edit"):
            reason = f"has the task {job.task}" if job.mask is None else "has a mask, which says what may change"
            raise ValueError(f"`--preserve` is auto, but {job.image} {reason}; leave one of them out.")
        if job.detail == "source" and (job.task != "edit" or (job.restore_size is False and not job.crop_to_mask)):
            reason = f"{job.image} has the task {job.task}" if job.task != "edit" else "`--no-restore-size` is given"
            raise ValueError(f"`--detail` is source, but {reason}; leave one of them out.")
        if job.crop_to_mask and job.mask is None:
            raise ValueError(f"`--crop-to-mask` needs a mask, but {job.image} has no mask; pass `--mask`.")
    if args.image.is_dir():
        taken = {os.path.abspath(path) for job in jobs for path in (job.image, job.mask) if path is not None}
        for path in (os.path.abspath(path) for job in jobs for path in list_outputs(job)):
            if path in taken:
                raise ValueError(
                    f"`--output` is {args.output}, but two edits would write {path}, or an edit would overwrite this "
                    "input image. Pass another folder, or an `output` for each line of `--prompts`."
                )
            taken.add(path)


def list_outputs(job: argparse.Namespace) -> list[Path]:
    """List the files that a job writes."""
    count = job.num_images_per_prompt
    if count == 1:
        return [job.output]
    return [job.output.with_stem(f"{job.output.stem}-{index}") for index in range(count)]


def choose_save_options(job: argparse.Namespace) -> dict[str, Any]:
    """Choose the format and Pillow's options for it.

    Raises:
        ValueError: If Pillow cannot write the format, or the format does not support the quality.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(job.output.suffix.lower(), "")
    if kind not in Image.SAVE:
        raise ValueError(
            f"`--output` is {job.output}; pass a file name with the suffix of an image format that Pillow can write, "
            "such as .png. To edit many images, pass a folder as `--image`."
        )
    options = {"format": kind, **SAVE_OPTIONS.get(kind, {})}
    if job.quality is None:
        return options
    if kind not in SAVE_OPTIONS or not 1 <= job.quality <= 100:
        raise ValueError(
            f"`--quality` is {job.quality} for {job.output}; pass 1 to 100 with .jpg, .avif or .webp, or leave it out."
        )
    return {**options, "quality": job.quality, "lossless": False}


# Edits that are done


def describe_job(job: argparse.Namespace) -> dict:
    """Describe all values that the outputs of a job depend on.

    Files are described by name and modification time, so that the folder can be moved between two runs.
    """
    files = [path and path.exists() and [path.name, path.stat().st_mtime_ns] for path in (job.image, job.mask)]
    options = {name: getattr(job, name) for name in (*PIPELINE_OPTIONS, "prompt", "seed", "model", "lora", "dtype")}
    if job.pack_weights:  # The result is that of float32, but with an adapter, packing rounds the fused weights.
        options |= {"dtype": "float32"} | ({"pack_weights": True} if job.lora is not None else {})
    return {"files": files, "quality": job.quality, **options}


def is_done(folder: Path, job: argparse.Namespace, record: dict) -> bool:
    """Return True if the outputs of a job exist and were made from the same images and options."""
    made_from = record.get(os.path.relpath(job.output, folder))
    return made_from == describe_job(job) and all(path.exists() for path in list_outputs(job))


def read_record(folder: Path) -> dict:
    """Read the record: what each output was made from, by the path of the output relative to the folder."""
    record: dict[str, dict] = {}
    path = folder / RECORD_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):  # A run that was killed may have written only part of a line.
            record |= json.loads(line)
    return record


def write_record(folder: Path, job: argparse.Namespace, made_from: dict | None) -> None:
    """Record what the outputs of a job were made from. None marks an edit in progress, which is repeated if killed."""
    with (folder / RECORD_FILE).open("a") as file:
        # Begin with a line break, because a killed run may have written only part of a line.
        file.write("\n" + json.dumps({os.path.relpath(job.output, folder): made_from}) + "\n")


# Run an edit


def edit(pipeline: Any, job: argparse.Namespace) -> None:
    """Edit one image and write the results."""
    import torch

    options = {name: getattr(job, name) for name in PIPELINE_OPTIONS}
    generator = torch.Generator().manual_seed(job.seed)
    output = pipeline(job.prompt, image=job.image, mask_image=job.mask, generator=generator, **options)
    if None in (output.preserved_mask or ()):
        print(f"{job.image}: the instruction changes the whole image, so nothing of it was kept", file=sys.stderr)
    for image, path in zip(output.images, list_outputs(job), strict=True):
        save_image(image, path, choose_save_options(job))


def save_image(image: "Image.Image", path: Path, options: dict[str, Any]) -> None:
    """Save an image with its color profile, which some formats do not read from the image itself."""
    with atomic_path(path) as unfinished:
        image.save(unfinished, icc_profile=image.info.get("icc_profile"), **options)
