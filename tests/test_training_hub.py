"""Training that uploads pipelines, adapters and VQ models, loaded by id in a fresh process, against a played Hub."""

import json

import pytest
import yaml
from hub_server import TOKEN, HubServer, Repository
from huggingface_hub import ModelCard
from PIL import Image
from processes import run_python
from scripts import EXAMPLES, list_words, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build_pipeline, write_pairs

from editar_hf import EditARPipeline


EDITOR, ADAPTER, VQ_MODEL = "tester/editor", "tester/adapter", "tester/vq-model"
CARDS = {EDITOR: "editor/pipeline", ADAPTER: "adapter/adapter"}
EDIT = """
import json, os, sys
from pathlib import Path
import torch
from PIL import Image
from editar_hf import EditARPipeline

def edit(pipe):
    image = Image.new("RGB", (16, 16), "red")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("make the red circle blue", image=image, generator=generator, output_type="tokens").images[0].tolist()

local = Path(sys.argv[1])
seen = {}
seen["pushed"] = edit(EditARPipeline.from_pretrained("tester/editor"))
seen["at hand"] = edit(EditARPipeline.from_pretrained(local / "editor" / "pipeline"))
for name, source in (("pushed adapter", "tester/adapter"), ("adapter at hand", local / "adapter" / "adapter")):
    pipe = EditARPipeline.from_pretrained("tester/editor")
    pipe.load_lora_weights(source)
    seen[name] = edit(pipe)
os.chdir(os.environ["HF_HOME"])
for name in ("EDITOR_SNIPPET", "ADAPTER_SNIPPET"):
    exec(os.environ[name])
    seen[name] = Image.open("edited.png").size
    os.remove("edited.png")
print(json.dumps(seen))
"""
ENCODE = """
import json, os, sys
import torch
from PIL import Image
from editar_hf import EditARVQModel

seen = {}
for name, source in (("pushed", "tester/vq-model"), ("at hand", sys.argv[1])):
    pixel_values = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen[name] = EditARVQModel.from_pretrained(source).encode(pixel_values).image_tokens.tolist()
os.chdir(os.environ["HF_HOME"])
exec(os.environ["SNIPPET"])
seen["snippet"] = Image.open("decoded.png").size
print(json.dumps(seen))
"""
FAIL = """
import sys
from editar_hf.pipelines.hub import try_to_upload_folder
print(try_to_upload_folder(sys.argv[1], "tester/editor"))
"""


def run(code, *words, environment):
    finished = run_python("-c", code, *words, environment=environment)
    assert finished.returncode == 0, finished.stderr
    return finished


