"""Run PEFT's own AdaMSS tests with `apply_adamss_kernels` switched on for every model that they make.

PEFT's source distribution carries its tests; pip downloads it, and nothing of it is kept. The release is the installed
one, or any other that `--version` names: that one is then put in front of the installed one, for this run only, and our
own tests of the integration run with it too. Tests that need the Hugging Face hub are left out, so that only pip needs
the network.

    python tests/peft_suite.py [--version 0.19.0] [--stock] [more arguments for pytest]

This file is also the pytest plugin that does the switching.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

FILES = ("test_adamss_asa.py", "test_custom_models.py", "test_initialization.py")
"""Those with tests that make AdaMSS models and need nothing from the Hugging Face hub."""

_OTHER_BASE = (
    "loads an adapter onto a base model that was drawn anew, which stock PEFT does silently and with a wrong row "
    "assignment; here it is an error that names the layer"
)
EXCEPTIONS = {
    f"test_custom_models.py::TestRequiresGrad::{name}[{low_cpu_mem_usage}-AdamssConfig]": _OTHER_BASE
    for name in (
        "test_loading_model_requires_grad_set_correctly",
        "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
    )
    for low_cpu_mem_usage in (False, True)
}
"""Tests that stock PEFT passes and a fused model does not, each with the reason."""

UNSEEDED = ("test_load_model_low_cpu_mem_usage", "test_load_multiple_adapters")
"""Tests that load an adapter again: before 0.20, PEFT draws a new row assignment for it, even on the same base."""

_counts = {"models": 0, "fused calls": 0}


def pytest_configure(config: object) -> None:
    """Fuse every AdaMSS model at the end of its construction, through whichever function of PEFT it is made."""
    from peft.tuners.adamss.model import AdamssModel

    from adamss_kernels.integrations import peft as integration

    construct = AdamssModel.__init__

    def construct_fused(self: object, *args: object, **kwargs: object) -> None:
        construct(self, *args, **kwargs)
        integration.apply_adamss_kernels(self)
        _counts["models"] += 1

    AdamssModel.__init__ = construct_fused
    packed = integration.FusedPeftLinear._packed

    def counted(self: object, *args: object) -> object:
        _counts["fused calls"] += 1
        return packed(self, *args)

    integration.FusedPeftLinear._packed = counted


def pytest_collection_modifyitems(items: list) -> None:
    """Mark the listed exceptions as expected failures: one that passes after all is then an error."""
    import peft
    import pytest

    unseeded = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20)
    for item in items:
        reason = EXCEPTIONS.get(item.nodeid.removeprefix("tests/"))
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        elif unseeded and item.originalname in UNSEEDED:
            # Not strict: by chance the new assignment may have the same sizes.
            item.add_marker(pytest.mark.xfail(reason="PEFT before 0.20 draws row assignments at random"))


def pytest_terminal_summary(terminalreporter: object) -> None:
    """Say how much really went through the fused kernels."""
    import peft

    terminalreporter.write_line(
        f"peft {peft.__version__}: {_counts['models']} models fused, {_counts['fused calls']} calls"
    )


def main() -> int:
    """Download, run, clean up; return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="release of PEFT; default: the installed one")
    parser.add_argument("--stock", action="store_true", help="leave the models as PEFT makes them")
    args, rest = parser.parse_known_args()

    import importlib.metadata

    version = args.version or importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = [f"peft=={version}", "--no-deps"]
        subprocess.run([*pip, "download", *wanted, "--no-binary", "peft", "--dest", name], check=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        source = folder / f"peft-{version}"
        (source / "tests" / "__init__.py").touch()
        paths = [str(HERE.parent), str(HERE)]
        if args.version:
            subprocess.run([*pip, "install", *wanted, "--target", str(folder / "release")], check=True)
            paths.insert(0, str(folder / "release"))
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        environment = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        files = [f"tests/{name}" for name in FILES if (source / "tests" / name).is_file()]
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-k", "adamss", *files, *rest]
        if not args.stock:
            command += ["-p", "peft_suite"]
        status = subprocess.run(command, cwd=source, env=os.environ | environment, check=False).returncode
        if args.version and not args.stock:
            ours = [str(HERE / name) for name in ("test_peft_integration.py", "test_trainer.py")]
            command = [sys.executable, "-m", "pytest", "-q", *ours]
            status = (
                subprocess.run(command, cwd=HERE.parent, env=os.environ | environment, check=False).returncode or status
            )
        return status


if __name__ == "__main__":
    sys.exit(main())
