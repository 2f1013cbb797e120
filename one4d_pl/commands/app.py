"""one4d app: a page in the browser that makes 4D scenes from a text, an image, a few frames or a video.

It shows frames, depth, the cameras and the points to turn, offers every export, and says the command that does the
same. One scene is made at a time, others wait in a queue. Uploads and scenes lie in a temporary folder: they go after
an hour, and all of them when the app ends. It listens on 127.0.0.1 only; from elsewhere go through
`ssh -L 7860:127.0.0.1:7860`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from one4d_pl import interrupts
from one4d_pl.commands.command import Command
from one4d_pl.commands.generate import add_machine_arguments
from one4d_pl.config import DEMO_ADAPTERS, ConfigError

log = logging.getLogger("one4d_pl")

PREFIX = "one4d-app-"
YOUNG_S = 60.0  # a folder may be so old before its app holds the lock


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add(
        "--adapters",
        type=Path,
        nargs="+",
        default=[DEMO_ADAPTERS],
        metavar="DIR",
        help="to choose from in the page, as of `one4d generate`; the first is opened at once; default: the demo's",
    )
    add("--base", metavar="PATH", help="folder or owner/name[@revision] of the hub; default: the adapter's own")
    add_machine_arguments(parser)
    add = parser.add_argument_group("the server").add_argument
    add("--port", type=int, default=7860, help="default %(default)s")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: whoever reaches this machine may use it")
    add("--share", action="store_true", help="also a public link for a week, through gradio's server elsewhere")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    if not 1 <= args.port <= 65535:
        raise ConfigError(f"--port: {args.port}, need 1 to 65535")
    for name in ("gradio", "viser"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"the app needs {name}, which is not installed: pip install 'one4d_pl[app]'")
    try:
        socket.create_server((args.host, args.port)).close()  # before the model is opened
    except OSError as error:
        raise ConfigError(f"--host, --port: cannot listen on {args.host}:{args.port} ({error.strerror})") from None
    with private_folder() as folder:
        serve(args, folder)


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Open the model and serve the page until the process is interrupted or terminated."""
    signal.signal(signal.SIGTERM, lambda number, frame: interrupts.end())  # the folder is removed then, too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fit does
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    # gradio asks its own address whether it is up; a proxy would not know
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), args.host, "localhost"]))

    from one4d_pl.commands.app_jobs import Studio
    from one4d_pl.commands.app_page import launch

    studio = Studio(folder, args.adapters, _options(args))
    log.info("open %s (Ctrl-C ends)", launch(studio, args.host, args.port, args.share))
    log.setLevel(logging.WARNING)  # the jobs report in the page
    while True:
        time.sleep(1)


def _options(args: argparse.Namespace) -> list[str]:
    """Return the model's options as `one4d generate` takes them."""
    given = {"--base": args.base, "--device": args.device, "--dtype": args.dtype, "--memory": args.memory}
    words = [str(word) for name, value in given.items() if value is not None for word in (name, value)]
    return [*words, *(["--compile"] if args.compile else [])]


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a temporary folder of this process, which alone may look into it, and remove it at the end.

    Folders of apps that were killed are removed as well: nobody holds their lock any more.
    """
    from one4d_pl.data.file_lock import locked

    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, TimeoutError):  # another user's, or in use
            if left.stat().st_uid == os.getuid() and time.time() - left.stat().st_mtime > YOUNG_S:
                with locked(left / ".lock", 0, 0):
                    shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    with interrupts.at_interrupt(remove), locked(folder / ".lock", 0, 0):
        try:
            yield folder
        finally:
            remove()


main = Command("one4d app", __doc__, _add_arguments, _run)