def read_snippet(card):
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Train a pipeline and push it on the way too; an adapter for it by its id; load both elsewhere."""
    home = tmp_path_factory.mktemp("hub")
    build_pipeline().save_pretrained(home / "start")
    (home / "pairs").mkdir()
    for split, num_rows in (("train", 4), ("validation", 2)):
        tasks = ["edit", "depth"] * (num_rows // 2)
        write_pairs(home / "pairs" / f"{split}.parquet", num_rows, prompt=["make it blue"] * num_rows, task=tasks)
    options = {"dataset": home / "pairs", "validation_dataset": home / "pairs", "validation_steps": 1}
    options |= {"batch_size": 2, "learning_rate": 0.1, "max_train_steps": 2, "logging_steps": 2}
    options |= {"log_with": "tensorboard"}
    editor = options | {"model": home / "start", "output_dir": home / "editor", "license": "mit"}
    editor |= {"push_to_hub": EDITOR, "push_steps": 1}
    adapter = options | {"model": EDITOR, "output_dir": home / "adapter", "push_to_hub": ADAPTER, "lora_rank": 2}
    with HubServer() as hub:
        environment = {**hub.get_environment(home / "maker"), "ACCELERATE_USE_CPU": "true"}
        printed = run_script("train_editar.py", environment=environment, **editor)
        hub.repositories[f"models/{ADAPTER}"] = repository = Repository()
        repository.commit({"README.md": b"what the user says"})
        words = list_words(adapter | {"output_dir": home / "refused"})
        refused = run_python(EXAMPLES / "train_editar.py", *words, environment=environment)
        run_script("train_editar.py", "--no_hub_private_repo", environment=environment, **adapter)
        cards = {name: (home / part / "README.md").read_text() for name, part in CARDS.items()}
        snippets = {"EDITOR_SNIPPET": read_snippet(cards[EDITOR]), "ADAPTER_SNIPPET": read_snippet(cards[ADAPTER])}
        user = {**hub.get_environment(home / "user"), **snippets}
        seen = json.loads(run(EDIT, home, environment=user).stdout)
    told = {"printed": printed, "refused": refused, "environment": environment}
    return {"hub": hub, "home": home, "cards": cards, "seen": seen, **told}


def test_what_was_pushed_edits_as_what_is_at_hand_and_snippets_run_as_pasted(story):
    seen = story["seen"]
    assert seen["pushed"] == seen["at hand"]
    assert seen["pushed adapter"] == seen["adapter at hand"]
    assert seen["pushed adapter"] != seen["pushed"]
    assert seen["EDITOR_SNIPPET"] == seen["ADAPTER_SNIPPET"] == [512, 512]
    editor, adapter = (set(story["hub"].read_files(name)) for name in (EDITOR, ADAPTER))
    assert {"model_index.json", "transformer/model.safetensors", "validation.png", "README.md"} <= editor
    assert {"adapter_config.json", "adapter_model.safetensors", "validation.png", "README.md"} <= adapter


def test_new_repositories_are_private_and_a_public_one_is_refused_before_the_training(story):
    assert story["hub"].repositories[f"models/{EDITOR}"].private
    line = f"Results will be uploaded to {EDITOR} (private; `--no-hub-private-repo` makes new ones public)."
    assert line in story["printed"].splitlines()
    last_line = story["refused"].stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"ValueError: `private` is True, but the repository {ADAPTER} exists and is public.")
    assert "`--no-hub-private-repo`" in last_line
    assert "Training\n" not in story["refused"].stdout


def test_cards_say_what_was_trained_on_what_how_well_and_under_which_terms(story):
    editor, adapter = (story["cards"][name] for name in (EDITOR, ADAPTER))
    assert yaml.safe_load(editor.split("---")[1])["license"] == "mit"
    assert "`mit`." in editor
    assert yaml.safe_load(adapter.split("---")[1])["base_model"] == EDITOR
    assert "Not stated yet" in adapter.partition("## License")[2]
    for card in (editor, adapter):
        for part in ("4 pairs, for ", "train_editar.py ", "![source, edited, target](validation.png)"):
            assert part in card


def test_the_last_upload_replaces_the_card_of_the_first_and_no_other(story):
    assert "for 2 steps" in story["cards"][EDITOR]
    assert story["hub"].read_files(EDITOR)["README.md"].decode() == story["cards"][EDITOR]
    assert story["hub"].read_files(ADAPTER)["README.md"] == b"what the user says"


def test_losses_of_training_of_each_task_and_of_validation_are_in_the_tensorboard_log(story):
    """Two steps of two pairs each, of which half are edits and half depth maps."""
    log = EventAccumulator(str(story["home"] / "editor" / "logs" / "editar")).Reload()
    steps = {tag: [event.step for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    last = {tag: log.Scalars(tag)[-1].value for tag in steps}
    assert steps["validation_loss"] == [1, 2]
    # The first step has two pairs of one task, which are not told apart.
    trained = {"loss": [1, 2], "token_loss": [1, 2], "token_loss/task/edit": [2], "token_loss/task/depth": [2]}
    assert {tag: steps[tag] for tag in (*trained, "learning_rate")} == trained | {"learning_rate": [1, 2]}
    tasks = [last[f"token_loss/task/{task}"] for task in ("edit", "depth")]
    assert tasks[0] != tasks[1]
    assert last["token_loss"] == pytest.approx(sum(tasks) / 2, rel=1e-5)
    card = story["cards"][EDITOR]
    assert f"Loss on held-out pairs: {last['validation_loss']:.4f}" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.task_type, result.metric_type) == ("image-to-image", "loss")
    assert result.metric_value == pytest.approx(last["validation_loss"], abs=1e-4)


def test_failed_upload_leaves_the_folder_and_says_how_to_try_again(story):
    folder = story["home"] / "editor" / "pipeline"
    finished = run(FAIL, folder, environment={**story["environment"], "HF_ENDPOINT": "http://localhost:9"})
    assert finished.stdout.strip() == "None"
    assert f"hf upload tester/editor {folder}" in finished.stderr
    assert EditARPipeline.from_pretrained(folder).transformer is not None


def test_token_is_written_nowhere(story):
    for path in story["home"].rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for repository in story["hub"].repositories.values():
        for files in repository.commits.values():
            assert not [name for name, content in files.items() if TOKEN.encode() in content]


def test_vq_model_is_pushed_on_the_way_and_at_the_end_with_a_card_whose_snippet_runs(tmp_path):
    write_pairs(tmp_path / "pairs.parquet", num_rows=6)
    options = {"num_embeddings": 16, "embedding_dim": 4, "latent_channels": 8, "base_channels": 8}
    options |= {"channel_multipliers": [1, 1, 1], "num_res_blocks": 1, "norm_num_groups": 2, "resolution": 16}
    options |= {"dataset": tmp_path / "pairs.parquet", "image_columns": "source_image,target_image"}
    options |= {"validation_rows": 2, "batch_size": 4, "max_steps": 3, "output_dir": tmp_path / "run"}
    options |= {"push_to_hub": VQ_MODEL, "push_steps": 2, "license": "mit"}
    with HubServer() as hub:
        run_script("train_vq.py", environment=hub.get_environment(tmp_path / "maker"), **options)
        files = hub.read_files(VQ_MODEL)
        card = files["README.md"].decode()
        user = {**hub.get_environment(tmp_path / "user"), "SNIPPET": read_snippet(card)}
        seen = json.loads(run(ENCODE, tmp_path / "run" / "vq_model", environment=user).stdout)
    assert seen["pushed"] == seen["at hand"]
    assert seen["snippet"] == [16, 16]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors", "validation.png"}
    with Image.open(tmp_path / "run" / "vq_model" / "validation.png") as sheet:
        assert sheet.size == (4 * 20 + 4, 2 * 20 + 4)
    cards = [commit.get("README.md", b"").decode() for commit in hub.commits_of(VQ_MODEL)]
    assert [text.partition(" steps of ")[0][-1:] for text in cards] == ["", "2", "3"]

    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["tags"]) == ("mit", ["editar", "vq-tokenizer"])
    assert f"Trained on 8 images of `{options['dataset']}`, for 3 steps of 4, at 16 × 16 pixels." in card
    assert "train_vq.py --num_embeddings 16" in card
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    psnr = next(line["psnr"] for line in reversed(lines) if "psnr" in line)
    assert f"On 4 held-out images: PSNR {psnr:.2f} dB" in card
    results = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    assert results.keys() == {"psnr", "code_usage", "perplexity"}
    assert results["psnr"] == pytest.approx(psnr, abs=1e-4)
    assert TOKEN not in card
