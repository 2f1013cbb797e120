"""What the demo measures: the truth scores perfectly, another clip's scene does not, and measuring changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from one4d_pl.config import Config
from one4d_pl.data.decode import Draw, make_sample
from one4d_pl.evaluation.fit_quality import ZOOMING, camera_path, measure_fit, photometric_error, sampled_clips
from one4d_pl.inference.pipeline import GeneratedScene, One4DPipeline
from one4d_pl.postopt.recover import recover_scene
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Sample

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module")
def clips() -> list[Sample]:
    given = Draw("video", torch.ones(9, dtype=torch.bool), drop_caption=False)
    config = Config().data
    config.num_frames, config.height, config.width = 9, HEIGHT, WIDTH
    return [
        make_sample(render_clip(seed, 9, HEIGHT, WIDTH), n, given, config, None) for n, seed in enumerate((3, 5, 11))
    ]


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


def test_the_truth_is_perfect_and_another_clips_scene_is_not(clips, pipeline):
    oracle = Oracle(clips, pipeline.encoders, pipeline.transformer)
    counted = []
    mean = torch.stack([c.pointmap for c in clips]).mean(0)
    quality = measure_fit(oracle, oracle, clips, mean, train_path=0.2, seed=0, on_clip=counted.append)
    assert sum(counted) == sampled_clips(len(clips))
    for task in ("video", "sparse", "image", "video_no_links"):
        assert quality.pointmaps[task]["rel_error"] < 1e-5 and quality.pointmaps[task]["inliers"] == 1
    assert quality.pointmaps["video_other_clip"]["rel_error"] > 0.1
    assert quality.pointmaps["constant"]["rel_error"] > quality.pointmaps["mean_pointmap"]["rel_error"] > 0.05
    assert 0 < quality.pointmaps["first_frame"]["rel_error"] < quality.pointmaps["constant"]["rel_error"]
    assert quality.frames_db["sparse"]["hidden"] == float("inf") and "hidden" not in quality.frames_db["video"]
    assert 0 < quality.frames_db["vae_round_trip"]["given"] < 60
    consistency = quality.consistency["image"]
    assert consistency["photometric_ratio"] == pytest.approx(1, abs=0.05)
    assert consistency["camera_path_ratio"] == pytest.approx(consistency["camera_path"] / 0.2)


def test_measuring_is_repeatable_and_puts_the_links_back(clips, pipeline):
    for weight in pipeline.transformer.links.parameters():
        weight.data.fill_(0.01)
    before = [weight.clone() for weight in pipeline.transformer.links.parameters()]
    mean = torch.stack([c.pointmap for c in clips]).mean(0)
    first, second = (measure_fit(pipeline, pipeline, clips[:2], mean, 0.2, seed=0) for _ in range(2))
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
