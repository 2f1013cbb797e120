"""The only sampler: a prompt and given frames in, RGB frames and pointmaps out.

`One4DPipeline.from_pretrained(base, adapters)` opens it like a diffusers pipeline, and calling it
makes a scene of any length. Training and evaluation use its batched `sample`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from one4d_pl.config import (
    MAX_SCENE_FRAMES,
    BaseConfig,
    Config,
    ConfigError,
    GuidanceConfig,
    SamplerConfig,
    TrainConfig,
    hub_name,
)
from one4d_pl.costs.sampling import MODES, SamplingMode
from one4d_pl.data.masking import task_of
from one4d_pl.diffusion.sampler import integrate
from one4d_pl.errors import UserError
from one4d_pl.geometry.camera import Placement, resize_crop_plan, resize_frames
from one4d_pl.inference import hub
from one4d_pl.inference.guidance import GuidedText, guided_velocity
from one4d_pl.inference.long_video import fill_window, join_frames, recover_video
from one4d_pl.inference.package import Metrics, write_package
from one4d_pl.inference.sampling_mode import choose_mode
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.models.base_files import resolve_base
from one4d_pl.models.conditioning import encode_condition
from one4d_pl.models.encoder_files import CPU
from one4d_pl.models.open_model import open_model
from one4d_pl.models.precision import autocast, uses_bfloat16
from one4d_pl.models.transformer import CoupledTransformer
from one4d_pl.models.wan import WanEncoders
from one4d_pl.postopt.recover import RecoverOptions
from one4d_pl.postopt.windows import Window, plan_windows, window_mask
from one4d_pl.scene.framing import Framing, frame_images
from one4d_pl.scene.media import FrameFolder, VideoReader, load_image, open_video, to_network
from one4d_pl.scene.panels import to_bytes
from one4d_pl.scene.predictions import report_dict
from one4d_pl.scene.scene import Scene
from one4d_pl.types import MODALITIES

Progress = Callable[[int, int], None]  # (finished steps, all steps)
Picture = Image.Image | Path | str | Tensor | np.ndarray  # an array is [H, W, 3] uint8

FPS = 16.0  # Wan's own
OVERLAP = 5  # frames that neighbouring windows share: one latent frame and the first


class RequestError(UserError):
    """The pipeline cannot make what was asked for; one line that names the argument."""


@dataclass(frozen=True)
class GeneratedScene:
    """A generated batch, on the encoders' device."""

    frames: Tensor  # [B, 3, T, H, W] in [-1, 1]; given frames are decoded, never pasted
    pointmap: Tensor  # [B, 3, T, H, W] in [-1, 1], camera-0 coordinates, normalised


