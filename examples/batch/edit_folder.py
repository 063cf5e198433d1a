"""Edit a folder of images with several processes, for example one for each GPU of a machine:

    accelerate launch --config-file examples/accelerate_configs/ddp.yaml --num-processes 8 \
        examples/batch/edit_folder.py --model examples/scene-editor --image photos \
        --prompt "remove the dog" --output edited

Without this configuration file, `accelerate launch` starts a single process on a machine without GPUs.

The options are those of `editar-hf edit`, and so are the results: the number of processes changes no byte of them. If
you start the command again, it skips the edits that are done.
"""

import sys
from datetime import timedelta

import torch
from accelerate import PartialState

from editar_hf.commands import build_parser
from editar_hf.commands.edit import check_jobs, list_jobs, run_jobs


def main() -> int:
    """Run this process's part of the edits. Return 1 if one of them failed."""
    args = build_parser().parse_args(["edit", *sys.argv[1:]])
    is_on_cpu = args.device == "cpu" or not torch.accelerator.is_available()
    # The timeout is how long a process waits for the others at the end.
    state = PartialState(cpu=is_on_cpu, timeout=timedelta(days=30))
    args.device = args.device or str(state.device)
    jobs = list(list_jobs(args))
    check_jobs(args, jobs)
    status = run_jobs(args, jobs[state.process_index :: state.num_processes])
    state.wait_for_everyone()  # The launcher stops all processes when the first one ends with a failure.
    state.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
