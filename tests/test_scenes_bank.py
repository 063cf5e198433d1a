"""The bank of the scenes: renderer, readers of packages, licenses, and a build from packages written here."""

import io
import json
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from archives import FurnitureCatalog, read_obj, read_rcc
from build_bank import build_bank, check_license, draw_sheet, read_credit
from nouns import COLORS, LIBRARIES, NOUNS, Noun
from packages import find_package
from PIL import Image
from renderer import Material, Mesh, render


def make_square(side: float = 2.0, z: float = 0.0, **material) -> Mesh:
    """Return a square of two triangles that faces +z, its texture upright."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2
    positions = np.array([[*corner, z] for corner in corners])[[[0, 1, 2], [0, 2, 3]]]
    coordinates = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)[[[0, 1, 2], [0, 2, 3]]]
    return Mesh(positions, coordinates, np.zeros((2, 3, 3)), np.zeros(2, int), [Material(**material)])


def join(first: Mesh, second: Mesh) -> Mesh:
    names = ("positions", "coordinates", "normals")
    parts = [np.concatenate([getattr(mesh, name) for mesh in (first, second)]) for name in names]
    return Mesh(*parts, np.array([0, 0, 1, 1]), first.materials + second.materials)


def get_hue(pixel: np.ndarray) -> int:
    return int(np.argmax(pixel[:3]))


def test_a_textured_square_seen_from_the_front_shows_its_texture():
    texture = np.ones((2, 2, 4), np.float32)
    texture[..., :3] = [[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 1]]]
    image, _ = render(make_square(texture=texture), 0.0, 0.0, 16)
    assert [get_hue(image[row, column]) for row, column in ((4, 4), (4, 12), (12, 4))] == [0, 1, 2]
    assert image[12, 12, :3].min() > 200


def test_transparent_texels_are_holes():
    texture = np.ones((1, 2, 4), np.float32)
    texture[0, 0, 3] = 0
    image, depth = render(make_square(texture=texture), 0.0, 0.0, 16)
    assert not image[1:-1, 1:7, 3].any()
    assert (image[1:-1, 9:-1, 3] == 255).all()
    assert np.isinf(depth[1:-1, 1:7]).all()


def test_a_nearer_triangle_hides_a_farther_one_in_any_order():
    near, far = make_square(1.0, 1.0, color=(1, 0, 0)), make_square(2.0, 0.0, color=(0, 0, 1))
    for mesh in (join(near, far), join(far, near)):
        image, _ = render(mesh, 0.0, 0.0, 32)
        assert get_hue(image[16, 16]) == 0
        assert get_hue(image[3, 3]) == 2


def test_a_transparent_material_blends_with_what_is_behind_it():
    glass = make_square(2.0, 0.0, color=(1, 0, 0), alpha=0.25)
    assert abs(int(render(glass, 0.0, 0.0, 16)[0][8, 8, 3]) - 64) <= 1
    image, depth = render(join(glass, make_square(2.0, -1.0, color=(0, 0, 1))), 0.0, 0.0, 16)
    assert image[8, 8, 3] == 255
    assert image[8, 8, 2] > image[8, 8, 0] > 60
    assert np.isclose(depth[8, 8], depth.min())


def test_mask_and_depth_of_a_tilted_plane_are_exact():
    pitch, size = 0.4, 64
    image, depth = render(make_square(), 0.0, pitch, size, supersample=1)
    # Pixel rays and the plane's equation in camera axes, worked out apart from the renderer's barycentric weights.
    distance = 3.5 * np.sqrt(2)
    normal = np.array([0, np.sin(pitch), np.cos(pitch)])
    corners = np.array([[x, y * np.cos(pitch), distance - y * np.sin(pitch)] for x in (-1, 1) for y in (-1, 1)])
    screen = corners[:, :2] / corners[:, 2:]
    scale = (size - 1) / np.ptp(screen, axis=0).max()
    middle = (screen.min(0) + screen.max(0)) / 2
    x = (np.arange(size) + 0.5 - size / 2) / scale + middle[0]
    y = -(np.arange(size) + 0.5 - size / 2) / scale + middle[1]
    rays = np.stack([*np.meshgrid(x, y), np.ones((size, size))], -1)
    z = (normal @ [0, 0, distance]) / (rays @ normal)
    hits = rays * z[..., None] - [0, 0, distance]
    along = hits[..., 1] * np.cos(pitch) - hits[..., 2] * np.sin(pitch)
    inside = (np.abs(hits[..., 0]) < 1) & (np.abs(along) < 1)
    mask = image[..., 3] > 0
    assert mask.sum() > 1000
    assert (mask == inside).mean() > 0.999
    np.testing.assert_allclose(depth[mask & inside], z[mask & inside], rtol=1e-9)
    assert np.isinf(depth[~mask]).all()


def test_supersampled_edges_are_partly_transparent():
    def count_partial(supersample: int) -> int:
        alpha = render(make_square(), 0.7, 0.5, 32, supersample=supersample)[0][..., 3]
        return int(((alpha > 0) & (alpha < 255)).sum())

    assert count_partial(1) == 0
    assert count_partial(2) > 10


def test_a_back_face_is_lit_and_a_black_one_is_not_quite_black():
    front, back = (render(make_square(color=(0, 0, 0)), yaw, 0.0, 8)[0][4, 4] for yaw in (0.0, np.pi))
    assert back[3] == front[3] == 255
    assert front[:3].min() > 5
    assert back[:3].min() > 5


def test_obj_reads_polygons_negative_indices_and_materials():
    files = {
        "a/m.obj": b"mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvn 0 0 1\nusemtl shiny\n"
        b"f 1/1/1 2/1/1 3/1/1 4/1/1\nusemtl none\nf -4 -3 -2\n",
        "a/m.mtl": b"newmtl shiny\nKd 1 0.5 0\nd 0.5\n",
    }
    mesh = read_obj("a/m.obj", files.get)
    assert mesh.positions.shape == (3, 3, 3)
    np.testing.assert_array_equal(mesh.positions[0], mesh.positions[2])
    np.testing.assert_array_equal(mesh.positions[1], [[0, 0, 0], [1, 1, 0], [0, 1, 0]])
    assert mesh.material_index.tolist() == [0, 0, 1]
    assert (mesh.materials[0].color, mesh.materials[0].alpha) == ((1.0, 0.5, 0.0), 0.5)
    assert mesh.normals[0, 0, 2] == 1
    assert not mesh.normals[2].any()


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_catalog(path: Path, names: list[str], rotation: str = ""):
    """Write a library of flat 2×1 cards, red above and blue below, that stand upright once they are turned."""
    texture = Image.new("RGB", (1, 2), (255, 0, 0))
    texture.putpixel((0, 1), (0, 0, 255))
    properties = "license=Creative Commons Attribution 3.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        points = [(-1, -2, 0), (1, -2, 0), (1, 2, 0), (-1, 2, 0), (0, 0, 0.5), (0, 0, -0.5)]
        if rotation:
            points = [(x, z, -y) for x, y, z in points]
        card = "".join(f"v {x} {y} {z}\n" for x, y, z in points) + "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        for number, name in enumerate(names, 1):
            entry = {"id": f"Test#{name}", "creator": "A | B", "model": f"/t/{name}/{name}.obj", "width": 10,
                     "height": 20, "depth": 1} | ({"modelRotation": rotation} if rotation else {})  # fmt: skip
            properties += "".join(f"{key}#{number}={value}\n" for key, value in entry.items())
            faces = "usemtl card\nf 1/1 2/2 3/3 4/4\nf 1/1 5/1 6/1\n"
            archive.writestr(f"t/{name}/{name}.obj", f"mtllib {name}.mtl\n{card}{faces}")
            archive.writestr(f"t/{name}/{name}.mtl", "newmtl card\nmap_Kd Card.PNG\n")
            archive.writestr(f"t/{name}/card.png", encode(texture, "PNG"))
        archive.writestr("PluginFurnitureCatalog.properties", properties)


# Turns a card that lies on its back upright: y comes from −z.
UPRIGHT = "1 0 0 0 0 -1 0 1 0"


@pytest.mark.parametrize("rotation", ["", UPRIGHT])
def test_model_rotation_and_catalog_size_are_obeyed(tmp_path, rotation):
    write_catalog(tmp_path / "t.sh3f", ["card"], rotation)
    mesh = FurnitureCatalog(tmp_path / "t.sh3f").load_mesh("Test#card")
    np.testing.assert_allclose(np.ptp(mesh.positions.reshape(-1, 3), axis=0), [10, 20, 1])
    image, _ = render(mesh, 0.0, 0.0, 32)
    assert [get_hue(image[row, 16]) for row in (8, 24)] == [0, 2]


def make_rcc(files: dict[str, bytes], compress: bool) -> bytes:
    """Return a Qt resource of version 1 with folders; the children of a folder follow one another."""
    root: dict = {}
    for path, content in files.items():
        node = root
        *folders, name = path.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = content
    names, payload = b"", b""
    nodes, queue = [b""], [(0, "", root)]

    def add_name(name: str) -> int:
        nonlocal names
        offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return offset

    while queue:
        index, name, content = queue.pop(0)
        if isinstance(content, dict):
            first = len(nodes)
            nodes += [b""] * len(content)
            queue += [(first + child, *item) for child, item in enumerate(content.items())]
            nodes[index] = struct.pack(">IHII", add_name(name), 2, len(content), first)
        else:
            data = struct.pack(">I", len(content)) + zlib.compress(content) if compress else content
            nodes[index] = struct.pack(">IHHHI", add_name(name), int(compress), 0, 0, len(payload))
            payload += struct.pack(">I", len(data)) + data
    tree = b"".join(nodes)
    return b"qres" + struct.pack(">4I", 1, 20, 20 + len(tree), 20 + len(tree) + len(payload)) + tree + payload + names


@pytest.mark.parametrize("compress", [False, True])
def test_qt_resources_are_read(tmp_path, compress):
    files = {"a/b/ü.txt": b"one", "a/c.bin": b"\x00" * 50, "d": b""}
    (tmp_path / "r.rcc").write_bytes(make_rcc(files, compress))
    assert read_rcc(tmp_path / "r.rcc") == files


README = b"""Copyright: Ann Example
License: CC0-1.0
Source: https://example.org/File:Meadow.webp
Files:
sub/meadow.webp

