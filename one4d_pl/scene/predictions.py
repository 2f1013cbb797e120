"""Stored predictions, ours and other people's, which are scored from these files alone.

A prediction is a folder per sequence. `read_prediction` recognises its layout by the files in it:

ours      cameras.json   per frame intrinsics and cam2world; also given frames, report and the map's
                         placement on the image
          depth.npy      float32 [T, h, w], z-depth in the cameras' unit
          valid.npy      bool [T, h, w], where a depth may be used to fit the alignment (optional)
folders   frame_%04d.npy float depth [h, w] per frame; and pred_poses.npy [T, 4, 4] (Pi3), or else
                         pred_traj.txt with lines `t x y z qw qx qy qz`, camera to world (MonST3R,
                         Geo4D, CUT3R). Depth or cameras may be absent.
demo      depth/%06d.npy and camera/%06d.npz, whose `pose` is camera to world (CUT3R's demo)
npz       prediction.npz, or <sequence>.npz beside the folders: arrays `depth` [T, h, w],
          `cam2world` [T, 4, 4] and `valid` [T, h, w] bool; depth or cam2world may be absent

Cameras may also be [T, 3, 4]. The folder has the sequence's name, or that of the dataset's own folder for it
(rgbd_dataset_freiburg3_<sequence>, rgbd_bonn_<sequence>). Files are ordered by their numbers. Nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from one4d_pl.data.frame_order import numbered_files
from one4d_pl.errors import reading
from one4d_pl.files import finite, open_whole, read_json, read_text, write_json
from one4d_pl.geometry.camera import Placement
from one4d_pl.geometry.se3 import geodesic_angle, is_rotation, se3_matrix, wxyz_to_matrix
from one4d_pl.postopt.recover import RecoveredScene, RecoverReport

FORMAT = "one4d_pl cameras 1"
WRONG_QUATERNION_ORDER = (
    "pred_traj.txt begins with the rotation 0 0 0 1, half a turn: its quaternions are x y z w, as TUM's; write w x y z"
)
HALF_TURN_TOLERANCE = 0.02  # radians
DATASET_PREFIXES = ("", "rgbd_dataset_freiburg3_", "rgbd_bonn_")  # of TUM's and Bonn's own folders


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one video: depth, cameras or both."""

    depth: Tensor | None  # [T, h, w] float32
    cam2world: Tensor | None  # [T, 4, 4] float64, OpenCV axes, any world and unit
    intrinsics: Tensor | None = None  # [T, 3, 3], pixels of the depth map, centres at +0.5
    valid: Tensor | None = None  # [T, h, w] bool, usable for fitting the alignment; None = everywhere
    placement: Placement | None = None  # of the depth map on the image; None = it shows all of it
    given: tuple[int, ...] | None = None  # frames that the model was shown; None = unknown
    flags: tuple[str, ...] = ()  # what is unusual or degenerate, in words

    @staticmethod
    def of(
        scene: RecoveredScene, placement: Placement | None = None, given: tuple[int, ...] | None = None
    ) -> Prediction:
        """Make a prediction of what was recovered from a pointmap video."""
        return Prediction(
            scene.depth, scene.cam2world, scene.intrinsics.double(), scene.valid, placement, given, scene.flags
        )

    @property
    def num_frames(self) -> int:
        """Count the frames of depth or cameras."""
        first = self.depth if self.depth is not None else self.cam2world
        assert first is not None
        return len(first)


