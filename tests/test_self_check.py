"""The self-check passes a pipeline that learned its photograph, and names whatever is broken in one."""

import copy
import math
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NUM_CODES, build_pipeline

from editar_hf.commands import main
from editar_hf.self_check import PROMPT, SelfCheckReport, check_pipeline


def open_photograph():
    return Image.open(str(files("editar_hf") / "self_check.jpg"))


def train(parameters, compute_loss, num_steps):
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(num_steps):
        compute_loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def trained():
    """Teach a decoder the photograph if that is the source, other tokens if it is prompted, any without a source."""
    pipeline = build_pipeline(num_text_tokens=20)
    pixels = pipeline.prepare_pixel_values(open_photograph(), None, None, "stretch")
    torch.manual_seed(0)
    train(pipeline.vq_model.parameters(), lambda: pipeline.vq_model(pixels).loss, 150)
    tokens = pipeline.encode_pixel_values(pixels)
    batch = {
        "source_image_tokens": tokens.expand(3, -1),
        "prompt_embeds": pipeline.encode_prompt(PROMPT).expand(3, -1, -1),
        "drop_source": torch.tensor([False, False, True]),
        "drop_prompt": torch.tensor([False, True, True]),
    }

    def compute_loss():
        labels = torch.cat([tokens.flip(1), tokens, torch.randint(NUM_CODES, tokens.shape)])
        return pipeline.transformer(**batch, labels=labels).loss

    train(pipeline.transformer.parameters(), compute_loss, 100)
    return pipeline


def test_a_trained_pipeline_passes(trained, tmp_path, capsys):
    report = check_pipeline(trained)
    assert report.failures == []
    assert report.nll_with_source < 1 < report.nll_without_source
    assert math.isclose(report.chance_nll, math.log(NUM_CODES))
    trained.save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    assert "Passed." in capsys.readouterr().out


def break_source(pipeline):
    pipeline.transformer.model.null_image_embeds.normal_()
    for layer in pipeline.transformer.model.layers:
        layer.self_attn.v_proj.weight.zero_()


FAULTS = {
    "The VQ model does not reconstruct the photograph": lambda pipe: pipe.vq_model.decoder.conv_out.weight.neg_(),
    "The decoder predicts tokens hardly better than chance": lambda pipe: pipe.transformer.lm_head.weight.zero_(),
    "The source image does not improve the prediction": break_source,
    "Guidance changes no token": lambda pipe: pipe.transformer.model.text_projection.fc2.weight.zero_(),
    "Not finite: text_encoder.": lambda pipe: pipe.text_encoder.shared.weight[-1].fill_(math.inf),
    "Not finite: logits, transformer.lm_head": lambda pipe: pipe.transformer.lm_head.weight[5].fill_(math.nan),
}


@pytest.mark.parametrize("failure", FAULTS)
def test_every_fault_is_named(trained, failure):
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        FAULTS[failure](broken)
    failures = check_pipeline(broken).failures
    assert [sentence for sentence in failures if sentence.startswith(failure)], failures


def test_psnr_is_that_of_the_formula(trained):
    decoded = trained.decode_image_tokens(
        trained.encode_image(open_photograph(), resize_mode="stretch"), output_type="np"
    )
    small = np.asarray(open_photograph().convert("RGB").resize((16, 16), Image.Resampling.LANCZOS)) / 255
    expected = -10 * math.log10(np.square(decoded[0] - small).mean())
    assert math.isclose(check_pipeline(trained).vq_psnr, expected, rel_tol=1e-4)


def test_nan_passes_no_comparison():
    report = SelfCheckReport(math.nan, math.nan, math.nan, math.nan, math.nan)
    assert len(report.failures) == 4


def test_check_refuses_a_folder_without_a_pipeline(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "missing")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
