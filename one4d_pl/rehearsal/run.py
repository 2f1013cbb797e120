"""A training run and a sampled scene on a pretended GPU, with the project's own code.

1. A skeleton of the base is written and opened by the run's own loader.
2. Lightning's own Trainer fits the run's own module for one optimiser step. AdamW's moments and the
   gradients of an accumulation exist already, so this is the peak of a step's memory.
3. The run's own sampler makes a scene in a few steps.

A run of several processes is rehearsed as a single process that holds everything; the planner
computes what their strategy shares out.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from one4d_pl.config import Config, ConfigError
from one4d_pl.costs.flops import TransformerShape, count_tokens
from one4d_pl.costs.memory import Memory, batch_of, layout_of, step_memory
from one4d_pl.data.datamodule import TimedLoader
from one4d_pl.data.latent_stats import LatentStats
from one4d_pl.data.masking import task_of
from one4d_pl.models.base_files import encoder_sizes, image_tokens, transformer_config
from one4d_pl.rehearsal.fake_cuda import pretend
from one4d_pl.rehearsal.skeleton import write_skeleton
from one4d_pl.rehearsal.watch import Phase, Watch, place_of
from one4d_pl.training.module import One4DModule
from one4d_pl.training.strategy import build_trainer
from one4d_pl.training.zero import fill_optimizer
from one4d_pl.types import Batch, Encoded, PointmapScale, Sample, collate

SAMPLER_STEPS = 2  # enough, since all are alike
AFTER = "after"  # the phase in which Lightning moves the model back to the CPU
NOT_SHOWN = ("moments", AFTER)  # phases that are no part of a run
STEP = ("encoding", "forward", "backward", "optimizer")  # the phases of a training step
PROMPT = "a red cube on a table"


class Fault(Exception):
    """An error that a GPU would have raised: one line with the module and the place."""


@dataclass(frozen=True)
class Rehearsal:
    """The measurements of a rehearsal."""

    base: str  # where the sizes come from, in words
    blocks: int
    phases: dict[str, Phase]
    at_peak: Counter[str]  # bytes that were alive at the training step's peak, by the operation that made them
    tensors: dict[str, str]  # part of the model -> devices, dtypes and sizes of its tensors, in words
    planned: Memory  # the planner's numbers for the same process (costs/memory.py)

    @property
    def step_peak(self) -> int:
        """Return the bytes of tensors at the training step's peak."""
        return max(self.phases[name].peak for name in STEP if name in self.phases)

    @property
    def traffic(self) -> float:
        """Return the bytes that one block reads and writes in a training step."""
        return sum(self.phases[name].block_bytes for name in ("forward", "backward")) / self.blocks

    @property
    def elementwise(self) -> float:
        """Return the part of `traffic` outside of matrix products and attention."""
        return sum(self.phases[name].block_elementwise for name in ("forward", "backward")) / self.blocks

    @property
    def operations(self) -> Counter[str]:
        """Return the bytes of all blocks' traffic in a training step, by operation."""
        return self.phases["forward"].by_operation + self.phases["backward"].by_operation


def rehearse(config: Config, blocks: int | None = None) -> Rehearsal:
    """Rehearse a run with so many of the transformer's blocks (None = all); neither weights nor data need exist.

    Raises Fault where a GPU would fail, ConfigError where the config cannot be rehearsed.
    """
    with TemporaryDirectory() as folder:
        origin = write_skeleton(Path(folder) / "base", config.base.path, blocks)
        alone = one_process(config, Path(folder), blocks)
        with rehearsing(alone) as watch:
            watching = Watching(watch, sample)
            fit(alone, watching)
        layers, shown = watching.blocks, {name: seen for name, seen in watch.phases.items() if name not in NOT_SHOWN}
        return Rehearsal(origin, layers, shown, watching.at_peak, watching.tensors, planned_memory(alone))


