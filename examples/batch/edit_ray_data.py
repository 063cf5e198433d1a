"""Edit a folder of images with Ray Data, on one machine or on a cluster:

    pip install 'ray[data]'
    python examples/batch/edit_ray_data.py --num-workers 2 --model examples/scene-editor --image photos \
        --prompt "remove the dog" --output edited

The other options are those of `editar-hf edit`, and so are the results. All machines must find the folders under the
same paths. If you start the command again, it skips the edits that are done.
"""

import argparse
import sys

import ray
import torch

from editar_hf.commands import build_parser
from editar_hf.commands.edit import check_jobs, describe_job, edit, is_done, list_jobs, read_record, write_record
from editar_hf.commands.loading import load_pipeline


class Editor:
    """A worker, with its own pipeline. It edits images, and returns the error of each edit, or an empty text."""

    def __init__(self, args: argparse.Namespace, jobs: list[argparse.Namespace]) -> None:
        self.pipeline, self.jobs = load_pipeline(args), jobs

    def __call__(self, row: dict) -> dict:
        try:
            edit(self.pipeline, self.jobs[row["id"]])
        except Exception as error:  # An error in one edit must not stop the other edits.
            return {**row, "error": f"{type(error).__name__}: {error}"}
        return {**row, "error": ""}


def main() -> int:
    """Share the edits between the workers, and record those that are done. Return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=1, help="number of workers (default: 1)")
    own, words = parser.parse_known_args()
    args = build_parser().parse_args(["edit", *words])
    jobs = list(list_jobs(args))
    check_jobs(args, jobs)
    args.output.mkdir(parents=True, exist_ok=True)
    record = read_record(args.output)
    waiting = [job for job in jobs if not is_done(args.output, job, record)]
    print(f"{len(jobs)} edits, {len(jobs) - len(waiting)} of them done before")
    workers = ray.data.ActorPoolStrategy(size=own.num_workers)
    num_gpus = int(torch.cuda.is_available() and args.device != "cpu")
    edits = ray.data.range(len(waiting)).map(
        Editor, fn_constructor_args=(args, waiting), compute=workers, num_gpus=num_gpus
    )
    num_failed = 0
    for row in edits.iter_rows():
        job = waiting[row["id"]]
        if row["error"]:
            num_failed += 1
            print(f"{job.image}: {row['error']}", file=sys.stderr)
        else:
            write_record(args.output, job, describe_job(job))
    print(f"{len(waiting) - num_failed} done, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
