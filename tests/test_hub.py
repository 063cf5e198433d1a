"""The pipeline on the Hub: push, load, cached, out of reach, variant, card; against a server that plays the Hub.

What talks to the server is a process with an environment of its own: one pushes and one loads, each writes down what it
saw, and the tests look at that.
"""

import json
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from processes import run_python
from tiny import build_pipeline

from editar_hf.pipelines.hub import make_card


REPO, PRIVATE_REPO, BARE_REPO = "tester/tiny-editor", "tester/private-editor", "tester/bare"
HEADER = f"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from tiny import build_pipeline
from editar_hf import EditARPipeline
seen = {{}}
"""
PUSH = """
pipe = build_pipeline()
seen["commit"] = pipe.push_to_hub("tiny-editor")
with torch.no_grad():
    pipe.transformer.lm_head.weight.mul_(2)
pipe.push_to_hub("tester/tiny-editor", variant="doubled")
pipe.push_to_hub("tester/private-editor", private=True, token=os.environ["HF_TOKEN"])
from huggingface_hub import HfApi
HfApi().create_repo("tester/bare")
HfApi().upload_file(path_or_fileobj=b"what the user says", path_in_repo="README.md", repo_id="tester/private-editor")
pipe.push_to_hub("tester/private-editor")
try:
    pipe.push_to_hub("tester/bare", private=True)
except ValueError as error:
    seen["refused"] = str(error)
"""
LOAD = """
def read_head(pipe):
    return pipe.transformer.lm_head.weight[0, 0].item()

pipe = EditARPipeline.from_pretrained("tester/tiny-editor")
seen["plain"], seen["name"] = read_head(pipe), pipe.name_or_path
seen["settings"] = pipe.transformer.generation_config.guidance_scale
folder = Path(EditARPipeline.download("tester/tiny-editor"))
seen["downloaded"] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
seen["doubled"] = read_head(EditARPipeline.from_pretrained("tester/tiny-editor", variant="doubled"))
seen["first commit"] = read_head(EditARPipeline.from_pretrained("tester/tiny-editor", revision=os.environ["COMMIT"]))
partly = Path(os.environ["HF_HOME"]) / "partly"
given = {"text_encoder": None, "vq_model": pipe.vq_model}
EditARPipeline.from_pretrained("tester/tiny-editor", cache_dir=partly, **given)
seen["partly"] = sorted({path.parent.name for path in partly.rglob("*.safetensors")})
for name, arguments in {
    "bare": {"pretrained_model_name_or_path": "tester/bare"},
    "no variant": {"pretrained_model_name_or_path": "tester/tiny-editor", "variant": "halved"},
    "no token": {"pretrained_model_name_or_path": "tester/private-editor", "token": False},
}.items():
    try:
        EditARPipeline.from_pretrained(**arguments)
    except Exception as error:
        seen[name] = [type(error).__name__, str(error)]
EditARPipeline.from_pretrained("tester/private-editor", token=os.environ["HF_TOKEN"])
snippet = os.environ["SNIPPET"]
os.chdir(os.environ["HF_HOME"])
exec(snippet)
seen["edited"] = Path("edited.png").exists()
"""
AWAY = """
pipe = EditARPipeline.from_pretrained("tester/tiny-editor", local_files_only=True)
seen["local files only"] = pipe.transformer.lm_head.weight[0, 0].item()
pipe = EditARPipeline.from_pretrained("tester/tiny-editor")
seen["server down"] = pipe.transformer.lm_head.weight[0, 0].item()
doubled = EditARPipeline.from_pretrained("tester/tiny-editor", variant="doubled", local_files_only=True)
seen["doubled"] = doubled.transformer.lm_head.weight[0, 0].item()
"""


def run(script, environment):
    """Run a script in a process of its own and return what it has seen."""
    finished = run_python("-c", f"{HEADER}{script}\nprint(json.dumps(seen))", environment=environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def read_snippet(card):
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Push from one machine, load on another, and once more with the Hub out of reach."""
    home = tmp_path_factory.mktemp("hub")
    with HubServer() as hub:
        pushed = run(PUSH, hub.get_environment(home / "maker"))
        environment = {
            **hub.get_environment(home / "user"),
            "SNIPPET": read_snippet(hub.read_files(REPO)["README.md"].decode()),
            "COMMIT": pushed["commit"].rpartition("/")[2],
        }
        loaded = run(LOAD, environment)
        requests = len(hub.requests)
    away = run(AWAY, environment)
    return {"hub": hub, "home": home, "pushed": pushed, "loaded": loaded, "away": away, "requests": requests}


