"""Importing the package is light and needs nothing that is optional."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

OPTIONAL = ("triton", "peft", "transformers", "sklearn", "safetensors", "tqdm", "matplotlib")
OPTIONAL += ("accelerate", "bitsandbytes", "torchao")
# Parts of torch that take their time.
OPTIONAL += ("torch._dynamo", "torch.distributed.tensor")


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_layer_works_where_optional_libraries_cannot_be_imported():
    run(
        """
import sys
for name in ("triton", "peft", "transformers", "matplotlib"):
    sys.modules[name] = None
import ctypes
def refuse(*args, **kwargs):
    raise OSError("unloadable in this test")
import torch
ctypes.CDLL = refuse
import adamss_kernels as ak
layer = ak.FusedAdaMSSLinear.from_linear(torch.nn.Linear(8, 6), ak.AdaMSSConfig(r=4, num_subspaces=2))
layer(torch.randn(3, 8)).sum().backward()
assert layer.C.grad.abs().sum() > 0
states = ak.available_backends()
assert states["reference"] == "available"
assert states["cpu"] != "available", states
"""
    )


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """The modules that importing the package adds to torch's own, which differ from version to version."""
    code = "import sys, torch; torchs = set(sys.modules); import adamss_kernels; print(*set(sys.modules) - torchs)"
    return set(run(code).split())


@pytest.mark.parametrize("module", OPTIONAL)
def test_importing_the_package_does_not_import(module, imported):
    assert "adamss_kernels" in imported
    assert not [name for name in imported if name == module or name.startswith(f"{module}.")]


def test_the_commands_work_where_triton_and_the_hugging_face_libraries_cannot_be_imported():
    run(
        """
import sys
for name in ("triton", "peft", "transformers", "matplotlib"):
    sys.modules[name] = None
from adamss_kernels.cli import main
assert main(["info"]) == 0
"""
    )


@pytest.mark.parametrize(
    ("name", "library"),
    [("ASACallback", "transformers"), ("apply_adamss_kernels", "peft"), ("revert_adamss_kernels", "peft")],
)
def test_a_name_that_needs_a_missing_library_says_which_extra_brings_it(name, library):
    run(
        f"""
import sys
sys.modules[{library!r}] = None
import adamss_kernels
try:
    from adamss_kernels import {name}
except ImportError as error:
    assert "{name} needs {library}" in str(error) and "adamss-kernels[hf]" in str(error), error
else:
    raise AssertionError("imported")
"""
    )


def test_importing_the_package_queries_no_device():
    run(
        """
import torch
def refuse(*args, **kwargs):
    raise AssertionError("a device was queried")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse
import adamss_kernels
"""
    )
