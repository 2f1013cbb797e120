"""A whole evaluation: predictions of every row, their scores, the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from one4d_pl.config import Config, ConfigError, changes, flatten
from one4d_pl.errors import reading
from one4d_pl.evaluation.benchmarks import EvalSequence, open_benchmark, sequence_names
from one4d_pl.evaluation.pictures import save_pictures
from one4d_pl.evaluation.predict import PredictOptions, ceiling_sequence, predict_sequence
from one4d_pl.evaluation.protocols import Protocol
from one4d_pl.evaluation.score import score_benchmark
from one4d_pl.evaluation.sweeps import SWEEPS, sparse_indices
from one4d_pl.evaluation.tables import Row, write_report
from one4d_pl.evaluation.vbench import generate_videos, read_i2v_prompts
from one4d_pl.files import read_json, write_text
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.models.device import device_of
from one4d_pl.models.sample_encoder import FrozenSampleEncoder
from one4d_pl.models.wan import fingerprint
from one4d_pl.progress import Progress
from one4d_pl.scene.framing import Shape
from one4d_pl.scene.predictions import find_prediction, read_prediction

VBENCH_DIMENSIONS = ("i2v_subject", "i2v_background", "dynamic_degree", "aesthetic_quality")


@dataclass(frozen=True)
class Request:
    """The options of one evaluation."""

    bench: str
    root: Path | None
    out: Path
    protocol: Protocol
    sequences: tuple[str, ...] = ()  # none = all
    predictions: Path | None = None  # stored ones of any method, instead of a model
    rows: tuple[str, ...] = ("model", "ceiling")
    shape: Shape = "no_squash"
    one_pass: bool = True
    overlap: int = 5
    sparsity: float = 1.0
    sweep: str | None = None
    seed: int = 0
    processes: int = 2
    pictures: bool = True

    def options(self, config: Config) -> PredictOptions:
        """Return how the model is shown the benchmark."""
        data, shown = config.data, (self.shape, self.one_pass, self.overlap, self.sparsity, self.seed)
        return PredictOptions(data.height, data.width, data.num_frames, *shown, data.far_limit, data.z_offset)


@dataclass(frozen=True)
class _StoredRow:
    """One row's predictions on disk."""

    label: str
    folder: Path
    settings: dict[str, object]


def evaluate(request: Request, config: Config | None, adapters: tuple[Path, ...]) -> str:
    """Predict (unless predictions are given), score, write the report; return the table.

    UserError says in one line what is missing or broken.
    """
    sequences = open_benchmark(request.bench, request.root, request.sequences)
    if request.predictions is not None:
        sequences = _select_sequences(request, sequences)
        stored = [_StoredRow(request.predictions.name, request.predictions, {"predictions": str(request.predictions)})]
    else:
        assert config is not None
        stored = _predict(request, config, adapters, sequences)
    rows = []
    for row in stored:
        bar = partial(Progress, desc=f"scoring {row.label}", total=len(sequences), unit="sequence")
        score = score_benchmark(request.bench, sequences, row.folder, request.protocol, request.processes, bar)
        rows.append(Row(row.label, score, row.settings))
        drawn = Progress(sequences, desc="drawing", unit="sequence") if request.pictures else ()
        for sequence, one in zip(drawn, score.sequences):
            path = find_prediction(row.folder, sequence.name)
            assert path is not None  # it has just been scored
            save_pictures(request.out / "pictures" / row.folder.name, sequence, read_prediction(path), one)
    return write_report(request.out, rows, len(sequence_names(request.bench)), request.sweep)


def _select_sequences(request: Request, sequences: list[EvalSequence]) -> list[EvalSequence]:
    """Return all sequences, or those that score cameras where exactly these are predicted.

    Sintel has cameras for 14 of its 23 sequences. Any other subset has to be named with --sequences.
    """
    assert request.predictions is not None
    with_cameras = [s for s in sequences if "cameras" in s.scores]
    found = [s.name for s in sequences if find_prediction(request.predictions, s.name) is not None]
    just_cameras = bool(found) and found == [s.name for s in with_cameras]
    return with_cameras if just_cameras and not request.sequences else sequences


