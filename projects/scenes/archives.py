"""Readers of what the bank is built from: Debian and npm packages, Qt resources, furniture catalogs."""

import io
import itertools
import re
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from renderer import Material, Mesh


# A texture is read at no more than this many pixels a side: a view of 144 pixels shows no finer ones.
MAX_TEXTURE_SIDE = 512


def unpack_deb(path: Path, folder: Path) -> Path:
    """Unpack the files of a Debian package into `folder` and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "-x", str(path), str(folder)], check=True)
    return folder


def read_tgz(path: Path) -> dict[str, bytes]:
    """Read the regular files of an npm package: path inside the package → bytes."""
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}


def read_rcc(path: Path) -> dict[str, bytes]:
    """Read the files of a Qt binary resource, plain or zlib-compressed: path inside the resource → bytes.

    Source: the format that Qt's `rcc` tool writes, versions 1 to 3.

    Raises:
        ValueError: A file in it is compressed by Zstandard.
    """
    data = Path(path).read_bytes()
    version, tree, payload, names = struct.unpack_from(">4I", data, 4)
    node_size = 14 if version < 2 else 22  # From version 2 on a node ends with a time.
    files = {}

    def read_name(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        start = names + offset + 6  # After the length comes a hash.
        return data[start : start + 2 * length].decode("utf-16-be")

    def read_node(index: int, folder: PurePosixPath) -> None:
        start = tree + index * node_size
        name_offset, flags = struct.unpack_from(">IH", data, start)
        node = folder / read_name(name_offset) if index else folder
        if flags & 2:
            count, first = struct.unpack_from(">II", data, start + 6)
            for child in range(first, first + count):
                read_node(child, node)
            return
        (offset,) = struct.unpack_from(">I", data, start + 10)
        (length,) = struct.unpack_from(">I", data, payload + offset)
        content = data[payload + offset + 4 : payload + offset + 4 + length]
        if flags & 4:
            raise ValueError(f"`{node}` in `{path}` is compressed by Zstandard, which this reader does not read.")
        files[str(node)] = zlib.decompress(content[4:]) if flags & 1 else content

    read_node(0, PurePosixPath())
    return files


class FurnitureCatalog:
    """A Sweet Home 3D furniture library (`.sh3f`): a zip of OBJ models with a properties file.

    Attributes:
        license: The library's license, as its properties name it.
        entries: Catalog id, for instance `"Scopia#cat"` → its properties (`name`, `creator`, `model`, `width`, …).
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.archive = zipfile.ZipFile(path)
        self.names = {name.lower(): name for name in self.archive.namelist()}
        text = self.archive.read("PluginFurnitureCatalog.properties").decode("latin1")
        self.license = "".join(re.findall(r"^license\s*=\s*(.+)$", text, re.M)).strip()
        numbered: dict[str, dict[str, str]] = {}
        for key, number, value in re.findall(r"^(\w+)#(\d+)\s*=\s*(.*)$", text, re.M):
            numbered.setdefault(number, {})[key] = value.strip()
        self.entries = {entry["id"]: entry for entry in numbered.values() if "id" in entry}

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, whatever the case of its name, or None where there is no such file."""
        stored = self.names.get(name.lower())
        return None if stored is None else self.archive.read(stored)

    def load_mesh(self, model_id: str) -> Mesh:
        """Load a model, turned by its `modelRotation` and scaled to the catalog's width, height and depth."""
        entry = self.entries[model_id]
        mesh = read_obj(entry["model"].lstrip("/"), self.read)
        if "modelRotation" in entry:
            mesh = mesh.transform(np.array(entry["modelRotation"].split(), float).reshape(3, 3))
        extent = np.ptp(mesh.positions.reshape(-1, 3), axis=0)
        size = np.array([float(entry[key]) for key in ("width", "height", "depth")])
        return mesh.transform(np.diag(size / np.maximum(extent, 1e-9)))


def read_mtl(text: str, folder: PurePosixPath, read) -> dict[str, Material]:
    """Read the materials of an MTL file: diffuse color, opacity and diffuse texture."""
    materials: dict[str, Material] = {}
    material = None
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        key, value = key.lower(), value.strip()
        if key == "newmtl":
            material = materials[value] = Material()
        elif material is None:
            continue
        elif key == "kd":
            material.color = tuple(float(number) for number in value.split()[:3])
        elif key == "d":
            material.alpha = float(value.split()[-1])
        elif key == "map_kd" and (content := read(str(folder / value.replace("\\", "/")))) is not None:
            image = Image.open(io.BytesIO(content)).convert("RGBA")
            image.thumbnail((MAX_TEXTURE_SIDE, MAX_TEXTURE_SIDE), Image.Resampling.BOX)
            material.texture = np.asarray(image, np.float32) / 255
    return materials


def read_obj(name: str, read) -> Mesh:
    """Read an OBJ model with its materials; polygons are cut into triangle fans.

    Args:
        name: Path of the OBJ file.
        read: Function from a path to bytes, or to None where there is no such file.
    """
    folder = PurePosixPath(name).parent
    tables: dict[str, list[list[float]]] = {"v": [], "vt": [[0.0, 0.0]], "vn": [[0.0, 0.0, 0.0]]}
    materials, names, current = {}, [], ""
    corners, triangle_materials = [], []

    def resolve(word: str) -> tuple[int, int, int]:
        # Indices count from 1, negative ones from the end. Row 0 of `vt` and `vn` stands for "none".
        numbers = [int(part) if part else 0 for part in word.split("/")] + [0, 0]
        position, texture, normal = numbers[:3]
        return (
            position - 1 if position > 0 else len(tables["v"]) + position,
            texture if texture >= 0 else len(tables["vt"]) + texture,
            normal if normal >= 0 else len(tables["vn"]) + normal,
        )

    for line in read(name).decode("latin1").splitlines():
        key, _, value = line.strip().partition(" ")
        if key in tables:
            tables[key].append([float(number) for number in value.split()[: 2 if key == "vt" else 3]])
        elif key == "f":
            polygon = [resolve(word) for word in value.split()]
            if current not in names:
                names.append(current)
            for second, third in itertools.pairwise(polygon[1:]):
                corners.append((polygon[0], second, third))
                triangle_materials.append(names.index(current))
        elif key == "usemtl":
            current = value.strip()
        elif key == "mtllib":
            content = read(str(folder / value.strip()))
            if content is not None:
                materials.update(read_mtl(content.decode("latin1"), folder, read))
    index = np.array(corners)
    positions, coordinates, normals = (
        np.array(tables[key])[index[..., column]] for column, key in enumerate(("v", "vt", "vn"))
    )
    return Mesh(
        positions, coordinates, normals, np.array(triangle_materials), [materials.get(n, Material()) for n in names]
    )
