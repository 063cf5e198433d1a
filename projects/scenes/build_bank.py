"""Build the bank of objects and photographs that scenes are composed of, from Debian and npm packages.

    python projects/scenes/build_bank.py --packages packages --output bank --sheet bank.png

The packages are downloaded by `apt-get download` and `npm pack` where they are missing. The bank is a folder with
`objects.parquet`, `photographs.parquet`, `bank.json` and `ATTRIBUTION.md`. The same packages and seed give the same
bytes. `nouns.py` and `photographs.csv` say what goes into it.
"""

import argparse
import csv
import io
import json
import re
import sys
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from archives import FurnitureCatalog, read_rcc, read_tgz, unpack_deb
from instructions import choose_article
from nouns import COLORS, LIBRARIES, NOUNS, Noun
from packages import find_package
from PIL import Image, ImageDraw
from renderer import Mesh, render

from editar_hf.io import atomic_path


VIEW_SIZE = 144
PHOTOGRAPH_SIDE = 352
FURNITURE = "sweethome3d-furniture"
EMOJI = "@lobehub/fluent-emoji-3d@1.1.0"
PHOTOGRAPHS = Path(__file__).with_name("photographs.csv")
# Photographs of this package have their license in a README beside them, those of others in `photographs.csv`.
README_PACKAGE = "gcompris-qt-data"
ATTRIBUTION = """\
# Attribution

The objects are renderings of the models, or the emoji, named below. The photographs are resized.

| file | creator | source | license |
|---|---|---|---|"""
LICENSE_TEXTS = """
CC0-1.0: https://creativecommons.org/publicdomain/zero/1.0/
CC-BY-2.0, 3.0, 4.0: https://creativecommons.org/licenses/by/2.0/, …/3.0/, …/4.0/

MIT: Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice and
this permission notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED
"AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
# Rows of the parquet files in one group: small, so that a reader can take the file piece by piece.
ROW_GROUP = 512

OBJECT_COLUMNS = {"id": pa.string(), "noun": pa.string(), "model": pa.string(), "kind": pa.string(),
                  "yaw": pa.float32(), "pitch": pa.float32(), "split": pa.string(), "image": pa.binary(),
                  "depth": pa.binary()}  # fmt: skip
PHOTOGRAPH_COLUMNS = {"id": pa.string(), "image": pa.binary(), "kind": pa.string(), "ground": pa.float32(),
                      "split": pa.string()}  # fmt: skip


class Credit(NamedTuple):
    """One line of `ATTRIBUTION.md`."""

    name: str
    creator: str
    source: str
    license: str


def make_generator(seed: int, name: str) -> np.random.Generator:
    """Return a generator of its own for each name, so that a new noun changes no other noun's views."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def check_license(name: str, text: str) -> str:
    """Return the license of a file as a short name.

    Raises:
        ValueError: The license is neither public domain, CC0, CC-BY nor MIT.
    """
    words = text.upper().replace(" ", "-")
    found = re.search(r"(?:CC-BY|ATTRIBUTION)-?(\d\.\d)", words)
    if any(word in words for word in ("-SA", "SHARE", "-NC", "-ND", "GPL", "GFDL", "FDL")):
        found = None
    elif "PUBLIC-DOMAIN" in words:
        return "public domain"
    elif words.startswith("CC0"):
        return "CC0-1.0"
    elif words == "MIT":
        return "MIT"
    if not found:
        raise ValueError(f"{name!r} has the license {text!r}; the bank takes public domain, CC0, CC-BY and MIT only.")
    return f"CC-BY-{found[1]}"


def encode_webp(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=6, **options)
    return buffer.getvalue()


