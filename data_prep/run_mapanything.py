"""Run MapAnything on a folder of pictures: PYTHON data_prep/run_mapanything.py IMAGES PREDICTIONS.npz MODEL

`data_prep.label` starts this file with the Python that has MapAnything, so it imports nothing of this package. It
leaves what MapAnything's own app saves (`data_prep/sources/labels.py`), by the calls of its README at f7ebafb.
"""

from __future__ import annotations

import sys

import numpy as np


def label(images: str, predictions: str, model: str) -> None:
    """Label the pictures, in the order of their names, and write predictions.npz."""
    import torch
    from mapanything.models import MapAnything
    from mapanything.utils.image import load_images

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = MapAnything.from_pretrained(model).to(device)
    settings = {"memory_efficient_inference": True, "use_amp": device == "cuda", "apply_mask": True, "mask_edges": True}
    views = network.infer(load_images(images), **settings)
    names = {"depth": "depth_z", "extrinsic": "camera_poses", "intrinsic": "intrinsics", "images": "img_no_norm"}
    arrays = {name: np.stack([view[key][0].float().cpu().numpy() for view in views]) for name, key in names.items()}
    mask = np.stack([view["mask"][0].squeeze(-1).cpu().numpy().astype(bool) for view in views])
    conf = np.stack([view["conf"][0].float().cpu().numpy() for view in views])
    arrays["final_mask"], arrays["conf"] = mask & (arrays["depth"][..., 0] > 0), conf.reshape(mask.shape)
    np.savez(predictions, allow_pickle=False, **arrays)


if __name__ == "__main__":
    label(*sys.argv[1:])
