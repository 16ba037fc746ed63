"""Builds the C++ functions of the fused programs into the package; everything else is in pyproject.toml.

Without a C++ compiler the package is installed without them. A run then trains eagerly, or builds them for its own processor.
`FASTPPO_KERNELS=0 python -m build --wheel` leaves them out: that wheel fits every system. Windows has no use for them.
"""

import os
import runpy
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """Libraries that ctypes loads: they are no Python modules, and are not to be taken for some."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".bin"


class TagWheel(bdist_wheel):
    """One wheel of a platform is for every Python, since ctypes loads the libraries."""

    def get_tag(self):
        platform = super().get_tag()[2]
        return "py3", "none", platform


sources = runpy.run_path("fastppo/fused/sources.py")
setup(
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel},
    ext_modules=[
        Extension(
            f"fastppo.fused.kernels_{name}",
            [sources["MAIN"].relative_to(sources["FOLDER"].parents[1]).as_posix()],
            depends=[path.relative_to(sources["FOLDER"].parents[1]).as_posix() for path in sources["files"]()],
            define_macros=[("FASTPPO_SOURCES", f'"{sources["digest"]()}"')],
            extra_compile_args=["-std=c++20", "-O3", "-g0", *flags, *sources["FLAGS"]],
            language="c++",
            optional=True,
        )
        for name, flags in sources["processors"]().items()
        if os.environ.get("FASTPPO_KERNELS") != "0" and sys.platform != "win32"
    ]
)
