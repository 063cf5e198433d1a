"""A small z-buffer renderer: textured triangles, transparent materials, sky light and sun, exact mask and depth."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numba import njit


@dataclass
class Material:
    """How a surface looks.

    Args:
        color: Diffuse red, green and blue in 0..1, used where there is no texture.
        alpha: Opacity in 0..1.
        texture: Float array (height, width, 4) of RGBA in 0..1, or None.
    """

    color: tuple[float, float, float] = (0.7, 0.7, 0.7)
    alpha: float = 1.0
    texture: np.ndarray | None = None


@dataclass
class Mesh:
    """Triangles with their materials; y points up, and the model's front looks along +z.

    Args:
        positions: Float array (triangles, 3, 3).
        coordinates: Texture coordinates, (triangles, 3, 2); v points up, values outside 0..1 repeat the texture.
        normals: (triangles, 3, 3); a zero normal stands for the triangle's own.
        material_index: Integer array (triangles,).
        materials: The materials that the index points into.
    """

    positions: np.ndarray
    coordinates: np.ndarray
    normals: np.ndarray
    material_index: np.ndarray
    materials: list[Material] = field(default_factory=list)

    def transform(self, matrix: np.ndarray) -> "Mesh":
        """Return the mesh with every point multiplied by a 3×3 matrix."""
        return replace(self, positions=self.positions @ matrix.T, normals=self.normals @ np.linalg.inv(matrix))


@njit(cache=True)
def _draw(points, camera, coordinates, normals, material_index, colors, alphas, texels, offsets, heights, widths,
          light, blend, nearest, depth, image, opacity):  # fmt: skip
    """Draw triangles into the buffers; `blend` draws over what is there and leaves `nearest` as it is."""
    height, width = nearest.shape
    for triangle in range(points.shape[0]):
        x0, y0 = points[triangle, 0]
        x1, y1 = points[triangle, 1]
        x2, y2 = points[triangle, 2]
        area = (y1 - y2) * (x0 - x2) + (x2 - x1) * (y0 - y2)
        if abs(area) < 1e-12:
            continue
        material = material_index[triangle]
        left, right = max(0, math.floor(min(x0, x1, x2))), min(width - 1, math.ceil(max(x0, x1, x2)))
        top, bottom = max(0, math.floor(min(y0, y1, y2))), min(height - 1, math.ceil(max(y0, y1, y2)))
        for row in range(top, bottom + 1):
            for column in range(left, right + 1):
                w0 = ((y1 - y2) * (column + 0.5 - x2) + (x2 - x1) * (row + 0.5 - y2)) / area
                w1 = ((y2 - y0) * (column + 0.5 - x2) + (x0 - x2) * (row + 0.5 - y2)) / area
                w2 = 1 - w0 - w1
                if w0 < 0 or w1 < 0 or w2 < 0:
                    continue
                # Weights on the screen become weights on the surface: what is farther changes faster.
                w0 /= camera[triangle, 0, 2]
                w1 /= camera[triangle, 1, 2]
                w2 /= camera[triangle, 2, 2]
                z = 1 / (w0 + w1 + w2)
                if z >= nearest[row, column]:
                    continue
                w0, w1, w2 = w0 * z, w1 * z, w2 * z
                red, green, blue = colors[material]
                if heights[material] > 0:
                    rows, columns = heights[material], widths[material]
                    u = w0 * coordinates[triangle, 0, 0] + w1 * coordinates[triangle, 1, 0] + w2 * coordinates[triangle, 2, 0]  # fmt: skip  # noqa: E501
                    v = w0 * coordinates[triangle, 0, 1] + w1 * coordinates[triangle, 1, 1] + w2 * coordinates[triangle, 2, 1]  # fmt: skip  # noqa: E501
                    texel_x = min(columns - 1, int((u - math.floor(u)) * columns))
                    texel_y = min(rows - 1, int((1 - (v - math.floor(v))) * rows))
                    texel = offsets[material] + texel_y * columns + texel_x
                    if texels[texel, 3] < 0.5:
                        continue
                    red, green, blue = texels[texel, 0], texels[texel, 1], texels[texel, 2]
                # All vectors in camera axes: x right, y up, z away from the camera.
                nx = w0 * normals[triangle, 0, 0] + w1 * normals[triangle, 1, 0] + w2 * normals[triangle, 2, 0]
                ny = w0 * normals[triangle, 0, 1] + w1 * normals[triangle, 1, 1] + w2 * normals[triangle, 2, 1]
                nz = w0 * normals[triangle, 0, 2] + w1 * normals[triangle, 1, 2] + w2 * normals[triangle, 2, 2]
                vx = -(w0 * camera[triangle, 0, 0] + w1 * camera[triangle, 1, 0] + w2 * camera[triangle, 2, 0])
                vy = -(w0 * camera[triangle, 0, 1] + w1 * camera[triangle, 1, 1] + w2 * camera[triangle, 2, 1])
                vz = -z
                length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12
                distance = math.sqrt(vx * vx + vy * vy + vz * vz)
                facing = (nx * vx + ny * vy + nz * vz) / (length * distance)
                if facing < 0:  # The back of a surface is lit like a front.
                    length, facing = -length, -facing
                nx, ny, nz = nx / length, ny / length, nz / length
                sun = max(0.0, nx * light[0] + ny * light[1] + nz * light[2])
                shade = 0.62 + 0.2 * ny + 0.42 * sun
                hx, hy, hz = light[0] + vx / distance, light[1] + vy / distance, light[2] + vz / distance
                gleam = max(0.0, (nx * hx + ny * hy + nz * hz) / math.sqrt(hx * hx + hy * hy + hz * hz))
                # What every surface reflects, whatever its color, so that black things keep their shape.
                reflection = 0.045 + 0.04 * ny + 0.1 * gleam**24 + 0.08 * (1 - facing) ** 3
                alpha = alphas[material]
                if blend:
                    red = image[row, column, 0] * (1 - alpha) + (red * shade + reflection) * alpha
                    green = image[row, column, 1] * (1 - alpha) + (green * shade + reflection) * alpha
                    blue = image[row, column, 2] * (1 - alpha) + (blue * shade + reflection) * alpha
                    image[row, column, 0], image[row, column, 1], image[row, column, 2] = red, green, blue
                    opacity[row, column] += alpha * (1 - opacity[row, column])
                else:
                    nearest[row, column] = z
                    image[row, column, 0] = red * shade + reflection
                    image[row, column, 1] = green * shade + reflection
                    image[row, column, 2] = blue * shade + reflection
                    opacity[row, column] = 1
                depth[row, column] = min(depth[row, column], z)


def render(
    mesh: Mesh,
    yaw: float,
    pitch: float,
    size: int,
    light: tuple[float, float, float] = (-0.4, 0.7, -0.6),
    supersample: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Render a mesh so that it fills a square image of `size` pixels.

    The camera looks at the middle of the mesh from 3.5 times the radius of its bounding box.

    Args:
        mesh: The model.
        yaw: Turn of the model about its upright axis in radians; 0 shows its front.
        pitch: Height of the camera above the horizon in radians.
        size: Width and height of the image in pixels.
        light: Direction towards the sun in camera axes: x right, y up, z away from the camera.
        supersample: Samples a pixel along each axis, *defaults to* 2.

    Returns:
        RGBA image, uint8 (size, size, 4), and depth, float64 (size, size): the nearest distance along the viewing
        axis in units of the mesh, infinite where the mesh is not.
    """
    points = mesh.positions.reshape(-1, 3)
    low, high = points.min(0), points.max(0)
    turn = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    tilt = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    to_camera = np.diag([1.0, 1.0, -1.0]) @ tilt @ turn
    camera = (mesh.positions - (low + high) / 2) @ to_camera.T
    camera[..., 2] += 3.5 * np.linalg.norm(high - low) / 2
    flat = camera[..., :2] / camera[..., 2:]
    left_bottom, right_top = flat.min((0, 1)), flat.max((0, 1))
    side = size * supersample
    scale = (side - supersample) / max(*(right_top - left_bottom), 1e-12)
    on_screen = (flat - (left_bottom + right_top) / 2) * np.array([scale, -scale]) + side / 2

    face = np.cross(camera[:, 1] - camera[:, 0], camera[:, 2] - camera[:, 0])[:, None]
    normals = mesh.normals @ to_camera.T
    normals = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    normals = np.where(np.abs(normals).sum(-1, keepdims=True) > 0.5, normals, face)

    textures = [material.texture for material in mesh.materials]
    heights = np.array([0 if texture is None else texture.shape[0] for texture in textures])
    widths = np.array([0 if texture is None else texture.shape[1] for texture in textures])
    offsets = np.concatenate([[0], np.cumsum(heights * widths)])
    empty = np.zeros((1, 4), np.float32)
    texels = np.concatenate([texture.reshape(-1, 4) for texture in textures if texture is not None] + [empty])
    colors = np.array([material.color for material in mesh.materials], np.float64)
    alphas = np.array([material.alpha for material in mesh.materials], np.float64)

    nearest, depth = np.full((side, side), np.inf), np.full((side, side), np.inf)
    image, opacity = np.zeros((side, side, 3)), np.zeros((side, side))
    direction = np.array(light, np.float64) / np.linalg.norm(light)
    opaque = alphas[mesh.material_index] > 0.99
    # Transparent triangles are laid over the opaque ones, the farthest first.
    behind = np.flatnonzero(~opaque)
    behind = behind[np.argsort(-camera[behind, :, 2].mean(1), kind="stable")]
    for chosen, blend in ((np.flatnonzero(opaque), False), (behind, True)):
        _draw(on_screen[chosen], camera[chosen], mesh.coordinates[chosen], normals[chosen], mesh.material_index[chosen],
              colors, alphas, texels, offsets, heights, widths, direction, blend, nearest, depth, image,
              opacity)  # fmt: skip

    def average(array: np.ndarray) -> np.ndarray:
        return array.reshape(size, supersample, size, supersample, *array.shape[2:]).mean((1, 3))

    # `image` is already weighted by opacity: where nothing was drawn it is black.
    alpha = average(opacity)
    rgb = average(np.clip(image, 0, 1)) / np.maximum(alpha, 1e-9)[..., None]
    rgba = np.dstack([np.clip(rgb, 0, 1), alpha])
    depth = depth.reshape(size, supersample, size, supersample).min((1, 3))
    return (rgba * 255 + 0.5).astype(np.uint8), depth
