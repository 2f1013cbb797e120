"""Toy scenes laid out in the raw format of each dataset: what the laws and the fuzz of the readers work on.

Each `write_<dataset>` returns the root to read. Wherever it can, a writer says in its own way what the reader says in
matrices (components moved one by one, angles from directions, scipy's quaternions), so that one slip is not made twice.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.spatial.transform import Rotation

from one4d_pl.toy.draw import build_scene
from one4d_pl.toy.render import Views, render
from one4d_pl.toy.things import moving_codes, solids_at, views_at

Array = np.ndarray
FPS = 12.0


@dataclass(frozen=True)
class Shot:
    """What a camera saw of a toy scene, in our conventions."""

    frames: Array  # [T, H, W, 3] uint8
    depth: Array  # [T, H, W] float64, +inf = sky
    intrinsics: Array  # [T, 3, 3]
    cam2world: Array  # [T, 4, 4]
    moving: Array  # [T, H, W] bool

    @property
    def world2cam(self) -> Array:
        return np.linalg.inv(self.cam2world)

    @property
    def size(self) -> tuple[int, int]:  # height, width
        return self.depth.shape[1], self.depth.shape[2]


def film(
    num_frames: int = 9,
    height: int = 48,
    width: int = 64,
    intrinsics: Array | None = None,  # [3, 3] of the enlarged picture; None = the scene's own
    enlarge: int = 1,  # every pixel becomes a block; odd, so that the block's centre is the pixel's
    seed: int = 2,  # has sky and things that move
) -> Shot:
    """A shot of a toy scene, exact at the centre of every block."""
    scene = build_scene(seed, "synthetic")
    times = np.arange(num_frames) / FPS
    views = views_at(scene.path, times, height, width)
    if intrinsics is not None:
        small = intrinsics * np.array([1 / enlarge, 1 / enlarge, 1])[:, None]
        views = Views(np.repeat(small[None], num_frames, axis=0), views.cam2world)
    solids = [solid for thing in scene.things for solid in solids_at(thing, times)]
    colour, depth, code = render(scene.room, solids, views, height, width)
    moving = moving_codes([solid for thing in scene.things for solid in solids_at(thing, times[:1])])[code]
    frames = (colour.clip(0, 1) * 255).round().astype(np.uint8)
    if enlarge > 1:
        frames, depth, moving = (a.repeat(enlarge, axis=1).repeat(enlarge, axis=2) for a in (frames, depth, moving))
    large = views.intrinsics * np.array([enlarge, enlarge, 1])[:, None]
    return Shot(frames, depth, large, views.cam2world, moving)


def save_exr(path: Path | io.BytesIO, channel: str, pixels: Array) -> None:
    import OpenEXR

    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {channel: np.ascontiguousarray(pixels)}).write(
        path if isinstance(path, io.BytesIO) else str(path)
    )


def save_video(path: Path, frames: Array, fps: int) -> None:  # [T, H, W, 3] uint8, nearly lossless
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_trajectory(folder: Path, frames: Array, depth: Array, rows: Array, first: int = 0) -> None:
    """TartanAir's folder: pictures and depth from number `first` on, and the rows of the camera file."""
    for name in ("image_left", "depth_left"):
        (folder / name).mkdir(parents=True)
    np.savetxt(folder / "pose_left.txt", rows, fmt="%.9e")
    for n, (frame, metres) in enumerate(zip(frames, depth, strict=True), start=first):
        picture = Image.fromarray(np.asarray(frame))
        picture.save(folder / "image_left" / f"{n:06d}_left.png", compress_level=1)
        np.save(folder / "depth_left" / f"{n:06d}_left_depth.npy", np.asarray(metres, np.float32))


def write_tartanair(root: Path, shot: Shot, first: int = 3) -> Path:
    """640x480; rows before `first` belong to frames that were not downloaded."""
    rows = [[9.0] * 3 + [0.0, 0, 0, 1]] * first
    for camera in shot.cam2world:
        x, y, z = camera[:3, 3]
        qx, qy, qz, qw = Rotation.from_matrix(camera[:3, :3]).as_quat()
        rows.append([z, x, y, qz, qx, qy, qw])  # forward, right, down
    depth = np.where(np.isinf(shot.depth), 10000, shot.depth)
    write_trajectory(root / "seaside" / "Easy" / "P000", shot.frames, depth, rows, first)
    return root


