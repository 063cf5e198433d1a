"""Malformed inputs by the thousand, each of which must end in a result or in a clear refusal, and soon.

    python tests/fuzz_inputs.py [--seed S] [--cases N] [group ...]

A refusal is clear if it is a ValueError, TypeError, RuntimeError or OSError whose message names the argument or the
file at fault; of a command, exit status 2 with one line `editar-hf: error: …`. All else is a fault: errors of other
kinds, those of libraries that name nothing, more than `TIME_LIMIT` seconds, more than `MEMORY_LIMIT` bytes.
Cases come from tables: wrong values for every argument, damage for every file and for every key of every JSON file.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import conftest  # noqa: F401  # before torch and huggingface_hub: one thread, no network
import datasets
import numpy as np
import safetensors.torch
import torch
import yaml
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tiny import STRIDE, build_pipeline, draw_image
from transformers.utils import logging as transformers_logging

from editar_hf import EditARConfig, EditARImageProcessor, EditARPipeline, EditARVQConfig
from editar_hf.commands import main
from editar_hf.training.data import EditCollator
from editar_hf.training.dataset_specs import DatasetSpec, load_recipe, open_dataset
from editar_hf.training.lora import add_lora
from editar_hf.training.rows import RowReader, UnusableRow


TIME_LIMIT, MEMORY_LIMIT = 20, 4 * 2**30
# The configurations' fields are checked by huggingface_hub, whose error is of a kind of its own.
REFUSALS = (ValueError, TypeError, RuntimeError, OSError, UnusableRow, StrictDataclassError)
# RuntimeErrors of a kind that says that something was not foreseen.
UNFORESEEN = (RecursionError, NotImplementedError)
PROMPT = "make the red circle blue"


class Case(NamedTuple):
    """One malformed input.

    Args:
        group, label (`str`): Where it is counted, and what tells it from the others.
        names (`tuple[str, ...]`): What a refusal may name: the argument in backticks, the file.
        run (`Callable`): Gets a folder that is its own.
    """

    group: str
    label: str
    names: tuple[str, ...]
    run: Callable[[Path], object]


class OutOfTimeError(BaseException):
    """Beyond what `except Exception` catches."""


def nest():
    """Make a list that holds itself."""
    nested = []
    nested.append(nested)
    return nested


# Values of wrong types, ranges and shapes: expressions, evaluated anew for every case.
EXPRESSIONS = """
None | True | -1 | 0 | 3 | 1.5 | 10**12 | -(10**30) | 1j | float("nan") | float("inf") | 1e300 | "" | "3" | b"x" | ()
... | [] | [None] | {} | {"a": 1} | {1} | object() | print | iter("ab") | nest() | [[1], [1, 2]] | ["a", 1]
range(10**9) | "ab " * 10**5 | "a\\ud800b" | "a\\0b" | Path("none.png") | "http://127.0.0.1:9/x.png" | draw_image(1)
np.array(["a"]) | np.int64(3) | np.float32(0.5) | np.bool_(True) | np.array([None]) | np.zeros((0, 3))
np.ones((16, 16, 3), np.uint8) | np.full((16, 16, 3), np.nan) | np.ones((16, 16, 2)) | torch.tensor(3)
torch.zeros(0) | torch.ones(2) | torch.ones(1, 16) | torch.zeros(1, 16).long() | torch.zeros(0, 16).long()
torch.full((1, 16), 10**9) | torch.ones(1, 16).int() | torch.ones(1, 16).bool() | torch.zeros(1, 10, 16)
torch.full((1, 10, 16), torch.nan) | torch.zeros(1, 10, 16).half() | torch.zeros(1, 16).cfloat()
torch.zeros(1, 1, 3, 16, 16) | torch.zeros(1, 3, 16, 16) | torch.ones(1, 16).to_sparse()
torch.zeros(1, 16).long().to("meta") | torch.zeros(1, 10, 16).to("meta") | torch.zeros(3, 16, 16).to("meta")
[torch.Generator()] * 3
"""
VALUES = {text: lambda text=text: eval(text) for text in EXPRESSIONS.strip().replace("\n", " | ").split(" | ")}
# Of a type that JSON or YAML has, for the keys of files.
JSON_VALUES = (None, True, -1, 1.5, 10**12, "x", [], {"a": 1})
JSON_FILES = (b"", b"null", b"[]", b"3", b'"x"', b"{", b"{}", b"\xff\xfe{}", b"\0", b"[" * 100_000, b'{"a": NaN}')
# What a row of a data set may hold.
ROW_VALUES = (*JSON_VALUES, b"x", "a\ud800b", {"bytes": b"x"}, {"path": "none.png"}, {"bytes": None, "path": None})
ROW_VALUES += ([0] * 16, [0.5] * 16, [10**9] * 16, [10**30] * 16, ["a"] * 16, [[0]] * 16, [None] * 16, bytes(640))
# What is given for the options of commands; no absolute paths, as outputs replace files.
WORDS = ("", "x", "-1", "0", "1.5", "nan", "inf", "1e999", str(10**20), "a\0b", "a\ud800", "long" * 1000, ".", "x/y")
WORDS += ("{data}/a.png", "{data}/text.png", "{data}/folder.png", "{data}/empty.json", "{data}", "{model}", "{adapter}")


@functools.cache
def get_pipeline() -> EditARPipeline:
    """Build the pipeline that most cases share."""
    return build_pipeline()


# Arguments


def call_cases(
    group: str, call: Callable, arguments: str, base: dict, also: dict | None = None, values: dict = VALUES
) -> Iterator[Case]:
    """Give every argument every value, the others as in `base`; `also` says what else a refusal may name."""
    for argument, (label, make) in itertools.product(arguments.split(), values.items()):
        names = (f"`{argument}`", *(also or {}).get(argument, ()))
        names += ("`resize_mode",) * ("image" in argument)  # the remedy where a picture is too thin to be cropped
        yield Case(group, f"{argument}={label}", names, lambda _, a=argument, m=make: call(**{**base, a: m()}))


def draw_pairs(cases: list[Case], call: Callable, seed: int, count: int) -> Iterator[Case]:
    """Give two arguments wrong values at once."""
    draw = random.Random(seed)
    arguments = sorted({case.label.partition("=")[0] for case in cases})
    for _ in range(count):
        (one, two), values = draw.sample(arguments, 2), draw.choices(list(VALUES.items()), k=2)
        label = f"{one}={values[0][0]}, {two}={values[1][0]}"
        given = lambda one=one, two=two, v=values: call(**{one: v[0][1](), two: v[1][1]()})  # noqa: E731
        yield Case("pairs of arguments", label, (f"`{one}`", f"`{two}`"), lambda _, given=given: given())


SOURCE_ARGUMENTS = "image height width resize_mode"
CALL_ARGUMENTS = f"prompt {SOURCE_ARGUMENTS} task restore_size mask_image mask_blend crop_to_mask guidance_scale "
CALL_ARGUMENTS += "image_guidance_scale negative_prompt do_sample temperature top_k top_p num_images_per_prompt "
CALL_ARGUMENTS += "generator prompt_embeds negative_prompt_embeds source_image_tokens source_cache decoding "
CALL_ARGUMENTS += "callback_on_step_end callback_on_step_end_tensor_inputs preview_every output_type return_dict"
GENERATE_ARGUMENTS = "source_image_tokens prompt_embeds guidance_scale image_guidance_scale negative_prompt_embeds "
GENERATE_ARGUMENTS += "do_sample temperature top_k top_p generator edit_mask source_cache decoding num_draft_tokens "
GENERATE_ARGUMENTS += "grid_height grid_width logits_processor stopping_criteria streamer generation_config "
GENERATE_ARGUMENTS += "return_dict_in_generate"
GRID = ("`grid_height`", "`grid_width`")


def argument_cases(seed: int) -> Iterator[Case]:
    """Wrong arguments of the pipeline, the networks, the processors and the configurations."""
    pipe = get_pipeline()
    source, tokens, states = draw_image(0), torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 10, 16)
    how = {"prompt": PROMPT, "image": source, "generator": None}
    also = {"image_guidance_scale": ("`guidance_scale`",)}
    calls = list(call_cases("pipeline call", pipe, CALL_ARGUMENTS, how, also))
    yield from calls
    masked = {**how, "mask_image": Image.new("L", (16, 16), 255)}
    arguments = "image mask_image mask_blend crop_to_mask restore_size"
    yield from call_cases("pipeline call", pipe, arguments, masked, {"image": ("`mask_image`",)})
    yield from call_cases("pipeline call", pipe, "prompt task image_guidance_scale", {"prompt_embeds": states})
    yield from draw_pairs(calls, lambda **given: pipe(**{**how, **given}), seed, 200)
    parts = {"image": source, "prompt": PROMPT, "height": 16, "width": 16}
    for name, arguments in (
        ("encode_prompt", "prompt task"),
        ("encode_image", SOURCE_ARGUMENTS),
        ("prepare_source_cache", SOURCE_ARGUMENTS),
        ("compute_edit_map", f"prompt task {SOURCE_ARGUMENTS}"),
        ("decode_image_tokens", "image_tokens height width output_type"),
    ):
        base = {word: parts[word] for word in arguments.split() if word in parts}
        base |= {"image_tokens": tokens} if name == "decode_image_tokens" else {}
        yield from call_cases("parts of the pipeline", getattr(pipe, name), arguments, base)
    base = {"source_image_tokens": tokens, "prompt_embeds": states}
    also = dict.fromkeys(("source_cache", "grid_height", "grid_width"), ("`source_image_tokens`",))
    also |= {"image_guidance_scale": ("`guidance_scale`",), "source_image_tokens": ("`decoding`",)}
    also["generation_config"] = ("`do_sample`", "`top_k`")
    for decoding in ("exact", "speculative"):
        given = {**base, "decoding": decoding}
        yield from call_cases("generate", pipe.transformer.generate, GENERATE_ARGUMENTS, given, also)
    cache, arguments = pipe.transformer.prepare_source_cache, "source_image_tokens grid_height grid_width"
    yield from call_cases("generate", cache, arguments, {"source_image_tokens": tokens}, also)
    yield from call_cases("VQ model", pipe.vq_model.encode, "pixel_values", {})
    yield from call_cases("VQ model", pipe.vq_model, "pixel_values", {})
    arguments = "image_tokens grid_height grid_width"
    also = dict.fromkeys(("grid_height", "grid_width"), ("`image_tokens`",))
    yield from call_cases("VQ model", pipe.vq_model.decode, arguments, {"image_tokens": tokens}, also)
    arguments = "images text task height width resize_mode target_images return_tensors"
    base = {"images": source, "text": PROMPT}
    yield from call_cases("processors", pipe.processor, arguments, base, {"target_images": ("`images`",)})
    sides = dict.fromkeys(("size", "stride"), ("`height`", "`width`"))
    images = pipe.processor.image_processor
    yield from call_cases("processors", images, "images size resize_mode return_tensors", {"images": source}, sides)
    yield from call_cases("processors", EditARImageProcessor, "size resize_mode stride", {}, sides)
    arguments = "pixel_values output_type"
    yield from call_cases("processors", images.postprocess, arguments, {"pixel_values": torch.zeros(1, 3, 16, 16)})
    for kind in (EditARConfig, EditARVQConfig):
        fields = " ".join(kind.__annotations__)
        quoted = {name: (f"'{name}'",) for name in fields.split()}
        yield from call_cases("configurations", kind, fields, {}, quoted)


# Pictures


def encode_picture(picture: Image.Image, kind: str, **options) -> bytes:
    """Encode a picture in a format of PIL's."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def damage_bytes(content: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Cut a file off here and there, and flip bits of its head and of the whole."""
    draw = random.Random(seed)
    for length in (0, 1, 8, 30, len(content) // 2, len(content) - 1):
        yield f"cut to {length}", content[:length]
    for name, end in (("head", 40), ("head", 120), ("whole", len(content)), ("whole", len(content))):
        damaged = bytearray(content)
        for _ in range(max(2, end // 50)):
            damaged[draw.randrange(min(end, len(content)))] ^= 1 << draw.randrange(8)
        yield f"bits flipped in the {name}", bytes(damaged)
    yield "zeros", bytes(len(content))


def list_picture_files(seed: int) -> Iterator[tuple[str, bytes | None]]:
    """List names of picture files and their content; None stands for a folder of that name."""
    noise = draw_image(0, 40, 24)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        for damage, content in damage_bytes(encode_picture(noise, kind), seed):
            yield f"{damage}.{kind.lower()}", content
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode_picture(noise, "JPEG", exif=exif)
    yield "turned.jpg", turned
    yield "EXIF damaged.jpg", turned.replace(b"Exif\0\0MM", b"Exif\0\0M\xff").replace(b"Exif\0\0II", b"Exif\0\0I\xff")
    for profile in (b"x", b"RGB " * 8, bytes(200)):
        yield f"profile {profile[:4]}.png", encode_picture(noise, "PNG", icc_profile=profile)
    frames = [draw_image(k) for k in range(3)]
    for kind in ("GIF", "TIFF", "WEBP"):
        yield f"animated.{kind.lower()}", encode_picture(frames[0], kind, save_all=True, append_images=frames[1:])
    yield "huge.png", encode_picture(noise, "PNG").replace(noise.width.to_bytes(4), (60000).to_bytes(4), 1)
    yield "text.png", b"no picture"
    yield "folder.png", None


def write_picture(folder: Path, name: str, content: bytes | None) -> Path:
    """Write a picture file, or a folder of its name."""
    path = folder / name
    path.mkdir() if content is None else path.write_bytes(content)
    return path


def picture_cases(seed: int) -> Iterator[Case]:
    """Damaged files, by path and opened, and pictures of every mode and of odd sizes."""
    pipe, source = get_pipeline(), draw_image(0, 40, 24)
    uses = {
        "`image`": lambda picture: pipe(PROMPT, image=picture),
        "`mask_image`": lambda picture: pipe(PROMPT, image=source, mask_image=picture),
        "`images`": lambda picture: pipe.processor(images=picture),
    }
    for (name, content), (argument, use) in itertools.product(list_picture_files(seed), uses.items()):
        names = (argument, name)
        run = lambda folder, n=name, c=content, use=use: use(str(write_picture(folder, n, c)))  # noqa: E731
        yield Case("picture files", f"{argument} {name}", names, run)
    modes = ("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")
    sizes = ((0, 0), (0, 5), (1, 1), (5000, 1), (1, 5000), (40, 24))
    for mode, size, (argument, use) in itertools.product((*modes, "I;16", "I;16B", "I;16L"), sizes, uses.items()):
        run = lambda _, mode=mode, size=size, use=use: use(Image.new(mode, size))  # noqa: E731
        yield Case("picture modes", f"{argument} {mode} {size}", (argument, "`resize_mode"), run)


# Folders


@functools.cache
def get_data() -> Path:
    """Write what damaged folders are copied from: a pipeline, an adapter, pairs; and some pictures."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    pipe = build_pipeline()
    pipe.save_pretrained(folder / "model")
    add_lora(pipe.transformer, "base", rank=2, modules_to_save=["text_projection"])
    pipe.save_lora_weights(folder / "adapter")
    pairs = folder / "pairs"
    pairs.mkdir()
    rows = {name: [draw_image(k) for k in range(4)] for name in ("source_image", "target_image")}
    kinds = {**dict.fromkeys(rows, datasets.Image()), "prompt": datasets.Value("string")}
    table = datasets.Dataset.from_dict({**rows, "prompt": [PROMPT] * 4}, features=datasets.Features(kinds))
    table.to_parquet(pairs / "train.parquet")
    for index in range(2):
        draw_image(index).save(folder / f"{'ab'[index]}.png")
    benchmark = folder / "benchmark"
    benchmark.mkdir()
    draw_image(0).save(benchmark / "a.png")
    (benchmark / "metadata.jsonl").write_text('{"id": "a", "source_image_file_name": "a.png", "prompt": "p"}')
    (folder / "text.png").write_text("no picture")
    (folder / "folder.png").mkdir()
    (folder / "empty.json").write_text("")
    return folder


def list_keys(content, path: tuple = ()) -> Iterator[tuple]:
    """List the paths of all values in JSON, but for those of long lists such as vocabularies."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(entries)[: 3 if path else None]:
        yield (*path, key)
        yield from list_keys(value, (*path, key)) if len(path) < 3 else ()


def replace_key(content, path: tuple, value):
    """Copy JSON with another value at a path; none at all if it is Ellipsis."""
    content = copy.deepcopy(content)
    parent = functools.reduce(lambda inner, key: inner[key], path[:-1], content)
    parent[path[-1]] = value
    if value is ...:
        del parent[path[-1]]
    return content


def damage_folder(folder: Path, seed: int) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """List what can be wrong with a folder: the file at fault, the damage, and a function that does it to a copy."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        name = path.relative_to(folder).as_posix()
        yield name, "missing", lambda copied, name=name: (copied / name).unlink()
        yield name, "renamed", lambda copied, name=name: (copied / name).rename(copied / f"{name}.old")
        yield name, "a folder", lambda copied, name=name: ((copied / name).unlink(), (copied / name).mkdir())
        contents = list(damage_bytes(path.read_bytes(), seed))
        if path.suffix == ".json":
            whole = json.loads(path.read_text())
            contents = [(f"{content!r:.20}", content) for content in JSON_FILES]
            contents.append(("unknown key", json.dumps({**whole, "unknown": 1}).encode()))
            for keys, value in itertools.product(list_keys(whole), (*JSON_VALUES, ...)):
                label = f"{'.'.join(map(str, keys))} is {value!r}"
                contents.append((label, json.dumps(replace_key(whole, keys, value)).encode()))
        elif path.suffix == ".safetensors":
            contents += damage_weights(path)
        for label, content in contents:
            yield name, label, lambda copied, name=name, content=content: (copied / name).write_bytes(content)


def damage_weights(path: Path) -> Iterator[tuple[str, bytes]]:
    """Change the weights of a file: their values, types and names; and its header's length."""
    weights = safetensors.torch.load_file(path)
    first = next(iter(weights))
    for label, changed in (
        ("NaN", {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}),
        ("integers", {name: tensor.int() for name, tensor in weights.items()}),
        ("float64", {name: tensor.double() for name, tensor in weights.items()}),
        ("one missing", {name: tensor for name, tensor in weights.items() if name != first}),
        ("one too many", {**weights, "unknown": torch.zeros(3)}),
        ("one of another shape", {**weights, first: torch.zeros(3)}),
        ("no tensors", {}),
    ):
        yield label, safetensors.torch.save(changed, metadata={"format": "pt"})
    yield "header of 2**60 bytes", (2**60).to_bytes(8, "little") + path.read_bytes()[8:]


def folder_cases(seed: int) -> Iterator[Case]:
    """Damaged folders of pipelines and adapters, loaded and put to use."""
    source = draw_image(0)

    def load_pipeline(folder):
        return EditARPipeline.from_pretrained(folder)(PROMPT, image=source)

    def load_adapter(folder):
        pipe = build_pipeline()
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
        return pipe(PROMPT, image=source)

    for kind, use in (("model", load_pipeline), ("adapter", load_adapter)):
        for name, label, damage in damage_folder(get_data() / kind, seed):

            def run(folder, kind=kind, use=use, damage=damage):
                copied = Path(shutil.copytree(get_data() / kind, folder / kind))
                damage(copied)
                return use(copied)

            # A pipeline's part is named by its folder where several of its files are at fault together.
            names = (Path(name).name, f"/{kind}/", f"/{kind}`", "damaged", "`processor`")
            yield Case(f"{kind} folders", f"{name}: {label}", names, run)


def adapter_cases(seed: int) -> Iterator[Case]:
    """Wrong arguments of the methods for adapters, and of loading and saving."""

    def call(method, **given):
        pipe = build_pipeline()
        pipe.load_lora_weights(get_data() / "adapter", "one")
        getattr(pipe, method)(**given)
        return pipe(PROMPT, image=draw_image(0))

    for method, arguments, base in (
        ("load_lora_weights", "pretrained_model_name_or_path adapter_name", {}),
        ("set_adapters", "adapter_names adapter_weights", {"adapter_names": "one"}),
        ("delete_adapters", "adapter_names", {}),
        ("fuse_lora", "lora_scale safe_fusing adapter_names", {}),
        ("save_lora_weights", "save_directory adapter_name", {"save_directory": "saved"}),
    ):
        base = {"pretrained_model_name_or_path": get_data() / "adapter"} if method.startswith("load") else base
        too_long = {"save_directory": ("File name too long",)}
        yield from call_cases("adapters", functools.partial(call, method), arguments, base, too_long)
    base = {"pretrained_model_name_or_path": get_data() / "model"}
    arguments = "pretrained_model_name_or_path dtype attn_implementation variant"
    also = {"attn_implementation": ("`attn_implementation=",), "variant": ("`variant=",)}
    also |= dict.fromkeys(("pretrained_model_name_or_path", "save_directory"), ("`3`", "File name too long"))
    yield from call_cases("loading and saving", EditARPipeline.from_pretrained, arguments, base, also)
    base, arguments = {"save_directory": "saved"}, "save_directory variant max_shard_size"
    yield from call_cases("loading and saving", get_pipeline().save_pretrained, arguments, base, also)


# Commands


def run_command(words: list[str]):
    """Run `editar-hf`; what it refuses in one line becomes a ValueError."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
    lines = errors.getvalue().strip().splitlines()
    if status == 2 and lines and lines[-1].startswith("editar-hf") and ": error: " in lines[-1]:
        raise ValueError(lines[-1])
    assert status == 0 or (status == 1 and "Traceback" not in errors.getvalue()), (status, lines[-3:])
    return status


COMMANDS = {
    "edit --model {model} --image {data}/a.png --prompt p --output out.png": "model image prompt output mask task seed "
    "resize-mode guidance-scale image-guidance-scale negative-prompt num-images lora dtype device quality prompts",
    "check {model}": "",
    "convert --output-dir out --reverse --model {model}": "output-dir model",
    "convert --output-dir out --transformer {data}/a.png --vq-model {data}/a.png --text-encoder {data}": "output-dir "
    "transformer vq-model text-encoder num-attention-heads grid-size dtype license push-to-hub",
    "evaluate generate --benchmark folder --source {data}/benchmark --model {model} --output-dir out": "benchmark "
    "source resolution system model lora guidance-scale top-k top-p temperature dtype quantize reconstruct command "
    "seed batch-size output-dir",
    "evaluate score --benchmark folder --source {data}/benchmark --images {data}/benchmark --output-dir out": "source "
    "benchmark images protocol metrics clip-model lpips-model output-dir",
    "evaluate report {data} --output-dir out": "output-dir",
}
LINES = (
    *("", "null", "3", "[]", "{", "{}", "\0", "[" * 100_000, '{"image": "a.png"}', '{"prompt": "p"}', "\ufeff{}"),
    *('{"image": "a.png", "prompt": "p", "unknown": 1}', '{"image": "a.png", "prompt": "p"} x', "\u2028"),
    *('{"image": "a.png", "prompt": "a\\ud800b"}', '{"image": "a\\u0000.png", "prompt": "p"}'),
    *('{"image": "a\\ud800.png", "prompt": "p"}', '{"image": "../a.png", "prompt": "p"}'),
)


def command_cases(seed: int) -> Iterator[Case]:
    """Wrong words for every option, and wrong lines of a file of prompts."""
    places = {"data": str(get_data()), "model": str(get_data() / "model"), "adapter": str(get_data() / "adapter")}

    def run(folder, words):
        with contextlib.chdir(folder):
            return run_command(words)

    for line, options in COMMANDS.items():
        words = line.format(**places).split()
        for option, word in itertools.product(options.split() or [None], WORDS):
            word = word.format(**places)
            given = [*words, f"--{option}={word}"] if option else [words[0], f"--={word}"[3:]]
            names = (f"--{option}", f"`{(option or 'model').replace('-', '_')}`", word[:100] or "`", "`")
            yield Case(f"editar-hf {words[0]}", f"{line} --{option} {word:.30}", names, lambda f, g=given: run(f, g))
    entries = dict.fromkeys(("image", "prompt", "output", "mask"), "a.png") | {"task": "edit", "seed": 1}
    lines = [json.dumps({**entries, name: value}) for name in entries for value in JSON_VALUES]
    for line in (*LINES, *lines):

        def run_file(folder, line=line):
            (folder / "prompts.jsonl").write_text(line, encoding="utf-8")
            words = ["edit", "--model", places["model"], "--image", places["data"], "--prompts", "prompts.jsonl"]
            return run(folder, [*words, "--output", "out"])

        yield Case("files of prompts", f"{line:.60}", ("prompts.jsonl",), run_file)


# Training


def training_cases(seed: int) -> Iterator[Case]:
    """Malformed rows, recipes, sources and files of pairs."""
    pipe = get_pipeline()
    geometry = (16, 16, "crop", STRIDE)
    reader, collate = RowReader(pipe.processor.image_processor, *geometry), EditCollator(pipe.processor, *geometry, 16)
    own = DatasetSpec("pairs")

    def read(rows):
        return [collate([reader.read(row, own)]) for row in rows]

    images = {"source_image": draw_image(0), "target_image": draw_image(1), "prompt": PROMPT}
    tokens = {"source_image_tokens": [0] * 16, "target_image_tokens": [0] * 16, "prompt": PROMPT}
    for row, names in (
        (images, "source_image target_image prompt mask task prompt_embeds"),
        (tokens, "source_image_tokens target_image_tokens edit_mask prompt prompt_embeds"),
    ):
        values = {f"{value!r:.40}": lambda value=value: value for value in ROW_VALUES}
        yield from call_cases("rows", lambda **given: read([given]), names, row, {"mask": ("`mask_image`",)}, values)
    fields = "dataset split config_name name probability columns task rewrite image_folder streaming"
    where = {"dataset": str(get_data() / "pairs")}
    opening = lambda **given: read(open_dataset(DatasetSpec(**given)))  # noqa: E731
    yield from call_cases("sources", opening, fields, where, dict.fromkeys(fields.split(), ("`dataset`",)))
    pairs = (get_data() / "pairs" / "train.parquet").read_bytes()
    files = [(f"pairs {label}", "train.parquet", content) for label, content in damage_bytes(pairs, seed)]
    files += [(f"{line:.40}", "train.jsonl", line.encode()) for line in LINES]
    for label, name, content in files:
        run = lambda f, n=name, c=content: read(open_dataset(DatasetSpec(str(write_picture(f, n, c)))))  # noqa: E731
        yield Case("files of pairs", label, ("`dataset`", name, "_image`"), run)
    recipes = [
        *JSON_FILES,
        b"a: [",
        b"datasets: 3",
        b"datasets: [3]",
        b"datasets: [{}]",
        b"!!python/object:os.system {}",
    ]
    values = [
        yaml.safe_dump({"datasets": [{**where, name: value}]}) for name in fields.split() for value in JSON_VALUES
    ]
    for content in (*recipes, *(value.encode() for value in values)):
        run = lambda f, c=content: [read(open_dataset(s)) for s in load_recipe(write_picture(f, "r.yaml", c))]  # noqa: E731
        yield Case("recipes", f"{content!r:.80}", ("r.yaml", "`dataset`"), run)


# The run


def is_sane(result) -> bool:
    """Tell whether pictures and tensors of a result are of sizes that the tiny pipeline can have made."""
    if isinstance(result, Image.Image):
        return 0 < result.width * result.height < 10**6
    if isinstance(result, torch.Tensor | np.ndarray):
        return 0 < np.prod(result.shape) < 10**6 and torch.as_tensor(result).isfinite().all()
    entries = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else ()
    return all(is_sane(entry) for entry in entries)


def raise_out_of_time(*_):
    raise OutOfTimeError(f"took more than {TIME_LIMIT} seconds")


def judge(case: Case) -> tuple[str, str]:
    """Run a case; `"result"`, `"refusal"` or `"fault"`, and what was said."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    previous = signal.signal(signal.SIGALRM, raise_out_of_time)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_LIMIT, limits[1]))
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = case.run(Path(folder))
            return ("result", "") if is_sane(result) else ("fault", f"the result is {result!r:.200}")
    except (Exception, OutOfTimeError) as error:
        said = f"{type(error).__name__}: {error}"
        is_named = isinstance(error, REFUSALS) and any(name in str(error) for name in case.names)
        if is_named and not isinstance(error, UNFORESEEN):
            return "refusal", said
        *_, last = traceback.extract_tb(error.__traceback__) or [None]
        said = " ".join(said.split())
        return "fault", f"{said:.300} [{last and f'{Path(last.filename).name}:{last.lineno}'}]"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def build_cases(seed: int) -> list[Case]:
    """Build all cases, in an order that the seed alone decides; the first of them are of all groups."""
    makers = (argument_cases, picture_cases, folder_cases, adapter_cases, command_cases, training_cases)
    groups = {}
    for case in itertools.chain.from_iterable(make(seed) for make in makers):
        groups.setdefault(case.group, []).append(case)
    for cases in groups.values():
        random.Random(seed).shuffle(cases)
    turns = itertools.zip_longest(*groups.values())
    return [case for turn in turns for case in turn if case is not None]


def run_cases(cases: list[Case]) -> tuple[Counter, list[str]]:
    """Run cases; how many of each group ended how, and the faults."""
    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
    datasets.disable_progress_bars()
    counts, faults = Counter(), []
    for case in cases:
        kind, said = judge(case)
        counts[case.group, kind] += 1
        if kind == "fault":
            faults.append(f"{case.group} | {case.label:.150} | {said}")
    return counts, faults


def main_of_script() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help="only these; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="only so many, of all groups alike")
    args = parser.parse_args()
    cases = [case for case in build_cases(args.seed) if case.group in (args.groups or [case.group])][: args.cases]
    counts, faults = run_cases(cases)
    kinds = ("result", "refusal", "fault")
    print(f"{'':24}{'cases':>8}" + "".join(f"{kind + 's':>10}" for kind in kinds))
    for group in (*dict.fromkeys(case.group for case in cases), None):
        row = [sum(n for (of, ended), n in counts.items() if of == (group or of) and ended == kind) for kind in kinds]
        print(f"{group or 'all':24}{sum(row):8}" + "".join(f"{count:10}" for count in row))
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main_of_script())