def write_prediction(folder: Path, prediction: Prediction, report: dict[str, object]) -> None:
    """Store a prediction in our layout with `report` as it is.

    cameras.json is written last: with it the prediction is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.json").unlink(missing_ok=True)
    for name, tensor in (("depth", prediction.depth), ("valid", prediction.valid)):
        if tensor is None:
            (folder / f"{name}.npy").unlink(missing_ok=True)
        else:
            with open_whole(folder / f"{name}.npy") as file:  # np.save would add a suffix to a path
                np.save(file, tensor.cpu().numpy(), allow_pickle=False)
    cameras = (
        [None] * prediction.num_frames if tensor is None else tensor.double().tolist()
        for tensor in (prediction.intrinsics, prediction.cam2world)
    )
    content = {
        "format": FORMAT,
        "convention": "OpenCV axes; cam2world row-major; pixels of the depth map, centres at +0.5; depth is z",
        "placement": None if prediction.placement is None else asdict(prediction.placement),
        "given": prediction.given,
        "flags": prediction.flags,
        "frames": [{"intrinsics": k, "cam2world": c} for k, c in zip(*cameras)],
        "report": report,
    }
    write_json(folder / "cameras.json", content)


def report_dict(report: RecoverReport) -> dict[str, object]:
    """Convert a recovery's report to what json can hold: nan and infinities become null."""
    fields: dict[str, object] = {
        name: finite(value.tolist() if isinstance(value, Tensor) else value)
        for name, value in vars(report).items()
        if name != "seams"
    }
    return fields | {"seams": [{"residual": finite(s.residual), "inliers": s.inliers} for s in report.seams]}


def find_prediction(root: Path, sequence: str) -> Path | None:
    """Find a sequence's folder or npz below `root`, by its own name or its dataset's, or None."""
    for prefix in DATASET_PREFIXES:
        folder, archive = root / f"{prefix}{sequence}", root / f"{prefix}{sequence}.npz"
        if folder.is_dir() or archive.is_file():
            return folder if folder.is_dir() else archive
    return None


def read_prediction(path: Path) -> Prediction:
    """Read a prediction in any of the layouts; UserError names what is broken."""
    with reading(path):
        if path.is_file():
            prediction = _read_npz(path)
        elif (path / "cameras.json").is_file():
            prediction = _read_ours(path)
        elif (path / "prediction.npz").is_file():
            prediction = _read_npz(path / "prediction.npz")
        elif (path / "camera").is_dir() and (path / "depth").is_dir():
            prediction = _read_demo(path)
        else:
            prediction = _read_frames(path)
        return _checked(prediction)