def write_omniworld(root: Path, shot: Shot) -> Path:
    """Two splits; the second one is the shot, the first is of other frames."""
    scene, total = root / "b04f88d1f85a", len(shot.frames)
    for name in ("color", "depth", "camera", "text"):
        (scene / name).mkdir(parents=True)
    numbers = [7 + t for t in range(total)]
    (scene / "split_info.json").write_text(
        json.dumps({"scene_name": "b04f88d1f85a", "split_num": 2, "split": [[0, 1], numbers]})
    )
    world2cam = shot.world2cam
    camera = {
        "focals": shot.intrinsics[:, 0, 0].tolist(),
        "cx": shot.intrinsics[0, 0, 2],
        "cy": shot.intrinsics[0, 1, 2],
        "quats": [[q[3], q[0], q[1], q[2]] for q in Rotation.from_matrix(world2cam[:, :3, :3]).as_quat()],
        "trans": world2cam[:, :3, 3].tolist(),
    }
    (scene / "camera" / "split_1.json").write_text(json.dumps(camera))
    (scene / "text" / "0_6.json").write_text(json.dumps({"Video_Caption": "another place"}))
    (scene / "text" / "7_87.json").write_text(
        json.dumps({"Short_Caption": "toys", "Video_Caption": "toys  move\nabout"})
    )
    (scene / "fps.txt").write_text("24.0\n")
    for n, frame, depth in zip(numbers, shot.frames, shot.depth):
        Image.fromarray(frame).save(scene / "color" / f"{n:06d}.png")
        near = 0.004 * np.where(np.isinf(depth), 1e9, depth)
        codes = np.where(np.isinf(depth), 65535, np.rint(65535 * 1000 * near / (1 + 999 * near)))
        Image.fromarray(codes.astype(np.uint16)).save(scene / "depth" / f"{n:06d}.png")
    return root


def unreal_angles(cam2world: Array) -> tuple[float, float, float]:  # yaw pitch roll in degrees, from directions
    right, _, forward = cam2world[:3, :3].T
    yaw = np.arctan2(forward[0], forward[2])  # how far right of straight ahead
    pitch = np.arcsin(-forward[1])  # up
    level = np.array([np.cos(yaw), 0, -np.sin(yaw)])  # to the right, without roll
    below = np.cross(forward, level)  # down, without roll
    return tuple(np.degrees([yaw, pitch, np.arctan2(right @ below, right @ level)]))  # clockwise


