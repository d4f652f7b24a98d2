"""The optional C++ extension; all other settings are in pyproject.toml.

Without a compiler, without pybind11 or with FASTRECYCLE_NO_EXTENSION=1 the package is installed in
pure Python, which gives the same results.
"""

import os
import sys
import textwrap
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels", "csrc")


def without(reason):
    """Say that the package is built without its extension, once: not when it is only described."""
    if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        print(f"fastrecycle: building without the C++ extension: {reason}", file=sys.stderr)


def extensions():
    """The extension, or none where it is not wanted or cannot be set up."""
    if os.environ.get("FASTRECYCLE_NO_EXTENSION", "0") not in ("", "0"):
        without("FASTRECYCLE_NO_EXTENSION is set")
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        without("pybind11 is not installed")
        return []
    unix = sys.platform != "win32"
    return [
        Pybind11Extension(
            "fastrecycle_kernels._host",
            sorted(path.as_posix() for path in SOURCES.glob("*.cpp")),
            depends=sorted(path.as_posix() for path in SOURCES.glob("*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread"] if unix else ["/O2"],
            extra_link_args=["-pthread"] if unix else [],
        )
    ]


class OptionalBuild(build_ext):
    """Goes on in pure Python where compiling fails."""

    def run(self):
        """Build, or say why not."""
        try:
            super().run()
        except Exception as error:  # each platform and compiler fails in a way of its own
            without(textwrap.shorten(str(error), 160) or type(error).__name__)
            self.extensions = []
            self.distribution.ext_modules = None
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.root_is_pure = True  # no platform tag


EXTENSIONS = extensions()
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": OptionalBuild} if EXTENSIONS else {})