def _read_ours(folder: Path) -> Prediction:
    content = read_json(folder / "cameras.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"cameras.json is not of the format {FORMAT!r}")
    stored = content["frames"]
    depth, valid = (_load(folder / f"{name}.npy") for name in ("depth", "valid"))
    return Prediction(
        depth=None if depth is None else depth.float(),
        cam2world=_stack([frame["cam2world"] for frame in stored]),
        intrinsics=_stack([frame["intrinsics"] for frame in stored]),
        valid=None if valid is None else valid.bool(),
        placement=None if content["placement"] is None else Placement(**content["placement"]),
        given=None if content["given"] is None else tuple(content["given"]),
        flags=tuple(content["flags"]),
    )


def _read_npz(path: Path) -> Prediction:
    with np.load(path, allow_pickle=False) as arrays:
        stored = {name: torch.from_numpy(arrays[name]) for name in ("depth", "cam2world", "valid") if name in arrays}
    if not {"depth", "cam2world"} & set(stored):
        raise ValueError("holds neither an array depth [T, h, w] nor cam2world [T, 4, 4]")
    depth, cam2world, valid = (stored.get(name) for name in ("depth", "cam2world", "valid"))
    return Prediction(
        None if depth is None else depth.float(),
        None if cam2world is None else _to_4x4(cam2world),
        valid=None if valid is None else valid.bool(),
    )


def _read_frames(folder: Path) -> Prediction:
    """Read a folder as MonST3R, Geo4D, CUT3R or Pi3 write it."""
    files = numbered_files(folder, (".npy",), "frame_")
    poses, trajectory = folder / "pred_poses.npy", folder / "pred_traj.txt"
    if not files and not poses.is_file() and not trajectory.is_file():
        raise ValueError(
            "holds none of cameras.json, prediction.npz, frame_%04d.npy, pred_poses.npy, pred_traj.txt, or depth/ and "
            "camera/"
        )
    cam2world = None
    flags: tuple[str, ...] = ()
    if (matrices := _load(poses)) is not None:
        cam2world = _to_4x4(matrices)
    elif trajectory.is_file():
        cam2world = read_wxyz_trajectory(trajectory)
        half_turn = torch.diag(cam2world.new_tensor([-1, -1, 1]))  # how 0 0 0 1, TUM's identity, is read here
        if len(cam2world) and bool(geodesic_angle(cam2world[0, :3, :3], half_turn) < HALF_TURN_TOLERANCE):
            flags = (WRONG_QUATERNION_ORDER,)
    return Prediction(_stack_maps(files) if files else None, cam2world, flags=flags)


def _read_demo(folder: Path) -> Prediction:
    """Read a folder as CUT3R's demo writes it."""
    depths, cameras = numbered_files(folder / "depth", (".npy",)), numbered_files(folder / "camera", (".npz",))
    if not depths or [file.stem for file in depths] != [file.stem for file in cameras]:
        raise ValueError(
            f"depth/ and camera/ hold {len(depths)} and {len(cameras)} files, need the same numbers in both"
        )
    poses = []
    for file in cameras:
        with np.load(file, allow_pickle=False) as arrays:
            if "pose" not in arrays:
                raise ValueError(f"camera/{file.name}: no array `pose`")
            poses.append(arrays["pose"])
    return Prediction(_stack_maps(depths), _to_4x4(torch.from_numpy(np.stack(poses))))


def _stack_maps(files: list[Path]) -> Tensor:  # [T, h, w] float32
    maps = [_load(file) for file in files]
    sizes = {tuple(one.shape) for one in maps if one is not None}
    if len(sizes) > 1:
        raise ValueError(f"{files[0].name} and the others differ in size: {sorted(sizes)}")
    return torch.stack([one.float() for one in maps if one is not None])


def _to_4x4(cam2world: Tensor) -> Tensor:  # [T, 4, 4] or [T, 3, 4] -> [T, 4, 4] float64; others as they are
    if cam2world.shape[1:] != (3, 4):
        return cam2world.double()
    last = cam2world.new_tensor([0, 0, 0, 1]).double().expand(len(cam2world), 1, 4)
    return torch.cat([cam2world.double(), last], dim=1)


def read_wxyz_trajectory(path: Path) -> Tensor:  # [T, 4, 4] float64, camera to world
    """Read lines `t x y z qw qx qy qz`: w comes first, unlike in TUM's format."""
    rows = []
    with reading(path):
        for i, line in enumerate(read_text(path).splitlines(), start=1):
            if not (columns := line.split("#")[0].split()):
                continue
            if len(columns) != 8:
                raise ValueError(f"line {i}: {len(columns)} columns, need t x y z qw qx qy qz")
            rows.append([float(column) for column in columns])
    numbers = torch.tensor(rows, dtype=torch.float64).reshape(-1, 8)
    return se3_matrix(wxyz_to_matrix(numbers[:, 4:]), numbers[:, 1:4])


def _load(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    with reading(path, "an array of numbers"):
        array = np.load(path, allow_pickle=False)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path.name}: {array.dtype}, need numbers")
    return torch.from_numpy(array)


def _checked(prediction: Prediction) -> Prediction:
    """Return a prediction whose shapes agree and whose cameras are rotations; ValueError otherwise.

    A camera that is not finite or no rotation is taken for a fault of the file, not of the model.
    """
    depth, cam2world, valid = prediction.depth, prediction.cam2world, prediction.valid
    if depth is not None and depth.ndim != 3:
        raise ValueError(f"depth is {list(depth.shape)}, need [T, h, w]")
    if valid is not None and (depth is None or valid.shape != depth.shape):
        raise ValueError(f"valid is {list(valid.shape)}, need the shape of depth")
    if cam2world is not None:
        if cam2world.shape[1:] != (4, 4):
            raise ValueError(f"cam2world is {list(cam2world.shape)}, need [T, 4, 4] or [T, 3, 4]")
        if not bool(cam2world.isfinite().all() & is_rotation(cam2world[:, :3, :3], 1e-3).all()):
            raise ValueError("a camera is not finite, or its 3x3 block is no rotation")
        if depth is not None and len(depth) != len(cam2world):
            raise ValueError(f"{len(depth)} depth maps, but {len(cam2world)} cameras")
    return prediction


def _stack(matrices: list[list[list[float]] | None]) -> Tensor | None:
    known = [matrix for matrix in matrices if matrix is not None]
    if len(known) not in (0, len(matrices)):
        raise ValueError("cameras.json: some frames have a camera and some have none")
    return torch.tensor(known, dtype=torch.float64) if known else None
