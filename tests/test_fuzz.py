"""Random calls with one mistake each, and damaged files: all end in a sane result or an error that names the fault.

`FUZZ_CASES=4500 FUZZ_SEED=1 pytest tests/test_fuzz.py` runs more cases, and others, than the suite does.
"""

import contextlib
import functools
import io
import itertools
import os
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from tiny import NUM_CODES, build_pipeline, draw_image

from editar_hf import EditARPipeline
from editar_hf.training.lora import add_lora


SEED, NUM_CASES = int(os.environ.get("FUZZ_SEED", "0")), int(os.environ.get("FUZZ_CASES", "160"))
TIME_LIMIT = 20
PROMPT = "make the red circle blue"


class Case(NamedTuple):
    """One input. `names` is what a refusal may name; without any, a result is due. `run` gets a folder of its own."""

    group: str
    label: str
    names: tuple[str, ...]
    run: Callable[[Path], object]


@functools.cache
def get_pipeline() -> EditARPipeline:
    return build_pipeline()


# Calls


TOKENS, STATES = torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 10, 16)
WAYS = (
    {"prompt": PROMPT, "image": draw_image(0, 40, 24)},
    {"prompt": [PROMPT] * 2, "image": draw_image(0), "height": 8},
    {"prompt": PROMPT, "image": draw_image(0), "mask_image": draw_image(1).convert("1"), "mask_blend": False},
    {"prompt": PROMPT, "image": draw_image(0), "mask_image": Image.new("1", (16, 16), 1), "crop_to_mask": True},
    {"prompt": PROMPT, "task": "text-to-image"},
    {"prompt_embeds": STATES, "source_image_tokens": TOKENS},
)
SETTINGS = {
    "guidance_scale": (1, 3.0),
    "do_sample": (True, False),
    "temperature": (0.5, 2.0),
    "top_k": (0, 5),
    "top_p": (0.5, 1.0),
    "num_images_per_prompt": (1, 2),
    "generator": (None, torch.Generator()),
    "negative_prompt": (None, "blurred"),
}
NAN, HUGE = float("nan"), 10**12
NO_IMAGES = ("none.png", b"x", 3, [], Image.new("RGB", (0, 5)), np.full((16, 16, 3), np.nan), torch.ones(2, 16, 16))
MISTAKES = {
    "prompt": (3, [], [3]),
    "image": NO_IMAGES,
    "mask_image": NO_IMAGES,
    "height": (-4, 0, 15, HUGE),
    "width": (-4, 0, 15, HUGE),
    "task": ("paint", ["edit", "paint"]),
    "size_policy": ("loose", True),
    "aspect": ("square", True),
    "detail": ("high", True),
    "preserve": ("on", True),
    "resize_mode": ("squeeze",),
    "guidance_scale": (NAN, "3"),
    "image_guidance_scale": (NAN, "3"),
    "temperature": (-1, NAN, "1"),
    "top_k": (-1, 1.5, "5"),
    "top_p": (0, 1.5, NAN),
    "num_images_per_prompt": (0, -1),
    "generator": (0, [torch.Generator()] * 5),
    "prompt_embeds": (STATES[..., :3], STATES[:, :3], STATES / 0),
    "negative_prompt_embeds": (STATES[..., :3], STATES[:, :3], STATES / 0),
    "source_image_tokens": (TOKENS[:, :9], TOKENS + NUM_CODES, TOKENS - 1, TOKENS.float()),
    "decoding": ("parallel",),
    "preview_every": (0, -1),
    "output_type": ("jpeg",),
}


def call_cases() -> Iterator[Case]:
    """Random calls, each with and without one mistake."""
    draw = random.Random(SEED)
    for argument, values in MISTAKES.items():
        for mistake, way in itertools.product(values, WAYS):
            call = way | {name: draw.choice(of) for name, of in SETTINGS.items() if draw.random() < 0.4}
            label = ", ".join(call)
            yield Case("calls", label, (), lambda _, call=call: get_pipeline()(**call))
            # Some arguments exclude one another, so the refusal may name one of the call's own.
            names = tuple(f"`{name}" for name in (argument, *way))
            wrong = {**call, argument: mistake}
            yield Case("mistakes", f"{label}, {argument}={mistake!r:.60}", names, lambda _, w=wrong: make_mistake(w))


def make_mistake(call: dict):
    raise AssertionError(f"the result is {get_pipeline()(**call)!r:.80}")


# Images


