"""Published files, made at tiny size by the plain implementation, through `editar-hf convert` and back."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer, Repository
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
SOURCES = {"transformer": "editar_release.pt", "vq_model": "vq_ds16_t2i.pt", "text_encoder": "t5"}


def make_plain_editar(**sizes):
    arguments = {"vocab": VOCAB, "width": WIDTH, "grid_size": GRID_SIZE, "text_length": TEXT_LENGTH}
    return redraw(PlainEditAR(**{**arguments, "text_width": TEXT_WIDTH, **sizes}), seed=0)


def save_text_encoder(folder, text_width=TEXT_WIDTH):
    """Save a whole tiny T5, decoder included, with its tokenizer."""
    tokenizer = train_tokenizer(["add a red circle in the middle"] * 9, vocab_size=120)
    sizes = {"d_model": text_width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(2)
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Published:
    """The three sources in the published formats, in one folder, and what they were made from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.transformer, self.vq_model = make_plain_editar(), redraw(PlainVQ(num_codes=VOCAB), seed=1)
        self.sources = {name: folder / file for name, file in SOURCES.items()}
        for name in ("transformer", "vq_model"):
            torch.save({"model": getattr(self, name).state_dict()}, self.sources[name])
        save_text_encoder(self.sources["text_encoder"])

    def convert(self, output_dir, *options, **sources):
        """Run the command and return its exit status."""
        words = ["convert", "--output-dir", str(output_dir), "--num-attention-heads", "2", *options]
        for name, path in {**self.sources, **sources}.items():
            words += [f"--{name.replace('_', '-')}", str(path)]
        return main(words)


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
    size = {"grid_height": grid[0], "grid_width": grid[1]}
    output = pipeline.transformer(source, text, labels=target, drop_source=drop_source, drop_prompt=drop_text, **size)
    expected = published.transformer(source, text, target, **conditions)
    assert expected.std() > 0.5
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, published.transformer.loss(source, text, target, **conditions))


def test_converted_decoder_gives_the_published_distillation_features(published, pipeline):
    source, text, target = draw_inputs()
    output = pipeline.transformer(source, text, labels=target, output_distillation_features=True)
    expected = published.transformer.distillation_features(source, text, target)
    torch.testing.assert_close(output.distillation_features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(4, 4), (2, 3)])
def test_converted_decoder_gives_the_published_greedy_tokens(published, pipeline, grid):
    source, text, _ = draw_inputs(grid, batch_size=2)
    expected = {scale: published.transformer.generate(source, text, scale, grid=grid) for scale in (1.0, 3.0)}
    assert (expected[1.0] != expected[3.0]).float().mean() > 0.2  # Guidance matters here.
    for scale, tokens in expected.items():
        settings = {"guidance_scale": scale, "do_sample": False, "grid_height": grid[0], "grid_width": grid[1]}
        assert pipeline.transformer.generate(source, text, **settings).tolist() == tokens.tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_converted_vq_model_gives_the_published_ids_and_pixels(published, pipeline, grid):
    pixels = torch.rand(2, 3, 4 * grid[0], 4 * grid[1], generator=torch.Generator().manual_seed(4)) * 2 - 1
    expected = published.vq_model.encode(pixels)
    assert expected.unique().numel() > 2
    assert pipeline.vq_model.encode(pixels).image_tokens.tolist() == expected.tolist()
    tokens = torch.randint(VOCAB, (2, grid[0] * grid[1]), generator=torch.Generator().manual_seed(5))
    decoded = pipeline.vq_model.decode(tokens, grid_height=grid[0], grid_width=grid[1])
    torch.testing.assert_close(decoded, published.vq_model.decode_code(tokens, grid), rtol=1e-4, atol=1e-4)