def encode_view(rgba: np.ndarray, depth: np.ndarray | None) -> tuple[bytes, bytes | None]:
    """Crop a view to what can be seen of it and encode it as WebP.

    Args:
        rgba: uint8 (height, width, 4).
        depth: Distances of the same height and width, infinite outside the object; None for emoji.
    """
    rows, columns = np.flatnonzero(rgba[..., 3].any(1)), np.flatnonzero(rgba[..., 3].any(0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = encode_webp(Image.fromarray(rgba[window]), quality=80, alpha_quality=80)
    if depth is None:
        return image, None
    depth = depth[window]
    inside = np.isfinite(depth)
    near, far = depth[inside].min(), depth[inside].max()
    nearness = (far - np.where(inside, depth, far)) / max(far - near, 1e-9)
    # 64 levels, which compress far better than 256 and differ by less than a noun's parts do.
    gray = np.where(inside, 3 + 4 * np.round(nearness * 63), 0)
    return image, encode_webp(Image.fromarray(gray.astype(np.uint8)), lossless=True)


def render_views(mesh: Mesh, noun: Noun, count: int, generator: np.random.Generator) -> list[dict]:
    """Render views of a model from all yaws that the noun allows, each a little different in pitch and light."""
    rows = []
    for index in range(count):
        # One view in each of `count` equal steps of yaw, half of them on either side of the front.
        step = 2 * (index + generator.uniform()) / count - 1
        yaw = np.sign(step) * (noun.skip + (noun.turn - noun.skip) * abs(step))
        pitch = generator.uniform(noun.lowest, noun.lowest + 0.3)
        azimuth, height = generator.uniform(-1.1, 1.1), generator.uniform(0.6, 1.1)
        light = (np.sin(azimuth) * np.cos(height), np.sin(height), -np.cos(azimuth) * np.cos(height))
        image, depth = encode_view(*render(mesh, yaw, pitch, VIEW_SIZE, light))
        rows.append({"yaw": yaw, "pitch": pitch, "image": image, "depth": depth})
    return rows


def build_models(library: Path, nouns: dict[str, Noun], seed: int) -> tuple[list[dict], list[Credit]]:
    """Render every model of the table.

    A noun with at least three models gives one to the split `test-model`; of every other model two views are
    `test-view`.
    """
    by_id = {}
    for prefix in {model.partition(":")[0] for noun in nouns.values() for model in noun.models.split()}:
        catalog = FurnitureCatalog(library / f"{LIBRARIES[prefix]}.sh3f")
        by_id |= {f"{prefix}:{key.split('#')[-1]}": (catalog, key) for key in catalog.entries}
    rows, credits = [], []
    for word, noun in nouns.items():
        models = noun.models.split()
        test_model = make_generator(seed, word).choice(models) if len(models) >= 3 else None
        for model in models:
            if model not in by_id:
                raise ValueError(f"`models` of {word!r} in nouns.csv names {model!r}, which the packages lack.")
            catalog, key = by_id[model]
            generator = make_generator(seed, model)
            # A noun of one model needs more views of it than one of ten.
            count = {1: 24, 2: 20}.get(len(models), 16)
            views = render_views(catalog.load_mesh(key), noun, count, generator)
            held_out = set(generator.choice(count, 2, replace=False))
            for index, view in enumerate(views):
                split = "test-model" if model == test_model else "test-view" if index in held_out else "train"
                rows.append({"id": f"{model}#{index}", "noun": word, "model": model, "kind": "model", "split": split})
                rows[-1].update(view)
            creator = catalog.entries[key].get("creator", "unknown")
            source = f"{FURNITURE}, {catalog.path.name}, {catalog.entries[key]['model'].lstrip('/')}"
            terms = "CC0" if LIBRARIES[model.split(":")[0]] == "BlendSwap-CC-0" else catalog.license
            credits.append(Credit(f"model {model} ({word})", creator, source, check_license(model, terms)))
        print(f"{word}: {len(models)} models", file=sys.stderr, flush=True)
    return rows, credits


def build_emoji(package: Path, nouns: dict[str, Noun]) -> tuple[list[dict], list[Credit]]:
    """Read every emoji of the table, one view each, always for training."""
    files = read_tgz(package)
    terms = json.loads(files["package/package.json"])["license"]
    rows, credits = [], []
    for word, noun in nouns.items():
        for code in noun.emoji.split():
            name = f"package/assets/{code}.webp"
            if name not in files:
                raise ValueError(f"`emoji` of {word!r} in nouns.csv names {code!r}, but {package} has no {name}.")
            image = Image.open(io.BytesIO(files[name])).convert("RGBA")
            image = image.crop(image.getchannel("A").getbbox())
            image.thumbnail((VIEW_SIZE, VIEW_SIZE), Image.Resampling.LANCZOS)
            encoded, _ = encode_view(np.asarray(image), None)
            model = f"emoji:{code}"
            rows.append({"id": f"{model}#0", "noun": word, "model": model, "kind": "emoji", "yaw": 0.0, "pitch": 0.0,
                         "split": "train", "image": encoded, "depth": None})  # fmt: skip
            creator, source = "Copyright Microsoft Corporation and LobeHub", f"{EMOJI}, {name}"
            credits.append(Credit(f"emoji {code} ({word})", creator, source, check_license(model, terms)))
    return rows, credits


def read_credit(files: dict[str, bytes], name: str) -> tuple[str, str, str]:
    """Return creator, license and source URL of a file from the README in its folder or a folder above.

    A README consists of paragraphs; one that names the file must name its license and its URL as well.

    Raises:
        ValueError: No README names the file together with a license and a URL.
    """
    for folder in PurePosixPath(name).parents:
        if f"{folder}/README" not in files:
            continue
        for paragraph in re.split(r"\n\s*\n", files[f"{folder}/README"].decode()):
            url = re.search(r"https?://\S+", paragraph)
            terms = re.search(r"^Licen[cs]e:\s*(.+)$", paragraph, re.M)
            creator = re.search(r"^Copyright:\s*(.+)$", paragraph, re.M)
            listed = re.sub(r"https?://\S+", "", paragraph).split()
            if url and terms and str(PurePosixPath(name).relative_to(folder)) in listed:
                return creator[1].strip() if creator else "unknown", terms[1].strip(), url[0]
    raise ValueError(f"No README names {name!r} together with a license and a URL; remove it from photographs.csv.")


def build_photographs(packages: Path, table: Path, unpacked: Path, seed: int) -> tuple[list[dict], list[Credit]]:
    """Read the photographs of the table, sized so that the shorter side has at most 352 pixels.

    A tenth of each kind is held out as `test`.
    """
    with open(table, newline="") as file:
        entries = list(csv.DictReader(file))
    roots, resources = {}, {}
    rows, credits = [], []
    for entry in entries:
        package, path = entry["package"], entry["path"]
        if package not in roots:
            roots[package] = unpack_deb(find_package(packages, package, "deb"), unpacked / package)
        if package == README_PACKAGE:
            activity = path.split("/")[0]
            if activity not in resources:
                folder = roots[package] / "usr/share/gcompris-qt/rcc"
                resources[activity] = read_rcc(folder / f"{activity}.rcc")
            name = f"gcompris/src/activities/{path}"
            content = resources[activity].get(name)
            creator, terms, url = read_credit(resources[activity], name) if content else ("", "", "")
        else:
            file = roots[package] / path
            content = file.read_bytes() if file.is_file() else None
            creator, terms, url = entry["creator"], entry["license"], entry["source"]
        if content is None:
            raise ValueError(f"photographs.csv names `{path}`, but the package {package} has no such file.")
        image = Image.open(io.BytesIO(content)).convert("RGB")
        if min(image.size) > PHOTOGRAPH_SIDE:
            scale = PHOTOGRAPH_SIDE / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        rows.append({"id": f"{package}/{path}", "image": encode_webp(image, quality=80), "kind": entry["kind"],
                     "ground": float(entry["ground"]), "split": "train"})  # fmt: skip
        credits.append(Credit(f"photograph {path}", creator, f"{package}, {url}", check_license(path, terms)))
    for kind in ("place", "other"):
        chosen = [row for row in rows if row["kind"] == kind]
        order = make_generator(seed, f"photographs {kind}").permutation(len(chosen))
        for index in order[: round(len(chosen) / 10)]:
            chosen[index]["split"] = "test"
    return rows, credits


def write_table(path: Path, rows: list[dict], columns: dict[str, pa.DataType]) -> None:
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in columns.items()})
    # The images are compressed already.
    pq.write_table(table, path, compression="none", row_group_size=ROW_GROUP, use_dictionary=False)


