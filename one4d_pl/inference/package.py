"""The folder of an adapter for others: its files, a model card (README.md), and on request a picture and the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from one4d_pl.config import EMBEDDED_BASE, hub_name
from one4d_pl.errors import UserError
from one4d_pl.files import whole_folder, write_text
from one4d_pl.inference.hub import README, SAMPLE, copy_base
from one4d_pl.models.adapters import AdapterCard, save_adapters
from one4d_pl.models.transformer import CoupledTransformer
from one4d_pl.scene.folder import save_picture
from one4d_pl.scene.media import load_image
from one4d_pl.scene.scene import Scene, save_panel

Metrics = Mapping[str, Mapping[str, float]]  # benchmark -> metric -> value

# the hub's own names for the tasks; the first that the adapter was trained on stands for it
HUB_TASKS = {"image": "image-to-video", "sparse": "image-to-video", "text": "text-to-video", "video": "video-to-video"}


def write_package(
    folder: Path,
    transformer: CoupledTransformer,
    card: AdapterCard,
    place: str,  # folder or hub name that opens it
    base: Path | None = None,  # to be copied, to where the card has it
    licence: str | None = None,  # of the adapter, as the hub's list has it; None = as its training data allow
    metrics: Metrics | None = None,
    sample: Scene | Path | None = None,  # a scene, or the file of a picture
) -> None:
    """Write a new folder, whole or not at all; UserError where something cannot be shown."""
    _check_metrics(metrics or {})
    picture = load_image(sample) if isinstance(sample, Path) else None
    front, text = _front_matter(card, place, licence, metrics or {}), _text(card, place, metrics or {}, bool(sample))
    with whole_folder(folder) as staging:
        save_adapters(transformer, staging, card)
        if base is not None:
            copy_base(base, staging / card.base_path)
        if isinstance(sample, Scene):
            save_panel(staging / SAMPLE, sample)
        elif picture is not None:
            save_picture(staging / SAMPLE, picture, [])
        write_text(staging / README, f"---\n{front}\n---\n{text}")


def _front_matter(card: AdapterCard, place: str, licence: str | None, metrics: Metrics) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = next((HUB_TASKS[task] for task in HUB_TASKS if task in card.tasks), "image-to-video")
    results = [
        EvalResult(task, dataset_type=benchmark, dataset_name=benchmark, metric_type=metric, metric_value=value)
        for benchmark, values in metrics.items()
        for metric, value in values.items()
    ]
    linked = None if card.base_path == EMBEDDED_BASE else hub_name(card.base_path)  # what the hub can link to
    data = ModelCardData(
        library_name="one4d_pl",
        base_model=None if linked is None else linked[0],
        base_model_relation=None if linked is None else "adapter",
        license=licence or "other",
        license_name=None if licence else "as-its-training-data",
        pipeline_tag=task,
        tags=["one4d", "4d", "video", "pointmap", "lora", *(f"training-data:{tag.lower()}" for tag in _licences(card))],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=place.partition("/")[2] or place if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _text(card: AdapterCard, place: str, metrics: Metrics, sample: bool) -> str:
    sources = [f"- {source['source']} ({source['domain']}): {source['licence']}" for source in card.data_sources]
    measured = ["## Measured", "", "| benchmark | metric | value |", "|---|---|---|"]
    measured += [
        f"| {benchmark} | {metric} | {value:.4g} |"
        for benchmark, values in metrics.items()
        for metric, value in values.items()
    ]
    parts = [
        "# One4D adapters (Decoupled LoRA Control, arXiv 2511.18922)",
        f"""Rank {card.rank}, alpha {card.rank * card.lora_scale:g}, control links after blocks {card.link_blocks},
{card.step} steps, clips of {card.num_frames} frames of {card.height}x{card.width}; tasks: {", ".join(card.tasks)}.
Base: {card.base_path} (fingerprint {card.base_fingerprint[:12]}).""",
        *([f"![frames, pointmap and depth of a generated scene]({SAMPLE})"] if sample else []),
        f"""```python
from one4d_pl.inference.pipeline import One4DPipeline

pipe = One4DPipeline.from_pretrained("{place}")
scene = pipe("a prompt", frames={{0: "first.png"}})
```""",
        *(["\n".join(measured)] if metrics else []),
        "## Training data",
        f"Licences: {', '.join(_licences(card)) or 'none stated'}.",
        "\n".join(sources or ["- none stated"]),
    ]
    return "\n\n".join(parts) + "\n"


def _licences(card: AdapterCard) -> list[str]:
    return sorted({source["licence"] for source in card.data_sources})


def _check_metrics(metrics: Metrics) -> None:
    """Raise UserError where a metric is no finite number, since the card would show it as one."""
    for benchmark, values in metrics.items():
        for metric, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"metrics: {benchmark}: {metric} is {value!r}, need a finite number")
