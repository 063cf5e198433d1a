"""The self-check passes a pipeline that learned its photograph, and names whatever is broken in one."""

import copy
import math
from importlib.resources import files

import pytest
import torch
from PIL import Image
from transformers import T5Config, T5EncoderModel

from editar_hf import (
    EditARConfig,
    EditARForConditionalGeneration,
    EditARImageProcessor,
    EditARPipeline,
    EditARProcessor,
    EditARVQConfig,
    EditARVQModel,
)
from editar_hf.commands import main
from editar_hf.self_check import PROMPT, SelfCheckReport, check_pipeline, compute_tokenizer_psnr
from editar_hf.training.tokenizer import train_tokenizer


VOCAB, STRIDE, GRID_SIZE = 64, 2, 4


def make_pipeline():
    """Build a tiny pipeline with fresh weights, for pictures of 8×8 pixels."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([PROMPT] * 9, vocab_size=120)
    text_config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config = EditARConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        grid_size=GRID_SIZE,
        num_text_tokens=16,
        text_hidden_size=16,
    )
    vq_config = EditARVQConfig(
        num_embeddings=VOCAB, latent_channels=16, base_channels=16, channel_multipliers=(1, 1), norm_num_groups=4
    )
    image_processor = EditARImageProcessor(size=STRIDE * GRID_SIZE, stride=STRIDE)
    return EditARPipeline(
        transformer=EditARForConditionalGeneration(config).eval(),
        vq_model=EditARVQModel(vq_config).eval(),
        text_encoder=T5EncoderModel(text_config).eval(),
        processor=EditARProcessor(image_processor, tokenizer, num_text_tokens=16),
    )


def train_tokenizer_on_photograph(pipeline, pixels, num_steps=150):
    optimizer = torch.optim.AdamW(pipeline.vq_model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        pipeline.vq_model(pixels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_decoder_on_photograph(pipeline, num_steps=100):
    """Teach it the photograph where that is the source, another picture where it is prompted, anything without."""
    transformer = pipeline.transformer
    photograph, _, _ = compute_tokenizer_psnr(pipeline)
    inputs = pipeline.processor(text=PROMPT)
    prompt_embeds = pipeline.text_encoder(**inputs).last_hidden_state.detach().expand(3, -1, -1)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    for _ in range(num_steps):
        anything = torch.randint(VOCAB, photograph.shape)
        loss = transformer(
            photograph.expand(3, -1),
            prompt_embeds,
            labels=torch.cat([photograph.flip(1), photograph, anything]),
            drop_source=torch.tensor([False, False, True]),
            drop_prompt=torch.tensor([False, True, True]),
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def trained():
    pipeline = make_pipeline()
    with Image.open(str(files("editar_hf") / "self_check.jpg")) as photograph:
        train_tokenizer_on_photograph(pipeline, pipeline.processor(images=photograph).source_pixel_values)
    train_decoder_on_photograph(pipeline)
    return pipeline


def test_a_trained_pipeline_passes(trained):
    report = check_pipeline(trained)
    assert report.failures == []
    assert report.passed
    assert report.nll_with_source < 1 < report.nll_without_source
    assert math.isclose(report.chance_nll, math.log(VOCAB))
    assert report.to_markdown().endswith("Passed.")


def break_tokenizer(pipeline):
    pipeline.vq_model.decoder.conv_out.weight.neg_()


def break_head(pipeline):
    pipeline.transformer.lm_head.weight.zero_()


def break_source(pipeline):
    pipeline.transformer.model.null_image_embeds.copy_(torch.randn(16, 32))
    for layer in pipeline.transformer.model.layers:
        layer.self_attn.v_proj.weight.zero_()


def break_prompt(pipeline):
    pipeline.transformer.model.text_projection.fc2.weight.zero_()


def break_weight(pipeline):
    pipeline.text_encoder.shared.weight[-1] = math.inf


def break_output(pipeline):
    pipeline.transformer.lm_head.weight[5] = math.nan


FAULTS = {
    break_tokenizer: "The tokenizer loses the photograph",
    break_head: "Tokens are hardly likelier than chance: by 0.00 nats",
    break_source: "The source image does not help: by 0.00 nats",
    break_prompt: "Guidance changes no token",
    break_weight: "Not finite: text_encoder.",
    break_output: "Not finite: transformer.lm_head.weight, logits.",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(trained, fault):
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        fault(broken)
    failures = check_pipeline(broken).failures
    assert [sentence for sentence in failures if sentence.startswith(FAULTS[fault])], failures


def test_psnr_is_that_of_the_formula(trained):
    _, reconstruction, psnr = compute_tokenizer_psnr(trained)
    with Image.open(str(files("editar_hf") / "self_check.jpg")) as photograph:
        small = photograph.resize((8, 8), Image.Resampling.LANCZOS)
    original = torch.tensor(list(small.convert("RGB").getdata())).reshape(8, 8, 3).permute(2, 0, 1) / 255
    error = (original - (reconstruction[0].detach().clamp(-1, 1) + 1) / 2).square().mean()
    assert math.isclose(psnr, -10 * math.log10(error.item()), rel_tol=1e-4)


def test_nan_passes_no_comparison():
    report = SelfCheckReport(math.nan, math.nan, math.nan, math.nan, math.nan)
    assert len(report.failures) == 4


def test_check_exits_with_one_on_fresh_weights_and_prints_what_is_wrong(tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 1
    assert "Tokens are hardly likelier than chance" in capsys.readouterr().out


def test_check_exits_with_zero_on_a_trained_pipeline(trained, tmp_path, capsys):
    trained.save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    assert "Passed." in capsys.readouterr().out


def test_check_refuses_a_folder_without_a_pipeline(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "missing")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