def write_bedlam(root: Path, shot: Shot, scene: str = "20221011_1_250_batch01hand", turned: bool = False) -> Path:
    """Images at 30 fps, depth for every fifth; those between are black. `turned`: pictures stored upright already."""
    name, total = "seq_000000", len(shot.frames)
    folders = {kind: root / scene / kind / name for kind in ("png", "depth")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (root / scene / "ground_truth" / "camera").mkdir(parents=True)
    lines = ["name,x,y,z,yaw,pitch,roll,focal_length,sensor_width,sensor_height,hfov"]
    for n in range(5 * total - 4):
        picture = shot.frames[n // 5] if n % 5 == 0 else np.zeros_like(shot.frames[0])
        Image.fromarray(np.rot90(picture, -1) if turned else picture).save(folders["png"] / f"{name}_{n:04d}.png")
        x, y, z = shot.cam2world[n // 5, :3, 3] if n % 5 == 0 else (9.0, 9, 9)
        yaw, pitch, roll = unreal_angles(shot.cam2world[n // 5])
        focal = shot.intrinsics[n // 5, 0, 0] / shot.size[1] * 36
        sensor_height = 36 * shot.size[0] / shot.size[1]
        place = ",".join(f"{v:.9f}" for v in (z * 100, x * 100, -y * 100, yaw, pitch, roll, focal))
        lines.append(f"{name}_{n:04d}.png,{place},36,{sensor_height:.9f},52")
    for t, depth in enumerate(shot.depth):
        centimetres = (np.where(np.isinf(depth), 1e6, depth * 100)).astype(np.float32)
        centimetres = np.rot90(centimetres, -1) if turned else centimetres
        save_exr(folders["depth"] / f"{name}_{5 * t:04d}_depth.exr", "Depth", centimetres)
    (root / scene / "ground_truth" / "camera" / f"{name}_camera.csv").write_text("\n".join(lines) + "\n")
    return root


def write_pointodyssey(root: Path, shot: Shot) -> Path:
    folder = root / "train" / "cab_h_bench_3rd"
    for name in ("rgbs", "depths"):
        (folder / name).mkdir(parents=True)
    for t, (frame, depth) in enumerate(zip(shot.frames, shot.depth)):
        Image.fromarray(frame).save(folder / "rgbs" / f"rgb_{t:05d}.jpg", quality=100, subsampling=0)
        codes = np.rint(np.minimum(depth, 1000) * 65535 / 1000).astype(np.uint16)
        Image.fromarray(codes).save(folder / "depths" / f"depth_{t:05d}.png")
    np.savez(
        folder / "anno.npz",
        intrinsics=shot.intrinsics.astype(np.float32),
        extrinsics=shot.world2cam.astype(np.float32),
        trajs_3d=np.zeros((len(shot.frames), 3, 3), np.float32),
    )
    return root


def write_spatialvid(root: Path, shot: Shot, indexes: bool = False, depth: bool = True) -> Path:
    """10 fps, so every second video frame is annotated (with `indexes`: every third); those between are black."""
    name, total = "group_0001/65612f9c-b702-5626-a4e9-5ddbea42149d", len(shot.frames)
    step = 3 if indexes else 2
    video = np.zeros((step * total, *shot.frames.shape[1:]), np.uint8)
    video[::step] = shot.frames
    save_video(root / "videos" / f"{name}.mp4", video, 10)
    annotation = root / "annotations" / name
    annotation.mkdir(parents=True)
    quaternions = Rotation.from_matrix(shot.world2cam[:, :3, :3]).as_quat()
    np.save(annotation / "poses.npy", np.concatenate([shot.world2cam[:, :3, 3], quaternions], 1).astype(np.float32))
    (height, width), k = shot.size, shot.intrinsics
    shares = [k[:, 0, 0] / width, k[:, 1, 1] / height, k[:, 0, 2] / width, k[:, 1, 2] / height]
    np.save(annotation / "intrinsics.npy", np.stack(shares, 1).astype(np.float32))
    if indexes:
        (annotation / "indexes.txt").write_text("".join(f"{t} {step * t}\n" for t in range(total)))
    caption = {"SceneSummary": "short", "SceneDescription": "Toys lie about.", "CameraMotion": "It turns."}
    (annotation / "caption.json").write_text(json.dumps({**caption, "MotionTrends": ["forward"]}))
    masks: dict[str, Array] = {"shape": np.array(shot.size)}
    for t, moving in enumerate(shot.moving):
        sparse = csr_matrix(moving.astype(np.uint8))
        masks |= {f"f_{t}_data": sparse.data, f"f_{t}_indices": sparse.indices, f"f_{t}_indptr": sparse.indptr}
    np.savez(annotation / "dyn_masks.npz", **masks)
    if depth:
        (root / "depths" / "group_0001").mkdir(parents=True)
        with zipfile.ZipFile(root / "depths" / f"{name}.zip", "w") as archive:
            for t in range(total):  # from 5 on, not padded: 10 comes behind 9
                content = io.BytesIO()
                save_exr(content, "Z", (1 / shot.depth[t]).astype(np.float16))
                archive.writestr(f"{name.split('/')[1]}/{t + 5}.exr", content.getvalue())
    return root


def write_rgbd(root: Path, shot: Shot, folder: str = "rgbd_dataset_freiburg3_walking_xyz") -> Path:
    """Images and depth at 30 Hz, 4 ms apart; cameras at 90 Hz, of which every third lies at an image."""
    sequence = root / folder
    for kind in ("rgb", "depth"):
        (sequence / kind).mkdir(parents=True)
    lists: dict[str, list[str]] = {"rgb": ["# color images"], "depth": ["# depth maps"]}
    cameras = ["# timestamp tx ty tz qx qy qz qw"]
    for t, (frame, depth) in enumerate(zip(shot.frames, shot.depth)):
        stamp = 1311868164.363181 + t / 30
        codes = np.where(depth * 5000 < 65535, np.rint(depth * 5000), 0).astype(np.uint16)
        for kind, picture, delay in (("rgb", frame, 0.0), ("depth", codes, 0.004)):
            name = f"{kind}/{stamp + delay:.6f}.png"
            Image.fromarray(picture).save(sequence / name)
            lists[kind].append(f"{stamp + delay:.6f} {name}")
        row = shot.cam2world[t] if "bonn" not in folder else bonn_marker_row(shot.cam2world[t])
        numbers = [*row[:3, 3], *Rotation.from_matrix(row[:3, :3]).as_quat()]
        cameras.append(f"{stamp + 0.001:.6f} " + " ".join(f"{v:.9f}" for v in numbers))
        for third in (1, 2):
            cameras.append(f"{stamp + third / 90:.6f} 9 9 9 0 0 0 1")
    for kind, lines in lists.items():
        (sequence / f"{kind}.txt").write_text("\n".join(lines))
    (sequence / "groundtruth.txt").write_text("\n".join(cameras))
    return root


def bonn_marker_row(cam2world: Array) -> Array:
    """What Bonn's motion capture would have seen: the marker's pose, its axes swapped (the dataset's page)."""
    marker = np.array(
        [
            [1.0157, 0.1828, -0.2389, 0.0113],
            [0.0009, -0.8431, -0.6413, -0.0098],
            [-0.3009, 0.6147, -0.8085, 0.0111],
            [0, 0, 0, 1],
        ]
    )
    u, _, vt = np.linalg.svd(marker[:3, :3])
    marker[:3, :3] = u @ vt
    ros = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    return np.linalg.inv(ros) @ cam2world @ np.linalg.inv(marker) @ np.linalg.inv(ros)


def world_points(shot: Shot) -> Array:  # [T, H, W, 3], nan in the sky
    height, width = shot.size
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(shot.intrinsics).transpose(0, 2, 1)[:, None]
    points = rays * np.where(np.isinf(shot.depth), np.nan, shot.depth)[..., None]
    return points @ shot.cam2world[:, None, :3, :3].transpose(0, 1, 3, 2) + shot.cam2world[:, None, None, :3, 3]


def generic_arrays(shot: Shot, pointmaps: bool = False, cameras: bool = True) -> dict[str, Array]:
    arrays = (
        {"pointmaps": world_points(shot).astype(np.float32)} if pointmaps else {"depth": shot.depth.astype(np.float32)}
    )
    if cameras:
        arrays |= {"intrinsics": shot.intrinsics.astype(np.float32), "cam2world": shot.cam2world}
    return arrays


def write_generic_npz(root: Path, shot: Shot, pointmaps: bool = False, cameras: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    texts = {
        "fps": np.float64(FPS),
        "licence": np.array("CC0-1.0"),
        "caption": np.array("toys"),
        "domain": np.array("synthetic"),
    }
    arrays = generic_arrays(shot, pointmaps, cameras)
    np.savez(root / "scene one.npz", frames=shot.frames, moving=shot.moving, **texts, **arrays)
    return root


def write_generic_folder(root: Path, shot: Shot, pointmaps: bool = False, cameras: bool = True) -> Path:
    folder = root / "scene_one"
    (folder / "frames").mkdir(parents=True)
    for t, frame in enumerate(shot.frames):
        Image.fromarray(frame).save(folder / "frames" / f"{t:04d}.png")
    for name, array in {**generic_arrays(shot, pointmaps, cameras), "moving": shot.moving}.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "clip.json").write_text(
        json.dumps({"fps": FPS, "licence": "CC0-1.0", "caption": "toys", "domain": "synthetic"})
    )
    return root
