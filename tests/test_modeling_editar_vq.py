"""The VQ tokenizer against formulas written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from editar_hf.configuration_editar import EditARVQConfig
from editar_hf.modeling_editar_vq import EditARVQModel, compute_nearest_codes


NUM_EMBEDDINGS = 48


def build_model(**overrides) -> EditARVQModel:
    """Build a tiny tokenizer whose norms and codebook row lengths differ from one another."""
    sizes = {
        "num_embeddings": NUM_EMBEDDINGS,
        "embedding_dim": 4,
        "latent_channels": 8,
        "base_channels": 8,
        "channel_multipliers": (1, 2, 2),
        "num_res_blocks": 1,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    model = EditARVQModel(EditARVQConfig(**{**sizes, **overrides})).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        model.quantize.embedding.weight.mul_(torch.rand(model.config.num_embeddings, 1) * 3 + 0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def pixel_values():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def swish_norm(weights: dict, name: str, x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Group normalisation and swish, by hand."""
    groups = x.reshape(x.shape[0], num_groups, -1)
    normed = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    normed = normed.view_as(x) * weights[f"{name}.weight"].view(-1, 1, 1) + weights[f"{name}.bias"].view(-1, 1, 1)
    return normed * torch.sigmoid(normed)


def test_residual_block_matches_its_formula(model):
    x = torch.randn(2, 8, 5, 6)
    block = model.encoder.conv_blocks[1].res[0]
    weights = block.state_dict()

    def conv(name, x):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding="same")

    expected = conv("conv1", swish_norm(weights, "norm1", x, 4))
    expected = conv("nin_shortcut", x) + conv("conv2", swish_norm(weights, "norm2", expected, 4))
    torch.testing.assert_close(block(x), expected)


def test_attention_block_matches_its_formula(model):
    block = model.encoder.mid[1]
    x = torch.randn(2, 16, 3, 5)
    normed = F.group_norm(x, 4, block.norm.weight, block.norm.bias, eps=1e-6)
    query, key, value = (
        torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], normed) + layer.bias.view(-1, 1, 1)
        for layer in (block.q, block.k, block.v)
    )
    scores = torch.einsum("bchw,bcij->bhwij", query, key) / math.sqrt(16)
    attention = scores.flatten(3).softmax(-1).view_as(scores)
    attended = torch.einsum("bhwij,bcij->bchw", attention, value)
    expected = x + torch.einsum("oc,bchw->bohw", block.proj_out.weight[:, :, 0, 0], attended)
    expected = expected + block.proj_out.bias.view(-1, 1, 1)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_downsampling_pads_right_and_bottom(model):
    downsample = model.encoder.conv_blocks[0].downsample
    x = torch.randn(1, 8, 4, 6)
    padded = torch.cat([x, torch.zeros(1, 8, 4, 1)], dim=3)
    padded = torch.cat([padded, torch.zeros(1, 8, 1, 7)], dim=2)
    expected = F.conv2d(padded, downsample.conv.weight, downsample.conv.bias, stride=2)
    torch.testing.assert_close(downsample(x), expected)


def test_modules_carry_the_published_keys():
    config = EditARVQConfig(num_embeddings=8, base_channels=8, norm_num_groups=4, latent_channels=8)
    keys = {name.rsplit(".", 1)[0] for name in EditARVQModel(config).state_dict()}
    res, attn = ("norm1", "conv1", "norm2", "conv2"), ("norm", "q", "k", "v", "proj_out")
    expected = {"quant_conv", "post_quant_conv", "quantize.embedding"}
    for side, blocks, resample, lowest, shortcuts in (
        ("encoder", 2, "downsample", 4, {"2.res.0", "4.res.0"}),
        ("decoder", 3, "upsample", 0, {"1.res.0", "3.res.0"}),
    ):
        expected |= {f"{side}.{name}" for name in ("conv_in", "norm_out", "conv_out")}
        expected |= {f"{side}.mid.{i}.{name}" for i in (0, 2) for name in res}
        expected |= {f"{side}.mid.1.{name}" for name in attn}
        levels = f"{side}.conv_blocks"
        expected |= {f"{levels}.{i}.res.{j}.{name}" for i in range(5) for j in range(blocks) for name in res}
        expected |= {f"{levels}.{lowest}.attn.{j}.{name}" for j in range(blocks) for name in attn}
        expected |= {f"{levels}.{i}.{resample}.conv" for i in range(4)}
        expected |= {f"{levels}.{block}.nin_shortcut" for block in shortcuts}
    assert keys == expected


