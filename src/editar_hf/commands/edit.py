"""`editar-hf edit`: edit one image, or the images of a folder."""

import argparse
import io
import json
import os
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io import atomic_path


# Arguments that go to the pipeline under the same names.
PIPELINE_OPTIONS = (
    *("resize_mode", "crop_to_mask", "restore_size", "guidance_scale", "image_guidance_scale", "negative_prompt"),
    "num_images_per_prompt",
)
# With Pillow's defaults, these formats change pixels that the edit did not change.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True},
}
# In the output folder: a JSON object per line says what an output was made from. The last line of an output counts.
RECORD_FILE = ".editar-edits.jsonl"


@dataclass
class Job:
    """One edit: what to read, what to do, where to write."""

    image: Path
    prompt: str
    output: Path
    task: str
    seed: int
    mask: Path | None


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf edit` to the command's parser."""
    summary = "edit an image, or a folder of images"
    description = (
        f"{summary.capitalize()}. With a folder and --prompt, every image gets the same edit. With a folder and "
        "--prompts, each line of the file is a JSON object that describes one edit: `image` (a name in the folder) and "
        "`prompt`, and optionally `output`, `task`, `seed` and `mask` (a name in the folder). If a line has no `task`, "
        "`seed` or `mask`, the option of that name counts. The command can be stopped and started again: it skips "
        "edits that are already in the output folder and were made from the same image, prompt and options. Edits "
        "that fail are listed at the end, and the exit status is then 1."
    )
    parser = subparsers.add_parser("edit", help=summary, description=description)
    parser.add_argument("--model", metavar="M", required=True, help="pipeline folder or Hub id")
    parser.add_argument(
        "--image", metavar="PATH", type=parse_path, required=True, help="image to edit, or folder of images"
    )
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument("--prompt", metavar="P", help="instruction: what to change")
    wish.add_argument(
        "--prompts", metavar="FILE", type=parse_path, help="file with an edit on each line, as described above"
    )
    output_help = "image to write, such as edited.png; a folder if --image is a folder"
    parser.add_argument("--output", metavar="PATH", type=parse_path, required=True, help=output_help)
    parser.add_argument("--mask", metavar="FILE", type=parse_path, help="mask image, white where the image may change")
    parser.add_argument(
        "--task", metavar="T", default="edit", help="edit, canny, depth or segmentation (default: edit)"
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="seed of the sampling (default: 0)")
    add_pipeline_arguments(parser)
    parser.set_defaults(run=run)


def parse_path(text: str) -> Path:
    """Read a path; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that are the same for all images."""
    parser.add_argument(
        "--resize-mode",
        choices=("crop", "stretch"),
        help="how to resize images to the model's size: crop edits the centre, stretch edits the whole image; default: "
        "that of the model",
    )
    parser.add_argument(
        "--crop-to-mask",
        action="store_true",
        default=None,
        help="cut out a window around the mask, and edit it at the model's size",
    )
    parser.add_argument(
        "--restore-size",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write results at the size of the image (default), or at the model's size",
    )
    parser.add_argument(
        "--guidance-scale", metavar="X", type=float, help="weight of the prompt; default: that of the model"
    )
    parser.add_argument(
        "--image-guidance-scale",
        metavar="X",
        type=float,
        help="weight of the source image; default: only the prompt has a weight",
    )
    parser.add_argument("--negative-prompt", metavar="P", help="what the result should not show")
    parser.add_argument(
        "--num-images",
        metavar="N",
        type=int,
        dest="num_images_per_prompt",
        help="results per edit (default: 1); several are named edited-0.png, edited-1.png, ...",
    )
    parser.add_argument("--lora", metavar="L", help="folder or Hub id of a LoRA adapter")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights; auto: that of the files; default: that of the files if this machine computes in "
        "it, else float32",
    )
    parser.add_argument("--device", metavar="D", help="device, such as cpu or cuda:1; default: the GPU if there is one")
    parser.add_argument(
        "--quality",
        metavar="Q",
        type=int,
        help="quality of .jpg, .avif and .webp, 1 to 100; default: 95 for .jpg and .avif, lossless for .webp",
    )


def run(args: argparse.Namespace) -> int:
    """Edit one image, or the images of a folder that are not edited yet; return 1 if an edit failed."""
    check_options(args)
    if args.prompts is None and not args.image.is_dir():
        job = Job(args.image, args.prompt, args.output, args.task, args.seed, args.mask)
        check_job(job, args)
        if not job.image.is_file():
            raise ValueError(f"`--image` is {job.image}, which is not a file; give the path of an image.")
        check_writable(job.output.parent)
        pipeline = load_pipeline(args)
        try:
            edit(pipeline, job, args)
        except RuntimeError as error:  # such as numbers that overflow, or too little memory
            print(describe_failure(job, error), file=sys.stderr)
            return 1
        return 0
    return edit_folder(args)


def edit_folder(args: argparse.Namespace) -> int:
    """Edit the images of a folder one by one, and list those that failed; return 1 if any did."""
    from tqdm import tqdm

    jobs = read_folder(args) if args.prompts is None else read_prompts(args)
    check_outputs(jobs, args)
    record = read_record(args.output)
    waiting = [job for job in jobs if not is_done(job, args, record)]
    print(f"{len(jobs)} edits, {len(jobs) - len(waiting)} of them done before")
    failures = []
    pipeline = None
    if waiting:
        check_writable(args.output)
        pipeline = load_pipeline(args)
    for job in tqdm(waiting, unit="edit", disable=None):
        made_from = describe_job(job, args)
        try:
            write_record(job, args, None)  # a run that is killed between image and record must not keep the old record
            edit(pipeline, job, args)
            write_record(job, args, made_from)
        except Exception as error:  # whatever is wrong with one image, the others are not
            failures.append((job, error))
    for job, error in failures:
        print(describe_failure(job, error), file=sys.stderr)
    print(f"{len(waiting) - len(failures)} done, {len(failures)} failed")
    return 1 if failures else 0


def describe_failure(job: Job, error: Exception) -> str:
    """Describe in one line which edit failed, and why."""
    return f"{job.image}: {type(error).__name__}: {error}"


# What to do


def read_folder(args: argparse.Namespace) -> list[Job]:
    """List the images of the folder, in alphabetical order.

    Raises:
        ValueError: If there is none.
    """
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = sorted(path for path in args.image.iterdir() if path.is_file() and path.suffix.lower() in suffixes)
    images = [path for path in images if not path.name.startswith(".")]
    if not images:
        raise ValueError(f"`--image` is {args.image}, a folder without images; give an image, or a folder of some.")
    jobs = []
    for path in images:
        jobs.append(Job(path, args.prompt, args.output / f"{path.stem}.png", args.task, args.seed, args.mask))
        check_job(jobs[-1], args)
    return jobs


def read_prompts(args: argparse.Namespace) -> list[Job]:
    """Read the file of prompts.

    Raises:
        ValueError: If it is not UTF-8, or a line is not what it should be.
    """
    if not args.image.is_dir():
        raise ValueError(f"`--image` is {args.image}, which is not a folder; `--prompts` names images in a folder.")
    try:
        text = args.prompts.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`--prompts` {args.prompts} is not UTF-8: {error}. Save it in that encoding.") from error
    # Prompts may hold characters at which `str.splitlines` splits too.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [read_job(args, line, f"{args.prompts}, line {number}") for number, line in lines]


def read_job(args: argparse.Namespace, line: str, place: str) -> Job:
    """Read one line; `task`, `seed` and `mask` default to the command's options."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`--prompts` {place} is no JSON: {error}.") from error
    kinds = {"image": str, "prompt": str, "output": str, "task": str, "seed": int, "mask": str}
    is_sound = isinstance(entry, dict) and {"image", "prompt"} <= entry.keys() <= kinds.keys()
    # `type`, because `True` is an instance of `int`.
    if not is_sound or not all(type(value) is kinds[name] and value != "" for name, value in entry.items()):
        raise ValueError(
            f"`--prompts` {place} is {line.strip()!r}; give an object with `image` and `prompt`, and optionally "
            "`output`, `task`, `seed`, `mask`. `seed` is a whole number; the others are text, and not empty."
        )
    output = args.output / entry.get("output", f"{Path(entry['image']).stem}.png")
    mask = args.image / entry["mask"] if "mask" in entry else args.mask
    task, seed = entry.get("task", args.task), entry.get("seed", args.seed)
    job = Job(args.image / entry["image"], entry["prompt"], output, task, seed, mask)
    check_job(job, args, f"`--prompts` {place}: ")
    return job


# Checks before any work


def check_options(args: argparse.Namespace) -> None:
    """Refuse options with which every job would fail."""
    import torch

    from ..pipelines.hub import check_folder_or_hub_id

    limits = (("--quality", args.quality, 100), ("--num-images", args.num_images_per_prompt, 1000))
    for option, value, highest in limits:
        if value is not None and not 1 <= value <= highest:
            raise ValueError(f"`{option}` is {value}; pass a whole number from 1 to {highest}.")
    if args.mask is not None and not args.mask.is_file():
        raise ValueError(f"`--mask` is {args.mask}, which is not a file; give the path of an image.")
    if args.device is not None:
        try:
            torch.empty(1, device=args.device).cpu()
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
            raise ValueError(f"`--device` is {args.device!r}, which torch cannot use here: {error}") from error
    check_folder_or_hub_id(args.model, "--model")
    if args.lora is not None:
        check_folder_or_hub_id(args.lora, "--lora")


def check_job(job: Job, args: argparse.Namespace, place: str = "") -> None:
    """Refuse a job that the pipeline or torch would refuse later, and an output that cannot be written.

    Args:
        place (`str`): The file and line that describe the job; the message starts with it.
    """
    from PIL import Image

    from ..processing_editar import apply_task_prefix

    dashes = "" if place else "--"
    if not job.prompt.strip():
        raise ValueError(f"{place}`{dashes}prompt` is empty; say what to change.")
    try:
        apply_task_prefix(job.prompt, job.task)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from error
    if not -(2**63) <= job.seed < 2**64:  # what torch takes
        raise ValueError(f"{place}`{dashes}seed` is {job.seed}; pass one from -2**63 to 2**64 - 1.")
    if args.crop_to_mask and job.mask is None:
        raise ValueError(f"{place}`--crop-to-mask` needs a mask; give one, or leave the option out.")
    if job.output.is_dir():
        raise ValueError(f"{place}`--output` is {job.output}, which is a folder; give the name of an image to write.")
    options = choose_save_options(job.output, args.quality)
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{place}`--output` is {job.output}; end it in an image format that Pillow writes, such as .png."
        ) from error


def check_outputs(jobs: list[Job], args: argparse.Namespace) -> None:
    """Refuse two jobs that write the same file, and a job that writes a file which another job reads."""
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"`--output` is {args.output}, which is a file; give a folder for the results.")
    outputs = [os.path.abspath(path) for job in jobs for path in list_outputs(job, args)]
    twice = [path for path, count in Counter(outputs).items() if count > 1]
    if twice and args.prompts is None:
        raise ValueError(f"`--image` {args.image} has two images for {twice[0]}; rename one, or use `--prompts`.")
    if twice:
        raise ValueError(f"`--prompts` {args.prompts} writes {twice[0]} more than once; give those lines an `output`.")
    read = {os.path.abspath(path) for job in jobs for path in (job.image, job.mask) if path is not None}
    if overwritten := sorted(read & set(outputs)):
        raise ValueError(f"`--output` is {args.output}; {overwritten[0]} would be overwritten. Give another folder.")


def check_writable(folder: Path) -> None:
    """Make the folder, and refuse it if no file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`--output`: no file can be written to {folder}: {error}.") from error


# What was done before


def describe_job(job: Job, args: argparse.Namespace) -> dict | None:
    """Describe everything that the outputs of a job depend on; `None` if a file is missing.

    Files are described by name and time of change, so that the folder can be moved between two runs.
    """
    try:
        files = [path and [path.name, path.stat().st_mtime_ns] for path in (job.image, job.mask)]
    except (OSError, ValueError):  # the latter for names that no file can have
        return None
    options = {name: getattr(args, name) for name in (*PIPELINE_OPTIONS, "model", "lora", "dtype", "quality")}
    return {"files": files, "prompt": job.prompt, "task": job.task, "seed": job.seed, **options}


def is_done(job: Job, args: argparse.Namespace, record: dict) -> bool:
    """Tell whether the outputs of a job exist and were made from what the job describes."""
    made_from = describe_job(job, args)
    is_recorded = made_from is not None and record.get(name_output(job, args)) == made_from
    return is_recorded and all(path.exists() for path in list_outputs(job, args))


def name_output(job: Job, args: argparse.Namespace) -> str:
    """Name the output of a job in the record by its path from the output folder."""
    return Path(os.path.relpath(job.output, args.output)).as_posix()


def read_record(folder: Path) -> dict[str, dict | None]:
    """Read what each output in the folder was made from."""
    record: dict[str, dict | None] = {}
    path = folder / RECORD_FILE
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError, TypeError):  # a run that was killed may have left a part of a line
            record |= json.loads(line)
    return record


def write_record(job: Job, args: argparse.Namespace, made_from: dict | None) -> None:
    """Add a line to the record. It starts with a line break, because a killed run may have left a part of a line."""
    with (args.output / RECORD_FILE).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({name_output(job, args): made_from}) + "\n")


# The work


def load_pipeline(args: argparse.Namespace):
    """Load the pipeline, and the adapter if one was given."""
    import torch

    from ..pipelines.pipeline_editar import EditARPipeline

    dtype = {}
    if args.dtype is not None:
        dtype = {"dtype": "auto" if args.dtype == "auto" else getattr(torch, args.dtype)}
    pipeline = EditARPipeline.from_pretrained(args.model, **dtype)
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def open_image(path: Path):
    """Open an image. For broken headers PIL raises many kinds of errors, and not all of them name the file."""
    from PIL import Image

    try:
        return Image.open(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} does not open as an image: {error}") from error


def list_outputs(job: Job, args: argparse.Namespace) -> list[Path]:
    """List the files that a job writes."""
    count = args.num_images_per_prompt or 1
    if count == 1:
        return [job.output]
    return [job.output.with_stem(f"{job.output.stem}-{index}") for index in range(count)]


def choose_save_options(path: Path, quality: int | None) -> dict:
    """Choose the format and Pillow's options for it.

    Raises:
        ValueError: If `quality` is given for a format that has none.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    if quality is None:
        return {"format": kind, **SAVE_OPTIONS.get(kind, {})}
    if kind not in SAVE_OPTIONS:
        raise ValueError(f"`--quality` is {quality}, but {path} has none; leave it out, or write .jpg, .avif or .webp.")
    return {"format": kind, **SAVE_OPTIONS[kind], "quality": quality, "lossless": False}


def edit(pipeline, job: Job, args: argparse.Namespace) -> None:
    """Edit one image and write the results."""
    import torch

    given = {name: getattr(args, name) for name in PIPELINE_OPTIONS if getattr(args, name) is not None}
    with open_image(job.image) as image, nullcontext() if job.mask is None else open_image(job.mask) as mask:
        generator = torch.Generator().manual_seed(job.seed)
        images = pipeline(job.prompt, image=image, task=job.task, mask_image=mask, generator=generator, **given).images
    for edited, path in zip(images, list_outputs(job, args), strict=True):
        save_image(edited, path, args.quality)


def save_image(image, path: Path, quality: int | None) -> None:
    """Save an image with its colour profile, which not every format takes from the image itself."""
    with atomic_path(path) as unfinished:
        image.save(unfinished, icc_profile=image.info.get("icc_profile"), **choose_save_options(path, quality))
