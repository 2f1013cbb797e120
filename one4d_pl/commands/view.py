"""one4d view: look at a 4D scene in the browser, or make one html file of it that needs no server.

The viewer listens on 127.0.0.1 only; from elsewhere go through `ssh -L 8080:127.0.0.1:8080`.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path

from one4d_pl.commands.command import Command
from one4d_pl.config import ConfigError
from one4d_pl.errors import UserError
from one4d_pl.files import check_folder

log = logging.getLogger("one4d_pl")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scene", type=Path, help="a scene folder, as `one4d generate` leaves it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one offline file (25 MB at most) and end")
    parser.add_argument("--port", type=int, default=8080, help="the next free one from here (default %(default)s)")
    parser.add_argument("--keep-flying-points", action="store_true", help="keep points between two surfaces, at edges")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)  # it logs every connection
    view(args.scene, args.html, args.port, args.keep_flying_points)


def view(folder: Path, html: Path | None, port: int, keep_flying_points: bool) -> None:
    """Serve a stored scene, or write it as html; ConfigError says what is missing."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: {port}, need 0 to 65535")
    if importlib.util.find_spec("viser") is None:
        raise ConfigError("the viewer needs viser, which is not installed: pip install 'one4d_pl[viz]'")
    if html is not None:
        check_folder(html.parent, "--html")

    from one4d_pl.scene.scene import open_scene
    from one4d_pl.scene.viewer import Viewer, write_html

    scene = open_scene(folder)
    if html is not None:
        try:
            stride = write_html(html, scene, keep_flying_points)
        except UserError:
            raise
        except ValueError as error:
            raise ConfigError(f"--html: cannot write {html} ({error})") from None
        log.info("%s: %.1f MB, stride %d (every n-th pixel both ways)", html, html.stat().st_size / 1e6, stride)
        return
    try:
        viewer = Viewer(scene, port, keep_flying_points)
    except OSError as error:
        raise ConfigError(f"--port: cannot listen on {port} ({error})") from None
    log.info("open %s (Ctrl-C ends)", viewer.address)
    try:
        viewer.play_forever()
    finally:
        viewer.close()


main = Command("one4d view", __doc__, _add_arguments, _run)