License: CC-BY-SA 4.0
Files: lake.webp
"""


def test_a_readme_must_name_license_and_url():
    files = {"r/README": README}
    assert read_credit(files, "r/sub/meadow.webp") == (
        "Ann Example", "CC0-1.0", "https://example.org/File:Meadow.webp"
    )  # fmt: skip
    for name in ("r/lake.webp", "r/meadow.webp", "other/meadow.webp"):
        with pytest.raises(ValueError, match="No README"):
            read_credit(files, name)


def test_free_licenses_get_short_names_and_others_are_refused():
    names = {"Public Domain": "public domain", "CC0": "CC0-1.0", "CC-BY 2.0": "CC-BY-2.0", "MIT": "MIT",
             "Creative Commons Attribution 3.0 license  © X": "CC-BY-3.0"}  # fmt: skip
    assert {text: check_license("x", text) for text in names} == names
    for text in ("CC-BY-SA 4.0", "GPL-2+", "GFDL", "CC-BY-NC 4.0", "FDL", "unknown", ""):
        with pytest.raises(ValueError, match="'x' has the license"):
            check_license("x", text)


def write_deb(folder: Path, name: str, files: dict[str, bytes]) -> None:
    root = folder / f"{name}-root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: test\n"
    )
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    subprocess.run(["dpkg-deb", "-b", str(root), str(folder / f"{name}_1_all.deb")], check=True, capture_output=True)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    folder = tmp_path_factory.mktemp("packages")
    write_catalog(folder / "t.sh3f", ["one", "two", "three"], UPRIGHT)
    library = "usr/share/sweethome3d/furniture/"
    write_deb(folder, "sweethome3d-furniture", {f"{library}Scopia.sh3f": (folder / "t.sh3f").read_bytes()})
    names = [f"park/resource/sub/p{index}.webp" for index in range(10)]
    files = {f"gcompris/src/activities/{name}": encode(Image.new("RGB", (500, 400)), "WEBP") for name in names}
    readme = README.replace(b"sub/meadow.webp", "\n".join(name.split("resource/")[1] for name in names).encode())
    files["gcompris/src/activities/park/resource/README"] = readme
    write_deb(folder, "gcompris-qt-data", {"usr/share/gcompris-qt/rcc/park.rcc": make_rcc(files, True)})
    write_deb(folder, "others", {"meadow.jpg": encode(Image.new("RGB", (60, 50)), "JPEG")})
    rows = [f"gcompris-qt-data,{name},place,0.8,,," for name in names]
    rows.append("others,meadow.jpg,other,0.9,Ann,Public Domain,https://example.org/m")
    (folder / "photographs.csv").write_text("package,path,kind,ground,creator,license,source\n" + "\n".join(rows))
    with tarfile.open(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", "w:gz") as archive:
        picture = Image.new("RGBA", (256, 256))
        picture.paste((200, 0, 0, 255), (60, 30, 200, 230))
        files = {"package.json": b'{"license": "MIT"}', "assets/1f34e.webp": encode(picture, "WEBP")}
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return folder


TABLE = {"card": Noun(0.4, "sheet,ticket", "sc:one sc:two sc:three"), "apple": Noun(0.2, "", "", "1f34e")}


@pytest.fixture(scope="module")
def bank(packages, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "bank"
    folder.mkdir()
    (folder / "old").write_text("from an earlier build")
    build_bank(packages, folder, nouns=TABLE, photographs=packages / "photographs.csv")
    return folder


def test_the_bank_holds_views_photographs_and_credits(bank):
    assert sorted(path.name for path in bank.iterdir()) == [
        "ATTRIBUTION.md", "bank.json", "objects.parquet", "photographs.parquet"
    ]  # fmt: skip
    rows = pq.read_table(bank / "objects.parquet").to_pylist()
    models = [row for row in rows if row["kind"] == "model"]
    assert len({row["id"] for row in rows}) == len(rows) == len(models) + 1
    by_split = {name: [row for row in models if row["split"] == name] for name in ("train", "test-view", "test-model")}
    assert [len(by_split[name]) for name in by_split] == [28, 4, 16]
    assert len({row["model"] for row in by_split["test-model"]}) == 1
    for row in models[:4]:
        image, depth = (Image.open(io.BytesIO(row[key])) for key in ("image", "depth"))
        assert (image.mode, image.size) == ("RGBA", depth.size)
        assert 100 < max(image.size) <= 144
        alpha, depth = np.asarray(image)[..., 3], np.asarray(depth.convert("L"))
        assert alpha[0].any() and alpha[:, 0].any()  # noqa: PT018
        assert (depth.min(), depth.max()) == (0, 255)
        assert ((depth > 0) == (alpha > 0)).mean() > 0.97
    apple = next(row for row in rows if row["kind"] == "emoji")
    assert (apple["noun"], apple["depth"], apple["split"], apple["pitch"]) == ("apple", None, "train", 0)
    assert Image.open(io.BytesIO(apple["image"])).size == (101, 144)

    photographs = pq.read_table(bank / "photographs.parquet").to_pylist()
    assert [row["split"] for row in photographs].count("test") == 1
    assert {row["kind"]: round(row["ground"], 3) for row in photographs} == {"place": 0.8, "other": 0.9}
    assert Image.open(io.BytesIO(photographs[0]["image"])).size == (440, 352)

    credits = (bank / "ATTRIBUTION.md").read_text().splitlines()
    assert len([line for line in credits if line.startswith(("| model", "| emoji", "| photograph"))]) == 3 + 1 + 11
    assert any("meadow.jpg" in line and "Ann" in line and "https://example.org/m" in line for line in credits)
    assert all(line.count("|") == 5 for line in credits if line.startswith("|"))

    description = json.loads((bank / "bank.json").read_text())
    assert description["nouns"]["apple"] == {"synonyms": [], "article": "an", "size": 0.2, "recolor": True}
    assert description["nouns"]["card"]["synonyms"] == ["sheet", "ticket"]
    assert len(description["held_out_pairs"]) == 2
    assert all(color in description["colors"] and noun in TABLE for color, noun in description["held_out_pairs"])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(bank, packages, tmp_path):
    for seed in (0, 1):
        build_bank(packages, tmp_path / f"{seed}", seed, TABLE, packages / "photographs.csv")
    for name in ("objects.parquet", "photographs.parquet", "bank.json", "ATTRIBUTION.md"):
        assert (tmp_path / "0" / name).read_bytes() == (bank / name).read_bytes()
    assert (tmp_path / "1" / "objects.parquet").read_bytes() != (bank / "objects.parquet").read_bytes()


def test_the_contact_sheet_shows_a_row_a_noun(bank, tmp_path):
    draw_sheet(bank, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height == 84


def test_what_the_packages_lack_is_named(packages, tmp_path):
    table = tmp_path / "photographs.csv"
    table.write_text("package,path,kind,ground,creator,license,source\nothers,lake.jpg,place,0.8,Ann,CC0,x\n")
    nouns = {"'sc:four'": Noun(0.2, "", "sc:four"), "'1f34f'": Noun(0.2, "", "", "1f34f")}
    for message, chosen in {**{message: {"card": noun} for message, noun in nouns.items()}, "lake.jpg": {}}.items():
        with pytest.raises(ValueError, match=message):
            build_bank(packages, tmp_path / "bank", nouns=chosen, photographs=table)
    assert list(tmp_path.iterdir()) == [table]


def test_a_package_that_cannot_be_had_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-package-of-editar"):
        find_package(tmp_path / "packages", "no-such-package-of-editar", "deb")


def test_every_word_of_the_table_means_one_noun():
    words = [word for noun, entry in NOUNS.items() for word in (noun, *filter(None, entry.synonyms.split(",")))]
    shown = [name for entry in NOUNS.values() for name in (*entry.models.split(), *entry.emoji.split())]
    for names in (words, shown):
        assert len(names) == len(set(names))
    assert not set(words) & set(COLORS)
    assert {name.split(":")[0] for name in shown if ":" in name} == set(LIBRARIES)
    assert all(entry.models or entry.emoji for entry in NOUNS.values())
    assert all(0.1 <= entry.size <= 0.8 for entry in NOUNS.values())