def test_only_the_encoder_of_the_text_model_is_kept(published, pipeline, folder):
    whole = T5ForConditionalGeneration.from_pretrained(published.folder / "t5")
    assert type(pipeline.text_encoder) is T5EncoderModel
    inputs = pipeline.processor(text="add a red circle")
    assert inputs.input_ids.shape == (1, TEXT_LENGTH)
    expected = whole.encoder(**inputs).last_hidden_state
    torch.testing.assert_close(pipeline.text_encoder(**inputs).last_hidden_state, expected)
    size = (folder / "text_encoder" / "model.safetensors").stat().st_size
    assert size < 0.7 * (published.folder / "t5" / "model.safetensors").stat().st_size


def test_folder_holds_safetensors_the_published_sampling_defaults_and_the_right_image_size(folder, pipeline):
    assert {path.suffix for path in folder.rglob("*.*")} <= {".safetensors", ".json", ".md", ".jinja", ".py"}
    settings = json.loads((folder / "transformer" / "generation_config.json").read_text())
    expected = {"do_sample": True, "temperature": 1.0, "top_k": 1000, "top_p": 1.0, "guidance_scale": 3.0}
    assert settings.items() >= expected.items()
    size = pipeline.processor.image_processor.size
    assert (size.height, size.width) == (16, 16)


def revert(folder, output_dir):
    return main(["convert", "--reverse", "--model", str(folder), "--output-dir", str(output_dir)])


@pytest.mark.parametrize(("lacking", "dtype"), [("alignment", "float32"), ("nothing", "bfloat16")])
def test_converting_back_gives_every_published_tensor_bit_for_bit_in_its_dtype(published, tmp_path, lacking, dtype):
    weights = {name: tensor for name, tensor in published.transformer.state_dict().items() if lacking not in name}
    torch.save({"model": weights}, tmp_path / "file.pt")
    assert published.convert(tmp_path / "pipeline", "--dtype", dtype, transformer=tmp_path / "file.pt") == 0
    pipeline = EditARPipeline.from_pretrained(tmp_path / "pipeline", dtype="auto")
    dtypes = {tensor.dtype for name in SOURCES for tensor in getattr(pipeline, name).state_dict().values()}
    assert dtypes == {getattr(torch, dtype)}
    assert revert(tmp_path / "pipeline", tmp_path / "back") == 0
    for name, expected in (("editar.pt", weights), ("vq.pt", published.vq_model.state_dict())):
        expected = {key: tensor.to(getattr(torch, dtype)) for key, tensor in expected.items()}
        if name == "vq.pt":
            expected["quantize.codebook_used"] = torch.zeros(65536)
        reverted = torch.load(tmp_path / "back" / name, weights_only=True)["model"]
        assert reverted.keys() == expected.keys()
        for key in expected:
            assert reverted[key].dtype == expected[key].dtype
            assert torch.equal(reverted[key], expected[key]), key
    assert len(list((tmp_path / "back").iterdir())) == 2


PUBLISHED_REPOSITORIES = {
    "transformer": "datasets--JitengMu--CVPR2025_EditAR_release",
    "vq_model": "models--peizesun--llamagen_t2i",
    "text_encoder": "models--google--flan-t5-xl",
}


def test_sources_left_out_are_the_published_ones(published, tmp_path):
    plain = make_plain_editar(width=64, num_heads=1)  # a head as wide as the published ones need not be given
    try:
        for part, repository in PUBLISHED_REPOSITORIES.items():
            cached = Path(HF_HUB_CACHE) / repository
            snapshot = cached / "snapshots" / ("0" * 40)
            shutil.copytree(published.folder / "t5", snapshot)
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text("0" * 40)
            weights = (plain if part == "transformer" else published.vq_model).state_dict()
            torch.save({"model": weights}, snapshot / SOURCES[part])
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
def test_vq_sizes_are_read_off_the_tensors(multipliers):
    plain = PlainVQ(base_channels=32, multipliers=multipliers, latent_channels=20, code_width=6, num_codes=50)
    config = read_vq_config(plain.state_dict())
    sizes = {"base_channels": 32, "latent_channels": 20, "num_res_blocks": 2, "num_embeddings": 50, "embedding_dim": 6}
    assert config.to_dict().items() >= sizes.items()
    assert tuple(config.channel_multipliers) == multipliers


