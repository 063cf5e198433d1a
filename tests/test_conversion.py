"""Published files, made at tiny size by the plain implementation, through `editar-hf convert` and back."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub.constants import HF_HUB_CACHE
from plain_editar import PlainEditAR, PlainVQ, redraw
from processes import run_python
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from editar_hf import EditARPipeline
from editar_hf.commands import main
from editar_hf.conversion import convert_transformer, load_published_weights, read_transformer_config, read_vq_config
from editar_hf.training.tokenizer import train_tokenizer


VOCAB, WIDTH, GRID_SIZE, TEXT_LENGTH, TEXT_WIDTH = 64, 32, 4, 16, 24
GRIDS = [(4, 4), (2, 4), (3, 1)]


def make_plain_editar(seed=0, **sizes):
    arguments = {"vocab": VOCAB, "width": WIDTH, "grid_size": GRID_SIZE, "text_length": TEXT_LENGTH}
    return redraw(PlainEditAR(**{**arguments, "text_width": TEXT_WIDTH, **sizes}), seed)


def make_plain_vq(seed=1, **sizes):
    return redraw(PlainVQ(**{"num_codes": VOCAB, **sizes}), seed)


def save_text_encoder(folder, text_width=TEXT_WIDTH):
    """Save a whole tiny T5, decoder included, with its tokenizer."""
    tokenizer = train_tokenizer(["add a red circle in the middle"] * 9, vocab_size=120)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=text_width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    torch.manual_seed(2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Published:
    """The three sources in the published formats, in one folder, and what they were made from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.editar, self.vq = make_plain_editar(), make_plain_vq()
        torch.save({"model": self.editar.state_dict()}, folder / "editar_release.pt")
        torch.save({"model": self.vq.state_dict()}, folder / "vq_ds16_t2i.pt")
        save_text_encoder(folder / "t5")

    def convert(self, output_dir, *options, transformer=None, vq_model=None, text_encoder=None):
        """Run the command and return its exit status."""
        sources = [
            ("--transformer", transformer or self.folder / "editar_release.pt"),
            ("--vq-model", vq_model or self.folder / "vq_ds16_t2i.pt"),
            ("--text-encoder", text_encoder or self.folder / "t5"),
        ]
        arguments = [str(word) for pair in sources for word in pair]
        return main(["convert", *arguments, "--output-dir", str(output_dir), "--num-attention-heads", "2", *options])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return Published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    assert published.convert(folder) == 0
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return EditARPipeline.from_pretrained(folder)


def draw_inputs(grid=(GRID_SIZE, GRID_SIZE), batch_size=4):
    generator = torch.Generator().manual_seed(3)
    source, target = torch.randint(VOCAB, (2, batch_size, grid[0] * grid[1]), generator=generator)
    return source, torch.randn(batch_size, TEXT_LENGTH, TEXT_WIDTH, generator=generator), target


@pytest.mark.parametrize("grid", GRIDS)
def test_converted_decoder_gives_the_published_logits_and_loss_for_every_dropped_condition(published, pipeline, grid):
    source, text, target = draw_inputs(grid)
    drop_source, drop_text = torch.tensor([[False, False, True, True], [False, True, False, True]])
    conditions = {"drop_source": drop_source, "drop_text": drop_text, "grid": grid}
    output = pipeline.transformer(
        source,
        text,
        labels=target,
        drop_source=drop_source,
        drop_prompt=drop_text,
        grid_height=grid[0],
        grid_width=grid[1],
    )
    expected = published.editar(source, text, target, **conditions)
    assert expected.std() > 0.5
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, published.editar.loss(source, text, target, **conditions))


def test_converted_decoder_gives_the_published_distillation_features(published, pipeline):
    source, text, target = draw_inputs()
    output = pipeline.transformer(source, text, labels=target, output_distillation_features=True)
    expected = published.editar.distillation_features(source, text, target)
    torch.testing.assert_close(output.distillation_features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3)])
def test_converted_decoder_gives_the_published_greedy_tokens(published, pipeline, guidance_scale, grid):
    source, text, _ = draw_inputs(grid, batch_size=2)
    tokens = pipeline.transformer.generate(
        source, text, guidance_scale=guidance_scale, do_sample=False, grid_height=grid[0], grid_width=grid[1]
    )
    assert tokens.tolist() == published.editar.generate(source, text, guidance_scale, grid=grid).tolist()


