"""Toy shots as other people's labelers leave them: what the laws of `data_prep.sources.labels` are tested on.

Each writer follows the tool's own code, which the reader's docstring cites. All of them count pixel centres from 0.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from tests.data_prep.raw_layouts import FPS, Array, Shot, save_exr, save_video, world_points


def _integer_centres(shot: Shot) -> Array:  # [T, 3, 3]
    lenses = shot.intrinsics.copy()
    lenses[:, :2, 2] -= 0.5
    return lenses


def _say_rate(folder: Path) -> None:
    (folder / "clip.json").write_text(json.dumps({"fps": FPS, "caption": "toys"}))


def write_vipe(root: Path, shot: Shot, name: str = "walk") -> Path:
    out = root / "vipe_results"
    for part in ("rgb", "pose", "depth", "intrinsics"):
        (out / part).mkdir(parents=True)
    save_video(out / f"rgb/{name}.mp4", shot.frames, int(FPS))
    numbers = np.arange(len(shot.frames))
    np.savez(out / f"pose/{name}.npz", data=shot.cam2world.astype(np.float32), inds=numbers)
    rows = [[k[0, 0], k[1, 1], k[0, 2], k[1, 2]] for k in _integer_centres(shot)]
    np.savez(out / f"intrinsics/{name}.npz", data=np.array(rows, np.float32), inds=numbers)
    (out / f"intrinsics/{name}_camera.txt").write_text("".join(f"{n}: PINHOLE\n" for n in numbers))
    with zipfile.ZipFile(out / f"depth/{name}.zip", "w") as archive:
        for n, depth in enumerate(shot.depth):
            content = io.BytesIO()
            save_exr(content, "Z", np.where(np.isinf(depth), np.nan, depth).astype(np.float16))
            archive.writestr(f"{n:05d}.exr", content.getvalue())
    return root


def write_megasam(root: Path, shot: Shot, name: str = "walk") -> Path:
    out = root / "outputs_cvd"
    out.mkdir(parents=True)
    np.savez(
        out / f"{name}_sgd_cvd_hr.npz",
        images=shot.frames,
        depths=np.clip(shot.depth.astype(np.float16), 1e-3, 1e2),
        intrinsic=_integer_centres(shot)[0].astype(np.float32),
        cam_c2w=shot.cam2world.astype(np.float32),
    )
    _say_rate(out)
    return root


def write_monst3r(root: Path, shot: Shot, name: str = "walk") -> Path:
    out = root / name
    out.mkdir(parents=True)
    with (out / "pred_traj.txt").open("w") as file:
        for t, camera in enumerate(shot.cam2world):
            x, y, z, w = Rotation.from_matrix(camera[:3, :3]).as_quat()
            file.write(" ".join(map(str, [float(t), *camera[:3, 3], w, x, y, z])) + "\n")
    np.savetxt(out / "pred_intrinsics.txt", _integer_centres(shot).reshape(-1, 9), fmt="%.6f")
    for t, (frame, depth, moving) in enumerate(zip(shot.frames, shot.depth, shot.moving, strict=True)):
        Image.fromarray(frame).save(out / f"frame_{t:04d}.png")
        np.save(out / f"frame_{t:04d}.npy", np.where(np.isinf(depth), 0, depth).astype(np.float32))
        np.save(out / f"conf_{t}.npy", np.full(depth.shape, 3, np.float32))
        np.save(out / f"init_conf_{t}.npy", np.full(depth.shape, 1, np.float32))
        Image.fromarray(moving.astype(np.uint8) * 255).save(out / f"dynamic_mask_{t}.png")
        Image.fromarray(np.full(depth.shape, 255, np.uint8)).save(out / f"enlarged_dynamic_mask_{t}.png")
    _say_rate(out)
    return root


def write_cut3r(root: Path, shot: Shot, name: str = "walk") -> Path:
    out = root / name
    for part in ("depth", "conf", "color", "camera"):
        (out / part).mkdir(parents=True)
    for t, lens in enumerate(_integer_centres(shot)):
        depth = np.where(np.isinf(shot.depth[t]), 0, shot.depth[t])
        np.save(out / f"depth/{t:06d}.npy", depth.astype(np.float32))
        np.save(out / f"conf/{t:06d}.npy", np.full(depth.shape, 2, np.float32))
        Image.fromarray(shot.frames[t]).save(out / f"color/{t:06d}.png")
        pose = shot.cam2world[t].astype(np.float32)
        np.savez(out / f"camera/{t:06d}.npz", pose=pose, intrinsics=lens.astype(np.float32))
    _say_rate(out)
    return root


def write_da3(root: Path, shot: Shot, name: str = "walk", wrong: bool = False) -> Path:
    """`wrong`: cameras as camera-to-world."""
    out = root / name
    (out / "exports/npz").mkdir(parents=True)
    cameras = shot.cam2world if wrong else shot.world2cam
    np.savez_compressed(
        out / "exports/npz/results.npz",
        image=shot.frames,
        depth=np.round(np.where(np.isinf(shot.depth), 0, shot.depth).astype(np.float32), 6),
        conf=np.full(shot.depth.shape, 1.25, np.float32),
        extrinsics=cameras[:, :3].astype(np.float32),
        intrinsics=_integer_centres(shot).astype(np.float32),
    )
    _say_rate(out)
    return root


def write_mapanything(root: Path, shot: Shot, name: str = "walk", wrong: bool = False) -> Path:
    """`wrong`: cameras as world-to-camera, as the name `extrinsic` would have it."""
    out = root / name
    out.mkdir(parents=True)
    known = np.isfinite(shot.depth)
    np.savez(
        out / "predictions.npz",
        extrinsic=(shot.world2cam if wrong else shot.cam2world).astype(np.float32),
        intrinsic=_integer_centres(shot).astype(np.float32),
        world_points=np.nan_to_num(world_points(shot)).astype(np.float32),
        conf=np.full(shot.depth.shape, 4, np.float32),
        depth=np.where(known, shot.depth, 1)[..., None].astype(np.float32),
        images=shot.frames.astype(np.float32) / 255,
        final_mask=known,
    )
    _say_rate(out)
    return root


def write_pi3(root: Path, shot: Shot, name: str = "walk") -> Path:
    out = root / name
    out.mkdir(parents=True)
    known = np.isfinite(shot.depth)
    np.savez(
        out / "predictions.npz",
        points=np.nan_to_num(world_points(shot), nan=1e3).astype(np.float32),
        conf=np.where(known, 0.9, 0.02)[..., None].astype(np.float32),
        camera_poses=shot.cam2world.astype(np.float32),
        images=shot.frames.astype(np.float32) / 255,
    )
    _say_rate(out)
    return root


WRITERS = {
    "vipe": write_vipe, "megasam": write_megasam, "monst3r": write_monst3r, "cut3r": write_cut3r, "da3": write_da3,
    "mapanything": write_mapanything, "pi3": write_pi3,
}  # fmt: skip
