"""Builds the C++ functions of the fused programs into the package; everything else is in pyproject.toml.

Without a C++ compiler the package is installed without them. A run then trains eagerly, or builds them for its own processor.
"""

import runpy

from setuptools import Extension, setup

sources = runpy.run_path("fastppo/fused/sources.py")
setup(
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