def test_guidance_matters_in_this_comparison(published):
    source, text, _ = draw_inputs(batch_size=2)
    plain, guided = (published.editar.generate(source, text, guidance) for guidance in (1.0, 3.0))
    assert (plain != guided).float().mean() > 0.2


@pytest.mark.parametrize("grid", GRIDS)
def test_converted_tokenizer_gives_the_published_ids_and_pixels(published, pipeline, grid):
    pixels = torch.rand(2, 3, 4 * grid[0], 4 * grid[1], generator=torch.Generator().manual_seed(4)) * 2 - 1
    expected = published.vq.encode(pixels)
    assert expected.unique().numel() > 2
    assert pipeline.vq_model.encode(pixels).image_tokens.tolist() == expected.tolist()
    tokens = torch.randint(VOCAB, (2, grid[0] * grid[1]), generator=torch.Generator().manual_seed(5))
    decoded = pipeline.vq_model.decode(tokens, grid_height=grid[0], grid_width=grid[1])
    torch.testing.assert_close(decoded, published.vq.decode_code(tokens, grid), rtol=1e-4, atol=1e-4)


def test_only_the_encoder_of_the_text_model_is_kept(published, pipeline, folder):
    whole = T5ForConditionalGeneration.from_pretrained(published.folder / "t5")
    assert type(pipeline.text_encoder) is T5EncoderModel
    inputs = pipeline.processor(text="add a red circle")
    assert inputs.input_ids.shape == (1, TEXT_LENGTH)
    expected = whole.encoder(**inputs).last_hidden_state
    torch.testing.assert_close(pipeline.text_encoder(**inputs).last_hidden_state, expected)
    size = (folder / "text_encoder" / "model.safetensors").stat().st_size
    assert size < 0.7 * (published.folder / "t5" / "model.safetensors").stat().st_size


def test_folder_holds_safetensors_the_published_sampling_defaults_and_the_right_picture_size(folder, pipeline):
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja"}
    settings = json.loads((folder / "transformer" / "generation_config.json").read_text())
    expected = {"do_sample": True, "temperature": 1.0, "top_k": 1000, "top_p": 1.0, "guidance_scale": 3.0}
    assert {name: settings[name] for name in expected} == expected
    size = pipeline.processor.image_processor.size
    assert (size["height"], size["width"]) == (16, 16)


def test_converting_back_gives_every_published_tensor_bit_for_bit(published, folder, tmp_path):
    assert main(["convert", "--reverse", "--model", str(folder), "--output-dir", str(tmp_path)]) == 0
    for name, plain in (("editar.pt", published.editar), ("vq.pt", published.vq)):
        reverted = torch.load(tmp_path / name, weights_only=True)["model"]
        expected = plain.state_dict()
        if "quantize.codebook_used" in expected:
            expected["quantize.codebook_used"].zero_()
        assert reverted.keys() == expected.keys()
        for key in expected:
            assert reverted[key].dtype == expected[key].dtype
            assert torch.equal(reverted[key], expected[key]), key
    assert {path.name for path in tmp_path.iterdir()} == {"editar.pt", "vq.pt"}


def test_converting_back_needs_no_alignment_head(published, tmp_path):
    weights = {name: tensor for name, tensor in published.editar.state_dict().items() if "alignment" not in name}
    torch.save({"model": weights}, tmp_path / "bare.pt")
    assert published.convert(tmp_path / "pipeline", transformer=tmp_path / "bare.pt") == 0
    assert EditARPipeline.from_pretrained(tmp_path / "pipeline").transformer.distillation_head is None
    assert main(["convert", "--reverse", "--model", str(tmp_path / "pipeline"), "--output-dir", str(tmp_path)]) == 0
    assert torch.load(tmp_path / "editar.pt", weights_only=True)["model"].keys() == weights.keys()


def test_dtype_casts_every_network(published, tmp_path):
    assert published.convert(tmp_path / "half", "--dtype", "bfloat16") == 0
    half = EditARPipeline.from_pretrained(tmp_path / "half")
    for part in (half.transformer, half.vq_model, half.text_encoder):
        assert {tensor.dtype for tensor in part.state_dict().values()} == {torch.bfloat16}
    head = published.editar.output.weight.to(torch.bfloat16)
    assert torch.equal(half.transformer.lm_head.weight, head)


