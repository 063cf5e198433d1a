"""Training that uploads pipelines, adapters and tokenizers, loaded by id in a fresh process, against a played Hub."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from hub_server import TOKEN, HubServer, Repository
from PIL import Image
from processes import run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build_pipeline

from editar_hf import EditARPipeline


EXAMPLES = Path(__file__).parents[1] / "examples"
EDITOR, ADAPTER, TOKENIZER = "tester/editor", "tester/adapter", "tester/tokenizer"
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
for name, source in (("pushed", "tester/tokenizer"), ("at hand", sys.argv[1])):
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


def write_pairs(path, num_rows, seed):
    rng = np.random.default_rng(seed)
    names = ("source_image", "target_image")
    rows = {
        name: [Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)) for _ in range(num_rows)]
        for name in names
    }
    rows |= {"prompt": ["make it blue"] * num_rows, "task": ["edit", "depth"] * (num_rows // 2)}
    words = dict.fromkeys(("prompt", "task"), datasets.Value("string"))
    features = datasets.Features({**dict.fromkeys(names, datasets.Image()), **words})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def run(words, environment):
    finished = run_python(*words, environment=environment)
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
    for split, num_rows, seed in (("train", 4, 0), ("validation", 2, 1)):
        write_pairs(home / "pairs" / f"{split}.parquet", num_rows, seed)
    options = ["--dataset", home / "pairs", "--batch_size", 2, "--learning_rate", 0.1, "--max_train_steps", 2]
    options += ["--validation_dataset", home / "pairs", "--validation_steps", 1]
    options += ["--logging_steps", 2, "--log_with", "tensorboard"]
    script = EXAMPLES / "train_editar.py"
    with HubServer() as hub:
        environment = {**hub.get_environment(home / "maker"), "ACCELERATE_USE_CPU": "true"}
        where = ["--output_dir", home / "editor", "--push_to_hub", EDITOR, "--push_steps", 1]
        pushed = run([script, "--model", home / "start", *where, "--license", "mit", *options], environment)
        hub.repositories[f"models/{ADAPTER}"] = repository = Repository()
        repository.commit({"README.md": b"what the user says"})
        where = ["--output_dir", home / "adapter", "--push_to_hub", ADAPTER]
        command = [script, "--model", EDITOR, *where, "--lora_rank", 2, *options]
        refused = run_python(*command, environment=environment)
        run([*command, "--no_hub_private_repo"], environment)
        cards = {name: (home / part / "README.md").read_text() for name, part in CARDS.items()}
        snippets = {"EDITOR_SNIPPET": read_snippet(cards[EDITOR]), "ADAPTER_SNIPPET": read_snippet(cards[ADAPTER])}
        seen = json.loads(run(["-c", EDIT, home], {**hub.get_environment(home / "user"), **snippets}).stdout)
    told = {"printed": pushed.stdout, "refused": refused}
    return {"hub": hub, "home": home, "cards": cards, "seen": seen, "environment": environment, **told}


def test_what_was_pushed_edits_as_what_is_at_hand(story):
    seen = story["seen"]
    assert seen["pushed"] == seen["at hand"]
    assert seen["pushed adapter"] == seen["adapter at hand"]
    assert seen["pushed adapter"] != seen["pushed"]


def test_new_repositories_are_private_and_the_run_says_so(story):
    assert story["hub"].repositories[f"models/{EDITOR}"].private
    line = f"Results will be uploaded to {EDITOR} (private; `--no-hub-private-repo` makes new ones public)."
    assert line in story["printed"].splitlines()


def test_a_public_repository_is_refused_before_the_training_unless_it_is_asked_for(story):
    assert not story["hub"].repositories[f"models/{ADAPTER}"].private
    last_line = story["refused"].stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"ValueError: The repository {ADAPTER} is to be private, but it exists and is public.")
    assert "`--no-hub-private-repo`" in last_line
    assert "Training\n" not in story["refused"].stdout


def test_snippets_of_the_cards_run_as_pasted(story):
    assert story["seen"]["EDITOR_SNIPPET"] == [512, 512]
    assert story["seen"]["ADAPTER_SNIPPET"] == [512, 512]


def test_pushed_folders_are_complete(story):
    editor, adapter = (set(story["hub"].read_files(name)) for name in (EDITOR, ADAPTER))
    assert {"model_index.json", "transformer/model.safetensors", "validation.png", "README.md"} <= editor
    assert {"adapter_config.json", "adapter_model.safetensors", "validation.png", "README.md"} <= adapter


def test_cards_say_what_was_trained_on_what_how_well_and_under_which_terms(story):
    editor, adapter = (story["cards"][name] for name in (EDITOR, ADAPTER))
    header = yaml.safe_load(editor.split("---")[1])
    assert header["license"] == "mit"
    assert "`mit`." in editor
    assert yaml.safe_load(adapter.split("---")[1])["base_model"] == EDITOR
    assert "Not stated yet" in adapter.partition("## Licence")[2]
    for card in (editor, adapter):
        assert "4 pairs, for " in card
        assert "train_editar.py --model" in card
        assert "Loss on held-out pairs: " in card
        assert "![source, edited, target](validation.png)" in card


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
    assert f"Loss on held-out pairs: {last['validation_loss']:.4f}" in story["cards"][EDITOR]


def test_failed_upload_leaves_the_folder_and_says_how_to_try_again(story):
    folder = story["home"] / "editor" / "pipeline"
    finished = run(["-c", FAIL, folder], {**story["environment"], "HF_ENDPOINT": "http://localhost:9"})
    assert finished.stdout.strip() == "None"
    assert f"hf upload tester/editor {folder}" in finished.stderr
    assert EditARPipeline.from_pretrained(folder).transformer is not None


def test_token_is_written_nowhere(story):
    for path in story["home"].rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for repository in story["hub"].repositories.values():
        for files in repository.commits.values():
            assert not [name for name, content in files.items() if TOKEN.encode() in content]


@pytest.fixture(scope="module")
def tokenizer_story(tmp_path_factory):
    """Train a tokenizer and push it, on the way too; load it elsewhere, and paste its card's snippet."""
    home = tmp_path_factory.mktemp("tokenizer-hub")
    write_pairs(home / "pairs.parquet", num_rows=6, seed=0)
    sizes = ["--num_embeddings", 16, "--embedding_dim", 4, "--latent_channels", 8, "--base_channels", 8]
    sizes += ["--channel_multipliers", 1, 1, 1, "--num_res_blocks", 1, "--norm_num_groups", 2, "--resolution", 16]
    options = ["--dataset", home / "pairs.parquet", "--image_columns", "source_image,target_image"]
    options += ["--validation_rows", 2, "--batch_size", 4, "--max_steps", 3, "--output_dir", home / "run"]
    options += ["--push_to_hub", TOKENIZER, "--push_steps", 2, "--license", "mit"]
    with HubServer() as hub:
        environment = {**hub.get_environment(home / "maker"), "ACCELERATE_USE_CPU": "true"}
        run([EXAMPLES / "train_vq.py", *sizes, *options], environment)
        card = hub.read_files(TOKENIZER)["README.md"].decode()
        environment = {**hub.get_environment(home / "user"), "SNIPPET": read_snippet(card)}
        seen = json.loads(run(["-c", ENCODE, home / "run" / "vq_model"], environment).stdout)
    return {"hub": hub, "home": home, "card": card, "seen": seen}