def one_process(config: Config, folder: Path, blocks: int | None) -> Config:
    """Change a config to one process without compiler, on the skeleton in `folder`."""
    settings = transformer_config(folder / "base")
    layers, dlc = int(str(settings["num_layers"])), config.dlc
    if blocks is not None:
        dlc = replace(dlc, num_links=min(dlc.num_links, layers))
    train = replace(
        config.train, strategy="single", num_nodes=1, devices=1, max_steps=1, init_from=None, compile=False,
        global_batch_size=config.train.micro_batch_size,
    )  # fmt: skip
    return replace(
        config,
        base=replace(config.base, path=str(folder / "base")),
        dlc=dlc,
        train=train,
        val=replace(config.val, sigmas=config.val.sigmas[:1], clips=1),
        run_dir=str(folder / "run"),
    )


@contextmanager
def rehearsing(config: Config) -> Iterator[Watch]:
    """Enter fake tensors that are watched; errors inside become Faults."""
    shape = TransformerShape.of(transformer_config(Path(config.base.path)), replace(config.dlc, coupling="decoupled"))
    tokens = count_tokens(shape, batch_of(config, 0))
    watch = Watch(2 * config.train.micro_batch_size * tokens * shape.width)
    # it would log a traceback of what a Fault says in one line
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with pretend(watch), watch.watching():
        try:
            yield watch
        except ConfigError:
            raise
        except Exception as error:  # any error would have ended the run
            raise Fault(describe_fault(error, watch.failed_in)) from error


