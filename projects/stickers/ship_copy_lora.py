"""Ship the adapter that `train_copy_lora.sh` trained: its weights, and a model card with results and images.

    python projects/stickers/ship_copy_lora.py --model projects/stickers/sticker-editor \
        --adapter runs/copy/run/adapter --dataset runs/copy/new --figures runs/copy/figures \
        --output-dir projects/stickers/sticker-copy-lora --hardware "two CPU cores, 12 minutes"

The results are the output of `evaluate_sticker_editor.py` for new and old test samples, with and without the adapter.
One image shows the first new test samples, without any selection. Two images are the example that the Hub shows.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image, ImageOps
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.data_files import load_files
from editar_hf.pipelines.hub import CARD_FILE
from editar_hf.pipelines.lora import CONFIG_FILE, WEIGHTS_FILE
from editar_hf.training.validation import build_contact_sheet


IMAGE_FILE = "copies.png"
NUM_SHOWN, ENLARGED = 6, 128
CARD = Path(__file__).with_name("copy_lora_card.md")
PHOTO = Path(__file__).with_name("photo.png")
# The widget of the Hub: its source image, its prompt, and the result.
EXAMPLE = {"src": "example.png", "prompt": "copy the red circle to the top right", "output": {"url": "edited.png"}}


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id that the adapter is for"})
    adapter: Path = field(metadata={"help": "folder that `train_editar.py --lora-rank` wrote"})
    dataset: str = field(metadata={"help": "folder that `make_copy_edits.py` wrote"})
    figures: Path = field(metadata={"help": "folder with new-without.json, new-with.json, old-without.json, ..."})
    output_dir: Path
    hardware: str = "two CPU cores"


def list_results(results: dict[str, dict], setting: str) -> list[EvalResult]:
    """List the percentages of edits that are done with the adapter, for the header of the card."""
    means = {**results["new-with"][setting]["seen"], **results["old-with"][setting]["seen"]}
    where = {"task_type": "image-to-image", "dataset_type": "custom", "dataset_name": "sticker edits"}
    where |= {"dataset_split": "test", "metric_type": "accuracy"}
    return [
        EvalResult(**where, metric_value=round(100 * mean["done"], 1), metric_name=f"{operation}: edits done, %")
        for operation, mean in means.items()
    ]


def compose_rows(results: dict[str, dict], setting: str) -> str:
    """Compose the rows of the table."""
    rows = []
    for part, reference_name in (("new", "ceiling"), ("old", "result without")):
        without, adapted = results[f"{part}-without"], results[f"{part}-with"]
        columns = [without["ceiling"]["seen"], without[setting]["seen"], adapted[setting]["seen"]]
        if part == "old":
            columns = [{**column, "all but copy": average(column)} for column in columns]
        for operation in columns[0]:
            ceiling, base, ours = (column[operation]["done"] for column in columns)
            reference = ceiling if part == "new" else base
            share = f"{ours / reference:.1%} of the {reference_name}" if reference else ""
            rates = " | ".join(f"{100 * rate:.1f}" for rate in (ceiling, base, ours))
            rows.append(f"| {operation} | {columns[0][operation]['n']:,} | {rates} | {share} |")
    return "\n".join(rows)


def average(means: dict[str, dict]) -> dict[str, float]:
    """Average the fractions of edits that are done over all operations, weighted by their numbers of samples."""
    total = sum(mean["n"] for mean in means.values())
    return {"n": total, "done": sum(mean["n"] * mean["done"] for mean in means.values()) / total}


def list_names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def draw_example(pipeline: EditARPipeline, folder: Path) -> None:
    """Write the images of the widget: a square of a photograph, and its edit with the seed 0."""
    ImageOps.fit(Image.open(PHOTO), (ENLARGED, ENLARGED)).save(folder / EXAMPLE["src"], optimize=True)
    call = {"prompt": EXAMPLE["prompt"], "image": folder / EXAMPLE["src"]}
    (edited,) = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    edited.save(folder / EXAMPLE["output"]["url"], optimize=True)


def draw_copies(args: Arguments, pipeline: EditARPipeline) -> Image.Image:
    """Draw the first test samples as source | without | with | target. The pipeline then has the adapter."""
    samples = load_files("parquet", [f"{args.dataset}/test.parquet"], f"test[:{NUM_SHOWN}]")

    def edit() -> list[Image.Image]:
        return pipeline(samples["prompt"][:], image=samples["source_image"][:], do_sample=False).images

    columns = [samples["source_image"][:], edit()]
    pipeline.load_lora_weights(args.adapter)
    columns += [edit(), samples["target_image"][:]]
    size = ENLARGED, ENLARGED
    rows = zip(*columns, strict=True)
    return build_contact_sheet([[image.resize(size, Image.Resampling.NEAREST) for image in row] for row in rows])


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    config = json.loads((args.adapter / CONFIG_FILE).read_text())
    results = {path.stem: json.loads(path.read_text()) for path in args.figures.glob("*.json")}
    (setting,) = results["new-with"].keys() - {"ceiling"}
    text = CARD.read_text(encoding="utf-8").format(
        model=args.model,
        folder=args.output_dir,
        rank=config["r"],
        alpha=config["lora_alpha"],
        modules=list_names(config["target_modules"]),
        trained_whole=f"; {list_names(whole)} trained as a whole" if (whole := config["modules_to_save"]) else "",
        hardware=args.hardware,
        setting=setting,
        rows=compose_rows(results, setting),
        image=IMAGE_FILE,
        adapted=results["new-with"][setting]["seen"]["copy"],
        without=results["new-without"][setting]["seen"]["copy"],
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipeline = EditARPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    draw_copies(args, pipeline).save(args.output_dir / IMAGE_FILE, optimize=True)
    draw_example(pipeline, args.output_dir)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(args.adapter / file, args.output_dir / file)
    card = ModelCard(text)
    card.data.model_name = "sticker-copy-lora"
    card.data.eval_results, card.data.widget = list_results(results, setting), [EXAMPLE]
    card.save(args.output_dir / CARD_FILE)


if __name__ == "__main__":
    main()
