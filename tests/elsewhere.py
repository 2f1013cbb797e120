"""python -m tests.elsewhere: a quick selection of the tests, as they would run on somebody else's machine.

1. The checkout, uncommitted files included, is copied into a folder with a space in its name.
2. There an ordinary user runs the tests and a short training: `nobody` where this is started as root. A folder on PATH
   may not be read by that user.
3. The processor is an ordinary laptop's: the libraries are told to use nothing beyond AVX2.

Exits with 1 if anything failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).parents[1]
NOBODY = 65534
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
TESTS = ("tests/geometry", "tests/models", "tests/evaluation", "tests/postopt")
STEP_TIMEOUT_S = 600

CLIPS = ("data.toy.train_synthetic=6", "data.toy.train_real=2", "data.toy.val=2", "val.clips=1", "val.sigmas=[0.5]",
         "eval.every=0", "train.global_batch_size=2", "train.micro_batch_size=2", "optim.cooldown_steps=0")  # fmt: skip
TRAINING = ("-m", "one4d_pl.fit", "--config", "configs/dlc.yaml", *CLIPS)
ZERO3 = ("train.strategy=deepspeed", "train.zero_stage=3")


def main() -> int:
    """Copy, run, and return the exit code."""
    with tempfile.TemporaryDirectory(prefix="somebody else ") as folder:
        user = User(Path(folder))
        python = user.interpreter()
        pytest = ("-m", "pytest", "-q", "-m", "not slow and not gpu and not slurm", "--durations=10", *TESTS)
        steps = (pytest, (*TRAINING, "train.max_steps=2"), (*TRAINING, *ZERO3, "train.max_steps=3"))
        return max(user.run([python, *step]) for step in steps)


class User:
    """Somebody who owns `folder` and nothing else of this machine; oneself, unless one is root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout, self.closed = folder, folder / "my checkout", folder / "closed"
        self.account: dict[str, object] = {}
        self.environment = {
            **os.environ, **AVX2, "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": str(self.checkout), "PATH": f"{self.closed}{os.pathsep}{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        copy_checkout(self.checkout)
        for name in ("home", "tmp"):
            (folder / name).mkdir()
        if os.getuid() == 0:
            self.account = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        self.closed.mkdir(mode=0o700 if os.getuid() == 0 else 0o000)

    def interpreter(self) -> str:
        """This Python with its packages, copied as far as the user may not read it where it is."""
        if self._can([sys.executable, "-c", "import torch"]):
            return sys.executable
        home = self.folder / "python"
        without = shutil.ignore_patterns("site-packages", "test")
        shutil.copytree(sys.base_prefix, home, symlinks=True, ignore=without, copy_function=link_or_copy)
        python = home / Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
        found = []
        for i, packages in enumerate(path for path in sys.path if path.endswith("site-packages")):
            if not self._can(["ls", packages]):
                copy = self.folder / f"packages-{i}"
                packages = str(shutil.copytree(packages, copy, symlinks=True, copy_function=link_or_copy))
            found.append(packages)
        own = next(home.glob("lib/python3*")) / "site-packages"
        own.mkdir()
        (own / "packages.pth").write_text("\n".join(found))
        self.environment["LD_LIBRARY_PATH"] = str(home / "lib")  # libpython: its own place is closed to the user
        return str(python)

    def run(self, command: list[str]) -> int:
        """Run in the user's checkout; 0, or 1 if it failed."""
        print("==", " ".join(command[1:]), flush=True)
        done = subprocess.run(command, env=self.environment, cwd=self.checkout, timeout=STEP_TIMEOUT_S, **self.account)
        return int(done.returncode != 0)

    def _can(self, command: list[str]) -> bool:
        try:
            return subprocess.run(command, cwd="/", capture_output=True, **self.account).returncode == 0
        except PermissionError:
            return False


def copy_checkout(target: Path) -> None:
    """Every file that git knows or would take, as it is now."""
    # safe.directory: the checkout may belong to another user than root
    listing = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=REPO, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # deleted, and not committed yet
            shutil.copy2(REPO / name, target / name, follow_symlinks=False)


def link_or_copy(source: str, target: str) -> None:
    """A second name for the same file where the filesystem allows it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    sys.exit(main())
