"""Where compiled kernels are kept: on the node, per user, because home folders are often shared, slow and locked."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from efficient_dl.errors import LaunchError

_log = logging.getLogger(__name__)

# Both write a file under another name and rename it, so ranks of a node may share a folder.
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def use_node_caches(environment: MutableMapping[str, str], uid: int) -> None:
    """Point Triton and Inductor to folders on this node, unless the variables are set already.

    Where no folder can be made, their own defaults stay, which is logged.
    Raises LaunchError if the folder is another user's, or open to others: whoever writes there runs code here.
    """
    missing = {name: folder for name, folder in CACHES.items() if name not in environment}
    if not missing:
        return
    home = Path(environment.get("TMPDIR") or tempfile.gettempdir()) / f"efficient_dl-{uid}"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _problem(home.lstat(), uid)
    except FileExistsError:
        problem = "no folder"
    except OSError as error:
        _log.warning("compiled kernels are kept in the home folder: %s", error)
        return
    if problem is not None:
        raise LaunchError(
            "compiled kernels cannot be kept on this node",
            expected="a folder of this user's alone",
            found=problem,
            where=str(home),
            fix=f"remove it, or set TMPDIR or {' and '.join(missing)} to a folder on the node",
        )
    for name, folder in missing.items():
        environment[name] = str(home / folder)


def _problem(found: os.stat_result, uid: int) -> str | None:
    if not stat.S_ISDIR(found.st_mode):
        return "no folder"
    if found.st_uid != uid:
        return f"a folder of user {found.st_uid}"
    if found.st_mode & 0o022:
        return f"mode {stat.S_IMODE(found.st_mode):o}: others may write"
    return None


def own_uid() -> int:
    """The user whose files this process makes."""
    return os.geteuid()
