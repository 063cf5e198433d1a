"""A server for tests, in a thread of their own process."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass

import httpx
import uvicorn

from editar_hf.serving.app import create_app
from editar_hf.serving.worker import BatchSettings, Job, Worker


# That of `docs/serve.md`.
KEY = "a-long-secret"


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 seconds"
        time.sleep(0.01)


@dataclass
class RunningServer:
    """A server in a thread of this process."""

    worker: Worker
    server: uvicorn.Server
    thread: threading.Thread
    url: str

    def wait_until_loaded(self):
        wait_until(lambda: self.worker.pipeline is not None)

    def post(self, path="edits", timeout=20, **arguments) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        # Without TLS, httpx need not read certificates, which would take longer than a request.
        how = {"headers": headers, "timeout": timeout, "verify": False}
        return httpx.post(f"{self.url}/v1/images/{path}", **how, **arguments)

    @contextlib.contextmanager
    def hold_worker(self):
        """Keep the worker's thread busy, so that all requests meanwhile wait."""
        running, go_on = threading.Event(), threading.Event()

        def report(outcome):
            running.set()
            assert go_on.wait(20)

        settings = BatchSettings((4, 4), False, None, False, False, False, 0)
        self.worker.submit([Job(settings, "hold", None, "text-to-image", None, None, 0, report)])
        assert running.wait(20)
        try:
            yield
        finally:
            go_on.set()

    def wait_for_queue(self, num_images):
        wait_until(lambda: len(self.worker.waiting) == num_images)


@contextlib.contextmanager
def run_server(load_pipeline, max_batch_size=8, max_queue=64, loras=(), api_key=KEY):
    worker = Worker(load_pipeline, max_batch_size, loras=loras)
    config = uvicorn.Config(create_app(worker, "tiny", api_key, max_queue), log_level="warning")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield RunningServer(worker, server, thread, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