PUBLISHED_REPOSITORIES = {
    "transformer": "datasets--JitengMu--CVPR2025_EditAR_release",
    "vq_model": "models--peizesun--llamagen_t2i",
    "text_encoder": "models--google--flan-t5-xl",
}


def test_sources_left_out_are_the_published_ones(published, tmp_path):
    snapshots = {}
    for part, repository in PUBLISHED_REPOSITORIES.items():
        cached = Path(HF_HUB_CACHE) / repository
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        snapshots[part] = cached / "snapshots" / ("0" * 40)
        snapshots[part].mkdir(parents=True)
    plain = make_plain_editar(width=64, num_heads=1)  # a head as wide as the published ones need not be given
    torch.save({"model": plain.state_dict()}, snapshots["transformer"] / "editar_release.pt")
    shutil.copy(published.folder / "vq_ds16_t2i.pt", snapshots["vq_model"])
    shutil.copytree(published.folder / "t5", snapshots["text_encoder"], dirs_exist_ok=True)
    try:
        assert main(["convert", "--output-dir", str(tmp_path / "pipeline")]) == 0
    finally:
        for repository in PUBLISHED_REPOSITORIES.values():
            shutil.rmtree(Path(HF_HUB_CACHE) / repository)
    source, text, target = draw_inputs()
    logits = EditARPipeline.from_pretrained(tmp_path / "pipeline").transformer(source, text, labels=target).logits
    torch.testing.assert_close(logits, plain(source, text, target), rtol=1e-4, atol=1e-4)
    card = read_card(tmp_path / "pipeline")[1]
    for source in ("JitengMu/CVPR2025_EditAR_release, editar_release.pt", "peizesun/llamagen_t2i", "google/flan-t5-xl"):
        assert source in card


@pytest.mark.parametrize("multipliers", [(1, 2, 2, 4), (1, 1, 2, 2, 4), (2, 1)])
def test_tokenizer_sizes_are_read_off_the_tensors(multipliers):
    plain = PlainVQ(base_channels=32, multipliers=multipliers, latent_channels=20, code_width=6, num_codes=50)
    config = read_vq_config(plain.state_dict())
    assert tuple(config.channel_multipliers) == multipliers
    assert (config.base_channels, config.latent_channels, config.num_res_blocks) == (32, 20, 2)
    assert (config.num_embeddings, config.embedding_dim) == (50, 6)


@pytest.mark.parametrize(("width", "heads"), [(1280, 20), (768, 12), (3200, 32)])
def test_decoder_sizes_are_read_off_the_tensors(width, heads):
    with torch.device("meta"):
        plain = PlainEditAR(70, width, 3, heads, grid_size=6, text_length=7, text_width=9, feature_width=11)
    config = read_transformer_config(plain.state_dict())
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (width, heads, 3)
    assert (config.vocab_size, config.grid_size, config.num_text_tokens, config.text_hidden_size) == (70, 6, 7, 9)
    assert config.distillation_hidden_size == 11
    assert config.intermediate_size == plain.layers[0].feed_forward.w1.out_features
    assert config.text_rotary == "zero"


@pytest.mark.parametrize("others", [[], ["module"], ["state_dict", "module"]])
def test_weights_are_found_under_model_then_module_then_state_dict(tmp_path, others):
    first, weights = {0: "state_dict", 1: "module", 2: "model"}[len(others)], {"a": torch.ones(2)}
    decoys = {key: {"a": torch.zeros(2)} for key in others if key != first}
    torch.save({**decoys, first: weights, "steps": 40_000}, tmp_path / "file.pt")
    assert torch.equal(load_published_weights(tmp_path / "file.pt")["a"], weights["a"])