def damage_bytes(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Cut a file off here and there, and flip bits of its head and of the whole."""
    draw = random.Random(SEED)
    for length in (0, 1, 8, 30, len(content) // 2, len(content) - 1):
        yield f"cut to {length}", content[:length]
    for name, end in (("head", 40), ("head", 120), ("whole", len(content)), ("whole", len(content))):
        damaged = bytearray(content)
        for _ in range(max(2, end // 50)):
            damaged[draw.randrange(min(end, len(content)))] ^= 1 << draw.randrange(8)
        yield f"bits flipped in the {name}", bytes(damaged)
    yield "zeros", bytes(len(content))


def list_image_files() -> Iterator[tuple[str, bytes]]:
    """List odd and damaged image files."""
    noise = draw_image(0, 40, 24)

    def encode(kind, **options):
        file = io.BytesIO()
        noise.save(file, kind, **options)
        return file.getvalue()

    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        yield from ((f"{damage}.{kind.lower()}", content) for damage, content in damage_bytes(encode(kind)))
    yield "animated.gif", encode("GIF", save_all=True, append_images=[draw_image(1)])
    yield "huge.png", encode("PNG").replace(noise.width.to_bytes(4), (60000).to_bytes(4), 1)


def image_cases() -> Iterator[Case]:
    """Damaged files, and images of every mode and of odd sizes."""
    uses = {
        "`image": lambda image: get_pipeline()(PROMPT, image=image),
        "`mask_image": lambda image: get_pipeline()(PROMPT, image=draw_image(0, 40, 24), mask_image=image),
    }
    for (name, content), (argument, use) in itertools.product(list_image_files(), uses.items()):
        run = lambda folder, n=name, c=content, use=use: use(str(write(folder / n, c)))  # noqa: E731
        yield Case("image files", f"{argument} {name}", (argument, name), run)
    modes = ("1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B")
    sizes = ((0, 5), (1, 1), (5000, 1), (1, 5000), (40, 24))
    for mode, size, (argument, use) in itertools.product(modes, sizes, uses.items()):
        run = lambda _, mode=mode, size=size, use=use: use(Image.new(mode, size))  # noqa: E731
        yield Case("image modes", f"{argument} {mode} {size}", (argument, "`resize_mode"), run)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Folders


@functools.cache
def get_folders() -> Path:
    """Write a pipeline and an adapter, to be copied and damaged."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    pipe = build_pipeline()
    pipe.save_pretrained(folder / "model")
    add_lora(pipe.transformer, "base", rank=2, modules_to_save=["text_projection"])
    pipe.save_lora_weights(folder / "adapter")
    return folder


def damage_file(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """List what a failed download may leave of a file, None for nothing; and wrong weights."""
    content = path.read_bytes()
    yield "missing", None
    if path.suffix == ".json":
        others = (b"", b"null", b"[]", b"{", b"{}", bytes(9), content[:-2])
        yield from ((str(other)[:20], other) for other in others)
        return
    yield from damage_bytes(content)
    if path.suffix == ".safetensors":
        weights = safetensors.torch.load_file(path)
        first = next(iter(weights))
        for label, changed in (
            ("NaN", {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}),
            ("one missing", {name: tensor for name, tensor in weights.items() if name != first}),
            ("one too many", {**weights, "unknown": torch.zeros(3)}),
            ("one of another shape", {**weights, first: torch.zeros(3)}),
        ):
            yield label, safetensors.torch.save(changed, metadata={"format": "pt"})


def folder_cases() -> Iterator[Case]:
    """Damaged folders of pipelines and adapters, loaded and put to use."""

    def use(folder, kind, name, content):
        copied = Path(shutil.copytree(get_folders() / kind, folder / kind))
        (copied / name).unlink() if content is None else write(copied / name, content)
        pipe = build_pipeline() if kind == "adapter" else EditARPipeline.from_pretrained(copied)
        if kind == "adapter":
            pipe.load_lora_weights(copied)
            pipe.fuse_lora()
        return pipe(PROMPT, image=draw_image(0))

    for kind in ("model", "adapter"):
        for path in sorted((get_folders() / kind).rglob("*.*")):
            name = path.relative_to(get_folders() / kind).as_posix()
            for label, content in damage_file(path) if path.suffix != ".md" else ():
                # A pipeline's part is named by its folder where several of its files are at fault together.
                names = (path.name, f"/{kind}/", f"/{kind}`", "damaged", "`processor`")
                run = lambda folder, k=kind, n=name, c=content: use(folder, k, n, c)  # noqa: E731
                yield Case(f"{kind} folders", f"{name}: {label}", names, run)


# The run


def is_sane(result) -> bool:
    """Tell whether the images and tensors of a result are of sizes that the tiny pipeline can have made."""
    images, image_tokens = result.images, result.image_tokens
    is_token = (image_tokens >= 0) & (image_tokens < NUM_CODES)
    return (
        len(images) == len(image_tokens) > 0 and is_token.all() and all(0 < i.width * i.height < 10**6 for i in images)
    )


def find_fault(case: Case) -> str | None:
    """Run a case; say what is wrong with its end."""
    # A KeyboardInterrupt passes every `except Exception`.
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(TIME_LIMIT)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = case.run(Path(folder))
            return None if is_sane(result) else f"the result is {result!r:.200}"
    except KeyboardInterrupt:
        return f"took more than {TIME_LIMIT} seconds"
    except Exception as error:
        is_refusal = isinstance(error, ValueError | TypeError | RuntimeError | OSError)
        if is_refusal and any(name in str(error) for name in case.names):
            return None
        *_, last = traceback.extract_tb(error.__traceback__)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{said:.300} [{Path(last.filename).name}:{last.lineno}]"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_mistakes_and_damage_end_in_results_or_in_clear_refusals():
    groups: dict[str, list[Case]] = {}
    for case in itertools.chain(call_cases(), image_cases(), folder_cases()):
        groups.setdefault(case.group, []).append(case)
    for cases in groups.values():
        random.Random(SEED).shuffle(cases)
    in_turns = (case for turn in itertools.zip_longest(*groups.values()) for case in turn if case is not None)
    faults = [
        f"{case.group} | {case.label:.150} | {fault}"
        for case in itertools.islice(in_turns, NUM_CASES)
        if (fault := find_fault(case)) is not None
    ]
    assert not faults, "\n".join(faults)
