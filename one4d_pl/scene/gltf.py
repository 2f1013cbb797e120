"""glTF 2.0 binary files: points and cameras of every frame, and an animation that plays them.

The root turns OpenCV's world (y down, z forward) into glTF's (y up, z back), so that positions are
stored as they are. A viewer that plays no animations shows all frames at once.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from one4d_pl.scene.point_cloud import EDGES

POINTS, LINES = 0, 1  # primitive modes
FLOAT, USHORT = 5126, 5123  # component types
UPRIGHT = [1.0, 0.0, 0.0, 0.0]  # x y z w: half a turn about x
CAMERA_COLOUR = [0.9, 0.35, 0.1, 1.0]

_SRGB = np.arange(256) / 255
# Vertex colours are linear light in glTF (3.7.2.1), frames are sRGB (IEC 61966-2-1). Only 16 bits
# keep all 256 values apart.
LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4)
LINEAR = (LINEAR * 65535).round().astype("<u2")


class _Buffer:
    """The binary chunk while it grows, and the accessors into it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.views: list[dict[str, object]] = []
        self.accessors: list[dict[str, object]] = []

    def add(self, values: NDArray[np.float32] | NDArray[np.uint16], kind: str, bounds: bool, normalised: bool) -> int:
        """Append an array and return its accessor.

        Every element has a multiple of four bytes, so all arrays stay aligned.
        """
        content = values.tobytes()
        self.views.append({"buffer": 0, "byteOffset": self.size, "byteLength": len(content)})
        accessor: dict[str, object] = {
            "bufferView": len(self.views) - 1,
            "componentType": USHORT if values.dtype == np.uint16 else FLOAT,
            "count": len(values),
            "type": kind,
        }
        if bounds:
            accessor |= {"min": np.atleast_1d(values.min(0)).tolist(), "max": np.atleast_1d(values.max(0)).tolist()}
        if normalised:
            accessor["normalized"] = True
        self.accessors.append(accessor)
        self.parts.append(content)
        self.size += len(content)
        return len(self.accessors) - 1


def glb_bytes(
    clouds: list[tuple[Tensor, Tensor]],  # per frame: [N, 3] float32 world, [N, 3] uint8; N may be 0
    frusta: Tensor,  # [T, 5, 3] float32 world: centre and image corners
    fps: float,
) -> bytes:
    """Build a .glb file of nodes frame_000000 ... (points, animated), camera_000000 ... (lines)."""
    buffer = _Buffer()
    nodes: list[dict[str, object]] = [{"name": "world", "rotation": UPRIGHT, "children": []}]
    meshes: list[dict[str, object]] = []
    played: list[tuple[int, int]] = []  # frame, node
    for i, (points, colours) in enumerate(clouds):
        if len(points) == 0:  # an empty accessor is not allowed
            continue
        rgba = np.pad(LINEAR[colours.numpy()], ((0, 0), (0, 1)), constant_values=65535)
        attributes = {
            "POSITION": buffer.add(points.numpy().astype("<f4"), "VEC3", bounds=True, normalised=False),
            "COLOR_0": buffer.add(rgba, "VEC4", bounds=False, normalised=True),
        }
        meshes.append({"primitives": [{"attributes": attributes, "mode": POINTS, "material": 0}]})
        played.append((i, len(nodes)))
        nodes.append({"name": f"frame_{i:06d}", "mesh": len(meshes) - 1})
    for i, frustum in enumerate(frusta.numpy().astype("<f4")):
        lines = buffer.add(frustum[list(EDGES)], "VEC3", bounds=True, normalised=False)
        meshes.append({"primitives": [{"attributes": {"POSITION": lines}, "mode": LINES, "material": 1}]})
        nodes.append({"name": f"camera_{i:06d}", "mesh": len(meshes) - 1})
    nodes[0]["children"] = list(range(1, len(nodes)))
    document: dict[str, object] = {
        "asset": {"version": "2.0", "generator": "one4d_pl"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": nodes,
        "meshes": meshes,
        "materials": [_unlit([1.0, 1.0, 1.0, 1.0]), _unlit(CAMERA_COLOUR)],
    }
    if len(clouds) > 1 and played:
        document["animations"] = [_animation(buffer, played, len(clouds), fps)]
    document |= {"accessors": buffer.accessors, "bufferViews": buffer.views, "buffers": [{"byteLength": buffer.size}]}
    return _container(json.dumps(document, separators=(",", ":")).encode(), b"".join(buffer.parts))


def _unlit(colour: list[float]) -> dict[str, object]:
    return {"pbrMetallicRoughness": {"baseColorFactor": colour}, "extensions": {"KHR_materials_unlit": {}}}


def _animation(buffer: _Buffer, played: list[tuple[int, int]], num_frames: int, fps: float) -> dict[str, object]:
    """Animate the clouds' size: 1 while their frame lasts, 0 otherwise."""
    samplers, channels = [], []
    times = buffer.add((np.arange(num_frames + 1) / fps).astype("<f4"), "SCALAR", bounds=True, normalised=False)
    for frame, node in played:
        size = np.zeros((num_frames + 1, 3), "<f4")
        size[frame] = 1
        if frame == num_frames - 1:
            size[num_frames] = 1  # the last picture stays
        scale = buffer.add(size, "VEC3", bounds=False, normalised=False)
        samplers.append({"input": times, "output": scale, "interpolation": "STEP"})
        channels.append({"sampler": len(samplers) - 1, "target": {"node": node, "path": "scale"}})
    return {"name": "time", "samplers": samplers, "channels": channels}


def _container(document: bytes, binary: bytes) -> bytes:
    document += b" " * (-len(document) % 4)
    chunks = len(document).to_bytes(4, "little") + b"JSON" + document
    chunks += len(binary).to_bytes(4, "little") + b"BIN\0" + binary  # a multiple of four already
    return b"glTF" + (2).to_bytes(4, "little") + (12 + len(chunks)).to_bytes(4, "little") + chunks