def describe_fault(error: Exception, where: str) -> str:
    """Write module, place and first line of an error."""
    places = [place_of(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    place = next((place for place in reversed(places) if place is not None), "outside of the package")
    message = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, RuntimeError):
        message = f"{type(error).__name__}: {message}"
    return f"{where or 'outside of any module'}: {place}: {message}"


def fit(config: Config, *callbacks: Callback) -> None:
    """Call the run's `trainer.fit`."""
    trainer = build_trainer(config, list(callbacks))
    trainer.fit(One4DModule(config, adapters=None), datamodule=FakeClips(config))


def sample(trainer: Trainer, module: One4DModule, watch: Watch) -> None:
    """Sample one scene from a first frame, as the callbacks of a run do."""
    batch = collate([fake_sample(module.config, given=[0])]).to(module.device)
    watch.begin("sampling: encoders")
    handles = [
        module.transformer.register_forward_pre_hook(lambda *_: watch.begin("sampling: transformer")),
        module.encoders.vae.decoder.register_forward_pre_hook(lambda *_: watch.begin("sampling: decoding")),
    ]
    module.sample(batch, SAMPLER_STEPS)
    for handle in handles:
        handle.remove()


class Watching(Callback):
    """Tells the watch which phase the Trainer is in; calls `at_end` after the step, while the model is on its device.

    With `largest`, AdamW has its moments and an accumulation its gradients, as in the middle of a run.
    """

    def __init__(
        self, watch: Watch, at_end: Callable[[Trainer, One4DModule, Watch], None] | None = None, largest: bool = True
    ) -> None:
        self.watch, self.at_end, self.largest = watch, at_end, largest
        self.at_peak: Counter[str] = Counter()
        self.blocks = 0
        self.tensors: dict[str, str] = {}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        self.watch.name(module, "transformer")
        self.watch.name(module.encoders, "encoders")
        module.transformer.register_forward_pre_hook(lambda *_: self._transformer_begins(trainer, module))

    def on_sanity_check_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.watch.begin("validation")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        if self.largest:
            self.watch.begin("moments")
            trainables = [parameter for _, parameter in module.transformer.trainable_parameters()]
            fill_optimizer(trainables, trainer.optimizers[0], 1, lambda i, _: torch.zeros_like(trainables[i]))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.watch.begin("encoding")
        self.watch.peak = 0

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        assert isinstance(module, One4DModule)
        self._accumulate(module)  # again, since the Trainer has dropped the gradients as before a step's first batch
        self.watch.begin("backward")

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.watch.begin("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self.watch.begin("callbacks")
        for size, label in self.watch.at_peak.values():
            self.at_peak[label] += size

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, One4DModule)
        self.blocks = len(module.transformer.base.blocks)
        self.tensors = {"transformer": _described(module.transformer)}
        self.tensors |= {name: _described(part) for name, part in module.encoders.named_children()}
        trainer.training = False
        if self.at_end is not None:
            module.eval()
            with torch.no_grad():
                self.at_end(trainer, module, self.watch)
        self.watch.begin(AFTER)

    def _transformer_begins(self, trainer: Trainer, module: One4DModule) -> None:
        if not trainer.training or trainer.sanity_checking:
            return
        self._accumulate(module)
        self.watch.begin("forward")

    def _accumulate(self, module: One4DModule) -> None:
        """Make the gradients of an earlier micro batch, where `largest` asks for them."""
        if self.largest:
            for _, parameter in module.transformer.trainable_parameters():
                parameter.grad = torch.zeros_like(parameter)


class FakeClips(LightningDataModule):
    """The run's data module with clips that have no bytes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.clips_per_source: list[int] = []

    def train_dataloader(self) -> TimedLoader:
        return self._loader(self.config.train.micro_batch_size, [0, self.config.data.num_frames // 2])

    def val_dataloader(self) -> TimedLoader:
        return self._loader(1, list(range(self.config.data.num_frames)))

    def describe_latents(self) -> LatentStats:
        channels = int(str(transformer_config(Path(self.config.base.path))["out_channels"]))
        mean, deviation = [0.0] * channels, [1.0] * channels
        return LatentStats(mean, deviation, mean, deviation, clips=0)

    def describe_sources(self) -> list[dict[str, str]]:
        return []

    def _loader(self, clips: int, given: list[int]) -> TimedLoader:
        encoded = self.config.data.cache_latents
        samples: Sequence[Sample] = [fake_sample(self.config, given, encoded, position) for position in range(clips)]
        return TimedLoader(samples, batch_size=clips, collate_fn=collate)  # type: ignore[arg-type]


def fake_sample(config: Config, given: list[int], encoded: bool = False, position: int = 0) -> Sample:
    """Make a clip of the config's size. If some but not all frames are given, the step encodes them."""
    data = config.data
    frames, size = data.num_frames, (data.num_frames, data.height, data.width)
    frame_mask = torch.zeros(frames, dtype=torch.bool)
    frame_mask[given] = True
    return Sample(
        key=f"clip-{position}",
        position=position,
        frames=torch.empty(3, *size),
        pointmap=torch.empty(3, *size),
        valid=torch.ones(size, dtype=torch.bool),
        moving=torch.zeros(size, dtype=torch.bool),
        scale=PointmapScale(torch.tensor(1.0), torch.tensor(0.0)),
        intrinsics=torch.eye(3).repeat(frames, 1, 1),
        cam2world=torch.eye(4).repeat(frames, 1, 1),
        frame_mask=frame_mask,
        task=task_of(frame_mask),
        caption=PROMPT,
        drop_caption=False,
        encoded=_fake_encoded(config) if encoded else None,
        skipped=(),
    )


def _fake_encoded(config: Config) -> Encoded:
    settings = transformer_config(Path(config.base.path))
    grid = batch_of(config, 0).latent_grid
    channels, width = int(str(settings["out_channels"])), int(str(settings["text_dim"]))
    image = settings.get("image_dim")
    tokens = image_tokens(Path(config.base.path))
    return Encoded(
        latents=torch.empty(2, channels, *grid),
        prompt_embeds=torch.empty(len(PROMPT), width),
        image_embeds=None if image is None else torch.empty(tokens, int(str(image))),
        condition=torch.empty(channels, *grid),
    )


def planned_memory(config: Config) -> Memory:
    """Compute the planner's memory of the process that was rehearsed."""
    folder = Path(config.base.path)
    shape = TransformerShape.of(transformer_config(folder), config.dlc)
    layout = layout_of(config, *encoder_sizes(folder))
    if config.data.cache_latents:
        layout = replace(layout, vae_base_dim=0)
    return step_memory(shape, batch_of(config, image_tokens(folder)), layout)


def _described(part: nn.Module) -> str:
    sizes: dict[str, int] = {}
    for tensor in [*part.parameters(), *part.buffers()]:
        kind = "trained" if tensor.requires_grad else "frozen"
        key = f"{kind} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
        sizes[key] = sizes.get(key, 0) + tensor.nbytes
    return ", ".join(f"{key} {size / 2**30:.2f} GiB" for key, size in sizes.items())