def test_pushed_tokenizer_encodes_as_the_one_at_hand_and_its_snippet_runs_as_pasted(tokenizer_story):
    seen = tokenizer_story["seen"]
    assert seen["pushed"] == seen["at hand"]
    assert seen["snippet"] == [16, 16]


def test_tokenizer_is_pushed_on_the_way_and_at_the_end_without_its_checkpoints(tokenizer_story):
    cards = [files.get("README.md", b"").decode() for files in tokenizer_story["hub"].commits_of(TOKENIZER)]
    assert [card.partition(" steps of ")[0][-1:] for card in cards] == ["", "2", "3"]
    files = set(tokenizer_story["hub"].read_files(TOKENIZER))
    assert files == {".gitattributes", "README.md", "config.json", "model.safetensors", "validation.png"}
    with Image.open(tokenizer_story["home"] / "run" / "vq_model" / "validation.png") as sheet:
        assert sheet.size == (4 * 20 + 4, 2 * 20 + 4)


def test_card_of_a_tokenizer_says_what_it_was_trained_on_and_how_well(tokenizer_story):
    card, home = tokenizer_story["card"], tokenizer_story["home"]
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert header["tags"] == ["editar", "vq-tokenizer"]
    assert f"Trained on 8 images of `{home / 'pairs.parquet'}`, for 3 steps of 4, at 16 × 16 pixels." in card
    assert "train_vq.py --num_embeddings 16" in card
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    psnr = next(line["psnr"] for line in reversed(lines) if "psnr" in line)
    assert f"On 4 held-out images: PSNR {psnr:.2f} dB" in card
    assert TOKEN not in card
