"""The pipeline on the Hub: push, load, cached, out of reach, variant, card; against a server that plays the Hub.

`push`, `load` and `load_away_from_the_hub` each run in a process with an environment of its own.
"""

import os
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, snapshot_download
from processes import run_python
from tiny import build_pipeline

from editar_hf import EditARPipeline
from editar_hf.pipelines.hub import ENGINE_FILES, make_card


REPO, PRIVATE_REPO, BARE_REPO = "tester/tiny-editor", "tester/private-editor", "tester/bare"
WEIGHTS = {f"{name}/model.safetensors" for name in ("transformer", "vq_model", "text_encoder")}


def read_head(pipe):
    """Read what tells the pipelines apart: one weight of the head."""
    return pipe.transformer.lm_head.weight[0, 0].item()


def read_snippet(card):
    return card.partition("```python\n")[2].partition("```")[0]


@torch.no_grad()
def push():
    pipe = build_pipeline()
    assert pipe.push_to_hub("tiny-editor").startswith(f"{os.environ['HF_ENDPOINT']}/{REPO}/commit/")
    pipe.transformer.lm_head.weight.mul_(2)
    pipe.push_to_hub(REPO, variant="doubled")
    pipe.push_to_hub(PRIVATE_REPO, private=True, token=os.environ["HF_TOKEN"])
    for name in ("README.md", "pipeline.py"):
        HfApi().upload_file(path_or_fileobj=b"what the user says", path_in_repo=name, repo_id=PRIVATE_REPO)
    pipe.push_to_hub(PRIVATE_REPO)
    HfApi().create_repo(BARE_REPO)
    with pytest.raises(ValueError, match="`private` is True, but the repository tester/bare exists and is public"):
        pipe.push_to_hub(BARE_REPO, private=True)


def load(commit, snippet):
    head = read_head(build_pipeline())
    pipe = EditARPipeline.from_pretrained(REPO)
    assert read_head(pipe) == head
    assert pipe.name_or_path == REPO
    assert pipe.transformer.generation_config.guidance_scale == 3.0
    folder = Path(EditARPipeline.download(REPO))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")} == WEIGHTS
    assert (folder / "transformer" / "generation_config.json").is_file()
    assert read_head(EditARPipeline.from_pretrained(REPO, variant="doubled")) == pytest.approx(2 * head)
    assert read_head(EditARPipeline.from_pretrained(REPO, revision=commit)) == head
    # As SGLang does: the weights from a folder, and the code from the repository.
    names = {"custom_pipeline": REPO, "trust_remote_code": True}
    assert read_head(DiffusionPipeline.from_pretrained(snapshot_download(REPO), **names)) == head
    partly = Path(os.environ["HF_HOME"]) / "partly"
    EditARPipeline.from_pretrained(REPO, cache_dir=partly, text_encoder=None, vq_model=pipe.vq_model)
    assert {path.parent.name for path in partly.rglob("*.safetensors")} == {"transformer"}
    with pytest.raises(ValueError, match="model_index"):
        EditARPipeline.from_pretrained(BARE_REPO)
    with pytest.raises(ValueError, match="halved"):
        EditARPipeline.from_pretrained(REPO, variant="halved")
    with pytest.raises(OSError, match=f"`{PRIVATE_REPO}` is not a local folder"):
        EditARPipeline.from_pretrained(PRIVATE_REPO, token=False)
    EditARPipeline.from_pretrained(PRIVATE_REPO, token=os.environ["HF_TOKEN"])
    os.chdir(os.environ["HF_HOME"])
    exec(snippet, {})
    assert Path("edited.png").is_file()


def load_away_from_the_hub():
    head = read_head(build_pipeline())
    assert read_head(EditARPipeline.from_pretrained(REPO, local_files_only=True)) == head
    assert read_head(EditARPipeline.from_pretrained(REPO)) == head
    doubled = EditARPipeline.from_pretrained(REPO, variant="doubled", local_files_only=True)
    assert read_head(doubled) == pytest.approx(2 * head)


def run(environment, function, *arguments):
    """Call a function of this file in a process of its own."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_hub\n"
    script += f"test_hub.{function.__name__}(*sys.argv[1:])"
    finished = run_python("-c", script, *arguments, environment=environment)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(home):
    """Play the Hub while one machine pushes and another loads; then go out of reach."""
    with HubServer() as hub:
        run(hub.get_environment(home / "maker"), push)
        first_commit = list(hub.repositories[f"models/{REPO}"].commits)[1]
        snippet = read_snippet(hub.read_files(REPO)["README.md"].decode())
        run(hub.get_environment(home / "user"), load, first_commit, snippet)
    return hub


def test_pushed_folder_is_safetensors_configurations_and_a_card_that_names_the_repository(hub):
    files = hub.read_files(REPO)
    doubled = {name.replace("model.s", "model.doubled.s") for name in WEIGHTS}
    assert {name for name in files if name.endswith(".safetensors")} == WEIGHTS | doubled
    assert {"README.md", "model_index.json", "transformer/generation_config.json"} <= set(files)
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".md", ".py", ""}
    assert {name for name in files if name.endswith(".py")} == set(ENGINE_FILES)
    card = files["README.md"].decode()
    assert card == make_card("base", REPO)
    assert f'EditARPipeline.from_pretrained("{REPO}")' in read_snippet(card)


def test_second_load_finds_the_weights_in_the_cache_also_out_of_reach(hub, home):
    fetched = [path for method, path in hub.requests if method == "GET" and path.startswith(f"/{REPO}/")]
    assert len([path for path in fetched if path.endswith("text_encoder/model.safetensors")]) == 1
    run(hub.get_environment(home / "user"), load_away_from_the_hub)


def test_private_repository_stays_private_with_the_files_of_the_user(hub):
    assert hub.repositories[f"models/{PRIVATE_REPO}"].private
    for name in ("README.md", "pipeline.py"):
        assert hub.read_files(PRIVATE_REPO)[name] == b"what the user says"
    assert set(hub.read_files(BARE_REPO)) == {".gitattributes"}


def test_token_is_written_nowhere(hub, home):
    commits = [files for repository in hub.repositories.values() for files in repository.commits.values()]
    pushed = [content for files in commits for content in files.values()]
    kept = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert not [content for content in pushed + kept if TOKEN.encode() in content]
