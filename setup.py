"""Builds the CPU engine of csrc/; everything else is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
NO_ENGINE = (
    "lt4rec_sparse is built WITHOUT its CPU engine: sparse networks will run dense in torch, slower. Its compiler's "
    "errors are above. Install a C++17 compiler with OpenMP (Debian: apt install g++) and build again with "
    "LT4REC_SPARSE_REQUIRE_NATIVE=1, which makes such an error fatal, and `pip install --no-cache-dir`."
)


class BuildEngine(build_ext):
    """Says so where the engine could not be built."""

    def run(self) -> None:
        """Build, and warn where nothing came of it."""
        super().run()
        if not self.has_engine():
            self.warn(NO_ENGINE)

    def has_engine(self) -> bool:
        """Whether the engine is built."""
        return all(Path(path).exists() for path in self.get_outputs())


class TaggedWheel(bdist_wheel):
    """Tags a wheel by what it holds: without the engine it is pure Python, `py3-none-any`."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of Python, ABI and platform; runs after the build."""
        self.root_is_pure = not self.get_finalized_command("build_ext").has_engine()
        return super().get_tag()


setup(
    ext_modules=[
        Extension(
            "lt4rec_sparse.kernels._engine",
            sources=sorted(str(p) for p in CSRC.glob("*.cpp")),
            depends=sorted(str(p) for p in CSRC.glob("*.h")),
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",  # debug information, which Python's own flags ask for, was nine tenths of the file
                "-fopenmp",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=["-fopenmp", "-s"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            # Without a compiler the install still succeeds, and torch serves in the engine's place.
            optional=os.environ.get("LT4REC_SPARSE_REQUIRE_NATIVE") != "1",
        )
    ],
    cmdclass={"build_ext": BuildEngine, "bdist_wheel": TaggedWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