@pytest.fixture(scope="module")
def head():
    """What tells the pipelines apart: one weight of the head."""
    return build_pipeline().transformer.lm_head.weight[0, 0].item()


def test_pushed_folder_is_safetensors_configurations_and_a_card(story):
    files = story["hub"].read_files(REPO)
    weights = {f"{name}/model.safetensors" for name in ("transformer", "vq_model", "text_encoder")}
    doubled = {name.replace("model.s", "model.doubled.s") for name in weights}
    assert {name for name in files if name.endswith(".safetensors")} == weights | doubled
    assert {"README.md", "model_index.json", "transformer/generation_config.json"} <= set(files)
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".md", ""}


def test_pipeline_loads_by_hub_id(story, head):
    assert story["loaded"]["plain"] == head
    assert story["loaded"]["name"] == REPO


def test_download_brings_the_generation_config_and_no_other_weights(story):
    downloaded = story["loaded"]["downloaded"]
    assert {"transformer/generation_config.json", "processor/tokenizer.json"} <= set(downloaded)
    assert [name for name in downloaded if name.endswith(".safetensors")] == [
        "text_encoder/model.safetensors",
        "transformer/model.safetensors",
        "vq_model/model.safetensors",
    ]
    assert story["loaded"]["settings"] == 3.0


def test_second_load_finds_the_weights_in_the_cache(story):
    fetched = [path for method, path in story["hub"].requests if method == "GET" and path.startswith(f"/{REPO}/")]
    assert len([path for path in fetched if path.endswith("text_encoder/model.safetensors")]) == 1


def test_variant_and_revision_choose_the_weights(story, head):
    assert story["loaded"]["doubled"] == pytest.approx(2 * head)
    assert story["loaded"]["first commit"] == head


def test_components_passed_in_are_not_downloaded(story):
    assert story["loaded"]["partly"] == ["transformer"]


def test_pipeline_loads_with_the_hub_out_of_reach(story, head):
    assert story["away"]["local files only"] == head
    assert story["away"]["server down"] == head
    assert story["away"]["doubled"] == pytest.approx(2 * head)
    assert len(story["hub"].requests) == story["requests"]


def test_repository_without_a_pipeline_or_variant_is_refused(story):
    assert story["loaded"]["bare"][0] == story["loaded"]["no variant"][0] == "ValueError"
    assert "model_index.json" in story["loaded"]["bare"][1]
    assert "halved" in story["loaded"]["no variant"][1]


def test_private_repository_needs_the_token(story):
    assert story["loaded"]["no token"][0] == "OSError"
    assert "`tester/private-editor` is no folder here" in story["loaded"]["no token"][1]


def test_card_names_the_repository_and_its_snippet_runs_as_pasted(story):
    card = story["hub"].read_files(REPO)["README.md"].decode()
    assert card == make_card("base", REPO)
    assert f'EditARPipeline.from_pretrained("{REPO}")' in read_snippet(card)
    assert story["loaded"]["edited"]


def test_card_of_the_user_outlives_later_pushes(story):
    assert story["hub"].read_files(PRIVATE_REPO)["README.md"] == b"what the user says"


def test_a_public_repository_is_no_place_for_a_private_push(story):
    assert story["hub"].repositories[f"models/{PRIVATE_REPO}"].private
    assert "tester/bare is to be private, but it exists and is public" in story["pushed"]["refused"]
    assert set(story["hub"].read_files(BARE_REPO)) == {".gitattributes"}


def test_token_is_written_nowhere(story):
    for repository in story["hub"].repositories.values():
        for files in repository.commits.values():
            assert not [name for name, content in files.items() if TOKEN.encode() in content]
    for path in story["home"].rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