def write_attribution(path: Path, credits: list[Credit]) -> None:
    clean = str.maketrans({"|": "/", "\n": " "})
    lines = [f"| {' | '.join(text.translate(clean) for text in credit)} |" for credit in credits]
    path.write_text("\n".join([ATTRIBUTION, *lines]) + "\n" + LICENSE_TEXTS, encoding="utf-8")


def build_bank(
    packages: Path, output: Path, seed: int = 0, nouns: dict[str, Noun] = NOUNS, photographs: Path = PHOTOGRAPHS
) -> None:
    """Build the bank, in place of what was at `output`.

    Args:
        packages: Folder of packages; missing ones are downloaded there.
        output: Folder of the bank.
        seed: Seed of views and splits, *defaults to* 0.
        nouns: Table of nouns.
        photographs: Table of photographs, CSV.

    Raises:
        FileNotFoundError: A package is missing and cannot be downloaded.
        ValueError: A table names something that its package lacks, or whose license is not free.
    """
    with atomic_path(output) as bank, tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary)
        bank.mkdir()
        objects, credits = [], []
        if any(noun.models for noun in nouns.values()):
            root = unpack_deb(find_package(packages, FURNITURE, "deb"), unpacked / FURNITURE)
            objects, credits = build_models(root / "usr/share/sweethome3d/furniture", nouns, seed)
        if any(noun.emoji for noun in nouns.values()):
            more, more_credits = build_emoji(find_package(packages, EMOJI, "npm"), nouns)
            objects, credits = objects + more, credits + more_credits
        images, image_credits = build_photographs(packages, photographs, unpacked, seed)
        write_table(bank / "objects.parquet", objects, OBJECT_COLUMNS)
        write_table(bank / "photographs.parquet", images, PHOTOGRAPH_COLUMNS)
        write_attribution(bank / "ATTRIBUTION.md", credits + image_credits)
        pairs = [[color, word] for word, noun in nouns.items() if noun.recolor for color in COLORS]
        order = make_generator(seed, "color-noun pairs").permutation(len(pairs))
        description = {
            "version": 1,
            "seed": seed,
            "view_size": VIEW_SIZE,
            "nouns": {
                word: {
                    "synonyms": [synonym for synonym in noun.synonyms.split(",") if synonym],
                    "article": choose_article(word),
                    "size": noun.size,
                    "recolor": noun.recolor,
                }
                for word, noun in nouns.items()
            },
            "colors": list(COLORS),
            "held_out_pairs": sorted(pairs[index] for index in order[: round(len(pairs) / 10)]),
        }
        (bank / "bank.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


def draw_sheet(bank: Path, path: Path, views: int = 8, cell: int = 84) -> None:
    """Draw a contact sheet of the bank: a row of views a noun, models in turn, three nouns side by side."""
    rows = pq.read_table(Path(bank) / "objects.parquet", columns=["noun", "model", "image"]).to_pylist()
    by_noun: dict[str, dict[str, list[bytes]]] = {}
    for row in rows:
        by_noun.setdefault(row["noun"], {}).setdefault(row["model"], []).append(row["image"])
    width = cell * (views + 1)
    sheet = Image.new("RGB", (3 * width, -(-len(by_noun) // 3) * cell), (205, 210, 200))
    draw = ImageDraw.Draw(sheet)
    for index, (noun, models) in enumerate(by_noun.items()):
        left, top = index % 3 * width, index // 3 * cell
        draw.text((left + 3, top + 3), noun.replace(" ", "\n"), fill="black")
        lists = list(models.values())
        for view in range(min(views, sum(map(len, lists)))):
            images = lists[view % len(lists)]
            step = max(1, len(images) * len(lists) // views)
            image = Image.open(io.BytesIO(images[view // len(lists) * step % len(images)]))
            image.thumbnail((cell - 2, cell - 2))
            sheet.paste(image, (left + (view + 1) * cell, top), image.convert("RGBA"))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, default=Path("packages"), help="folder of packages, filled if need be")
    parser.add_argument("--output", type=Path, default=Path("bank"), help="folder of the bank; an old one is replaced")
    parser.add_argument("--seed", type=int, default=0, help="seed of views and splits")
    parser.add_argument("--nouns", nargs="+", default=NOUNS, choices=NOUNS, metavar="NOUN", help="these nouns only")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this file")
    arguments = parser.parse_args()
    build_bank(arguments.packages, arguments.output, arguments.seed, {word: NOUNS[word] for word in arguments.nouns})
    if arguments.sheet:
        draw_sheet(arguments.output, arguments.sheet)
    for file in sorted(arguments.output.iterdir()):
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
