"""one4d COMMAND ...: train, generate, look at, export and measure 4D scenes; `one4d COMMAND --help` tells the rest.

`python -m one4d_pl COMMAND` is the same.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from typing import NoReturn

COMMANDS = {
    "demo": "see and measure what the shipped adapters make of the toy world",
    "generate": "a text, an image, a few frames or a video becomes a 4D scene",
    "app": "a page in the browser that makes scenes and shows them",
    "view": "look at a scene in the browser, or make one html file of it",
    "export": "a scene as ply, glb, COLMAP, nerfstudio; an adapter for diffusers and Wan",
    "cameras": "intrinsics, cameras and depth from anyone's pointmap video",
    "evaluate": "score an adapter, or anyone's predictions, on a benchmark",
    "fit": "train Decoupled LoRA Control on a frozen Wan",
    "plan": "memory, time and strategies of a training, before anything is loaded",
    "rehearse": "a training step on a GPU that is not there",
    "preflight": "what would end a run in an hour, found in a minute, on every node",
    "fetch-weights": "download a base, or check one",
}


def main() -> NoReturn:
    """Run the command that the first argument names; exit code 2 where it names none."""
    if len(sys.argv) < 2 or sys.argv[1] in {"-h", "--help"}:
        print(f"{__doc__}\ncommands:", *(f"  {name:<15}{words}" for name, words in COMMANDS.items()), sep="\n")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        print(f"error: one4d has no command {name!r}; it has: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    if name == "fit":  # a process like any rank's, which watches for signals before it imports
        runpy.run_module("one4d_pl.fit", run_name="__main__", alter_sys=True)
    importlib.import_module(f"one4d_pl.commands.{name.replace('-', '_')}").main.run_process()
    raise AssertionError("a command ends its process")


if __name__ == "__main__":
    main()