class One4DPipeline:
    """A sampler of 4D scenes from an adapted Wan.

    Args:
        transformer: base plus adapter.
        encoders: the base's VAE, text and image encoder.
        config: steps, solver and guidance.
        shift: sigma shift, the one the adapter was trained with.
        negative_prompt: prompt of the unconditional branch.
        card: the adapter's card; None = untrained, or still in training. Calling and saving the pipeline need it.
        bfloat16: run under bfloat16 autocast; a base in bfloat16 needs it, since the adapter's own weights are float32.
    """

    def __init__(
        self,
        transformer: CoupledTransformer,
        encoders: WanEncoders,
        config: SamplerConfig,
        shift: float,
        negative_prompt: str,
        card: AdapterCard | None = None,
        bfloat16: bool = False,
    ) -> None:
        self.transformer, self.encoders, self.config = transformer, encoders, config
        self.shift, self.negative_prompt, self.card, self.bfloat16 = shift, negative_prompt, card, bfloat16
        self.frugal = False  # see costs/sampling.py
        self.base: str | None = None  # where the base was read

    @staticmethod
    def from_pretrained(
        base: str | None = None,  # folder or hub name; None = the one that the adapter names
        adapters: Path | str | None = None,  # folder or hub name; None = `base` if it is one, else the demo's
        dtype: str = "float32",  # of the frozen transformer and text encoder; bfloat16 also runs under autocast
        device: torch.device | str = "cpu",
        memory: float | None = None,  # GiB of the GPU to stay within; None = everything lies on the device
        height: int | None = None,  # of the scenes that `memory` is for; None = the card's, as for the width
        width: int | None = None,
        revision: str | None = None,  # of the adapter on the hub: branch, tag or commit
        token: str | None = None,  # of the hub; None = the stored one
    ) -> One4DPipeline:
        """Open a base with an adapter, sampled as its card says; UserError if they are not there, or mismatch.

        Names of the hub are owner/name, or owner/name@revision; what is not in the local cache is
        fetched (`inference/hub.py`). from_pretrained("owner/name") opens an adapter on its own base.

        Within `memory`, the encoders wait on the host, guidance takes two calls and the VAE works in
        tiles; where that is not enough the base is int8, and then its blocks wait on the host too.
        """
        base, adapters = hub.find(base, adapters, revision, token)
        card = AdapterCard.read(adapters)
        config = Config(
            base=BaseConfig(
                path=base,
                dtype=dtype,
                max_text_tokens=card.max_text_tokens,
                negative_prompt=card.negative_prompt,
            ),
            train=TrainConfig(precision="bf16-mixed" if dtype == "bfloat16" else "32-true"),
            sampler=card.sampler_config,
        )
        config, mode = card.configure(config), MODES[0]
        if memory is not None:
            height, width = height or card.height, width or card.width
            # longer videos run in windows of the card's length
            scene = replace(config.data, num_frames=card.num_frames, height=height, width=width)
            mode = choose_mode(replace(config, data=scene), memory, torch.device(device))
        return One4DPipeline.open(config, adapters, torch.device(device), mode)

    @staticmethod
    def open(
        config: Config, adapters: Path | None, device: torch.device = CPU, mode: SamplingMode = MODES[0]
    ) -> One4DPipeline:
        """Open a run's base with an adapter, sampled as its config says, on as much memory as the mode does.

        Without adapters both branches are the base. ConfigError where the adapter is of another
        base, or not of the config's shape (`AdapterCard.configure`).
        """
        if mode.frugal:
            config = replace(config, base=replace(config.base, quantisation=mode.quantisation, offload=mode.offload))
        transformer, card = open_model(config, adapters, device)
        encoders, bfloat16 = WanEncoders.of(config.base), uses_bfloat16(config, device)
        if mode.frugal:
            encoders.vae.enable_tiling()
            for _, parameter in transformer.trainable_parameters() if bfloat16 else ():
                parameter.data = parameter.data.bfloat16()  # as autocast would at every product
        transformer.eval().requires_grad_(False)
        pipeline = One4DPipeline(
            transformer,
            encoders.wait_on_host(device) if mode.frugal else encoders.to(device),
            config.sampler,
            config.flow.shift,
            config.base.negative_prompt,
            card,
            bfloat16,
        )
        pipeline.frugal, pipeline.base = mode.frugal, config.base.path
        return pipeline

    @property
    def device(self) -> torch.device:
        """Return the device it runs on; offloaded encoders are on the CPU between their uses."""
        return self.encoders.latents_mean.device

    def __call__(
        self,
        prompt: str = "",
        frames: Mapping[int, Picture] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        fps: float | None = None,
        zooms: bool = False,
        on_step: Progress = lambda done, total: None,
        video: Path | str | None = None,
    ) -> Scene:
        """Make one 4D scene from a prompt, given frames or a whole video.

        Without frames this is text to 4D, with frame 0 image to 4D, with all frames video to 4D.

        Args:
            prompt: what the scene shows; may be empty where frames are given.
            frames: index -> picture of the given frames, frame 0 among them. Each is resized to cover the scene's size
                and cropped in the middle.
            num_frames: any number; default: the video's, or the adapter's own. A longer video than the adapter's runs
                in overlapping windows. A length that is not 4k+1 is filled by repeating the last frame, and the copies
                are cut off.
            height: height of the scene in pixels; like `width` a multiple of what the base takes (16 for Wan). Default:
                as many pixels as the adapter was trained with, in the shape of the first picture.
            width: see height.
            steps: steps of the solver; default: the card's.
            guidance_scale: guidance on text, for both branches; 1 = off. Default: the card's, by task.
            negative_prompt: default: the card's.
            generator: source of the noise, on the CPU; it draws first frames, then pointmaps, window by window.
            fps: frames per second of the result, and at which a video is read. Default: the video's, else 16.
            zooms: solve for one focal length per frame.
            on_step: called with the finished steps and all steps, over all windows.
            video: file, or folder of pictures, whose frames are all given, instead of `frames`.

        Raises RequestError, which names the argument that is wrong.
        """
        pipeline = self.with_settings(steps, guidance_scale, negative_prompt)
        if video is not None:
            if frames:
                raise RequestError("frames, video: give one of them")
            reader = open_video(Path(video), fps, FPS)
            placed, placement = self._place_video(reader, num_frames, height, width)
            frame_mask = torch.ones(len(placed), dtype=torch.bool)
            return pipeline._make_scene(prompt, placed, frame_mask, placement, generator, reader.fps, zooms, on_step)
        given = dict(sorted((frames or {}).items()))
        count = self._num_frames(num_frames, given)
        pictures = {index: _pixels(picture) for index, picture in given.items()}
        first = next(iter(pictures.values()), None)
        framing = self.framing(None if first is None else (first.shape[0], first.shape[1]), height, width)
        placed = torch.zeros(count, framing.height, framing.width, 3, dtype=torch.uint8)
        frame_mask = torch.zeros(count, dtype=torch.bool)
        for index, pixels in pictures.items():
            placed[index] = resize_frames(pixels[None], framing.height, framing.width)[0]
            frame_mask[index] = True
        placement = framing.placement if given else None
        return pipeline._make_scene(prompt, placed, frame_mask, placement, generator, fps or FPS, zooms, on_step)

    def _place_video(
        self, reader: VideoReader | FrameFolder, num_frames: int | None, height: int | None, width: int | None
    ) -> tuple[Tensor, Placement | None]:  # [T, h, w, 3] uint8
        """Resize frames as they are read, so that only one full-size frame is held at a time."""
        frames, framing = [], None
        for frame in islice(reader, num_frames or MAX_SCENE_FRAMES):
            framing = framing or self.framing((frame.shape[0], frame.shape[1]), height, width)
            frames.append(resize_frames(frame[None], framing.height, framing.width)[0])
        if framing is None or len(frames) < 2:
            raise RequestError(f"{reader.path}: holds {len(frames)} frames, need 2 or more; a still is an image")
        if num_frames is None and len(frames) == MAX_SCENE_FRAMES:
            raise RequestError(f"{reader.path}: {MAX_SCENE_FRAMES} frames or more; cut it, or set num_frames")
        if num_frames is not None and len(frames) < num_frames:
            raise RequestError(f"num_frames: {num_frames}, but {reader.path} holds {len(frames)} frames")
        return torch.stack(frames), framing.placement

    def _make_scene(
        self,
        prompt: str,
        frames: Tensor,  # [T, h, w, 3] uint8, as large as the scene; hidden frames are never read
        frame_mask: Tensor,  # [T] bool, 1 = given
        placement: Placement | None,  # of the frames on the pictures they come from
        generator: torch.Generator | None,
        fps: float,
        zooms: bool,
        on_step: Progress = lambda done, total: None,
    ) -> Scene:
        """Make one scene of frames that have its size."""
        card = self._card()
        windows = plan_windows(len(frames), card.num_frames, min(OVERLAP, card.num_frames - 1))
        done, total = 0, len(windows) * self.config.steps

        def count_step(step: int) -> None:
            nonlocal done
            done += 1
            on_step(done, total)

        def draw_noise(window: int, shape: tuple[int, ...]) -> Tensor:
            # Two draws: then a plain Wan pipeline with the same generator starts from the same frames.
            return torch.cat([torch.randn(1, *shape[1:], generator=generator) for _ in MODALITIES])

        parts, points = self.sample_windows(prompt, to_network(frames), frame_mask, windows, draw_noise, count_step)
        recovered = recover_video(windows, points, RecoverOptions(shared_focal=False if zooms else None))
        return Scene(
            frames=to_bytes((join_frames(windows, parts) + 1) / 2),
            pointmap=recovered.pointmap,
            valid=recovered.valid,
            depth=recovered.depth,
            intrinsics=recovered.intrinsics.double(),
            cam2world=recovered.cam2world,
            fps=fps,
            prompt=prompt,
            given=tuple(frame_mask.nonzero()[:, 0].tolist()),
            placement=placement,
            flags=recovered.flags,
            report=report_dict(recovered.report),
            made={
                "task": task_of(frame_mask),
                "sampler": asdict(self.config),
                "shift": self.shift,
                "negative_prompt": self.negative_prompt,
                "base": card.base_fingerprint,
                "adapter_step": card.step,
                "windows": [[window.start, window.stop] for window in windows],
            },
        )

    def sample_windows(
        self,
        prompt: str,
        frames: Tensor,  # [3, T, h, w] in [-1, 1], h and w what the base takes; hidden frames are never read
        frame_mask: Tensor,  # [T] bool, 1 = given
        windows: tuple[Window, ...],
        draw_noise: Callable[[int, tuple[int, ...]], Tensor],  # (window, [2, C, t, h', w']) -> noise of that shape
        on_step: Callable[[int], None] = lambda step: None,  # called after every step of every window
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Sample the windows of a video in order; later ones also see generated frames they share.

        Returns per window, on the CPU and without repeated frames: frames [t, h, w, 3] in [-1, 1],
        and points [t, h, w, 3], normalised and in the world of the window's first camera.
        """
        shown, made_frames, made_points = frames, [], []
        for index, window in enumerate(windows):
            given = window_mask(frame_mask, windows, index)
            clip = fill_window(shown[:, window.start : window.stop], window)
            noise = draw_noise(index, (2, *self.encoders.latent_shape(*clip.shape[1:]))).to(self.device)
            scene = self.sample([prompt], clip[None].to(self.device), given[None].to(self.device), noise, on_step)
            count = window.stop - window.start
            made = scene.frames[0, :, :count].float().cpu()
            made_frames.append(made.movedim(0, -1))
            made_points.append(scene.pointmap[0, :, :count].float().cpu().movedim(0, -1))
            if index + 1 < len(windows):  # show the next window the generated frames
                hidden = ~frame_mask[window.start : window.stop]
                shown = shown.clone()
                shown[:, window.start : window.stop][:, hidden] = made[:, hidden]
        return tuple(made_frames), tuple(made_points)

    def with_settings(
        self,
        steps: int | None = None,
        guidance: float | None = None,  # of both branches and every task
        negative_prompt: str | None = None,
        solver: str | None = None,  # one of config.SOLVERS
    ) -> One4DPipeline:
        """Return the same model at other settings; None keeps one. RequestError names a bad one."""
        config = self.config
        if guidance is not None:
            if not 0 <= guidance < math.inf:
                raise RequestError(f"guidance: {guidance}, need 0 or more; 1 = off")
            same = GuidanceConfig(guidance, guidance, guidance, guidance)
            config = replace(config, guidance=same, guidance_xyz=None)
        try:
            config = replace(
                config,
                steps=config.steps if steps is None else steps,
                solver=config.solver if solver is None else solver,
            )
        except ConfigError as error:
            raise RequestError(str(error)) from None
        negative = self.negative_prompt if negative_prompt is None else negative_prompt
        changed = One4DPipeline(self.transformer, self.encoders, config, self.shift, negative, self.card, self.bfloat16)
        changed.frugal, changed.base = self.frugal, self.base
        return changed

    def framing(
        self,
        picture: tuple[int, int] | None,  # height, width of the first given picture
        height: int | None = None,  # of the scene; None with width: as many pixels as in training, in its shape
        width: int | None = None,
    ) -> Framing:
        """Choose the scene's size, and where it lies on the picture."""
        card = self._card()
        if (height is None) != (width is None):
            raise RequestError("height, width: give both or none")
        from_height, from_width = picture or (height or card.height, width or card.width)
        if height is None or width is None:
            return frame_images(from_height, from_width, card.height, card.width, "no_squash")
        patch = self.transformer.base.config.patch_size
        for name, value, side in (("height", height, patch[1]), ("width", width, patch[2])):
            unit = self.encoders.spatial_factor * side
            if value < unit or value % unit:
                raise RequestError(f"{name}: {value}, need a multiple of {unit} (VAE times patch of this base)")
        return Framing(height, width, height, width, resize_crop_plan(from_height, from_width, height, width))

    def save_pretrained(
        self,
        folder: Path | str,
        base: str | None = None,
        licence: str | None = None,
        metrics: Metrics | None = None,
        sample: Scene | Path | str | None = None,
        place: str | None = None,
    ) -> None:
        """Write adapter, card and a model card (README.md) into a new folder, whole or not at all.

        Args:
            folder: the folder to make.
            base: what the card names as the base: a hub name, or "./base", which is written, too. Default: as before.
            licence: of the adapter, as the hub's list has it; default: "other", as the training data allow.
            metrics: benchmark -> metric -> value, as `read_metrics` finds them in an evaluation.
            sample: a scene, or the file of a picture, for the model card.
            place: how the model card says to open it; default: the folder's name.
        """
        target, card = Path(folder), self._card()
        if target.exists():
            raise RequestError(f"save_pretrained: {target} exists; name a new folder")
        if self.frugal and self.bfloat16:
            raise RequestError("save_pretrained: memory= made the adapter bfloat16; open it without, on the CPU")
        source = resolve_base(self.base or card.base_path) if base == hub.BASE_IN_REPO else None
        card = replace(card, base_path=base or card.base_path)
        shown = Path(sample) if isinstance(sample, str) else sample
        write_package(target, self.transformer, card, place or target.name, source, licence, metrics, shown)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        base: str | None = None,
        licence: str | None = None,
        metrics: Metrics | None = None,
        sample: Scene | Path | str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a model repository, in one commit; return the commit's address.

        Args:
            repo_id: owner/name; made if it does not exist.
            private: whether others may not see it; None = as the owner's settings say.
            token: of the hub; None = the stored one.
            revision: the branch; made if it does not exist. Default: main.
            base: as of `save_pretrained`; needed where the base is a folder of this machine.
            licence: as of `save_pretrained`, like the others.
            metrics: see there.
            sample: see there.
        """
        if hub_name(repo_id) is None or "@" in repo_id:
            raise RequestError(f"repo_id: {repo_id!r}, need owner/name")
        base = hub.portable_base(self._card().base_path, base)
        with TemporaryDirectory() as parent:
            folder = Path(parent) / "adapters"
            place = repo_id if revision in (None, "main") else f"{repo_id}@{revision}"
            self.save_pretrained(folder, base, licence, metrics, sample, place)
            return hub.upload(folder, repo_id, private, token, revision)

    def compile_blocks(self) -> None:
        """Compile the transformer's blocks; they are alike, so one compilation serves them all."""
        self.transformer.compile_blocks()

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        frames: Tensor,  # [B, 3, T, H, W] in [-1, 1]; hidden frames are never read
        frame_mask: Tensor,  # [B, T] bool, 1 = given
        noise: Tensor,  # [2B, C, t, h, w], rgb first
        on_step: Callable[[int], None] = lambda step: None,
    ) -> GeneratedScene:
        """Generate a batch, with guidance by each sample's task (no, first, some or all frames)."""
        encoders, codec = self.encoders, self.transformer.codec
        with autocast(self.bfloat16, self.device):
            condition = encode_condition(encoders.encode, frames, frame_mask, encoders.temporal_factor)
            image_embeds = encoders.encode_first_frame(frames, frame_mask)
            text = GuidedText.embed(encoders, self.config, prompts, self.negative_prompt, frame_mask)
            latents = integrate(
                lambda noisy, sigma: guided_velocity(
                    self.transformer, noisy, condition, sigma, text, image_embeds, two_calls=self.frugal
                ),
                noise,
                self.config.steps,
                self.shift,
                self.config.solver,
                on_step,
            )
            rgb, xyz = codec.restore(latents).chunk(2)
            return GeneratedScene(encoders.decode(rgb), codec.decode(encoders, xyz))

    def _card(self) -> AdapterCard:
        if self.card is None:
            raise RequestError("One4DPipeline: no adapter is loaded; open it with from_pretrained(base, adapters)")
        return self.card

    def _num_frames(self, asked: int | None, given: Mapping[int, Picture]) -> int:
        count = max(self._card().num_frames, max(given, default=-1) + 1) if asked is None else asked
        if count < 1:
            raise RequestError(f"num_frames: {count}, need 1 or more")
        if given and (min(given) < 0 or max(given) >= count):
            wrong = min(given) if min(given) < 0 else max(given)
            raise RequestError(f"frames: index {wrong} is not one of the scene's {count} frames, 0 to {count - 1}")
        if given and 0 not in given:
            raise RequestError(
                f"frames: frame 0 is hidden, but it defines the scene's world (first given: {min(given)}); "
                "give frame 0, or count from the first frame you have"
            )
        return count


def _pixels(picture: Picture) -> Tensor:  # [H, W, 3] uint8
    if isinstance(picture, (str, Path)):
        return load_image(Path(picture))
    if isinstance(picture, Image.Image):
        return torch.from_numpy(np.array(picture.convert("RGB")))
    pixels = torch.as_tensor(picture)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise RequestError(f"frames: {pixels.dtype} {list(pixels.shape)}, need uint8 [H, W, 3]")
    return pixels
