"""Compiles csrc/cuda with nvcc: run by CMake when the package is installed, and by `adamss-kernels build-cuda` later.

Standard library only, since an isolated build has nothing else: `python cuda_compile.py --out FOLDER`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAME = "libadamss_cuda.so"
ARCHITECTURES = ("80", "90", "100", "120")
HOW_TO_BUILD = "with CUDA's compiler, nvcc, at hand, `adamss-kernels build-cuda` builds it"


def csrc() -> Path:
    """Return the folder of all sources: beside this file in an installed package, else in the source tree."""
    installed = Path(__file__).parent / "csrc"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "csrc"


def source_hash(folder: Path) -> str:
    """Return a hash of the names and contents of all in `csrc` that is compiled."""
    digest = hashlib.sha256()
    for path in sorted(p for name in ("cuda", "torch") for p in (folder / name).iterdir()):
        if path.suffix in (".cu", ".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    """Return the compiler: $CUDACXX, or else that of $CUDA_HOME, on the path, or where CUDA installs itself."""
    named, home = os.environ.get("CUDACXX"), os.environ.get("CUDA_HOME")
    at_home = [str(Path(home, "bin", "nvcc"))] if home else []
    candidates = [named] if named else [*at_home, "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for candidate in candidates if (found := shutil.which(candidate))), None)


def nvcc_version(nvcc: str) -> str:
    """Return the compiler's version, as in "13.0"."""
    found = re.search(r"release (\S+),", _said(nvcc, "--version"))
    return found[1] if found else "of unknown version"


def supported(nvcc: str, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the architectures to compile for: those wanted, or those of ARCHITECTURES that this nvcc knows.

    Raises:
        ValueError: nvcc does not know one that is wanted.
    """
    known = set(re.findall(r"compute_(\w+)", _said(nvcc, "--list-gpu-arch")))
    unknown = [arch for arch in wanted or () if arch not in known]
    if unknown:
        listed = " ".join(sorted(known, key=_number))
        raise ValueError(f"architectures: {nvcc} compiles for {listed}, got {' '.join(unknown)}")
    return tuple(wanted) if wanted else tuple(arch for arch in ARCHITECTURES if arch in known)


def command(nvcc: str, architectures: Sequence[str], out: Path, *options: str) -> list[str]:
    """Return the command that compiles for `architectures`, with PTX of the newest for those that are newer still."""
    # wgmma exists only in code for 9.0 alone, which every GPU of 9.0 runs.
    exact = ["90a" if arch == "90" else arch for arch in architectures]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in exact]
    newest = max(architectures, key=_number)
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return [
        *(nvcc, "-O3", "-std=c++17", *targets),
        # CUDA's runtime is linked in: what torch brings, or does not bring, is not needed.
        *("--shared", "-cudart=static", "-Xcompiler=-fPIC,-Wall,-Wextra", f"--threads={os.cpu_count() or 1}"),
        f'-DADAMSS_CUDA_ARCHITECTURES="{" ".join(names(architectures))}"',
        *(*options, *(str(path) for path in sorted((csrc() / "cuda").glob("*.c*"))), "-o", str(out)),
    ]


def names(architectures: Sequence[str]) -> list[str]:
    """Return the architectures as the library names them: the newest also as PTX."""
    return [arch + "+PTX" * (arch == max(architectures, key=_number)) for arch in architectures]


def compile_library(nvcc: str, architectures: Sequence[str], out: Path) -> None:
    """Compile the library into the file `out`.

    Raises:
        RuntimeError: nvcc failed; the message holds what it said.
    """
    done = subprocess.run(command(nvcc, architectures, out), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{nvcc} failed with status {done.returncode}: {(done.stderr + done.stdout).strip()}")


def _number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def _said(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _main() -> int:
    """Compile into a folder where nvcc is there, and record what happened; an install never fails for this."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", nargs="*", help="default: those of ARCHITECTURES that nvcc knows")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        state = f"not built: no nvcc was found when the package was installed; {HOW_TO_BUILD}"
    else:
        try:
            architectures = supported(nvcc, args.arch)
            compile_library(nvcc, architectures, args.out / NAME)
            state = f"built with nvcc {nvcc_version(nvcc)} for {' '.join(names(architectures))}"
        except (OSError, RuntimeError, ValueError) as error:
            sys.stderr.write(f"{error}\n")
            state = f"not built: {' '.join(str(error).split())[:500]}; once that is mended, {HOW_TO_BUILD}"
    (args.out / "cuda_build_state.txt").write_text(state + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
