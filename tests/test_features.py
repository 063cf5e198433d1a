"""What networks see in images: each step of the published evaluation written out beside the function.

The functions get networks that were loaded from folders and files, the expected values come from the same networks
before they were saved.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from tiny_metrics import (
    build_clip,
    build_depth_model,
    build_dino,
    build_inception,
    build_lpips,
    build_segmentation_model,
    save_models,
)

from editar_hf.evaluation import features, metrics
from editar_hf.evaluation.features import Network, load_network


PROMPTS = ["a red barn", "two cats"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = save_models(tmp_path_factory.mktemp("models"))
    names = ("clip", "structure", "lpips", "inception", "depth", "segmentation")
    return {name: load_network(name, folder / name, "cpu") for name in names}


@pytest.fixture(scope="module")
def photographs():
    """Two pieces of a photograph, (80, 64, 3)."""
    return [data.astronaut()[top : top + 80, 200:264] for top in (20, 120)]


@pytest.fixture(scope="module")
def images(photographs):
    return make_tensor(*photographs)


@pytest.fixture(scope="module")
def mask():
    """One mask of a rectangle, and one that is empty."""
    mask = torch.zeros(2, 1, 80, 64)
    mask[0, :, 10:60, 20:50] = 1
    return mask


def make_tensor(*arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def normalize(image, mean, std):
    """Turn an 8-bit image into what a vision model takes."""
    return torch.from_numpy((np.asarray(image) / 255 - np.array(mean)) / np.array(std)).float().permute(2, 0, 1)[None]


# CLIP


@torch.no_grad()
def test_clip_score_is_a_hundred_cosines_of_the_image_as_clip_sees_it(networks, images, photographs):
    model, processor = build_clip()
    expected = []
    for photograph, prompt in zip(photographs, PROMPTS, strict=True):
        seen = Image.fromarray(photograph).resize((224, 280), Image.BICUBIC).crop((0, 28, 224, 252))
        image = model.get_image_features(normalize(seen, *OPENAI)).pooler_output[0]
        text = model.get_text_features(**processor.tokenizer([prompt], return_tensors="pt")).pooler_output[0]
        expected.append(max(100 * (image @ text / image.norm() / text.norm()).item(), 0))
    scores = features.compute_clip_score(networks["clip"], images, PROMPTS)
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)
    assert len(set(scores.tolist()) - {0.0}) == 2


def test_clip_score_under_a_mask_is_that_of_the_image_black_outside(networks, images, mask):
    score = features.compute_clip_score(networks["clip"], images, PROMPTS, mask)
    assert score[0] == features.compute_clip_score(networks["clip"], images * mask, PROMPTS)[0]
    assert score[0] != features.compute_clip_score(networks["clip"], images, PROMPTS)[0]
    assert score[1].isnan(), "an empty mask shows nothing"


def test_long_prompts_are_cut_off_and_short_ones_are_not_changed_by_them(networks, images):
    short, padded = (
        features.compute_clip_score(networks["clip"], images, ["a red barn", other])[0].item()
        for other in ("a red barn", "cat " * 50)
    )
    assert padded == pytest.approx(short, rel=1e-5)
    with pytest.raises(ValueError, match="`prompts` is 'cat'; pass a list of 2"):
        features.compute_clip_score(networks["clip"], images, "cat")


# DINO


@torch.no_grad()
@pytest.mark.parametrize("pixel_scale", [1, 255])
@pytest.mark.parametrize("antialias", [True, False])
def test_keys_are_those_of_the_last_layer(pixel_scale, antialias, networks):
    images, model = make_tensor(data.astronaut()[:400, 100:400]), build_dino()
    # 400×300 to a shorter side of 224.
    pixels = F.interpolate(images * pixel_scale, (298, 224), mode="bilinear", antialias=antialias)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in IMAGENET)
    states = model((pixels - mean) / std, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    last = model.layers[-1]
    expected = F.linear(last.layernorm_before(states[-2]), *last.attention.k_proj.parameters())
    keys = features.encode_keys(networks["structure"], images, pixel_scale=pixel_scale, antialias=antialias)
    torch.testing.assert_close(keys, expected, rtol=1e-4, atol=1e-5)


def test_structure_distance_of_a_dino_of_seeded_weights_has_its_golden_value(networks):
    pairs = torch.rand(2, 2, 3, 80, 64, generator=torch.Generator().manual_seed(0))
    distance = metrics.compute_structure_distance(
        *(features.encode_keys(networks["structure"], pixels) for pixels in pairs)
    )
    assert distance.tolist() == pytest.approx([0.00066484777, 0.00088699597], rel=1e-4)


@pytest.mark.parametrize(
    ("size", "patch_size", "num_patches"),
    [((512, 512), 8, 28 * 28), ((300, 1000), 16, 9 * 30), ((1000, 300), 16, 9 * 30)],
)
def test_keys_are_of_a_shorter_side_of_224_and_a_longer_one_of_480_at_most(size, patch_size, num_patches):
    keys = features.encode_keys(Network(build_dino(patch_size)), torch.zeros(1, 3, *size))
    assert keys.shape == (1, num_patches + 1, 16), "every patch and the class token"


@pytest.mark.parametrize("name", ["structure", "dino"])
def test_a_dino_that_is_loaded_has_its_authors_layer_norms(name, tmp_path):
    build_dino(layer_norm_eps=1e-12).save_pretrained(tmp_path)
    norms = [norm for norm in load_network(name, tmp_path).model.modules() if isinstance(norm, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * 5, "two layers of two, and the last"


@torch.no_grad()
def test_class_tokens_are_of_the_center(networks, images, photographs):
    # 64×80 to 256×320; the middle 224×224.
    seen = (Image.fromarray(one).resize((256, 320), Image.BICUBIC).crop((16, 48, 240, 272)) for one in photographs)
    expected = [build_dino()(normalize(image, *IMAGENET)).last_hidden_state[0, 0] for image in seen]
    tokens = features.encode_class_tokens(networks["structure"], images)
    torch.testing.assert_close(tokens, torch.stack(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_corner_of_the_center_is_rounded_to_nearest(networks):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 259, 3), dtype=np.uint8)
    seen = Image.fromarray(pixels).crop((18, 16, 242, 240))  # 17.5 pixels to the left
    expected = build_dino()(normalize(seen, *IMAGENET)).last_hidden_state[:, 0]
    tokens = features.encode_class_tokens(networks["structure"], torch.from_numpy(pixels / 255).movedim(2, 0)[None])
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


# LPIPS


@torch.no_grad()
def test_lpips_is_of_images_whose_edited_pixels_are_black(networks, images, mask):
    network, model, references = networks["lpips"], build_lpips(), images.flip(3)
    for each, unedited in ((None, 1), (mask, 1 - mask)):
        expected = model(images * unedited * 2 - 1, references * unedited * 2 - 1)
        torch.testing.assert_close(features.compute_lpips(network, images, references, each).float(), expected)
    weighted = model(images * unedited * 2 - 1, references * unedited * 2 - 1, unedited)
    torch.testing.assert_close(features.compute_lpips(network, images, references, mask, True).float(), weighted)
    assert (weighted[0] - expected[0]).abs() > 0.1 * expected[0]
    for masked_mean in (False, True):
        values = features.compute_lpips(network, images, references, 1 - mask, masked_mean)
        assert values.isnan().tolist() == [False, True], "an image that is edited everywhere has no value"


# Depth and segmentation


@torch.no_grad()
@pytest.mark.parametrize(("keep_size", "side"), [(False, 32), (True, 64)])
def test_depth_is_estimated_at_the_trained_size_or_that_of_the_image(keep_size, side, networks):
    array, (model, _) = data.astronaut()[:64, 200:264], build_depth_model()
    resized = Image.fromarray(array).resize((side, side), Image.BICUBIC)
    expected = model(normalize(resized, [0.5] * 3, [0.5] * 3)).predicted_depth
    depth = features.estimate_depth(networks["depth"], make_tensor(array), keep_size)
    assert depth.shape == (1, side, side)
    torch.testing.assert_close(depth, expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_classes_are_those_that_the_model_sees(networks, images, photographs):
    model, processor = build_segmentation_model()
    outputs = model(**processor([Image.fromarray(photograph) for photograph in photographs], return_tensors="pt"))
    expected = torch.stack(processor.post_process_semantic_segmentation(outputs, target_sizes=[(80, 64)] * 2))
    assert len(expected.unique()) > 1
    assert torch.equal(features.segment(networks["segmentation"], images), expected)


# Inception


@torch.no_grad()
def test_features_are_of_channels_resized_in_floating_point(networks):
    """Black and white squares: what is bicubic overshoots there, and is cut off."""
    array = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((9, 9)))[..., None].repeat(3, 2).astype(np.uint8) * 255
    array[..., 1] //= 3
    channels = [Image.fromarray(array[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC) for c in range(3)]
    pixels = torch.tensor(np.array([np.asarray(channel) for channel in channels]))
    assert (pixels % 1 != 0).any()
    assert pixels.max() > 260
    found = features.encode_inception(networks["inception"], make_tensor(array))
    expected = build_inception()((pixels.clamp(0, 255)[None] - 128) / 128)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# Loading


@pytest.mark.parametrize("name", features.DEFAULT_MODELS)
def test_what_is_missing_is_named(name):
    if features.DEFAULT_MODELS[name] is None:
        with pytest.raises(ValueError, match=f"`{name}_model` is missing; pass the "):
            load_network(name)
    with pytest.raises(ValueError, match=f"`{name}_model` is '/no/where': there is no such folder"):
        load_network(name, "/no/where")
