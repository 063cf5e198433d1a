"""Load `editar-hf serve` on loopback: throughput and latency for 1, 4 and 16 clients, then mixed requests for minutes.

The shipped checkpoint is served in batches of at most 8, and one by one. Each client sends its next edit when it has
the last one, and all images of both servers are compared. Then 8 clients send good, bad and aborted requests to one
server, while its memory is measured. The results are written to `results/server.md`:

    python benchmarks/bench_server.py
"""

import argparse
import base64
import contextlib
import io
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image
from report import describe_machine, format_table, take_turns, write_result


ROOT = Path(__file__).parents[1]
PHOTO = (ROOT / "examples/photo.png").read_bytes()
PROMPTS = ("make the red circle blue", "add a green square", "remove the red circle")
SERVERS = {"batches of at most 8": 8, "one by one": 1}
NUM_CLIENTS = (1, 4, 16)
# Longer than any request of this load takes, if the server does not lose it.
STUCK_SECONDS = 120


class Server:
    """`editar-hf serve` in a process of its own, with its log in a file."""

    def __init__(self, max_batch_size: int, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        program = Path(sys.executable).with_name("editar-hf")
        command = [program, "serve", "--model", ROOT / "examples/sticker-editor", "--port", str(self.port)]
        with log.open("w") as file:
            self.process = subprocess.Popen([*command, "--max-batch-size", str(max_batch_size)], stderr=file)
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"The server did not start:\n{log.read_text()}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200:
                    return
            time.sleep(0.1)

    def connect(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}/v1/images/", timeout=STUCK_SECONDS)

    def close(self) -> int:
        """Terminate the server as a user does, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STUCK_SECONDS)

    def measure_memory(self) -> float:
        """Measure the memory of the process in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def measure_batch(self) -> float:
        """Measure how many images a batch has had on average."""
        lines = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return float(values["editar_hf_batch_images_sum"]) / float(values["editar_hf_batch_images_count"])


# Throughput and latency


def edit(client: httpx.Client, seed: int) -> tuple[float, np.ndarray]:
    """Edit the photograph. Return the seconds and the image."""
    start = time.perf_counter()
    fields = {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed}
    answer = client.post("edits", data=fields, files={"image": PHOTO}).raise_for_status()
    seconds = time.perf_counter() - start
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    return seconds, np.asarray(image)


def load_server(max_batch_size: int, num_clients: int, num_images: int, folder: Path) -> tuple[list[str], list]:
    """Let clients ask for images in turn. Return the cells of a row, and the images in the order of their seeds."""
    server = Server(max_batch_size, folder / "log")
    try:
        with server.connect() as client, ThreadPoolExecutor(num_clients) as threads:
            list(threads.map(lambda seed: edit(client, seed), range(2 * num_clients)))  # Warm up.
            start = time.perf_counter()
            results = list(threads.map(lambda seed: edit(client, seed), range(num_images)))
            total = time.perf_counter() - start
        batch = server.measure_batch()
    finally:
        server.close()
    seconds = sorted(spent for spent, _ in results)
    late = seconds[int(0.95 * (len(seconds) - 1))]
    cells = [f"{num_images / total:.2f}", f"{statistics.median(seconds):.2f}", f"{late:.2f}", f"{batch:.1f}"]
    return cells, [image for _, image in results]


def measure_load(num_images: int, folder: Path) -> str:
    """Measure both servers in turn for each number of clients. Return the section as Markdown."""
    rows, images = [], []
    for num_clients in NUM_CLIENTS:
        for name in take_turns(SERVERS, 1):
            cells, results = load_server(SERVERS[name], num_clients, num_images, folder)
            rows.append([str(num_clients), name, *cells])
            images.append(results)
    equal = sum(np.array_equal(one, first) for run in images for one, first in zip(run, images[1], strict=True))
    largest = max(np.abs(a.astype(int) - b).max() for run in images for a, b in zip(run, images[1], strict=True))
    header = ["clients", "server", "images per second", "median seconds", "95th percentile", "images per batch"]
    return (
        f"{num_images} edits of a 360×240 photograph for each row, after a warm-up. Clients and server share the "
        f"machine. {equal} of {len(rows) * num_images} images are equal, to the bit, to those made one by one for one "
        f"client; the largest difference of a pixel is {largest} of 255.\n\n{format_table(header, rows)}"
    )


# Mixed requests


def send_good(client: httpx.Client) -> str:
    fields = {"prompt": random.choice(PROMPTS), "size": random.choice(("auto", "64x64", "32x64"))}
    return str(client.post("edits", data=fields, files={"image": PHOTO}).status_code)


def send_bad(client: httpx.Client) -> str:
    fields, files = random.choice(
        (
            ({"prompt": "a", "style": "vivid"}, {"image": PHOTO}),
            ({"prompt": "a"}, {"image": PHOTO[: random.randrange(len(PHOTO))]}),
            ({"prompt": "a", "n": 3}, {"image": os.urandom(1000)}),
            ({"prompt": "a" * 5000}, {"image": PHOTO}),
        )
    )
    return str(client.post("edits", data=fields, files=files).status_code)


def leave_stream(client: httpx.Client) -> str:
    body = {"prompt": random.choice(PROMPTS), "stream": True, "partial_images": 3}
    with client.stream("POST", "generations", json=body) as answer:
        for _ in zip(range(random.randrange(8)), answer.iter_lines(), strict=False):
            pass
    return "left a stream"


def leave_edit(client: httpx.Client) -> str:
    fields = {"prompt": random.choice(PROMPTS), "n": 2}
    with contextlib.suppress(httpx.TimeoutException):
        client.post("edits", data=fields, files={"image": PHOTO}, timeout=random.uniform(0.001, 0.3))
    return "left an edit"


def measure_soak(minutes: float, folder: Path) -> str:
    """Send mixed requests with 8 clients for some minutes. Return the section as Markdown."""
    server = Server(8, folder / "log")
    counts, memory, end = Counter(), [], time.monotonic() + 60 * minutes

    def send_requests():
        with server.connect() as client:
            while time.monotonic() < end:
                send = random.choice((send_good, send_bad, leave_stream, leave_edit))
                try:
                    counts[send(client)] += 1
                except httpx.TimeoutException:
                    counts["stuck"] += 1
                except httpx.TransportError as error:
                    counts[type(error).__name__] += 1

    clients = [threading.Thread(target=send_requests) for _ in range(8)]
    for client in clients:
        client.start()
    while time.monotonic() < end:
        time.sleep(60 * minutes / 12)
        memory.append(server.measure_memory())
    for client in clients:
        client.join()
    with server.connect() as client:
        last, _ = edit(client, 0)
    text = server.log.read_text()
    status = server.close()
    rows = [[name, str(count)] for name, count in sorted(counts.items())]
    figures = ", ".join(f"{figure:.0f}" for figure in memory)
    return (
        f"8 clients for {minutes:g} minutes; a quarter of the requests each are good, bad, streams and edits whose "
        f"clients leave. Memory of the server in MiB, at twelve equal intervals: {figures}. Lines with a traceback in "
        f"its log: {text.count('raceback')}. Afterwards, an edit takes {last:.2f} seconds. The exit status after "
        f"SIGTERM is {status}.\n\n{format_table(['status of the answer', 'requests'], rows)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", metavar="N", type=int, default=100, help="edits per row (default: 100)")
    parser.add_argument("--minutes", metavar="N", type=float, default=30, help="of mixed requests (default: 30)")
    args = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            "# The HTTP server under load",
            f"{machine} The shipped checkpoint in the default dtype and weight format, on all cores. Wall-clock time. "
            "Made by `python benchmarks/bench_server.py`.",
            "## Throughput and latency",
            measure_load(args.images, Path(folder)),
            "## Mixed requests",
            measure_soak(args.minutes, Path(folder)),
        ]
    write_result("server", "\n\n".join(parts))


if __name__ == "__main__":
    main()