def test_training_options_beside_the_weights_and_the_old_file_format_are_understood(tmp_path):
    checkpoint = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(learning_rate=1e-4)}
    torch.save(checkpoint, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_published_weights(tmp_path / "file.pt")["a"], torch.ones(2))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(tmp_path, published, capsys):
    torch.save({"model": published.editar.state_dict(), "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "file.pt")
    assert published.convert(tmp_path / "pipeline", transformer=tmp_path / "file.pt") == 2
    assert "does not open safely" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()  # so the file was one that could have


def write_text(path):
    path.write_text("These are not weights.")


def write_half(path):
    torch.save({"model": make_plain_editar().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:10_000])


BAD_FILES = {
    "absent": (lambda path: None, "is not a file"),
    "empty": (Path.touch, "does not open safely"),
    "text": (write_text, "does not open safely"),
    "truncated": (write_half, "does not open safely"),
    "a list": (lambda path: torch.save([1, 2, 3], path), "holds no weights"),
    "other keys": (lambda path: torch.save({"weights": {}}, path), "holds no weights"),
    "no tensors": (lambda path: torch.save({"model": {"a": 1}}, path), "holds no weights"),
    "a tokenizer": (lambda path: torch.save({"model": make_plain_vq().state_dict()}, path), "not an EditAR decoder"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_decoder_checkpoint_is_refused(published, tmp_path, capsys, case):
    write, message = BAD_FILES[case]
    write(tmp_path / "file.pt")
    assert published.convert(tmp_path / "pipeline", transformer=tmp_path / "file.pt") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "pipeline").exists()


def change(weights, **replaced):
    """Replace tensors by name, with `None` for those to remove; dots are written as double underscores."""
    replaced = {name.replace("__", "."): tensor for name, tensor in replaced.items()}
    return {name: tensor for name, tensor in {**weights, **replaced}.items() if tensor is not None}


TEXT_TO_IMAGE = {"img_uncond_embedding": None, "alignment__weight": None, "alignment__bias": None}


def test_text_to_image_decoder_becomes_a_start_for_training(published, tmp_path, capsys):
    weights = published.editar.state_dict()
    torch.save({"model": change(weights, **TEXT_TO_IMAGE)}, tmp_path / "t2i.pt")
    options = ("--grid-size", str(GRID_SIZE))
    assert published.convert(tmp_path / "start", *options, transformer=tmp_path / "t2i.pt") == 0
    printed = capsys.readouterr()
    assert "New, and drawn at random: the null image embedding and the distillation head." in printed.out
    assert "SELF-CHECK FAILED" not in printed.err
    card = (tmp_path / "start" / "README.md").read_text()
    assert "A start for training EditAR" in card
    assert "cannot edit yet" in card

    start = EditARPipeline.from_pretrained(tmp_path / "start")
    assert start.transformer.config.grid_size == GRID_SIZE
    own = start.transformer.state_dict()
    whole = convert_transformer(weights, 2).state_dict()
    new = {"model.null_image_embeds", "distillation_head.weight", "distillation_head.bias"}
    assert own.keys() == whole.keys()
    assert {name for name, tensor in own.items() if not torch.equal(tensor, whole[name])} >= new - {
        "distillation_head.bias"
    }
    assert all(torch.equal(own[name], whole[name]) for name in own.keys() - new)
    # As in a new model: null images of the published scale.
    assert own["model.null_image_embeds"].std().item() == pytest.approx(WIDTH**-0.5, rel=0.2)
    assert own["distillation_head.weight"].shape[0] == start.transformer.config.distillation_hidden_size == 768
    assert own["distillation_head.weight"].std() > 0


def test_grid_size_that_the_file_says_itself_is_refused(published, tmp_path, capsys):
    assert published.convert(tmp_path / "pipeline", "--grid-size", "4") == 2
    assert "`grid_size` goes with a LlamaGen text-to-image decoder" in capsys.readouterr().err
    assert main(["convert", "--grid-size", "4", "--output-dir", str(tmp_path / "pipeline")]) == 2
    assert "`--grid-size` goes with `--transformer`" in capsys.readouterr().err


BAD_DECODERS = {
    "missing": ({"layers__1__attention__wo__weight": None}, "1 missing (layers.1.attention.wo.weight)"),
    "two missing": ({"norm__weight": None, "alignment__bias": None}, "2 missing (alignment.bias, norm.weight)"),
    "unexpected": ({"layers__0__extra": torch.ones(1)}, "1 unexpected (layers.0.extra)"),
    "wrong shape": ({"output__weight": torch.ones(60, 32)}, "1 wrongly shaped (output.weight (60, 32) instead of (64"),
    "missing sizes": ({"tok_embeddings__weight": None}, "tok_embeddings.weight missing"),
    "text-to-image": (TEXT_TO_IMAGE, "LlamaGen text-to-image decoder, which cannot edit. To start"),
    "no square": ({"img_uncond_embedding": torch.ones(15, 32)}, "`img_uncond_embedding` has 15 rows"),
}


@pytest.mark.parametrize("case", BAD_DECODERS)
def test_decoder_keys_at_fault_are_listed(published, tmp_path, capsys, case):
    replaced, message = BAD_DECODERS[case]
    torch.save({"model": change(published.editar.state_dict(), **replaced)}, tmp_path / "file.pt")
    assert published.convert(tmp_path / "pipeline", transformer=tmp_path / "file.pt") == 2
    assert message in capsys.readouterr().err


BAD_TOKENIZERS = {
    "missing": ({"decoder__norm_out__weight": None}, "1 missing (decoder.norm_out.weight)"),
    "missing size": ({"quant_conv__weight": None}, "quant_conv.weight missing"),
    "unexpected": ({"loss__weight": torch.ones(1)}, "1 unexpected (loss.weight)"),
    "wrong shape": ({"post_quant_conv__bias": torch.ones(3)}, "post_quant_conv.bias (3,) instead of (24,)"),
    "other codes": ({"quantize__embedding__weight": torch.ones(50, 8)}, "`vq_model` has 50 codes"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_tokenizer_keys_at_fault_are_listed(published, tmp_path, capsys, case):
    replaced, message = BAD_TOKENIZERS[case]
    torch.save({"model": change(published.vq.state_dict(), **replaced)}, tmp_path / "file.pt")
    assert published.convert(tmp_path / "pipeline", vq_model=tmp_path / "file.pt") == 2
    assert message in capsys.readouterr().err


def test_a_text_encoder_of_another_width_is_refused_and_nothing_is_left_behind(published, tmp_path, capsys):
    save_text_encoder(tmp_path / "t5", text_width=16)
    assert published.convert(tmp_path / "pipeline", text_encoder=tmp_path / "t5") == 2
    assert "`text_encoder` has states of width 16" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"t5"}


def test_a_text_model_without_an_encoder_is_refused(published, tmp_path, capsys):
    save_text_encoder(tmp_path / "t5")
    model = T5EncoderModel.from_pretrained(tmp_path / "t5")
    rest = {name: tensor for name, tensor in model.state_dict().items() if "block.0" not in name}
    model.save_pretrained(tmp_path / "t5", state_dict=rest)
    assert published.convert(tmp_path / "pipeline", text_encoder=tmp_path / "t5") == 2
    assert "is not a T5 encoder" in capsys.readouterr().err


def test_heads_that_no_published_width_explains_must_be_given(published, tmp_path, capsys):
    arguments = ["--transformer", str(published.folder / "editar_release.pt"), "--output-dir", str(tmp_path / "out")]
    assert main(["convert", *arguments]) == 2
    assert "give --num-attention-heads" in capsys.readouterr().err


@pytest.mark.parametrize("heads", ["7", "0", "16"])
def test_heads_that_do_not_fit_are_refused(published, tmp_path, capsys, heads):
    assert published.convert(tmp_path / "pipeline", "--num-attention-heads", heads) == 2
    assert f"`num_attention_heads` is {heads}" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_never_overwritten(published, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert published.convert(tmp_path) == 2
    assert "already holds something" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def read_card(folder):
    """Split a card into its front matter and its text."""
    _, front_matter, text = (folder / "README.md").read_text().split("---\n", maxsplit=2)
    return yaml.safe_load(front_matter), text


def test_without_a_licence_the_card_names_none_and_says_so(folder):
    front_matter, text = read_card(folder)
    assert "license" not in front_matter
    assert "stated no licence" in text
    assert "apache" not in text.lower()


def test_the_licence_given_is_the_licence_of_the_card(published, tmp_path):
    assert published.convert(tmp_path / "pipeline", "--license", "cc-by-nc-4.0") == 0
    front_matter, text = read_card(tmp_path / "pipeline")
    assert front_matter["license"] == "cc-by-nc-4.0"
    assert "`cc-by-nc-4.0`, as stated by whoever converted" in text


def test_the_card_holds_the_figures_and_the_sources_but_no_path_of_this_machine(published, folder):
    text = read_card(folder)[1]
    assert "| photograph through the tokenizer, PSNR |" in text
    assert "* decoder: editar_release.pt" in text
    assert "* text encoder: t5" in text
    assert str(published.folder) not in text
    assert str(folder.parent) not in text


def test_convert_warns_loudly_where_the_self_check_fails_and_still_writes_the_folder(published, tmp_path, capsys):
    assert published.convert(tmp_path / "pipeline") == 0
    assert "WARNING: THE SELF-CHECK FAILED" in capsys.readouterr().err
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    assert "Tokens are hardly likelier than chance" in read_card(tmp_path / "pipeline")[1]
    assert main(["check", str(tmp_path / "pipeline")]) == 1


PUSH = """
import sys
from huggingface_hub import create_repo, upload_file
from editar_hf.commands import main
from editar_hf.pipelines.hub import upload_folder
create_repo("tester/mine")
upload_file(path_or_fileobj=b"my card", path_in_repo="README.md", repo_id="tester/mine")
assert main(["convert", *sys.argv[2:], "--output-dir", sys.argv[1]]) == 0
upload_folder(sys.argv[1], "tester/mine")
"""


def test_push_uploads_the_folder_with_its_card_and_leaves_a_card_that_is_there(published, tmp_path):
    sources = ["--transformer", "editar_release.pt", "--vq-model", "vq_ds16_t2i.pt", "--text-encoder", "t5"]
    options = ["--num-attention-heads", "2", "--license", "cc-by-4.0", "--push-to-hub", "tester/editar"]
    with HubServer() as hub:
        words = ["-c", PUSH, tmp_path / "out", *sources, *options]
        finished = run_python(*words, cwd=published.folder, environment=hub.get_environment(tmp_path / "home"))
        assert finished.returncode == 0, finished.stderr
        pushed, kept = hub.read_files("tester/editar"), hub.read_files("tester/mine")
        assert hub.repositories["models/tester/editar"].private
    written = {
        str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {name: pushed[name] for name in written} == {name: path.read_bytes() for name, path in written.items()}
    assert read_card(tmp_path / "out")[0]["license"] == "cc-by-4.0"
    assert b'from_pretrained("tester/editar")' in pushed["README.md"]
    assert kept.pop("README.md") == b"my card"
    assert kept.keys() >= written.keys() - {"README.md"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--push-to-hub", "me/editar", "--transformer", "absent.pt"], "`--license` is missing"),
        (["--push-to-hub", "editar", "--license", "mit"], "`--push-to-hub` is editar"),
        (["--model", "somewhere"], "`--model` is somewhere"),
        (["--text-encoder", "./absent", "--transformer", "absent.pt"], "`text_encoder` is './absent': there is no"),
        (["--reverse", "--model", "./absent"], "`model` is './absent': there is no such folder"),
        (["--reverse"], "`--model` is missing"),
        (["--reverse", "--model", "m", "--license", "mit"], "`--license` is mit"),
        (["--reverse", "--model", "m", "--transformer", "t.pt"], "`--transformer` is t.pt"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused_first(tmp_path, capsys, arguments, named):
    assert main(["convert", "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    assert named in capsys.readouterr().err


def test_converting_back_refuses_a_folder_without_a_pipeline(tmp_path, capsys):
    assert main(["convert", "--reverse", "--model", str(tmp_path), "--output-dir", str(tmp_path / "out")]) == 2
    assert "without `model_index.json`" in capsys.readouterr().err


def test_converting_back_overwrites_nothing(folder, tmp_path, capsys):
    (tmp_path / "vq.pt").write_text("mine")
    assert main(["convert", "--reverse", "--model", str(folder), "--output-dir", str(tmp_path)]) == 2
    assert "already holds vq.pt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["vq.pt"]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("transformer", "text_rotary", "identity"),
        ("transformer", "rope_theta", 500.0),
        ("vq_model", "norm_num_groups", 16),
    ],
)
def test_converting_back_refuses_what_the_published_format_cannot_say(folder, tmp_path, capsys, part, name, value):
    changed = EditARPipeline.from_pretrained(folder)
    setattr(getattr(changed, part).config, name, value)
    changed.save_pretrained(tmp_path / "changed")
    assert (
        main(["convert", "--reverse", "--model", str(tmp_path / "changed"), "--output-dir", str(tmp_path / "o")]) == 2
    )
    message, published = capsys.readouterr().err, getattr(type(getattr(changed, part).config)(), name)
    assert f"`{name}` is {value!r}" in message
    assert f"the published code always computes with {published!r}" in message
    assert not (tmp_path / "o").exists()