@pytest.mark.parametrize(("width", "heads"), [(1280, 20), (768, 12), (3200, 32)])
def test_decoder_sizes_are_read_off_the_tensors(width, heads):
    with torch.device("meta"):
        plain = PlainEditAR(70, width, 3, heads, grid_size=6, text_length=7, text_width=9, feature_width=11)
    config = read_transformer_config(plain.state_dict())
    sizes = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 3,
        "vocab_size": 70,
        "grid_size": 6,
    }
    sizes |= {"num_text_tokens": 7, "text_hidden_size": 9, "distillation_hidden_size": 11}
    sizes["intermediate_size"] = plain.layers[0].feed_forward.w1.out_features
    assert config.to_dict().items() >= sizes.items()


@pytest.mark.parametrize("keys", [("model", "module", "state_dict"), ("module", "state_dict"), ("state_dict",)])
def test_weights_are_found_in_each_known_place_of_old_files_with_training_options(tmp_path, keys):
    places = {key: {"a": torch.tensor(index)} for index, key in enumerate(keys)}
    checkpoint = {**places, "args": argparse.Namespace(learning_rate=1e-4), "steps": 40_000}
    torch.save(checkpoint, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert load_published_weights(tmp_path / "file.pt") == {"a": torch.tensor(0)}


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(tmp_path, published, capsys):
    torch.save({"model": published.transformer.state_dict(), "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "file.pt")
    assert "does not open safely" in fail_to_convert(published, tmp_path, capsys, transformer=tmp_path / "file.pt")
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()  # so the file was one that could have


def fail_to_convert(published, tmp_path, capsys, *options, **sources):
    """Run the command where it must refuse, and return what it says."""
    assert published.convert(tmp_path / "pipeline", *options, **sources) == 2
    assert not (tmp_path / "pipeline").exists()
    return capsys.readouterr().err


def change(weights, replaced):
    """Replace tensors by name, with `None` for those to remove."""
    return {name: tensor for name, tensor in {**weights, **replaced}.items() if tensor is not None}


TEXT_TO_IMAGE = {"img_uncond_embedding": None, "alignment.weight": None, "alignment.bias": None}


def test_text_to_image_decoder_becomes_a_start_for_training(published, tmp_path, capsys):
    weights = published.transformer.state_dict()
    torch.save({"model": change(weights, TEXT_TO_IMAGE)}, tmp_path / "t2i.pt")
    options = ("--grid-size", str(GRID_SIZE))
    assert published.convert(tmp_path / "start", *options, transformer=tmp_path / "t2i.pt") == 0
    printed = capsys.readouterr()
    assert "The null image embedding and the distillation head are new" in printed.out
    assert "SELF-CHECK FAILED" not in printed.err
    assert "A start for training EditAR" in read_card(tmp_path / "start")[1]
    start = EditARPipeline.from_pretrained(tmp_path / "start").transformer
    own, whole = start.state_dict(), convert_transformer(weights, 2).state_dict()
    new = {"model.null_image_embeds", "distillation_head.weight", "distillation_head.bias"}
    assert start.config.grid_size == GRID_SIZE
    assert own.keys() == whole.keys()
    assert all(torch.equal(own[name], whole[name]) for name in own.keys() - new)
    # As in a new model: null images of the published scale.
    assert own["model.null_image_embeds"].std().item() == pytest.approx(WIDTH**-0.5, rel=0.2)
    assert own["distillation_head.weight"].shape[0] == start.config.distillation_hidden_size == 768
    assert own["distillation_head.weight"].std() > 0


T, V = "transformer", "vq_model"
BAD_SOURCES = {
    "absent": (T, None, "is not a file"),
    "empty": (T, b"", "does not open safely"),
    "text": (T, b"These are not weights.", "does not open safely"),
    "a list": (T, [1, 2, 3], "holds no weights"),
    "other keys": (T, {"weights": {}}, "holds no weights"),
    "no tensors": (T, {"model": {"a": 1}}, "holds no weights"),
    "missing": (T, {"layers.1.attention.wo.weight": None}, "1 missing (layers.1.attention.wo.weight)"),
    "two missing": (T, {"norm.weight": None, "output.weight": None}, "2 missing (norm.weight, output.weight)"),
    "unexpected": (T, {"layers.0.extra": torch.ones(1)}, "1 unexpected (layers.0.extra)"),
    "shape": (T, {"output.weight": torch.ones(60, 32)}, "1 wrongly shaped (output.weight (60, 32) instead of"),
    "no sizes": (T, {"tok_embeddings.weight": None}, "`tok_embeddings.weight` is missing"),
    "text-to-image": (T, TEXT_TO_IMAGE, "LlamaGen text-to-image decoder, which cannot edit. To use"),
    "no square": (T, {"img_uncond_embedding": torch.ones(15, 32)}, "`img_uncond_embedding` has 15 rows"),
    "VQ missing": (V, {"decoder.norm_out.weight": None}, "1 missing (decoder.norm_out.weight)"),
    "VQ shape": (V, {"post_quant_conv.bias": torch.ones(3)}, "post_quant_conv.bias (3,) instead of (24,)"),
    "VQ no sizes": (V, {"quant_conv.weight": None}, "`quant_conv.weight` is missing"),
    "other codes": (V, {"quantize.embedding.weight": torch.ones(50, 8)}, "`vq_model` has 50 codes"),
}


@pytest.mark.parametrize(("part", "content", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_file_that_is_no_such_network_is_refused(published, tmp_path, capsys, part, content, message):
    file = tmp_path / "file.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        if isinstance(content, dict) and content.keys().isdisjoint(("model", "weights")):
            content = {"model": change(getattr(published, part).state_dict(), content)}
        torch.save(content, file)
    assert message in fail_to_convert(published, tmp_path, capsys, **{part: file})


def test_a_truncated_file_is_refused(published, tmp_path, capsys):
    (tmp_path / "file.pt").write_bytes(published.sources["transformer"].read_bytes()[:10_000])
    assert "does not open safely" in fail_to_convert(published, tmp_path, capsys, transformer=tmp_path / "file.pt")


def test_a_text_encoder_of_another_width_is_refused(published, tmp_path, capsys):
    save_text_encoder(tmp_path / "t5", text_width=16)
    said = fail_to_convert(published, tmp_path, capsys, text_encoder=tmp_path / "t5")
    assert "`text_encoder` has states of width 16" in said
    assert {path.name for path in tmp_path.iterdir()} == {"t5"}


def test_a_text_model_without_an_encoder_is_refused(published, tmp_path, capsys):
    save_text_encoder(tmp_path / "t5")
    model = T5EncoderModel.from_pretrained(tmp_path / "t5")
    rest = {name: tensor for name, tensor in model.state_dict().items() if "block.0" not in name}
    model.save_pretrained(tmp_path / "t5", state_dict=rest)
    assert "is not a T5 encoder" in fail_to_convert(published, tmp_path, capsys, text_encoder=tmp_path / "t5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-attention-heads", "7"], "`num_attention_heads` is 7"),
        (["--num-attention-heads", "0"], "`num_attention_heads` is 0"),
        (["--num-attention-heads", "16"], "`num_attention_heads` is 16"),
        (["--grid-size", "4"], "`grid_size` is 4, but this is an EditAR decoder"),
    ],
)
def test_options_that_do_not_fit_the_file_are_refused(published, tmp_path, capsys, options, message):
    assert message in fail_to_convert(published, tmp_path, capsys, *options)


def test_heads_that_no_published_width_explains_must_be_given(published):
    with pytest.raises(ValueError, match="pass --num-attention-heads"):
        read_transformer_config(published.transformer.state_dict())


def test_nothing_is_ever_overwritten(published, folder, tmp_path, capsys):
    (tmp_path / "vq.pt").write_text("mine")
    assert published.convert(tmp_path) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert revert(folder, tmp_path) == 2
    assert "already holds vq.pt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["vq.pt"]


def read_card(folder):
    """Split a card into its front matter and its text."""
    _, front_matter, text = (folder / "README.md").read_text().split("---\n", maxsplit=2)
    return yaml.safe_load(front_matter), text


def test_the_card_holds_the_figures_and_the_sources_but_no_license_and_no_path_of_this_machine(published, folder):
    front_matter, text = read_card(folder)
    assert "license" not in front_matter
    assert "stated no license" in text
    for line in ("| PSNR of the photograph", "* decoder: editar_release.pt", "* text encoder: t5\n"):
        assert line in text
    assert str(published.folder) not in text
    assert str(folder.parent) not in text


def test_convert_warns_loudly_where_the_self_check_fails_and_still_writes_the_folder(published, tmp_path, capsys):
    assert published.convert(tmp_path / "pipeline", "--license", "cc-by-nc-4.0") == 0
    assert "WARNING: THE SELF-CHECK FAILED" in capsys.readouterr().err
    front_matter, text = read_card(tmp_path / "pipeline")
    assert front_matter["license"] == "cc-by-nc-4.0"
    assert "`cc-by-nc-4.0`, as stated by the person who converted" in text
    assert "The decoder predicts tokens hardly better than chance" in text
    assert main(["check", str(tmp_path / "pipeline")]) == 1


def test_push_uploads_the_folder_with_its_card_and_a_public_repository_is_refused_first(published, tmp_path):
    words = ["-m", "editar_hf.commands", "convert", "--output-dir", tmp_path / "out", "--num-attention-heads", 2]
    for part, source in published.sources.items():
        words += [f"--{part.replace('_', '-')}", source]
    words += ["--license", "cc-by-4.0", "--push-to-hub"]
    with HubServer() as hub:
        hub.repositories["models/tester/public"] = public = Repository()
        public.commit({"config.json": b"{}"})
        environment = hub.get_environment(tmp_path / "home")
        refused = run_python(*words, "tester/public", environment=environment)
        assert "the repository tester/public exists and is public" in refused.stderr
        assert refused.returncode == 2
        assert not (tmp_path / "out").exists()
        finished = run_python(*words, "tester/editar", environment=environment)
        assert finished.returncode == 0, finished.stderr
        pushed = hub.read_files("tester/editar")
        assert hub.repositories["models/tester/editar"].private
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(pushed[str(path.relative_to(tmp_path / "out"))] == path.read_bytes() for path in written)
    assert b'from_pretrained("tester/editar")' in pushed["README.md"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--push-to-hub", "me/editar", "--transformer", "absent.pt"], "`--license` is missing"),
        (["--push-to-hub", "editar", "--license", "mit"], "`--push-to-hub` is editar"),
        (["--model", "somewhere"], "`--model` is somewhere"),
        (["--grid-size", "4"], "`--grid-size` is 4 without `--transformer`"),
        (["--transformer", ""], "`` is not a file"),
        (["--text-encoder", ""], "`text_encoder` is empty"),
        (["--text-encoder", "./absent", "--transformer", "absent.pt"], "`text_encoder` is './absent': there is no"),
        (["--reverse", "--model", "./absent"], "`model` is './absent': there is no such folder"),
        (["--reverse", "--model", "tests"], "has no `model_index.json`"),
        (["--reverse"], "`--model` is missing"),
        (["--reverse", "--model", "m", "--license", "mit"], "`--license` is mit"),
        (["--reverse", "--model", "m", "--transformer", "t.pt"], "`--transformer` is t.pt"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused_first(tmp_path, capsys, arguments, named):
    assert main(["convert", "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "name", "value"), [(T, "text_rotary", "identity"), (T, "rope_theta", 5.0), (V, "norm_num_groups", 16)]
)
def test_converting_back_refuses_what_the_published_format_cannot_say(folder, tmp_path, capsys, part, name, value):
    changed = EditARPipeline.from_pretrained(folder)
    setattr(getattr(changed, part).config, name, value)
    changed.save_pretrained(tmp_path / "changed")
    assert revert(tmp_path / "changed", tmp_path / "out") == 2
    assert f"`{name}` is {value!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
