"""Benchmarks as their authors share them, tiny; and ways to run `editar-hf evaluate` on them."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tiny import draw_image

from editar_hf.commands import main
from editar_hf.evaluation.benchmarks import BENCHMARKS
from editar_hf.evaluation.table import METRICS


sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "stickers"))

import evaluate_stickers as sticker_evaluation
import make_sticker_edits as stickers


PROMPT = "make the red circle blue"


def evaluate(*words):
    """Run `editar-hf evaluate` and return its exit status."""
    return main(["evaluate", *map(str, words)])


def evaluate_stickers(*words):
    """Run `python projects/stickers/evaluate_stickers.py` in this process and return its exit status."""
    with patch.dict(BENCHMARKS), patch.dict(METRICS):
        return sticker_evaluation.run(list(map(str, words)))


def make_sticker_data(folder, num_samples=8, resolution=32):
    """Make a test split of stickers: the eight tasks in turn."""
    tasks = (*stickers.OPERATIONS, *stickers.TRANSLATIONS)
    jobs = [(tasks[index % len(tasks)], "seen", None) for index in range(num_samples)]
    folder.mkdir(parents=True)
    stickers.write_shard(folder / "test-00000-of-00001.parquet", 0, "test", 0, jobs, resolution)
    return folder


def make_pie_folder(folder, num_samples=4):
    """Make a folder in PIE-Bench's form: samples of different kinds, each with a square to edit."""
    (folder / "annotation_images" / "some").mkdir(parents=True)
    mapping = {}
    for index in range(num_samples):
        key = f"{index:012}"
        small = draw_image(index, 64, 64)
        small.resize((512, 512)).save(folder / "annotation_images" / "some" / f"{key}.jpg")
        runs = [value for row in range(100, 200) for value in (row * 512 + 100 + index, 50)]
        mapping[key] = {
            "image_path": f"some/{key}.jpg",
            "original_prompt": "a red circle",
            "editing_prompt": "a [blue] circle",
            "editing_instruction": PROMPT,
            "editing_type_id": str(index),
            "blended_word": "circle circle",
            "mask": runs,
        }
    (folder / "mapping_file.json").write_text(json.dumps(mapping))
    return folder


def make_translation_data(folder, num_samples=3, side=40, classes=(0, 5, 170, 255), **changes):
    """Make a parquet file in the form of the depth and segmentation sets; `changes` are columns of the first row.

    Columns that the sets do not all have are text, and only there if the first row has them.
    """
    features = Features(
        {name: Value("string") for name in changes}
        | {name: Image() for name in ("image", "control_depth", "control_seg", "panoptic_seg_map")}
        | {name: Value("string") for name in ("text", "prompt")}
    )
    rows = []
    for index in range(num_samples):
        pictures = [draw_image(10 * index + k, side + 8, side) for k in range(3)]
        labels = np.random.default_rng(index).choice(classes, size=(side, side + 8)).astype(np.uint8)
        names = ("image", "control_depth", "control_seg")
        rows.append(dict(zip(names, pictures, strict=True)) | {"text": "a man", "prompt": "a red man"})
        rows[-1]["panoptic_seg_map"] = PILImage.fromarray(labels)
    rows[0] |= changes
    folder.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


def make_magicbrush_folder(folder):
    """Make a folder in the form of MagicBrush's test set: a session of two turns and one of one."""
    sessions, captions = {}, {}
    for session, num_turns in (("30", 2), ("139", 1)):
        pictures = folder / "images" / session
        pictures.mkdir(parents=True)
        draw_image(int(session), 24, 24).save(pictures / f"{session}-input.png")
        sessions[session], captions[session], source = [], {}, f"{session}-input.png"
        for turn in range(1, num_turns + 1):
            target = f"{session}-output{turn}.png"
            draw_image(int(session) + turn, 24, 24).save(pictures / target)
            sessions[session].append({"input": source, "output": target, "instruction": f"{PROMPT} {turn}"})
            captions[session][target] = "a blue circle"
            source = target
    for name, content in (("edit_sessions", sessions), ("local_descriptions", captions)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def make_picture_folder(folder, num_samples=3, side=16):
    """Make any folder with metadata.jsonl: the first sample has everything, the last only what it must."""
    folder.mkdir()
    lines = []
    for index in range(num_samples):
        draw_image(index, side, side).save(folder / f"{index}-before.png")
        lines.append({"source_image_file_name": f"{index}-before.png", "prompt": f"{PROMPT} {index}"})
        if index < num_samples - 1:
            draw_image(100 + index, side, side).save(folder / f"{index}-after.png")
            draw_image(200 + index, side, side).convert("L").point(lambda v: 255 * (v > 127)).save(
                folder / f"{index}-mask.png"
            )
            lines[-1] |= {"target_image_file_name": f"{index}-after.png", "mask_file_name": f"{index}-mask.png"}
    lines[0] |= {"id": "first", "category": "kind", "target_prompt": "a blue circle"}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder
