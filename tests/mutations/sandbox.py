"""A throw-away copy of the repository, and its tests in processes of their own."""

from __future__ import annotations

import compileall
import configparser
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 600  # for the tests of one mutation: one that never ends is seen as well
PROCESSES = multiprocessing.get_context("forkserver")
# A process forked from one that has imported these starts its tests in a second.
PRELOADED = [
    "torch",
    "scipy.stats",
    "pytest",
    "hypothesis",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
    "lightning",
]


@contextmanager
def copy_of_the_repository() -> Iterator[Path]:
    """A folder with what git tracks or would, in which every package lies where an import looks for it first."""
    PROCESSES.set_forkserver_preload(PRELOADED)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / ROOT.name
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        setup = configparser.ConfigParser()
        setup.read(copy / "setup.cfg")
        packages = [line.split(" = ") for line in setup["options"]["package_dir"].split("\n") if line]
        for package, where in packages:
            # An editable install would find those that lie elsewhere in the working tree.
            if package.replace(".", "/") != where:
                (copy / package.replace(".", "/")).symlink_to(copy / where, target_is_directory=True)
            # Bytecode that is valid by the source's hash: two mutations may be of one size and one second.
            compileall.compile_dir(copy / where, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        yield copy


def run_tests(copy: Path, *tests: str) -> str:
    """What pytest says of them, in a process of its own that has what takes long to import already.

    Raises:
        TimeoutError: if it takes longer than any of them should.
        RuntimeError: if they imported the package from elsewhere.
    """
    said, elsewhere = copy.parent / "said", copy.parent / "elsewhere"
    process = PROCESSES.Process(target=_pytest, args=(copy, said, elsewhere, tests))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        raise TimeoutError
    if elsewhere.exists():
        raise RuntimeError(f"expected code from the copy in {copy}, got {elsewhere.read_text()}")
    return said.read_text()


def _pytest(copy: Path, said: Path, elsewhere: Path, tests: tuple[str, ...]) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # for processes that tests start
    sys.path.insert(0, str(copy))
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow"]
    pytest.main([*options, *tests])
    files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "entropy_pl"]
    others = [file for file in files if file and not Path(file).resolve().is_relative_to(copy)]
    if others or not files:
        elsewhere.write_text(str(others))
