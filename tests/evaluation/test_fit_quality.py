"""What the demo measures: the truth scores perfectly, another clip's scene does not, and measuring changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from one4d_pl.config import Config
from one4d_pl.evaluation.fit_quality import measure_fit
from one4d_pl.evaluation.goals import Goal, goal_table, goals
from one4d_pl.evaluation.recovered import (
    camera_path,
    geometry_errors,
    photometric_error,
    recover_scenes,
    self_consistency,
)
from one4d_pl.evaluation.toy_clips import HeldOut, render_samples
from one4d_pl.geometry.pointmap import denormalise
from one4d_pl.inference.pipeline import GeneratedScene, One4DPipeline
from one4d_pl.postopt.recover import RecoverOptions, recover_scene
from one4d_pl.types import Sample, collate

HEIGHT, WIDTH = 32, 48
ZOOMING = RecoverOptions(shared_focal=False)


@pytest.fixture(scope="module")
def clips() -> list[Sample]:
    config = Config()
    config.data.num_frames, config.data.height, config.data.width = 9, HEIGHT, WIDTH
    return render_samples(config, (3, 5, 11), "clips")


@pytest.fixture(scope="module")
def held_out(clips) -> HeldOut:
    return HeldOut(clips, torch.stack([c.pointmap for c in clips]).mean(0), camera_path=0.2, recovery=ZOOMING)


@pytest.fixture
def pipeline(run_config) -> One4DPipeline:
    return One4DPipeline.open(run_config(), adapters=None)


@dataclass
class Oracle:
    """Answers with the true scene of whatever clip it is shown."""

    clips: list[Sample]
    encoders: torch.nn.Module
    transformer: torch.nn.Module

    def sample(self, prompts, frames, frame_mask, noise) -> GeneratedScene:
        shown = [next(c for c in self.clips if torch.equal(c.frames, one)) for one in frames]
        return GeneratedScene(torch.stack([c.frames for c in shown]), torch.stack([c.pointmap for c in shown]))


def test_the_truth_is_perfect_and_another_clips_scene_is_not(clips, held_out, pipeline, capsys):
    oracle = Oracle(clips, pipeline.encoders, pipeline.transformer)
    quality = measure_fit(oracle, oracle, held_out, seed=0)
    said = capsys.readouterr().err
    assert "sampling 4D scenes: 100% 24/24" in said and "recovering cameras: 100% 12/12" in said
    for task in ("video", "sparse", "image", "video_no_links"):
        assert quality.pointmaps[task]["rel_error"] < 1e-5 and quality.pointmaps[task]["inliers"] == 1
    assert quality.pointmaps["video_other_clip"]["rel_error"] > 0.1
    assert quality.pointmaps["constant"]["rel_error"] > quality.pointmaps["mean_pointmap"]["rel_error"] > 0.05
    assert 0 < quality.pointmaps["first_frame"]["rel_error"] < quality.pointmaps["constant"]["rel_error"]
    assert quality.frames_db["sparse"]["hidden"] == float("inf") and "hidden" not in quality.frames_db["video"]
    assert 0 < quality.frames_db["vae_round_trip"]["given"] < 60
    assert quality.geometry["video"]["abs_rel"] < 0.01 and quality.geometry["video"]["ate_share"] < 0.01
    assert quality.geometry["ceiling"]["abs_rel"] > 0.02  # this VAE's weights are drawn, not trained
    consistency = quality.consistency["image"]
    assert consistency["photometric_ratio"] == pytest.approx(1, abs=0.05)
    assert consistency["camera_path_ratio"] == pytest.approx(consistency["camera_path"] / 0.2)
    verdicts = {f"{goal.about}: {goal.what}": goal.verdict for goal in goals(quality)}
    assert verdicts.pop("world: mean pointmap's point error") == "met"
    assert verdicts.pop("text: caption's colours found / another's") == "not measured"  # more than three things each
    assert verdicts.pop("video: no control links, times worse") == "short"  # the oracle needs none
    assert verdicts.pop("image: camera path / training median") == "short"
    assert set(verdicts.values()) == {"met"}, verdicts


def test_measuring_is_repeatable_and_puts_the_links_back(held_out, pipeline):
    for weight in pipeline.transformer.links.parameters():
        weight.data.fill_(0.01)
    before = [weight.clone() for weight in pipeline.transformer.links.parameters()]
    two = replace(held_out, clips=held_out.clips[:2], recovery=RecoverOptions(focal=float(WIDTH)))  # quicker
    first, second = (measure_fit(pipeline, pipeline, two, seed=0) for _ in range(2))
    assert first.pointmaps == second.pointmaps and first.frames_db == second.frames_db
    assert first.pointmaps["video"] != first.pointmaps["video_no_links"]  # they were off in between
    for weight, kept in zip(pipeline.transformer.links.parameters(), before, strict=True):
        assert torch.equal(weight, kept)


def test_wrong_geometry_shows_in_the_frames_it_predicts(clips):
    clip = clips[0]
    points = clip.pointmap.movedim(0, -1)
    frames = clip.frames.movedim(0, -1)
    scene = recover_scene(points, clip.valid, ZOOMING)
    true = photometric_error(frames, points, scene.intrinsics, scene.cam2world, clip.valid)
    still = points[:1].expand_as(points)  # a camera that stands, in front of frames that move
    stood = recover_scene(still, clip.valid)
    wrong = photometric_error(frames, still, stood.intrinsics, stood.cam2world, clip.valid)
    assert wrong > 2 * true
    assert camera_path(stood.cam2world, still, clip.valid) < 1e-3
    assert camera_path(scene.cam2world, points, clip.valid) == pytest.approx(
        float(camera_path(clip.cam2world / clip.scale.scale, points, clip.valid)), rel=0.05
    )


def test_exact_geometry_has_the_truths_photometric_error_and_a_scene_of_another_clip_has_not(clips):
    batch = collate(clips)
    exact = GeneratedScene(batch.frames, batch.pointmap)
    swapped = GeneratedScene(batch.frames, batch.pointmap.roll(1, 0))
    ours, wrong = (
        self_consistency(scene.frames, recover_scenes(scene.pointmap, ZOOMING), clips, 0.2)
        for scene in (exact, swapped)
    )
    assert ours["photometric_error"] == pytest.approx(ours["photometric_error_truth"], rel=0.05)
    assert wrong["photometric_ratio"] > 3
    nothing = GeneratedScene(batch.frames, torch.ones_like(batch.pointmap))  # sky wherever one looks
    empty = self_consistency(nothing.frames, recover_scenes(nothing.pointmap, ZOOMING), clips, 0.2)
    assert empty["camera_path"] == 0 and empty["photometric_ratio"] == float("inf")


def test_depth_and_cameras_do_not_depend_on_the_scenes_unit_and_a_flat_scene_has_neither(clips):
    pointmaps = torch.stack([denormalise(c.pointmap.movedim(0, -1), c.scale).movedim(-1, 0) for c in clips])
    # half the cube's size: nothing of it reads as sky, not even the sky
    small = 0.5 * collate(clips).pointmap
    assert float(pointmaps.abs().max()) > 1
    exact = geometry_errors(recover_scenes(small, ZOOMING), clips)
    flat = torch.full_like(small, 0.3)
    wrong = geometry_errors(recover_scenes(flat, ZOOMING), clips)
    assert exact["abs_rel"] < 0.01 and wrong["abs_rel"] > 0.1
    assert exact["ate_share"] < 0.02 and 0.2 < wrong["ate_share"] < 0.5  # a standing camera's: 0.29 of a straight path


def test_a_goal_is_met_within_its_bounds_alone_and_the_table_says_so():
    cases = [
        (Goal("video", "point error", 0.08, "", high=0.08), "met", "<= 0.08"),
        (Goal("video", "point error", 0.0801, "", high=0.08), "short", "<= 0.08"),
        (Goal("video", "times worse", 1.99, "", low=2), "short", ">= 2"),
        (Goal("image", "path", 1.5, "", low=0.7, high=1.4), "short", "0.7 - 1.4"),
        (Goal("image", "path", float("inf"), "", low=0.7, high=1.4), "short", "0.7 - 1.4"),
        (Goal("text", "colours", float("nan"), "", low=2), "not measured", ">= 2"),
        (Goal("video", "ATE", 0.05, "", high=0.07, unit="%"), "met", "<= 7 %"),
        (Goal("image", "PSNR", 20.0, "", low=19.0, unit="dB"), "met", ">= 19.0 dB"),
    ]
    for goal, verdict, target in cases:
        assert (goal.verdict, goal.target) == (verdict, target)
    table = goal_table([goal for goal, _, _ in cases], 64, "clear").splitlines()
    assert "64 held-out clips:" in table[0] and table[-1] == "3 of 8 goals met."
    assert all(verdict in line for (_, verdict, _), line in zip(cases, table[1:-1], strict=True))
    assert "these clips are of hard" in goal_table([cases[0][0]], 2, "hard")
