"""The benchmarks: what each is made of, and which metrics its table has.

`TASKS` is the one list of them. A task's `read_samples(source, ...)` turns what its authors published into samples;
`prepare_benchmark` writes them as one folder. Its options are the keyword arguments that `options` names.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..samples import Benchmark, Sample, check_new, write_benchmark
from . import folder, magicbrush, pie_bench, sticker_edits, translation


@dataclass(frozen=True)
class Task:
    """A benchmark, unprepared.

    Args:
        summary (`str`): What it is.
        read_samples (`Callable`): Reads its samples from a source; raises `ValueError` where it is not as published.
        metrics (tuple of `str`): Its table's columns, names of `scoring.METRICS`; the first ranks samples in sheets.
        default_source (`str`, *optional*): The Hub id it is published under.
        expected (mapping or `int`, *optional*): How many samples it has as published, by category or in all.
        options (tuple of `str`): Keyword arguments of `read_samples`.
        models (mapping): Models its published figures were computed with, where they are not the default ones.
        takes_any_size (`bool`): Whether predictions of another size than the sample's are scored too.
        trade_off (tuple of two `str`): Metrics that guidance plots show: how much is kept, and how well it is edited.
    """

    summary: str
    read_samples: Callable[..., Iterator[Sample]]
    metrics: tuple[str, ...]
    default_source: str | None = None
    expected: Mapping[str, int] | int | None = None
    options: tuple[str, ...] = ()
    models: Mapping[str, str] = field(default_factory=dict)
    takes_any_size: bool = False
    trade_off: tuple[str, str] = ("l1", "clip_t")


MAGICBRUSH_METRICS = ("l1", "l2", "clip_i", "dino", "clip_t")
# Source: evaluation of MagicBrush (arXiv 2306.10012), which also brings predictions to the size of the truth.
MAGICBRUSH_MODELS = {"clip": "openai/clip-vit-base-patch32"}

TASKS = {
    "pie-bench": Task(
        "PIE-Bench: 700 edits with masks; a folder with mapping_file.json and annotation_images/",
        pie_bench.read_samples,
        (
            *("structure_distance", "psnr_unedited", "lpips_unedited", "mse_unedited", "ssim_unedited"),
            *("clip_whole", "clip_edited"),
        ),
        expected=pie_bench.NUM_SAMPLES,
        trade_off=("structure_distance", "clip_whole"),
    ),
    "depth": Task(
        "pictures from depth maps",
        translation.read_depth_samples,
        ("depth_rmse", "fid"),
        trade_off=("depth_rmse", "fid"),
        default_source="limingcv/MultiGen-20M_depth_eval",
        expected=5000,
        options=("resolution",),
    ),
    "canny": Task(
        "pictures from canny edges, those of the depth task's pictures",
        translation.read_canny_samples,
        ("edge_f1", "edge_ms_ssim", "edge_psnr", "fid"),
        trade_off=("edge_f1", "fid"),
        default_source="limingcv/MultiGen-20M_depth_eval",
        expected=5000,
        options=("resolution",),
    ),
    "segmentation": Task(
        "pictures from COCOStuff segmentation maps",
        translation.read_segmentation_samples,
        ("mean_iou", "fid"),
        trade_off=("mean_iou", "fid"),
        default_source="limingcv/Captioned_COCOStuff",
        expected=5000,
        options=("resolution",),
    ),
    "magicbrush": Task(
        "MagicBrush's test set, each turn from the true picture; its unzipped folder",
        magicbrush.read_single_turns,
        MAGICBRUSH_METRICS,
        expected=magicbrush.NUM_TURNS,
        models=MAGICBRUSH_MODELS,
        takes_any_size=True,
    ),
    "magicbrush-multi-turn": Task(
        "MagicBrush's test set, each turn from the turn before, of which the last counts; its unzipped folder",
        magicbrush.read_multi_turns,
        MAGICBRUSH_METRICS,
        expected=magicbrush.NUM_TURNS,
        models=MAGICBRUSH_MODELS,
        takes_any_size=True,
    ),
    "folder": Task(
        "any folder of pictures with metadata.jsonl",
        folder.read_samples,
        ("l1", "l2", "psnr", "ssim", "psnr_unedited", "ssim_unedited"),
        trade_off=("psnr_unedited", "l1"),
    ),
    "sticker-edits": Task(
        "the demo's test set; a folder that projects/stickers/make_sticker_edits.py wrote",
        sticker_edits.read_samples,
        ("done", "inside", "outside", "psnr_unedited", "ssim_unedited", "psnr"),
        options=("tokenizer",),
        trade_off=("outside", "inside"),
    ),
}


def get_task(name: str) -> Task:
    """Find a task by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in TASKS:
        raise ValueError(f"`task` is {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def prepare_benchmark(
    name: str, output_dir: str | Path, source: str | None = None, allow_partial: bool = False, **options
) -> Benchmark:
    """Turn a benchmark's source into a folder of samples, and check that it is all there.

    Args:
        name (`str`): The task, a key of `TASKS`.
        output_dir (`str` or `Path`): The new folder.
        source (`str`, *optional*): The folder or Hub id its authors published; default the task's own.
        allow_partial (`bool`): Whether a part of the benchmark will do; reports then say so.
        options: Those of the task; `None` stands for its default.

    Raises:
        ValueError: If the folder exists, an option is not the task's, or the source is not the published benchmark.
    """
    task, options = get_task(name), {option: value for option, value in options.items() if value is not None}
    if unknown := sorted(set(options) - set(task.options)):
        raise ValueError(f"`{unknown[0]}` is {options[unknown[0]]!r}; the task {name} has no such option.")
    source = source or task.default_source
    if source is None:
        raise ValueError(f"`source` is missing; the task {name} is read from a folder: {task.summary}.")
    if options.get("resolution", 1) < 1:
        raise ValueError(f"`resolution` is {options['resolution']}; it must be at least 1 pixel.")
    check_new(output_dir)
    samples = task.read_samples(source, **options)
    write_benchmark(samples, output_dir, name, source, task.expected, allow_partial)
    return Benchmark(output_dir)
