"""What networks see in images: each step of the published evaluation written out beside the function."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from tiny import redraw_weights
from tiny_metrics import (
    NUM_LABELS,
    build_clip,
    build_depth_model,
    build_dino,
    build_inception,
    build_lpips,
    build_segmentation_model,
    draw_inception_weights,
    draw_lpips_weights,
    save_lpips,
)
from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerImageProcessorPil, ResNetConfig

from editar_hf.evaluation.features import (
    DEFAULT_MODELS,
    Network,
    compute_clip_score,
    compute_lpips,
    compute_size,
    encode_class_tokens,
    encode_images,
    encode_inception,
    encode_keys,
    estimate_depth,
    load_network,
    segment,
)
from editar_hf.evaluation.metrics import compute_cosine_similarity, compute_structure_distance


PROMPTS = ["a red barn", "two cats"]


@pytest.fixture(scope="module")
def photographs():
    """Two pieces of a photograph, (80, 64, 3)."""
    return [data.astronaut()[top : top + 80, 200:264] for top in (20, 120)]


@pytest.fixture(scope="module")
def images(photographs):
    return torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def references(images):
    return images.flip(3)


@pytest.fixture(scope="module")
def mask():
    """One mask of a rectangle, and one that is empty."""
    mask = torch.zeros(2, 1, 80, 64)
    mask[0, :, 10:60, 20:50] = 1
    return mask


def normalise(array, mean, std):
    """Turn (height, width, 3) of 0 to 255 into what a vision model takes."""
    return torch.from_numpy((array / 255 - np.array(mean)) / np.array(std)).float().permute(2, 0, 1)[None]


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# CLIP


def build_clip_network():
    model, processor = build_clip()
    return Network(model, processor.image_processor, processor.tokenizer)


@torch.no_grad()
def test_clip_score_is_a_hundred_cosines_of_the_picture_as_clip_sees_it(images, photographs):
    model, processor = build_clip()
    expected = []
    for photograph, prompt in zip(photographs, PROMPTS, strict=True):
        picture = Image.fromarray(photograph).resize((224, 280), Image.BICUBIC).crop((0, 28, 224, 252))
        image = model.get_image_features(normalise(np.asarray(picture), *OPENAI)).pooler_output[0]
        text = model.get_text_features(**processor.tokenizer([prompt], return_tensors="pt")).pooler_output[0]
        expected.append(max(100 * (image @ text / image.norm() / text.norm()).item(), 0))
    scores = compute_clip_score(Network(model, processor.image_processor, processor.tokenizer), images, PROMPTS)
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)
    assert len(set(scores.tolist()) - {0.0}) == 2


def test_clip_score_under_a_mask_is_that_of_the_picture_black_outside(images, mask):
    network = build_clip_network()
    score = compute_clip_score(network, images, PROMPTS, mask)
    assert score[0] == compute_clip_score(network, images * mask, PROMPTS)[0]
    assert score[0] != compute_clip_score(network, images, PROMPTS)[0]
    assert score[1].isnan(), "an empty mask shows nothing"


def test_long_prompts_are_cut_off_and_short_ones_are_not_changed_by_them(images):
    network = build_clip_network()
    short, padded = (
        compute_clip_score(network, images, ["a red barn", other])[0].item() for other in ("a red barn", "cat " * 50)
    )
    assert padded == pytest.approx(short, rel=1e-5)
    with pytest.raises(ValueError, match="`prompts` is 'cat'; pass a list of 2"):
        compute_clip_score(network, images, "cat")


def test_clip_i_of_a_picture_with_itself_is_one(images, references):
    network = build_clip_network()
    embeds, others = encode_images(network, images), encode_images(network, references)
    assert compute_cosine_similarity(embeds, embeds).tolist() == pytest.approx([1, 1])
    assert compute_cosine_similarity(embeds, others).max() < 1 - 1e-5


def test_clip_from_a_folder_is_the_instance_it_was_saved_from(images, tmp_path):
    model, processor = build_clip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = compute_clip_score(Network(model, processor.image_processor, processor.tokenizer), images, PROMPTS)
    assert torch.equal(compute_clip_score(load_network("clip", tmp_path), images, PROMPTS), expected)
    assert torch.equal(compute_clip_score(load_network("clip", str(tmp_path)), images, PROMPTS), expected)


# DINO


def compare_structure(model, images, references, **switches):
    keys = (encode_keys(Network(model), pixels, **switches) for pixels in (images, references))
    return compute_structure_distance(*keys)


@torch.no_grad()
@pytest.mark.parametrize("pixel_scale", [1, 255])
@pytest.mark.parametrize("antialias", [True, False])
def test_structure_distance_is_of_the_last_layers_keys(pixel_scale, antialias, images, references):
    model = build_dino()
    keys = []
    for pictures in (images, references):
        # 80×64 to a shorter side of 224.
        pixels = F.interpolate(pictures * pixel_scale, (280, 224), mode="bilinear", antialias=antialias)
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in IMAGENET)
        states = model((pixels - mean) / std, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        last = model.layers[-1]
        keys.append(F.linear(last.layernorm_before(states[-2]), *last.attention.k_proj.parameters()))
    # 32 pixels a patch: 8 rows of 7, and the class token.
    assert keys[0].shape == (2, 57, 16)
    distance = compare_structure(model, images, references, pixel_scale=pixel_scale, antialias=antialias)
    torch.testing.assert_close(distance, compute_structure_distance(*keys), rtol=1e-4, atol=1e-9)


def test_structure_distance_of_a_dino_of_seeded_weights_has_its_golden_value():
    images, references = torch.rand(2, 2, 3, 80, 64, generator=torch.Generator().manual_seed(0))
    expected = [0.00066484777, 0.00088699597]
    assert compare_structure(build_dino(), images, references).tolist() == pytest.approx(expected, rel=1e-4)


def test_structure_distance_depends_on_both_switches(references):
    images = torch.rand(1, 3, 400, 300, generator=torch.Generator().manual_seed(0))
    references = F.interpolate(references[:1], (400, 300))
    switches = [{}, {"pixel_scale": 1}, {"antialias": False}]
    assert len({compare_structure(build_dino(), images, references, **kwargs).item() for kwargs in switches}) == 3


def test_all_785_tokens_count():
    keys = encode_keys(Network(build_dino(patch_size=8)), torch.zeros(1, 3, 512, 512))
    assert keys.shape == (1, 785, 16)


@pytest.mark.parametrize(
    ("size", "expected"), [((512, 512), (224, 224)), ((300, 1000), (144, 480)), ((1000, 300), (480, 144))]
)
def test_size_is_that_of_a_shorter_side_of_224_and_a_longer_one_of_480_at_most(size, expected):
    assert compute_size(*size, 224, 480) == expected


@pytest.mark.parametrize("name", ["structure", "dino"])
def test_a_dino_that_is_loaded_has_its_authors_layer_norms_and_an_instance_its_own(name, tmp_path):
    model = build_dino(layer_norm_eps=1e-12)
    model.save_pretrained(tmp_path)
    loaded = [
        module.eps for module in load_network(name, tmp_path).model.modules() if isinstance(module, torch.nn.LayerNorm)
    ]
    # Two layers of two, and the last.
    assert loaded == [1e-6] * 5
    assert Network(model).model.layernorm.eps == 1e-12


@torch.no_grad()
def test_dino_similarity_is_of_class_tokens_of_the_centre(images, references, photographs):
    model = build_dino()
    tokens = []
    for photograph in photographs:
        for array in (photograph, photograph[:, ::-1]):
            # 64×80 to 256×320; the middle 224×224.
            picture = Image.fromarray(array).resize((256, 320), Image.BICUBIC).crop((16, 48, 240, 272))
            tokens.append(model(normalise(np.asarray(picture), *IMAGENET)).last_hidden_state[0, 0])
    expected = [F.cosine_similarity(a, b, dim=0).item() for a, b in (tokens[:2], tokens[2:])]
    found = compute_cosine_similarity(*(encode_class_tokens(Network(model), each) for each in (images, references)))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 1 - 1e-5


# LPIPS


@torch.no_grad()
def test_lpips_is_of_pictures_with_the_edited_pixels_grey(images, references, mask):
    model = build_lpips()
    network = Network(model)
    torch.testing.assert_close(
        compute_lpips(network, images, references).float(), model(images * 2 - 1, references * 2 - 1)
    )
    expected = model(images * (1 - mask) * 2 - 1, references * (1 - mask) * 2 - 1)
    torch.testing.assert_close(compute_lpips(network, images, references, mask).float(), expected)
    assert compute_lpips(network, images, references, mask)[0] != compute_lpips(network, images, references)[0]


@pytest.mark.parametrize("masked_mean", [False, True])
def test_lpips_of_a_picture_edited_everywhere_has_no_value(masked_mean, images, references, mask):
    network = Network(build_lpips())
    scores = compute_lpips(network, images, references, 1 - mask, masked_mean)
    assert scores.isnan().tolist() == [False, True]
    assert scores.dtype == torch.float64


def test_lpips_of_the_spared_part_alone_is_larger_than_of_the_whole(images, references):
    mask = torch.ones(2, 1, 80, 64)
    mask[..., :20] = 0
    network = Network(build_lpips())
    assert (
        compute_lpips(network, images, references, mask, True) > 1.5 * compute_lpips(network, images, references, mask)
    ).all()


# Depth


@torch.no_grad()
@pytest.mark.parametrize("variant", ["editar", "controlnet++", "controlar"])
def test_depth_is_estimated_at_the_size_that_the_variant_says(variant):
    model, processor = build_depth_model()
    images = torch.from_numpy(data.astronaut()[:64, 200:264]).permute(2, 0, 1)[None] / 255
    side = 64 if variant == "controlar" else 32
    picture = Image.fromarray(data.astronaut()[:64, 200:264]).resize((side, side), Image.BICUBIC)
    depth = model(normalise(np.asarray(picture), [0.5] * 3, [0.5] * 3)).predicted_depth
    assert depth.shape == (1, side, side)
    estimated = estimate_depth(Network(model, processor), images, keep_size=variant == "controlar")
    torch.testing.assert_close(estimated, depth, rtol=1e-3, atol=1e-5)


def test_depth_from_a_folder_is_the_instance_it_was_saved_from(images, tmp_path):
    model, processor = build_depth_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = estimate_depth(Network(model, processor), images)
    assert torch.equal(estimate_depth(load_network("depth", tmp_path), images), expected)


# Segmentation


def build_maskformer():
    """Build a mask classifier on a residual network, the kind of the published COCOStuff model."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    decoder = {"model_type": "detr", "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "num_queries": 9}
    decoder |= {"decoder_ffn_dim": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = MaskFormerConfig(
        backbone_config=backbone,
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=NUM_LABELS,
    )
    return redraw_weights(MaskFormerForInstanceSegmentation(config), 0.3), MaskFormerImageProcessorPil(
        size={"height": 64, "width": 64}
    )


@pytest.mark.parametrize("build", [build_segmentation_model, build_maskformer])
def test_classes_are_those_that_the_model_sees(build, images, tmp_path):
    model, processor = build()
    with torch.no_grad():
        outputs = model(**processor([Image.fromarray(p) for p in make_arrays(images)], return_tensors="pt"))
    seen = torch.stack(processor.post_process_semantic_segmentation(outputs, target_sizes=[(80, 64)] * 2))
    assert len(seen.unique()) > 1
    assert torch.equal(segment(Network(model, processor), images), seen)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert torch.equal(segment(load_network("segmentation", tmp_path), images), seen)


def make_arrays(images):
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


# Inception


@torch.no_grad()
def test_features_are_of_channels_resized_in_floating_point():
    """Black and white squares: what is bicubic overshoots there, and is cut off."""
    array = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((9, 9)))[..., None].repeat(3, 2).astype(np.uint8) * 255
    array[..., 1] //= 3
    channels = [Image.fromarray(array[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC) for c in range(3)]
    pixels = torch.tensor(np.array([np.asarray(channel) for channel in channels]))
    assert (pixels % 1 != 0).any()
    assert pixels.max() > 260
    model = build_inception()
    features = encode_inception(Network(model), torch.from_numpy(array).permute(2, 0, 1)[None] / 255)
    expected = model((pixels.clamp(0, 255)[None] - 128) / 128)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# All


@pytest.mark.parametrize("name", DEFAULT_MODELS)
def test_a_missing_folder_is_called_missing(name):
    with pytest.raises(ValueError, match=f"`{name}_model` is '/no/where': there is no such folder"):
        load_network(name, "/no/where")


def test_networks_from_folders_are_ready_to_score(images, references, tmp_path):
    save_lpips(draw_lpips_weights(), tmp_path / "lpips")
    torch.save(dict(draw_inception_weights()), tmp_path / "inception.pth")
    build_dino().save_pretrained(tmp_path / "dino")
    loaded = load_network("lpips", tmp_path / "lpips")
    assert torch.equal(
        compute_lpips(loaded, images, references), compute_lpips(Network(build_lpips()), images, references)
    )
    loaded = load_network("inception", tmp_path / "inception.pth")
    assert torch.equal(encode_inception(loaded, images), encode_inception(Network(build_inception()), images))
    for encode, name in ((encode_keys, "structure"), (encode_class_tokens, "dino")):
        loaded = load_network(name, tmp_path / "dino")
        assert torch.equal(encode(loaded, images), encode(Network(build_dino()), images))
