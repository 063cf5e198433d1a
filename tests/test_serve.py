"""`editar-hf serve`: requests on loopback, through the `openai` client and httpx, to a server with a tiny pipeline."""

import asyncio
import base64
import contextlib
import functools
import io
import itertools
import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image, ImageChops
from processes import PythonProcess, find_free_port
from scripts import STICKERS
from serving import KEY, run_server, wait_until
from test_lora import adapters  # noqa: F401
from tiny import build_pipeline as build_tiny_pipeline
from tiny import draw_image, teach_to_keep

from editar_hf import EditARPipeline
from editar_hf.commands import main
from editar_hf.image_processing_editar import DETAILS
from editar_hf.serving import app, requests, worker
from editar_hf.serving.worker import BatchSettings, Job, Worker


pytestmark = pytest.mark.filterwarnings("ignore:The center crop cuts")
NUM_TOKENS = 16
# Long enough for the prefixes of the tasks.
build_pipeline = functools.partial(build_tiny_pipeline, num_text_tokens=80)


def read_events(caplog, kind):
    """Read the lines of the server's log that tell of requests or batches."""
    lines = [record.message for record in caplog.records if record.name.startswith("editar_hf.serving")]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def served():
    with run_server(build_pipeline) as running:
        running.wait_until_loaded()
        yield running


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def write_image(image, image_format="PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def read_image(text) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def draw_mask(size, box) -> Image.Image:
    """Draw a mask in OpenAI's convention: transparent, with arbitrary color, where the image may change."""
    mask = Image.new("RGBA", size, (200, 30, 60, 255))
    mask.paste((255, 255, 255, 0), box)
    return mask


def seed_generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# Answers


def test_edit_through_the_openai_client_is_that_of_the_pipeline(client, pipe):
    image = draw_image(0, 24, 18)
    answer = client.images.edit(
        image=write_image(image), prompt="make it blue", model="tiny", n=2, user="me", extra_body={"seed": 7}
    )
    expected = pipe("make it blue", image=image, num_images_per_prompt=2, generator=seed_generators(7, 8)).images
    results = [read_image(entry.b64_json) for entry in answer.data]
    assert all(np.array_equal(*pair) for pair in zip(results, expected, strict=True))
    assert not np.array_equal(*results)
    assert (answer.size, answer.output_format, answer.seed) == ("24x18", "png", 7)
    num_text = len(pipe.processor.tokenizer("make it blue").input_ids)
    assert answer.usage.input_tokens_details.to_dict() == {"image_tokens": NUM_TOKENS, "text_tokens": num_text}
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (NUM_TOKENS + num_text, 2 * NUM_TOKENS)
    assert answer.usage.total_tokens == 3 * NUM_TOKENS + num_text


def test_transparent_pixels_of_the_mask_are_edited_and_the_others_stay(client, pipe):
    image, box = draw_image(1), (8, 8, 16, 16)
    mask = draw_mask(image.size, box)
    answer = client.images.edit(
        image=[write_image(image)], mask=write_image(mask), prompt="a hat", extra_body={"seed": 3}
    )
    result = np.asarray(read_image(answer.data[0].b64_json))
    white = Image.new("L", image.size)
    white.paste(255, box)
    assert np.array_equal(result, pipe("a hat", image=image, mask_image=white, generator=seed_generators(3)).images[0])
    assert np.array_equal(result[:4], np.asarray(image)[:4])
    assert not np.array_equal(result[8:, 8:], np.asarray(image)[8:, 8:])


def test_rotated_photo_is_edited_upright_with_an_upright_mask(served, pipe):
    photo, exif, mask = io.BytesIO(), Image.Exif(), draw_mask((16, 24), (4, 8, 12, 16))
    exif[0x0112] = 6  # The camera was turned by 90°.
    draw_image(0, 24, 16).save(photo, "JPEG", exif=exif)
    files = {"image": photo.getvalue(), "mask": write_image(mask)}
    answer = served.post(data={"prompt": "a hat", "seed": 0}, files=files).json()
    white = ImageChops.invert(mask.getchannel("A"))
    (expected,) = pipe("a hat", image=Image.open(photo), mask_image=white, generator=seed_generators(0)).images
    assert expected.size == (16, 24)
    assert np.array_equal(read_image(answer["data"][0]["b64_json"]), expected)


def test_generation_and_formats(client, pipe):
    answer = client.images.generate(
        prompt="a hat", output_format="webp", extra_body={"seed": 5, "guidance_scale": 1.5, "negative_prompt": "red"}
    )
    result = read_image(answer.data[0].b64_json)
    settings = {"guidance_scale": 1.5, "negative_prompt": "red", "generator": seed_generators(5)}
    assert np.array_equal(result.convert("RGB"), pipe("a hat", task="text-to-image", **settings).images[0])
    assert result.format == "WEBP"
    assert answer.usage.input_tokens_details.image_tokens == 0
    sizes = []
    for quality in (10, 90):
        answer = client.images.generate(
            prompt="a hat", size="16x8", output_format="jpeg", output_compression=quality, extra_body={"seed": 5}
        )
        sizes.append(len(answer.data[0].b64_json))
    assert answer.size == "16x8"
    assert read_image(answer.data[0].b64_json).format == "JPEG"
    assert sizes[0] < sizes[1]


def test_missing_seed_is_random_and_returned(client):
    first, second = (client.images.generate(prompt="a hat") for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(prompt="a hat", extra_body={"seed": first.seed})
    assert again.data[0].b64_json == first.data[0].b64_json != second.data[0].b64_json


def test_models_lists_the_served_one(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


# Batches


def list_mixed_calls():
    """List 18 images to ask for in 17 requests, by the arguments of the pipeline; the masks are white."""
    for k in range(4):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (4 * k, 0, 4 * k + 4, 8))
        for call in (
            {"prompt": f"edit {k}", "task": ("edit", "canny")[k // 2]},
            {"prompt": f"masked {k}", "mask_image": mask},
            {"prompt": f"small {k}", "height": 16, "width": 8, "negative_prompt": "no " * k + "more"},
            {"prompt": f"large {k}", "height": 50, "width": 70, "size_policy": "fit"},
        ):
            yield {**call, "image": draw_image(k), "generator": seed_generators(k)}
    yield {"prompt": "two", "guidance_scale": 2.0, "image": draw_image(9), "generator": seed_generators(4, 5)}


async def edit(client, call):
    """Ask the server for the images of a call of the pipeline."""
    fields = {"prompt": call["prompt"], "image": write_image(call["image"]), "n": len(call["generator"])}
    extra = {name: call[name] for name in ("task", "negative_prompt", "guidance_scale") if name in call}
    if "mask_image" in call:
        mask = call["image"].convert("RGBA")
        mask.putalpha(ImageChops.invert(call["mask_image"]))
        fields["mask"] = write_image(mask)
    if "width" in call:
        fields["size"] = f"{call['width']}x{call['height']}"
    return await client.images.edit(**fields, extra_body={"seed": call["generator"][0].initial_seed(), **extra})


def test_requests_that_wait_together_run_in_batches_and_get_the_images_of_each_alone(served, pipe, caplog):
    async def edit_all():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
            with served.hold_worker():
                tasks = [asyncio.create_task(edit(client, call)) for call in list_mixed_calls()]
                await asyncio.to_thread(served.wait_for_queue, 18)
            return await asyncio.gather(*tasks)

    with caplog.at_level(logging.INFO, logger="editar_hf.serving"):
        answers = asyncio.run(edit_all())
        wait_until(lambda: sum(event["images"] for event in read_events(caplog, "batch")) == 19)
    # The first image is that of `hold_worker`.
    assert sorted(event["images"] for event in read_events(caplog, "batch")) == [1, 2, 2, 2, 4, 4, 4]
    for call, answer in zip(list_mixed_calls(), answers, strict=True):
        num_images = len(call["generator"])
        expected = pipe(**call, num_images_per_prompt=num_images).images
        assert [read_image(entry.b64_json).size for entry in answer.data] == [expected[0].size] * num_images
        for entry, image in zip(answer.data, expected, strict=True):
            assert np.array_equal(read_image(entry.b64_json), image), call["prompt"]


class RecordingPipeline(EditARPipeline):
    """A pipeline that keeps the tokens of all images, by their seeds."""

    def __call__(self, **call):
        output = super().__call__(**call)
        for generator, tokens in zip(call["generator"], output.image_tokens, strict=True):
            self.transformer.record[generator.initial_seed()] = tokens.tolist()
        return output


def test_hundred_requests_get_the_tokens_and_images_that_each_gets_alone(caplog):
    def edit(k):
        files = {"image": write_image(draw_image(k % 9))}
        fields = {
            "prompt": f"edit {k}",
            "seed": 10 * k + 1,
            "n": 1 + (k % 10 == 9),
            "task": ("edit", "edit", "canny")[k % 3],
        }
        if k % 4 == 0:
            files["mask"] = write_image(draw_mask((16, 16), (k % 12, 0, k % 12 + 4, 12)))
        if k % 4 == 1:
            fields["size"] = ("16x8", "24x24")[k % 8 // 4]
        if k % 5 == 4:
            fields["negative_prompt"] = f"no {k}"
        answer = running.post(data=fields, files=files, timeout=60)  # The last of them waits for all others.
        assert answer.status_code == 200, answer.text
        return [entry["b64_json"] for entry in answer.json()["data"]]

    results, batches = [], []
    caplog.set_level(logging.INFO, logger="editar_hf.serving")
    for max_batch_size in (1, 8):
        pipeline = RecordingPipeline(**build_pipeline().components)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.transformer.record = record = {}
        caplog.clear()
        load_pipeline = functools.partial(lambda pipeline: pipeline, pipeline)
        with run_server(load_pipeline, max_batch_size, max_queue=111) as running, ThreadPoolExecutor(100) as threads:
            running.wait_until_loaded()
            with running.hold_worker():
                tasks = [threads.submit(edit, k) for k in range(100)]
                running.wait_for_queue(110)
            results.append((record, [task.result() for task in tasks]))
        batches.append([event["images"] for event in read_events(caplog, "batch")])
    alone, together = results
    assert batches[0] == [1] * 111  # One image held the worker.
    assert sum(batches[1]) == 111
    assert len(batches[1]) < 30
    assert len(set(map(str, alone[0].values()))) > 100  # Masks can leave a single token to choose.
    assert together == alone


def test_a_model_of_several_aspect_ratios_edits_each_image_at_its_own():
    def load_pipeline():
        pipeline = build_pipeline()
        pipeline.processor.image_processor.aspect = "source"
        return pipeline

    pipe, sizes = load_pipeline(), [(36, 24), (24, 36), (45, 30), (16, 16)]
    with run_server(load_pipeline) as running, ThreadPoolExecutor(4) as threads:
        running.wait_until_loaded()
        for task in ("edit", "canny"):
            fields = {"prompt": "a hat", "seed": 0, "task": task}
            files = [{"image": write_image(draw_image(0, *size))} for size in sizes]
            with running.hold_worker():
                answers = [threads.submit(running.post, data=fields, files=file) for file in files]
                running.wait_for_queue(4)
            for size, answer in zip(sizes, (answer.result().json() for answer in answers), strict=True):
                expected = pipe("a hat", image=draw_image(0, *size), task=task, generator=seed_generators(0)).images[0]
                assert np.array_equal(read_image(answer["data"][0]["b64_json"]), expected)
                assert answer["size"] == f"{size[0]}x{size[1]}"
                assert answer["usage"]["output_tokens"] == (16 if size == (16, 16) else 12)
        # A size that is asked for is the size of the result, cropped as before.
        answer = running.post(data={"prompt": "a hat", "seed": 0, "size": "16x8"}, files=files[0]).json()
        image = draw_image(0, 36, 24)
        expected = pipe("a hat", image=image, height=8, width=16, generator=seed_generators(0)).images[0]
        assert np.array_equal(read_image(answer["data"][0]["b64_json"]), expected)


@pytest.mark.parametrize("size", ["auto", "16x16", "20x20"])
def test_the_rest_of_an_image_is_kept_without_a_mask_at_every_size(size):
    def load_pipeline():
        pipeline = build_pipeline()
        teach_to_keep(pipeline, [draw_image(0), draw_image(0).resize((20, 20), Image.Resampling.LANCZOS)], ["a hat"])
        return pipeline

    with run_server(load_pipeline) as running:
        running.wait_until_loaded()
        fields = {"prompt": "a hat", "seed": 0, "preserve": "auto", "size": size}
        answer = running.post(data=fields, files={"image": write_image(draw_image(0))}).json()
    sides = {} if size == "auto" else {"height": int(size[:2]), "width": int(size[:2])}
    how = {"preserve": "auto", "size_policy": "fit", "generator": seed_generators(0), **sides}
    expected = load_pipeline()("a hat", image=draw_image(0), **how)
    assert expected.preserved_mask != [None]
    assert np.array_equal(read_image(answer["data"][0]["b64_json"]), expected.images[0])
    assert answer["data"][0]["preserved"] is True


def test_an_answer_says_whether_the_edit_may_have_changed_the_whole_image():
    pipe = build_pipeline()
    teach_to_keep(pipe, [draw_image(0)], ["a hat"])
    files = {"image": write_image(draw_image(0))}
    with run_server(lambda: pipe) as running:
        running.wait_until_loaded()
        for value, is_preserved in ((1.0, True), (1e-9, False)):
            pipe.transformer.generation_config.preserve_threshold = value
            fields = {"prompt": "a hat", "seed": 0, "preserve": "auto"}
            answer = running.post(data={**fields, "n": 2}, files=files).json()
            assert [one["preserved"] for one in answer["data"]] == [is_preserved] * 2
            stream = running.post(data={**fields, "stream": True, "partial_images": 1}, files=files)
            partial, completed = (json.loads(line[6:]) for line in stream.text.splitlines() if line[:4] == "data")
            assert ("preserved" in partial, completed["preserved"]) == (False, is_preserved)
        answer = running.post(data={"prompt": "a hat"}, files=files).json()
        assert answer["data"][0].keys() == {"b64_json"}


def test_a_large_image_keeps_its_detail_if_asked(pipe):
    image = draw_image(0, 60, 40)
    with run_server(build_pipeline) as running:
        running.wait_until_loaded()
        fields = {"prompt": "a hat", "seed": 0, "detail": "source"}
        answer = running.post(data=fields, files={"image": write_image(image)}).json()
    images = [pipe("a hat", image=image, detail=how, generator=seed_generators(0)).images[0] for how in DETAILS]
    is_equal = [np.array_equal(read_image(answer["data"][0]["b64_json"]), one) for one in images]
    assert dict(zip(DETAILS, is_equal, strict=True)) == {"model": False, "source": True}


def test_repeated_image_is_encoded_once_while_its_cache_is_kept(pipe, monkeypatch):
    def load_pipeline():
        pipeline = build_pipeline()
        pipeline.vq_model.encoder.register_forward_hook(lambda *inputs: encoded.append(0))
        return pipeline

    def edit(seed, **options):
        """Edit the image of a seed and compare it with that of the pipeline alone."""
        expected = pipe("a hat", image=draw_image(seed), generator=seed_generators(0), **options).images[0]
        fields = {"prompt": "a hat", "seed": 0, "task": options.get("task", "edit")}
        files = {"image": write_image(draw_image(seed))}
        if "mask_image" in options:
            files["mask"] = write_image(draw_mask((16, 16), (4, 4, 8, 8)))
        if "width" in options:
            fields["size"] = f"{options['width']}x{options['height']}"
        answer = running.post(data=fields, files=files)
        assert np.array_equal(read_image(answer.json()["data"][0]["b64_json"]), expected)
        return len(encoded)

    encoded: list[int] = []
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 8, 8))
    with run_server(load_pipeline) as running:
        running.wait_until_loaded()
        assert [edit(1), edit(1), edit(1, mask_image=mask), edit(1, task="canny")] == [1, 1, 1, 1]
        assert edit(1, mask_image=mask, width=16, height=16) == 1
        assert [edit(2), edit(1), edit(2)] == [2, 2, 2]
        assert [edit(1, width=8, height=16), edit(1, width=8, height=16)] == [3, 3]
        fitted = {"width": 70, "height": 50, "size_policy": "fit"}
        assert [edit(1, **fitted), edit(1, **fitted)] == [4, 5]
        with ThreadPoolExecutor(4) as threads, running.hold_worker():
            tasks = [threads.submit(edit, seed) for seed in (1, 2, 3, 1)]
            running.wait_for_queue(4)
        assert [task.result() for task in tasks] == 4 * [6]
        # A cache has 2 layers with keys and values of 32 floats, for 16 tokens of the source and 80 of the null text:
        # 48 KiB. Two have room.
        monkeypatch.setattr(worker, "SOURCE_CACHE_BYTES", 2 * 48 * 1024)
        assert [edit(4), edit(5), edit(4), edit(5)] == [7, 8, 8, 8]
        assert [edit(6), edit(5), edit(4)] == [9, 9, 10]


def test_failed_call_of_a_batch_fails_only_the_image_that_is_at_fault():
    outcomes: queue.Queue = queue.Queue()
    one = Worker(build_pipeline)
    settings = BatchSettings((None, None), False, None, True, False, False, 0)
    images = {"good": draw_image(0), "bad": "not an image", "fine": draw_image(1)}
    one.submit([Job(settings, name, None, "edit", image, None, 0, outcomes.put) for name, image in images.items()])
    one.start()
    ended = {outcome.job.prompt: outcome for outcome in (outcomes.get(timeout=20) for _ in images)}
    one.close()
    assert isinstance(ended["bad"].error, ValueError)
    assert ended["good"].image.size == ended["fine"].image.size == (16, 16)


# Adapters


def test_requests_that_wait_together_get_the_images_of_their_own_adapters(adapters, caplog):  # noqa: F811
    def load_pipeline(*loras):
        pipeline = build_pipeline()
        for lora in loras:
            pipeline.load_lora_weights(adapters / lora, adapter_name=lora)
        return pipeline

    def edit(lora):
        fields = {"prompt": "a hat", "n": 2, "seed": 5} | ({"lora": lora} if lora else {})
        return running.post(data=fields, files={"image": IMAGE})

    loras = ("plain", "text", "narrow", "dora")  # The third one is rsLoRA.
    expected = {
        lora: load_pipeline(*[lora] * (lora is not None))(
            "a hat", image=draw_image(0), num_images_per_prompt=2, generator=seed_generators(5, 6)
        ).images
        for lora in (None, *loras)
    }
    assert not any(np.array_equal(expected[a][0], expected[b][0]) for a, b in itertools.combinations(expected, 2))
    caplog.set_level(logging.INFO, logger="editar_hf.serving")
    with run_server(lambda: load_pipeline(*loras), loras=loras) as running, ThreadPoolExecutor(10) as threads:
        running.wait_until_loaded()
        with running.hold_worker():
            together = [threads.submit(edit, lora) for lora in 2 * list(expected)]
            running.wait_for_queue(20)
        answers = [*(one.result() for one in together), *(edit(lora) for lora in 2 * list(expected))]
        refused = running.post(data={"prompt": "a hat", "lora": "../text"}, files={"image": IMAGE})
    assert sorted(event["images"] for event in read_events(caplog, "batch")) == [1] + 10 * [2] + 5 * [4]
    for lora, answer in zip(4 * list(expected), answers, strict=True):
        for entry, image in zip(answer.json()["data"], expected[lora], strict=True):
            assert np.array_equal(read_image(entry["b64_json"]), image), lora
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "lora")
    assert "plain, text, narrow, dora" in error["message"]


# Streams


@pytest.mark.parametrize("num_previews", [0, 1, 3])
def test_stream_sends_previews_and_then_the_image_of_the_same_request_unstreamed(num_previews, client, pipe):
    image = draw_image(2)
    arguments = {"image": write_image(image), "prompt": "a hat", "extra_body": {"seed": 4}}
    *partial, completed = client.images.edit(stream=True, partial_images=num_previews, **arguments)
    assert [event.type for event in partial] == ["image_edit.partial_image"] * num_previews
    assert [event.partial_image_index for event in partial] == list(range(num_previews))
    unstreamed = client.images.edit(**arguments)
    assert (completed.type, completed.b64_json) == ("image_edit.completed", unstreamed.data[0].b64_json)
    assert (completed.size, completed.seed) == ("16x16", 4)
    assert completed.usage.to_dict() == unstreamed.usage.to_dict()
    if num_previews == 3:  # A preview after each of the first three rows of tokens: 4 pixels are decoded, then 8, 12.
        previews = [np.asarray(read_image(event.b64_json)) for event in partial]
        assert np.array_equal(previews[0][8:], np.asarray(image)[8:])
        assert not np.array_equal(previews[1][4:8], np.asarray(image)[4:8])


def test_stream_of_a_generation_has_its_own_names(client):
    *partial, completed = client.images.generate(prompt="a hat", stream=True, partial_images=1)
    assert [event.type for event in (*partial, completed)] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]


@pytest.fixture(scope="module")
def slow():
    """A server whose images take 256 passes of at least 4 milliseconds, and the number of passes so far."""
    passes = []

    def load_pipeline():
        pipeline = build_pipeline(grid_size=16)

        def note_pass(*inputs):
            passes.append(time.sleep(0.004))

        pipeline.transformer.register_forward_hook(note_pass)
        return pipeline

    with run_server(load_pipeline) as running:
        running.wait_until_loaded()
        yield running, passes


def leave_after_first_event(running, body):
    headers = {"Authorization": f"Bearer {KEY}"}
    path = f"{running.url}/v1/images/generations"
    with httpx.stream("POST", path, headers=headers, json={**body, "stream": True, "partial_images": 3}) as answer:
        assert next(answer.iter_lines()) == "event: image_generation.partial_image"


def test_image_stops_when_its_client_leaves(slow):
    running, passes = slow
    leave_after_first_event(running, {"prompt": "a hat"})
    assert running.post("generations", json={"prompt": "a hat", "size": "4x4"}).status_code == 200
    assert 64 <= len(passes) < 200


def test_unstreamed_image_stops_when_its_client_leaves(slow):
    running, passes = slow
    before = len(passes)
    with pytest.raises(httpx.ReadTimeout):
        running.post("generations", json={"prompt": "a hat"}, timeout=0.3)
    assert running.post("generations", json={"prompt": "a hat", "size": "4x4"}).status_code == 200
    assert len(passes) - before < 200


def test_batch_goes_on_for_the_clients_that_stay(slow):
    running, passes = slow
    streams = []

    def stay():
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
        extra = {"extra_body": {"seed": 1}}
        streams.append(list(client.images.generate(prompt="a coat", stream=True, partial_images=3, **extra)))

    with running.hold_worker():
        threads = [threading.Thread(target=stay)]
        threads.append(threading.Thread(target=leave_after_first_event, args=(running, {"prompt": "a hat"})))
        for thread in threads:
            thread.start()
        running.wait_for_queue(2)
        before = len(passes)
    for thread in threads:
        thread.join(20)
    assert len(passes) - before < 2 * 256
    alone = build_pipeline(grid_size=16)("a coat", task="text-to-image", generator=seed_generators(1)).images[0]
    assert len(streams[0]) == 4
    assert np.array_equal(read_image(streams[0][-1].b64_json), alone)


# Errors

IMAGE = write_image(draw_image(0))
CASES = {
    "no prompt": ({}, {"image": IMAGE}, 400, "prompt"),
    "empty prompt": ({"prompt": " "}, {"image": IMAGE}, 400, "prompt"),
    "long prompt": ({"prompt": "red " * 90}, {"image": IMAGE}, 400, "prompt"),
    "endless prompt": ({"prompt": "red " * 9000}, {"image": IMAGE}, 400, "prompt"),
    "long negative prompt": ({"prompt": "a", "negative_prompt": "red " * 90}, {"image": IMAGE}, 400, "negative_prompt"),
    "no image": ({"prompt": "a"}, {}, 400, None),
    "path as image": ({"prompt": "a", "image": "/etc/hostname"}, {"x": IMAGE}, 400, "image"),
    "url as image": ({"prompt": "a", "image": "http://127.0.0.1/a.png"}, {"x": IMAGE}, 400, "image"),
    "two images": ({"prompt": "a"}, [("image[]", IMAGE), ("image[]", IMAGE)], 400, "image"),
    "text as image file": ({"prompt": "a"}, {"image": b"hello"}, 400, "image"),
    "half an image": ({"prompt": "a"}, {"image": write_image(draw_image(0, 64, 64))[:6000]}, 400, "image"),
    "thin image": ({"prompt": "a"}, {"image": write_image(draw_image(0, 400, 1))}, 400, "image"),
    "gif": ({"prompt": "a"}, {"image": write_image(draw_image(0), "GIF")}, 400, "image"),
    "large image": ({"prompt": "a"}, {"image": write_image(Image.new("1", (5000, 5000)))}, 413, "image"),
    "bomb": ({"prompt": "a"}, {"image": write_image(Image.new("1", (20000, 20000)))}, 413, "image"),
    "file as prompt": ({}, {"prompt": b"a", "image": IMAGE}, 400, "prompt"),
    "unknown field": ({"prompt": "a", "style": "vivid"}, {"image": IMAGE}, 400, "style"),
    "unknown task": ({"prompt": "a", "task": "draw"}, {"image": IMAGE}, 400, "task"),
    "preserve in words": ({"prompt": "a", "preserve": "yes"}, {"image": IMAGE}, 400, "preserve"),
    "preserve and a mask": ({"prompt": "a", "preserve": "auto"}, {"image": IMAGE, "mask": IMAGE}, 400, "preserve"),
    "preserve and a map": ({"prompt": "a", "preserve": "auto", "task": "depth"}, {"image": IMAGE}, 400, "preserve"),
    "detail of a map": ({"prompt": "a", "detail": "source", "task": "depth"}, {"image": IMAGE}, 400, "detail"),
    "detail and a size": ({"prompt": "a", "detail": "source", "size": "64x64"}, {"image": IMAGE}, 400, "detail"),
    "eleven images": ({"prompt": "a", "n": 11}, {"image": IMAGE}, 400, "n"),
    "huge size": ({"prompt": "a", "size": "9999x2000"}, {"image": IMAGE}, 400, "size"),
    "size in words": ({"prompt": "a", "size": "large"}, {"image": IMAGE}, 400, "size"),
    "quality": ({"prompt": "a", "quality": "high"}, {"image": IMAGE}, 400, "quality"),
    "url as answer": ({"prompt": "a", "response_format": "url"}, {"image": IMAGE}, 400, "response_format"),
    "compressed png": ({"prompt": "a", "output_compression": 5}, {"image": IMAGE}, 400, "output_compression"),
    "guidance nan": ({"prompt": "a", "guidance_scale": "nan"}, {"image": IMAGE}, 400, "guidance_scale"),
    "negative seed": ({"prompt": "a", "seed": -1}, {"image": IMAGE}, 400, "seed"),
    "previews unstreamed": ({"prompt": "a", "partial_images": 2}, {"image": IMAGE}, 400, "partial_images"),
    "streamed pair": ({"prompt": "a", "n": 2, "stream": "true"}, {"image": IMAGE}, 400, "n"),
    "other model": ({"prompt": "a", "model": "gpt-image-1"}, {"image": IMAGE}, 404, "model"),
    "opaque mask": ({"prompt": "a"}, {"image": IMAGE, "mask": IMAGE}, 400, "mask"),
    "mask of another size": (
        {"prompt": "a"},
        {"image": IMAGE, "mask": write_image(draw_mask((8, 8), (0, 0, 4, 4)))},
        400,
        "mask",
    ),
    "mask without holes": (
        {"prompt": "a"},
        {"image": IMAGE, "mask": write_image(Image.new("RGBA", (16, 16), "red"))},
        400,
        "mask",
    ),
    "mask outside the crop": (
        {"prompt": "a"},
        {"image": write_image(draw_image(0, 64, 16)), "mask": write_image(draw_mask((64, 16), (0, 0, 8, 8)))},
        400,
        "mask",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_request_is_refused_by_the_name_of_the_field(case, served):
    fields, files, status, param = CASES[case]
    answer = served.post(data=fields, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert not any(word in answer.text for word in ("Traceback", "pattern"))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": 3}', b"\xff"]
)
def test_bad_json_is_refused(body, served):
    answer = served.post("generations", content=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_unknown_paths_and_methods_have_errors_of_the_same_shape(served):
    for path, status in (("/v1/nothing", 404), ("/v1/images/edits", 405)):
        answer = httpx.get(served.url + path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_large_bodies_are_refused_with_and_without_a_length(served, monkeypatch):
    monkeypatch.setattr(requests, "MAX_BODY_BYTES", 50_000)
    parts = [b"x" * 1000] * 100
    for content in (b"".join(parts), iter(parts)):
        assert served.post("generations", content=content).status_code == 413
    assert served.post(data={"prompt": "a"}, files={"image": b"x" * 100_000}).status_code == 413


@pytest.mark.parametrize("key", [None, KEY[:-1], KEY + "2", "kéy"])
def test_wrong_key_gets_401_before_the_body_is_read(key, served):
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    for method, path in (("POST", "/v1/images/edits"), ("POST", "/v1/images/generations"), ("GET", "/v1/models")):
        answer = httpx.request(method, served.url + path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_full_queue_gets_429_and_leaving_frees_the_place():
    with run_server(build_pipeline, max_batch_size=1, max_queue=1) as running:
        running.wait_until_loaded()
        with running.hold_worker():
            for _ in range(2):  # These clients wait for half a second, and leave.
                with pytest.raises(httpx.ReadTimeout):
                    running.post("generations", json={"prompt": "a", "n": 2}, timeout=0.5)
            running.wait_for_queue(0)
            waiting = threading.Thread(target=running.post, args=["generations"], kwargs={"json": {"prompt": "a"}})
            waiting.start()
            running.wait_for_queue(1)
            refused = running.post("generations", json={"prompt": "a", "n": 2})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            assert running.post("generations", json={"prompt": "a", "n": 11}).status_code == 400
        waiting.join(20)
        assert running.post("generations", json={"prompt": "a", "n": 2}).status_code == 200


@pytest.mark.parametrize("is_reader", [False, True])
def test_client_that_stalls_loses_its_place(is_reader, monkeypatch):
    """Two clients take all places. They stop in the middle of their requests, or do not read their answers."""
    monkeypatch.setattr(app, "CLIENT_SECONDS", 1)
    body = json.dumps({"prompt": "a", "stream": True, "size": "1000x1000", "partial_images": 3})
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    text = f"{head}Content-Length: {len(body)}\r\n\r\n{body if is_reader else body[:9]}"
    with run_server(build_pipeline, max_batch_size=1, max_queue=1) as running, contextlib.ExitStack() as stack:
        running.wait_until_loaded()
        # The system shall not buffer whole answers.
        running.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for _ in range(2):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
            client.sendall(text.encode())
        wait_until(lambda: running.post("generations", json={"prompt": "a"}).status_code == 429)
        wait_until(lambda: running.post("generations", json={"prompt": "a"}).status_code == 200)


def test_requests_get_503_while_the_model_loads():
    loaded = threading.Event()

    def load_pipeline():
        assert loaded.wait(20)
        return build_pipeline()

    with run_server(load_pipeline) as running:
        time.sleep(0.05)
        assert httpx.get(f"{running.url}/health").status_code == 503
        answer = running.post("generations", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert int(answer.headers["retry-after"]) >= 1
        loaded.set()
        running.wait_until_loaded()
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


def test_failure_of_the_model_is_an_error_of_the_server_and_its_log_has_the_place(caplog):
    def load_pipeline():
        pipeline = build_pipeline()
        pipeline.text_encoder.shared.weight.data.fill_(float("nan"))
        return pipeline

    with run_server(load_pipeline) as running:
        running.wait_until_loaded()
        answer = running.post("generations", json={"prompt": "secretword"})
        event, data = running.post("generations", json={"prompt": "secretword", "stream": True}).text.splitlines()[:2]
    error = {"message": "The model failed. The log of the server has the reason.", "type": "server_error"}
    assert (answer.status_code, answer.json()["error"]) == (500, {**error, "param": None, "code": None})
    assert (event, json.loads(data.removeprefix("data: "))["error"]["type"]) == ("event: error", "server_error")
    failures = read_events(caplog, "failure")
    assert [failure["error"] for failure in failures] == ["RuntimeError"] * 2
    assert all("encode_prompt" in failure["traceback"] and "secretword" not in str(failure) for failure in failures)


def test_log_has_neither_prompts_nor_images(served, caplog):
    with caplog.at_level(logging.INFO):
        served.post(data={"prompt": "secretword"}, files={"image": IMAGE})
        served.post(data={"prompt": "secretword " * 90}, files={"image": IMAGE})
        httpx.get(f"{served.url}/secretword")
        wait_until(lambda: len(read_events(caplog, "request")) == 3)
    assert sorted(event["status"] for event in read_events(caplog, "request")) == [200, 400, 404]
    assert not [record for record in caplog.records if "secretword" in record.getMessage() and record.name != "httpx"]


def test_metrics_count_requests_images_and_batches(tmp_path):
    with run_server(build_pipeline, max_batch_size=2) as running:
        running.wait_until_loaded()
        with running.hold_worker():
            waiting = threading.Thread(
                target=running.post, args=["generations"], kwargs={"json": {"prompt": "a", "n": 3}}
            )
            waiting.start()
            running.wait_for_queue(3)
            assert "editar_hf_waiting_images 3.0" in httpx.get(f"{running.url}/metrics").text
        waiting.join(20)
        running.post("generations", json={})
        text = httpx.get(f"{running.url}/metrics").text
    path = 'path="/v1/images/generations"'
    assert f'editar_hf_request_seconds_count{{{path},status="200"}} 1.0' in text
    assert f'editar_hf_request_seconds_count{{{path},status="400"}} 1.0' in text
    assert "editar_hf_waiting_images 0.0" in text
    assert "editar_hf_batch_images_sum 4.0" in text  # One image held the worker.
    assert 'editar_hf_batch_images_bucket{le="1.0"} 2.0' in text
    assert "editar_hf_batch_seconds_count 3.0" in text


# Shutdown


def test_shutdown_finishes_what_has_begun():
    answers = []
    with run_server(build_pipeline) as running:
        running.wait_until_loaded()
        with running.hold_worker():
            body = {"json": {"prompt": "a hat", "n": 2}}
            client = threading.Thread(target=lambda: answers.append(running.post("generations", **body)))
            client.start()
            running.wait_for_queue(2)
            running.server.should_exit = True
            time.sleep(0.3)
        client.join(20)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["data"]) == 2


# The command


def test_command_serves_a_folder_until_it_is_terminated():
    port = find_free_port()
    environment = {**os.environ, "EDITAR_HF_API_KEY": KEY}
    model, adapter = STICKERS / "sticker-editor", STICKERS / "sticker-copy-lora"
    words = ["serve", "--model", model, "--lora", f"copy={adapter}", "--port", port]
    process = PythonProcess("-m", "editar_hf.commands", *words, environment=environment)
    health = None
    while health != 200:
        assert process.is_running(), process.read("stderr")
        time.sleep(0.1)
        with contextlib.suppress(httpx.TransportError):
            health = httpx.get(f"http://127.0.0.1:{port}/health").status_code
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY)
    photo, prompt = STICKERS / "photo.png", "copy the red circle to the top left"
    pipe = EditARPipeline.from_pretrained(model, dtype=torch.float32)
    for lora in (None, "copy"):
        if lora is not None:
            pipe.load_lora_weights(adapter)
        (expected,) = pipe(prompt, image=photo, generator=seed_generators(0)).images
        extra = {"seed": 0, **({"lora": lora} if lora else {})}
        answer = client.images.edit(image=photo, prompt=prompt, model="sticker-editor", extra_body=extra)
        assert answer.size == "360x240"
        assert np.array_equal(read_image(answer.data[0].b64_json), expected), lora
    os.kill(process.pid, signal.SIGTERM)
    output = process.wait()
    assert "Traceback" not in output.stderr
    assert '"path": "/v1/images/edits", "status": 200' in output.stderr


def test_command_refuses_what_it_cannot_serve(tmp_path, capsys):
    model = str(STICKERS / "sticker-editor")
    cases = {
        ("--model", str(tmp_path / "absent" / "folder")): "`model` is",
        ("--model", model, "--api-key", ""): "`api_key` is empty",
        ("--model", model, "--lora", "a=absent/nested/folder"): "`--lora` is 'absent/nested/folder'",
        ("--model", model, "--lora", f"a={model}", "--lora", f"a={model}"): "different names",
        ("--model", model, "--lora", f"a={model}", "--lora", model): "different names",
        ("--model", model, "--max-queue", "0"): "`max_queue` is 0",
        ("--model", model, "--max-batch-size", "0"): "`max_batch_size` is 0",
        ("--model", model, "--lora", f"a={model}", "--port", str(find_free_port())): "no LoRA adapter",
        ("--model", str(tmp_path), "--port", str(find_free_port())): "model_index.json",
    }
    for words, message in cases.items():
        assert main(["serve", *words]) == 2, words
        assert message in capsys.readouterr().err
