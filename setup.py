"""Builds the C++ functions of the fused programs into the package; everything else is in pyproject.toml.

Without a C++ compiler the package is installed without them. A run then trains eagerly, or builds them for its own processor.
"""

import os
import runpy

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """Libraries that ctypes loads: they are no Python modules, and are not to be taken for some."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".bin"


sources = runpy.run_path("fastppo/fused/sources.py")
setup(
    cmdclass={"build_ext": BuildKernels},
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
    ]
)
