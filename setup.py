"""Builds the CPU engine of csrc/; everything else stands in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("csrc")

setup(
    ext_modules=[
        Extension(
            "lt4rec_sparse.kernels._engine",
            sources=sorted(str(p) for p in CSRC.glob("*.cpp")),
            depends=sorted(str(p) for p in CSRC.glob("*.h")),
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fopenmp",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=["-fopenmp"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            # Without a compiler the install still succeeds, and the reference serves in the engine's place.
            optional=os.environ.get("LT4REC_SPARSE_REQUIRE_NATIVE") != "1",
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
