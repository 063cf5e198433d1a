"""Train or fine-tune EditAR on pairs of images, each with an instruction.

    accelerate launch examples/train_editar.py --model editar --dataset my-pairs --output-dir runs/my-editor

`--model` is a pipeline folder or Hub id. `--dataset` is a Hub id (streamed), a folder or pattern of parquet files or
webdataset tars, an image folder, or the output of `examples/precompute_tokens.py`. It needs the columns
`source_image`, `target_image` and `prompt`, and may have `mask` and `task`. If your columns have other names, pass them
as `--source-image-column` and so on. In place of `--dataset`, `--recipe` takes a file that mixes several data sets,
such as `examples/recipes/editar.yaml`.

The VQ model stays frozen. The text encoder stays frozen too, unless you pass `--train-text-encoder`. The defaults are
the published settings (arXiv 2501.04699, section 4.1): 40,000 steps of 64 pairs with AdamW.
`examples/train_minimal.py` is a short script that shows the batch, the loss and the optimizer.
"""

from transformers import set_seed

from editar_hf.training.arguments import TrainingArguments, parse_arguments
from editar_hf.training.trainer import EditARTrainer, build_accelerator, load_pipeline


def main():
    args = parse_arguments(TrainingArguments)
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    # Before the model is loaded, because a wrong recipe is refused here.
    data = args.describe_datasets(streaming=args.streaming), args.describe_validation_dataset()
    trainer = EditARTrainer(args, accelerator, load_pipeline(args), *data)
    trainer.train()
    trainer.save_result()
    accelerator.end_training()


if __name__ == "__main__":
    main()