def _predict(
    request: Request, config: Config, adapters: tuple[Path, ...], sequences: list[EvalSequence]
) -> list[_StoredRow]:
    device = device_of(config)
    encoder, options = None, request.options(config)
    base: dict[str, object] = {"base": config.base.path, "base_fingerprint": fingerprint(config.base.path)}
    stored = []
    for folder in adapters:
        card = AdapterCard.read(folder)
        pipeline = One4DPipeline.open(card.configure(config), folder, device)
        encoder = FrozenSampleEncoder(pipeline.encoders, pipeline.transformer.codec)
        model = base | {"adapters": str(folder), "step": card.step, "shift": card.shift}
        model["precision"] = config.train.precision
        for label, variant, row_options in _variants(request, pipeline, options, card.step):
            given = {str(n): sparse_indices(n, row_options.sparsity) for n in {s.num_frames for s in sequences}}
            shown = {"sampler": asdict(variant.config), "options": asdict(row_options), "given": given}
            predict = partial(predict_sequence, variant, row_options)
            stored.append(_stored_row(request.out, label, model | shown, sequences, predict))
    if "ceiling" in request.rows and request.sweep is None:
        encoder = encoder or FrozenSampleEncoder.of(config, device)
        for label, encoder_used in (("ceiling with VAE", encoder), ("ceiling without VAE", None)):
            settings = base | {"options": asdict(options)}
            if encoder_used is not None and encoder_used.codec.power != 1:
                settings["pointmap_power"] = encoder_used.codec.power
            ceiling = partial(ceiling_sequence, encoder_used, options)
            stored.append(_stored_row(request.out, label, settings, sequences, ceiling))
    return stored


def _variants(
    request: Request, pipeline: One4DPipeline, options: PredictOptions, step: int
) -> Iterable[tuple[str, One4DPipeline, PredictOptions]]:
    """Yield the rows of one adapter: itself, or one per swept value."""
    if request.sweep is None:
        yield "model", pipeline, options
    elif request.sweep == "checkpoint":
        yield f"checkpoint {step}", pipeline, options
    else:
        for value in SWEEPS[request.sweep]:
            label = f"{request.sweep} {value:g}"
            if request.sweep == "sparsity":
                yield label, pipeline, replace(options, sparsity=value)
            elif request.sweep == "guidance":
                yield label, pipeline.with_settings(guidance=value), options
            else:
                yield label, pipeline.with_settings(steps=int(value)), options


def _stored_row(
    out: Path,
    label: str,
    settings: dict[str, object],
    sequences: list[EvalSequence],
    predict: Callable[[EvalSequence, Path], None],
) -> _StoredRow:
    """Predict what a row's folder does not hold yet; ConfigError for a folder of other settings."""
    row = _StoredRow(label, out / "predictions" / label.replace(" ", "_"), settings)
    path, text = row.folder / "settings.json", json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if path.is_file():
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ConfigError(f"{path}: holds no settings; delete {row.folder} or set another --out")
        if differing := changes(flatten(stored), flatten(json.loads(text))):
            raise ConfigError(
                f"{row.folder}: holds predictions of other settings: {', '.join(map(str, differing))}; delete it or "
                "set another --out"
            )
    write_text(path, text)
    missing = [s for s in sequences if not (row.folder / s.name / "cameras.json").is_file()]
    for sequence in Progress(missing, desc=row.label, unit="sequence", disable=not missing):
        predict(sequence, row.folder / sequence.name)
    return row


def generate_vbench(request: Request, config: Config, adapters: Path, ratio: str, fps: float) -> None:
    """Write the videos of VBench's I2V suite; ConfigError where its list or images are missing."""
    root = request.root or Path()
    path, images = root / "vbench2_i2v_full_info.json", root / "data" / "crop" / ratio
    if not path.is_file() or not images.is_dir():
        raise ConfigError(
            f"--root: need {path} and {images}; clone VBench, run its vbench2_beta_i2v/download_data.sh and name the "
            "folder vbench2_beta_i2v"
        )
    tree = read_json(path)
    with reading(path):
        prompts = read_i2v_prompts(tree, images, VBENCH_DIMENSIONS)
    pipeline = One4DPipeline.open(AdapterCard.read(adapters).configure(config), adapters, device_of(config))
    generate_videos(
        pipeline, prompts, request.options(config), request.out / "videos", fps, lambda p: Progress(p, unit="prompt")
    )
