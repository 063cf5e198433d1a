"""Serve several replicas of the HTTP server of `editar-hf serve` behind one address, with Ray Serve:

    pip install 'ray[serve]'
    python examples/ray_serve/serve_replicas.py --model examples/scene-editor --num-replicas 2 --port 8000

Each replica has its own pipeline, and its own GPU if there are GPUs.
"""

import argparse
from pathlib import Path

import torch
from fastapi import FastAPI
from ray import serve

from editar_hf import EditARPipeline
from editar_hf.serving.app import create_app
from editar_hf.serving.worker import Worker


def main() -> None:
    """Serve until the process is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline folder or Hub id")
    parser.add_argument("--num-replicas", type=int, default=2)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", help="key that clients must send")
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    # Replicas have another working directory.
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model

    def create_replica_app() -> FastAPI:
        """Load the pipeline in the process of a replica, before the replica gets requests."""
        pipeline = EditARPipeline.from_pretrained(model).to("cuda" if has_gpu else "cpu")
        pipeline.set_progress_bar_config(disable=True)
        return create_app(Worker(lambda: pipeline), Path(model).name, args.api_key)

    deployment = serve.deployment(
        serve.ingress(create_replica_app)(),
        name="editar-hf",
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(has_gpu)},
        # The application limits its own queue, and answers with status 429.
        max_ongoing_requests=100,
    )
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(deployment.bind(), blocking=True)


if __name__ == "__main__":
    main()
