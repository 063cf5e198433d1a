"""`editar-hf edit`: one picture and one instruction, or a folder of pictures and a file of instructions."""

import argparse
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path


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
    summary = "edit a picture, or a folder of pictures"
    description = (
        f"{summary.capitalize()}. A line of the file of prompts is a JSON object with `image`, a name in the folder, "
        "and `prompt`, and where wanted `output`, `task`, `seed` and `mask`, again a name in the folder. Edits whose "
        "output is there are skipped; one that fails is reported, the others go on, and the exit status is 1."
    )
    parser = subparsers.add_parser("edit", help=summary, description=description)
    parser.add_argument("--model", metavar="M", required=True, help="the pipeline, a folder or Hub id")
    parser.add_argument("--image", metavar="PATH", type=Path, required=True, help="a picture; with --prompts, a folder")
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument("--prompt", metavar="P", help="what to do")
    wish.add_argument("--prompts", metavar="FILE", type=Path, help="JSON lines: what to do with which picture")
    parser.add_argument("--mask", metavar="FILE", type=Path, help="white where the picture may change")
    parser.add_argument("--task", metavar="T", default="edit", help="edit, canny, depth or segmentation; default: edit")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the sampling; default: 0")
    parser.add_argument(
        "--output", metavar="PATH", type=Path, required=True, help="the picture to write; with --prompts, a folder"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Edit one picture, or all that are not there yet; exit status 1 where one failed."""
    if args.prompts is None:
        job = Job(args.image, args.prompt, args.output, args.task, args.seed, args.mask)
        check_seed("`--seed`", job.seed)
        check_output(job.output)
        edit(load_pipeline(args.model), job)
        return 0
    jobs = read_jobs(args)
    waiting = [job for job in jobs if not job.output.exists()]
    print(f"{len(jobs)} edits, {len(jobs) - len(waiting)} of them done before")
    failures = run_jobs(args.model, waiting)
    for job, error in failures:
        print(f"{job.image}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{len(waiting) - len(failures)} done, {len(failures)} failed")
    return 1 if failures else 0


def run_jobs(model: str, jobs: list[Job]) -> list[tuple[Job, Exception]]:
    """Edit picture after picture; return those that failed, with the reason."""
    from tqdm import tqdm

    failures = []
    pipeline = load_pipeline(model) if jobs else None
    for job in tqdm(jobs, unit="edit", disable=None):
        try:
            edit(pipeline, job)
        except Exception as error:  # whatever is wrong with one picture, the others are not
            failures.append((job, error))
    return failures


def read_jobs(args: argparse.Namespace) -> list[Job]:
    """Read the file of prompts.

    Raises:
        ValueError: If a line is not what it should be, or two lines write the same file.
    """
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    jobs = [read_job(args, line, f"{args.prompts}, line {k}") for k, line in enumerate(lines, 1) if line.strip()]
    twice = [str(path) for path, count in Counter(job.output for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"`--prompts` {args.prompts} writes {twice[0]} more than once; give those lines an `output`.")
    return jobs


def read_job(args: argparse.Namespace, line: str, place: str) -> Job:
    """Read one line; what it leaves out, the command's arguments say."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"`--prompts` {place} is no JSON: {error}.") from error
    kinds = {"image": str, "prompt": str, "output": str, "task": str, "seed": int, "mask": str}
    is_sound = isinstance(entry, dict) and {"image", "prompt"} <= entry.keys() <= kinds.keys()
    if not is_sound or not all(isinstance(value, kinds[name]) for name, value in entry.items()):
        raise ValueError(
            f"`--prompts` {place} is {line.strip()!r}; give an object with `image` and `prompt`, and where wanted "
            "`output`, `task`, `seed`, `mask`."
        )
    output = args.output / entry.get("output", f"{Path(entry['image']).stem}.png")
    check_output(output)
    mask = args.image / entry["mask"] if "mask" in entry else args.mask
    task, seed = entry.get("task", args.task), entry.get("seed", args.seed)
    check_seed(f"`--prompts` {place}: `seed`", seed)
    return Job(args.image / entry["image"], entry["prompt"], output, task, seed, mask)


def check_output(path: Path) -> None:
    """Refuse a file name that says no picture format, before any work."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"`--output` is {path}; end it in a picture format such as .png.")


def check_seed(name: str, seed: int) -> None:
    """Refuse a seed that torch does not take, before any work."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name} is {seed}; pass one from -2**63 to 2**64 - 1.")


def load_pipeline(model: str):
    """Load the pipeline onto the GPU if there is one."""
    import torch

    from ..pipeline_editar import EditARPipeline

    pipeline = EditARPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_picture(path: Path):
    """Open a picture. What PIL raises for a broken header is of many kinds, and not all of it names the file."""
    from PIL import Image

    try:
        return Image.open(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no picture that opens: {error}") from error


def edit(pipeline, job: Job) -> None:
    """Edit one picture and write it, at its own size, under a temporary name first."""
    import torch

    with open_picture(job.image) as image, nullcontext() if job.mask is None else open_picture(job.mask) as mask:
        generator = torch.Generator().manual_seed(job.seed)
        how = {"task": job.task, "mask_image": mask, "restore_size": True, "generator": generator}
        edited = pipeline(job.prompt, image=image, **how).images[0]
    job.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = job.output.with_name(f".unfinished-{job.output.name}")
    edited.save(unfinished)
    unfinished.replace(job.output)
