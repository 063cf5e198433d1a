"""Load `editar-hf serve` on loopback: throughput and latency for 1, 4 and 16 clients, then mixed requests for minutes.

The sticker editor is served in batches of at most 8, and one by one. Each client sends its next edit when it has
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

from editar_hf.packing import explain_missing_kernel


ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "projects/stickers/sticker-copy-lora"
PHOTO = (ROOT / "projects/stickers/photo.png").read_bytes()
PROMPTS = ("make the red circle blue", "add a green square", "remove the red circle")
SERVERS = {"batches of at most 8": 8, "one by one": 1}
NUM_CLIENTS = (1, 4, 16)
# Longer than any request of this load takes, if the server does not lose it.
STUCK_SECONDS = 120


class Server:
    """`editar-hf serve` in a process of its own, with its log in a file."""

    def __init__(self, max_batch_size: int, log: Path, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        program = Path(sys.executable).with_name("editar-hf")
        command = [program, "serve", "--model", ROOT / "projects/stickers/sticker-editor", "--port", str(self.port)]
        command += ["--max-batch-size", str(max_batch_size), *options]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file)
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

    def read_metrics(self) -> dict[str, float]:
        lines = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text.splitlines()
        values = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in values}


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
        metrics = server.read_metrics()
        batch = metrics["editar_hf_batch_images_sum"] / metrics["editar_hf_batch_images_count"]
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


def draw_upload(num_images: int = 1000) -> dict[str, bytes]:
    """Draw one of many versions of the photograph, so that the server cannot keep the source caches of all."""
    rotated = Image.open(io.BytesIO(PHOTO)).convert("RGBA").rotate(0.36 * random.randrange(num_images))
    files = {"image": io.BytesIO()}
    rotated.convert("RGB").save(files["image"], "PNG", compress_level=1)
    if random.random() < 0.3:
        # Inside the part that the model sees at each of the sizes.
        left, top = random.randrange(120, 140), random.randrange(140)
        rotated.putalpha(255)
        rotated.paste((0, 0, 0, 0), (left, top, left + 100, top + 100))
        files["mask"] = io.BytesIO()
        rotated.save(files["mask"], "PNG", compress_level=1)
    return {name: file.getvalue() for name, file in files.items()}


def send_good(client: httpx.Client) -> str:
    """Ask for an edit, some with a mask, an adapter, another size or as a stream, and read it to its end."""
    fields = {"prompt": random.choice(PROMPTS), "size": random.choice(("auto", "64x64", "32x64"))}
    if random.random() < 0.3:
        fields["lora"] = "copy"
    if random.random() < 0.3:
        fields |= {"stream": "true", "partial_images": random.randrange(4)}
    with client.stream("POST", "edits", data=fields, files=draw_upload()) as answer:
        text = answer.read().decode()
    is_complete = ("image_edit.completed" if "stream" in fields else '"b64_json"') in text
    return f"{answer.status_code}{'' if is_complete or answer.is_error else ', incomplete'}"


def send_bad(client: httpx.Client) -> str:
    fields, files = random.choice(
        (
            ({"prompt": "a", "style": "vivid"}, {"image": PHOTO}),
            ({"prompt": "a", "lora": "absent"}, {"image": PHOTO}),
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
    return f"{answer.status_code}, left"


def leave_edit(client: httpx.Client) -> str:
    fields = {"prompt": random.choice(PROMPTS), "n": 2, "lora": "copy"}
    try:
        timeout = random.uniform(0.001, 0.3)
        return str(client.post("edits", data=fields, files=draw_upload(), timeout=timeout).status_code)
    except httpx.TimeoutException:
        return "left"


REQUESTS = {
    "good": send_good,
    "bad": send_bad,
    "stream that its client leaves": leave_stream,
    "edit that its client leaves": leave_edit,
}


def measure_soak(minutes: float, folder: Path) -> str:
    """Send mixed requests with 8 clients for some minutes. Return the section as Markdown."""
    server = Server(8, folder / "log", "--lora", f"copy={ADAPTER}")
    counts, memory, end = Counter(), [], time.monotonic() + 60 * minutes

    def send_requests():
        with server.connect() as client:
            while time.monotonic() < end:
                kind = random.choice(list(REQUESTS))
                try:
                    outcome = REQUESTS[kind](client)
                except httpx.TransportError as error:  # A timeout is a request that is stuck.
                    outcome = type(error).__name__
                counts[kind, outcome] += 1

    clients = [threading.Thread(target=send_requests) for _ in range(8)]
    for client in clients:
        client.start()
    for _ in range(12):
        time.sleep(max(0, end - time.monotonic()) / (12 - len(memory)))
        memory.append(server.measure_memory())
    for client in clients:
        client.join()
    with server.connect() as client:
        last, _ = edit(client, 0)
    waiting = server.read_metrics()["editar_hf_waiting_images"]
    text = server.log.read_text()
    status = server.close()
    rows = [[*key, str(count)] for key, count in sorted(counts.items())]
    figures = ", ".join(f"{figure:.0f}" for figure in memory)
    return (
        f"8 clients for {minutes:g} minutes. A quarter of the requests each are good, bad, streams that their clients "
        "leave, and edits that their clients leave. Good requests are of 1,000 different images, in three sizes; 30 % "
        "each have a mask, choose an adapter, and are streams with up to 3 previews.\n\n"
        f"Memory of the server in MiB, at twelve equal intervals: {figures}. It includes up to 1,024 MiB of source "
        f"caches, which fill first. Failures and tracebacks in its log: {text.count('raceback')}. Afterwards, "
        f"{waiting:.0f} images wait, and an edit takes {last:.2f} seconds. The exit status after SIGTERM is {status}."
        f"\n\n{format_table(['request', 'status of the answer', 'number'], rows)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", metavar="N", type=int, default=100, help="edits per row (default: 100)")
    parser.add_argument("--minutes", metavar="N", type=float, default=30, help="of mixed requests (default: 30)")
    args = parser.parse_args()
    machine = describe_machine()
    weights = "packed 16-bit weights" if explain_missing_kernel() is None else "weights of the default dtype"
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            "# The HTTP server under load",
            f"{machine} The sticker editor with {weights}, on all cores, with the default settings of "
            "`editar-hf serve`. Wall-clock time. Made by `python benchmarks/bench_server.py`.",
            "## Throughput and latency",
            measure_load(args.images, Path(folder)),
            "## Mixed requests",
            measure_soak(args.minutes, Path(folder)),
        ]
    write_result("server", "\n\n".join(parts))


if __name__ == "__main__":
    main()