def test_published_size_has_the_published_parameters():
    with torch.device("meta"):
        model = EditARVQModel(EditARVQConfig())
    # VQ-16 of LlamaGen: 72 M parameters.
    assert 71.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 72.5e6


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (20, 4)])
def test_any_grid_encodes_and_decodes(model, height, width):
    image_tokens = model.encode(torch.zeros(2, 3, height, width)).image_tokens
    assert image_tokens.shape == (2, height * width // 16)
    assert image_tokens.dtype == torch.long
    assert model.decode(image_tokens, height // 4, width // 4).shape == (2, 3, height, width)
    assert model.decode(image_tokens, grid_width=width // 4).shape == (2, 3, height, width)
    assert model.decode(image_tokens, grid_height=height // 4).shape == (2, 3, height, width)


def test_eight_pixel_stride_comes_from_four_levels():
    image_tokens = build_model(channel_multipliers=(1, 1, 1, 1)).encode(torch.zeros(1, 3, 32, 16)).image_tokens
    assert image_tokens.shape == (1, 8)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
def test_nearest_code_is_the_brute_force_cosine_whatever_the_chunk(chunk_size):
    latents, rows = torch.randn(50, 4), torch.randn(20, 4) * torch.rand(20, 1)
    expected = [max(range(20), key=lambda code: F.cosine_similarity(z, rows[code], dim=0).item()) for z in latents]
    codes = compute_nearest_codes(latents, F.normalize(rows, dim=-1), chunk_size)
    assert codes.tolist() == expected


def test_tokens_are_the_codes_of_highest_cosine_in_raster_order(model, pixel_values):
    latents = model.quant_conv(model.encoder(pixel_values))
    rows = model.quantize.embedding.weight
    image_tokens = model.encode(pixel_values).image_tokens.view(2, 4, 6)
    assert image_tokens.unique().numel() > 3
    for row in range(4):
        for column in range(6):
            similarities = F.cosine_similarity(latents[:, None, :, row, column], rows[None], dim=-1)
            assert similarities.argmax(-1).tolist() == image_tokens[:, row, column].tolist()


def test_decoder_sees_normalised_codes_in_raster_order(model):
    image_tokens = torch.randint(NUM_EMBEDDINGS, (1, 6), generator=torch.Generator().manual_seed(2))
    rows = model.quantize.embedding.weight[image_tokens[0]]
    latents = torch.zeros(1, 4, 2, 3)
    for position in range(6):
        latents[0, :, position // 3, position % 3] = rows[position] / rows[position].norm()
    expected = model.decoder(model.post_quant_conv(latents))
    torch.testing.assert_close(model.decode(image_tokens, 2, 3), expected)


def test_length_of_codebook_rows_does_not_matter(pixel_values):
    model, rescaled = build_model(), build_model()
    with torch.no_grad():
        rescaled.quantize.embedding.weight.mul_(torch.logspace(-2, 2, NUM_EMBEDDINGS)[:, None])
    image_tokens = model.encode(pixel_values).image_tokens
    assert torch.equal(rescaled.encode(pixel_values).image_tokens, image_tokens)
    torch.testing.assert_close(rescaled.decode(image_tokens, 4, 6), model.decode(image_tokens, 4, 6))


def test_picture_is_the_same_alone_and_in_a_batch(model, pixel_values):
    together = model.encode(pixel_values)
    alone = model.encode(pixel_values[1:])
    torch.testing.assert_close(alone.latents[0], together.latents[1])
    assert torch.equal(alone.image_tokens[0], together.image_tokens[1])
    decoded = model.decode(together.image_tokens, 4, 6)
    torch.testing.assert_close(model.decode(alone.image_tokens, 4, 6)[0], decoded[1])


def test_losses_match_their_formulas(pixel_values):
    model = build_model(commitment_loss_weight=0.5)
    outputs = model(pixel_values)
    latents = model.quant_conv(model.encoder(pixel_values)).flatten(2).transpose(1, 2)
    latents = latents / latents.norm(dim=-1, keepdim=True)
    rows = model.quantize.embedding.weight[outputs.image_tokens]
    distance = ((latents - rows / rows.norm(dim=-1, keepdim=True)) ** 2).mean()
    error = model.decode(outputs.image_tokens, 4, 6) - pixel_values
    reconstruction_loss = error.abs().mean() + (error**2).mean()
    torch.testing.assert_close(outputs.reconstruction - pixel_values, error)
    torch.testing.assert_close(outputs.reconstruction_loss, reconstruction_loss)
    torch.testing.assert_close(outputs.codebook_loss, distance)
    torch.testing.assert_close(outputs.commitment_loss, distance)
    torch.testing.assert_close(outputs.loss, reconstruction_loss + 1.5 * distance)


def has_gradient(module: nn.Module) -> bool:
    return any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        ("reconstruction_loss", {"encoder", "quant_conv", "post_quant_conv", "decoder"}),
        ("codebook_loss", {"quantize"}),
        ("commitment_loss", {"encoder", "quant_conv"}),
    ],
)
def test_each_loss_moves_its_own_parts(pixel_values, loss, reached):
    model = build_model()
    model(pixel_values)[loss].backward()
    assert {name for name, module in model.named_children() if has_gradient(module)} == reached


def test_gradient_passes_the_choice_of_codes_straight_through(pixel_values):
    model = build_model()
    outputs = model(pixel_values)
    outputs.latents.retain_grad()
    outputs.reconstruction_loss.backward()
    codes = model.quantize.decode(outputs.image_tokens).detach().requires_grad_()
    decoded = model.decoder(model.post_quant_conv(codes.transpose(1, 2).unflatten(2, (4, 6))))
    error = decoded - pixel_values
    (error.abs().mean() + error.square().mean()).backward()
    torch.testing.assert_close(outputs.latents.grad, codes.grad)


def test_saved_tokenizer_loads_identical(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = EditARVQModel.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.encode(pixel_values).image_tokens, model.encode(pixel_values).image_tokens)


def test_fresh_tokenizer_gives_varied_codes_and_finite_pixels():
    torch.manual_seed(0)
    model = EditARVQModel(build_model().config)
    lengths = model.quantize.embedding.weight.norm(dim=-1)
    assert 0.5 < lengths.mean() < 1.5
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    bound = 1 / math.sqrt(8 * 9)
    kernel = model.encoder.conv_blocks[0].res[0].conv1.weight
    assert 0.9 * bound < kernel.abs().max() <= bound


def test_bf16_and_channels_last_agree_with_fp32(pixel_values):
    model = build_model()
    image_tokens, latents = model.encode(pixel_values).to_tuple()
    decoded = model.decode(image_tokens, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(pixel_values)
    assert outputs.latents.dtype == outputs.loss.dtype == torch.float32
    torch.testing.assert_close(outputs.latents, latents, atol=0.05, rtol=0)

    model = model.to(memory_format=torch.channels_last)
    channels_last = pixel_values.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.encode(channels_last).latents, latents, atol=1e-4, rtol=1e-4)
    model = model.to(torch.bfloat16)
    torch.testing.assert_close(model.encode(channels_last).latents, latents, atol=0.05, rtol=0)
    half = model.decode(image_tokens, 4, 6)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), decoded, atol=0.05, rtol=0.05)


def test_encode_and_decode_fire_offload_hooks(pixel_values):
    class CountingHook:
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1

    model = build_model()
    model._hf_hook = CountingHook()
    model.decode(model.encode(pixel_values).image_tokens, 4, 6)
    assert model._hf_hook.calls == 2


def test_sequential_offload_finds_the_codebook(pixel_values):
    accelerate = pytest.importorskip("accelerate")
    model = build_model()
    image_tokens = model.encode(pixel_values).image_tokens
    decoded = model.decode(image_tokens, 4, 6)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.quantize.embedding.weight.device.type == "meta"
    assert torch.equal(model.encode(pixel_values).image_tokens, image_tokens)
    torch.testing.assert_close(model.decode(image_tokens, 4, 6), decoded)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 18, 16), (1, 3, 16, 6), (1, 3, 0, 16)])
@pytest.mark.parametrize("method", ["encode", "forward"])
def test_pictures_of_a_wrong_shape_are_refused(model, method, shape):
    with pytest.raises(ValueError, match="`pixel_values`"):
        getattr(model, method)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("image_tokens", "grid", "message"),
    [
        (torch.zeros(1, 6, dtype=torch.long), {}, "6 tokens"),
        (torch.zeros(1, 6, dtype=torch.long), {"grid_height": 2, "grid_width": 2}, "2×2"),
        (torch.zeros(1, 6, dtype=torch.long), {"grid_height": 4}, "4×1"),
        (torch.zeros(1, 6, dtype=torch.long), {"grid_width": 0}, "6×0"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "0 tokens"),
        (torch.zeros(6, dtype=torch.long), {}, "shape"),
        (torch.full((1, 4), NUM_EMBEDDINGS), {}, f"0 to {NUM_EMBEDDINGS - 1}"),
        (torch.full((1, 4), -1), {}, "-1"),
    ],
)
def test_tokens_that_are_no_picture_are_refused(model, image_tokens, grid, message):
    with pytest.raises(ValueError, match=message):
        model.decode(image_tokens, **grid)
