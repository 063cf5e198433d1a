"""The VQ model against the plain implementation of `plain_editar.py` and against formulas written out here."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from plain_editar import PlainVQ, redraw

from editar_hf import EditARVQConfig, EditARVQModel
from editar_hf.conversion import convert_vq_model
from editar_hf.modeling_editar_vq import compute_nearest_codes


NUM_CODES = 64
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@pytest.fixture
def plain():
    return redraw(PlainVQ(num_codes=NUM_CODES))


@pytest.fixture
def model(plain):
    return convert_vq_model(plain.state_dict()).eval()


@pytest.fixture
def pixel_values():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("multipliers", [(1, 1, 2), (1, 1, 2, 2)])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_tokens_and_pixels_are_those_of_the_plain_implementation(multipliers, height, width):
    plain = redraw(PlainVQ(multipliers=multipliers, num_codes=NUM_CODES))
    model, stride = convert_vq_model(plain.state_dict()).eval(), 2 ** (len(multipliers) - 1)
    grid = height // stride, width // stride
    pixel_values = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image_tokens = model.encode(pixel_values).image_tokens
    assert image_tokens.dtype == torch.long
    assert image_tokens.tolist() == plain.encode(pixel_values).tolist()
    assert image_tokens.unique().numel() > 3
    for sides in (grid, (grid[0], None), (None, grid[1])):
        decoded = model.decode(image_tokens, *sides)
        assert_close(decoded, plain.decode_code(image_tokens, grid))


def test_published_size_has_the_published_parameters():
    with torch.device("meta"):
        model = EditARVQModel(EditARVQConfig())
    # VQ-16 of LlamaGen: 72 M parameters.
    assert 71.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 72.5e6


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
def test_nearest_code_is_the_brute_force_cosine_whatever_the_chunk(chunk_size):
    latents, rows = torch.randn(50, 4), torch.randn(20, 4) * torch.rand(20, 1)
    expected = [max(range(20), key=lambda code: F.cosine_similarity(z, rows[code], dim=0).item()) for z in latents]
    codes = compute_nearest_codes(latents, F.normalize(rows, dim=-1), chunk_size)
    assert codes.tolist() == expected


def test_picture_is_the_same_alone_and_in_a_batch(model, pixel_values):
    together, alone = model.encode(pixel_values), model.encode(pixel_values[1:])
    assert_close(alone.latents[0], together.latents[1])
    assert torch.equal(alone.image_tokens[0], together.image_tokens[1])
    decoded = model.decode(together.image_tokens, 4, 6)
    assert_close(model.decode(alone.image_tokens, 4, 6)[0], decoded[1])


def test_losses_match_their_formulas(model, pixel_values):
    model.config.commitment_loss_weight = 0.5
    outputs = model(pixel_values)
    latents = model.quant_conv(model.encoder(pixel_values)).flatten(2).transpose(1, 2)
    latents = latents / latents.norm(dim=-1, keepdim=True)
    rows = model.quantize.embedding.weight[outputs.image_tokens]
    distance = ((latents - rows / rows.norm(dim=-1, keepdim=True)) ** 2).mean()
    error = model.decode(outputs.image_tokens, 4, 6) - pixel_values
    reconstruction_loss = error.abs().mean() + (error**2).mean()
    assert_close(outputs.reconstruction - pixel_values, error)
    assert_close(outputs.reconstruction_loss, reconstruction_loss)
    assert_close(outputs.codebook_loss, distance)
    assert_close(outputs.commitment_loss, distance)
    assert_close(outputs.loss, reconstruction_loss + 1.5 * distance)


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        ("reconstruction_loss", {"encoder", "quant_conv", "post_quant_conv", "decoder"}),
        ("codebook_loss", {"quantize"}),
        ("commitment_loss", {"encoder", "quant_conv"}),
    ],
)
def test_each_loss_moves_its_own_parts(model, pixel_values, loss, reached):
    model(pixel_values)[loss].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name, gradient in gradients.items() if gradient.abs().sum() > 0} == reached


def test_gradient_passes_the_choice_of_codes_straight_through(model, pixel_values):
    outputs = model(pixel_values)
    outputs.latents.retain_grad()
    outputs.reconstruction_loss.backward()
    codes = model.quantize.decode(outputs.image_tokens).detach().requires_grad_()
    decoded = model.decoder(model.post_quant_conv(codes.transpose(1, 2).unflatten(2, (4, 6))))
    error = decoded - pixel_values
    (error.abs().mean() + error.square().mean()).backward()
    assert_close(outputs.latents.grad, codes.grad)


def test_saved_tokenizer_loads_identical(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = EditARVQModel.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_fresh_tokenizer_gives_varied_codes_and_finite_pixels(model):
    torch.manual_seed(0)
    fresh = EditARVQModel(model.config)
    assert 0.5 < fresh.quantize.embedding.weight.norm(dim=-1).mean() < 1.5
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    bound = 1 / math.sqrt(32 * 9)
    assert 0.9 * bound < fresh.encoder.conv_blocks[0].res[0].conv1.weight.abs().max() <= bound


def test_bf16_and_channels_last_agree_with_fp32(model, pixel_values):
    image_tokens, latents = model.encode(pixel_values).to_tuple()
    decoded = model.decode(image_tokens, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(pixel_values)
    assert outputs.latents.dtype == outputs.loss.dtype == torch.float32
    assert_close(outputs.latents, latents, atol=0.1, rtol=0)

    model = model.to(memory_format=torch.channels_last)
    channels_last = pixel_values.contiguous(memory_format=torch.channels_last)
    assert_close(model.encode(channels_last).latents, latents)
    model = model.to(torch.bfloat16)
    assert_close(model.encode(channels_last).latents, latents, atol=0.1, rtol=0)
    half = model.decode(image_tokens, 4, 6)
    assert half.dtype == torch.bfloat16
    assert (half.float() - decoded).square().mean().sqrt() < 0.05 * decoded.std()


def test_skipped_upsamples_are_the_last_ones(model):
    image_tokens = torch.arange(24)[None]
    quarter, half = (model.decode(image_tokens, 4, 6, num_skipped_upsamples=number) for number in (2, 1))
    model.decoder.conv_blocks[1].upsample.nearest = torch.nn.Identity()
    assert_close(model.decode(image_tokens, 4, 6), half, rtol=0, atol=0)
    model.decoder.conv_blocks[0].upsample.nearest = torch.nn.Identity()
    assert_close(model.decode(image_tokens, 4, 6), quarter, rtol=0, atol=0)
    assert quarter.shape == (1, 3, 4, 6)
    with pytest.raises(ValueError, match=r"`num_skipped_upsamples` is 3; .* from 0 to 2"):
        model.decode(image_tokens, 4, 6, num_skipped_upsamples=3)


def test_encode_and_decode_fire_offload_hooks(model, pixel_values):
    class CountingHook:
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1

    model._hf_hook = CountingHook()
    model.decode(model.encode(pixel_values).image_tokens, 4, 6)
    assert model._hf_hook.calls == 2


def test_sequential_offload_finds_the_codebook(model, pixel_values):
    accelerate = pytest.importorskip("accelerate")
    image_tokens = model.encode(pixel_values).image_tokens
    decoded = model.decode(image_tokens, 4, 6)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.quantize.embedding.weight.device.type == "meta"
    assert torch.equal(model.encode(pixel_values).image_tokens, image_tokens)
    assert_close(model.decode(image_tokens, 4, 6), decoded)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 18, 16), (1, 3, 16, 6), (1, 3, 0, 16)])
@pytest.mark.parametrize("method", ["encode", "forward"])
def test_pictures_of_a_wrong_shape_are_refused(model, method, shape):
    with pytest.raises(ValueError, match="`pixel_values`"):
        getattr(model, method)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("image_tokens", "grid", "message"),
    [
        (torch.zeros(1, 6).long(), (None, None), "6 tokens"),
        (torch.zeros(1, 6).long(), (2, 2), "2×2"),
        (torch.zeros(1, 6).long(), (4, None), "4×1"),
        (torch.zeros(1, 6).long(), (None, 0), "6×0"),
        (torch.zeros(1, 0).long(), (None, None), "0 tokens"),
        (torch.zeros(6).long(), (None, None), "shape"),
        (torch.full((1, 4), NUM_CODES), (None, None), f"0 to {NUM_CODES - 1}"),
        (torch.full((1, 4), -1), (None, None), "-1"),
    ],
)
def test_tokens_that_are_no_picture_are_refused(model, image_tokens, grid, message):
    with pytest.raises(ValueError, match=f"`image_tokens`.*{message}"):
        model.decode(image_tokens, *grid)


@pytest.mark.parametrize(
    ("field", "value"), [("base_channels", 0), ("channel_multipliers", ()), ("norm_num_groups", 3)]
)
def test_a_configuration_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        EditARVQConfig(**{field: value})
