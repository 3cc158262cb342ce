"""Every launch goes through Triton's own driver code, up to where a GPU would take over."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from fluxkiln.kernels import registry, resources
from fluxkiln.kernels.arch import ARCHS, NATIVE
from fluxkiln.kernels.language import jit

HERE = Path(__file__).parent


@jit
def _kernel(x): ...


def test_a_kernel_runs_on_the_gpu_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks for the current GPU alone."""
    seen = []

    @contextlib.contextmanager
    def current(device: torch.device):
        seen.append(device)
        yield
        seen.append("out")

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: seen.append("run"))
    second = SimpleNamespace(device=torch.device("cuda:1"))
    for x in (second, SimpleNamespace(base=second)):  # a tensor and a descriptor
        _kernel[(1,)](x)
    assert seen == 2 * [torch.device("cuda:1"), "run", "out"]


@pytest.mark.long  # compiles 17 to 23 kernels for each architecture
@pytest.mark.compiled
@pytest.mark.skipif(shutil.which("gcc") is None, reason="makes a stand-in for libcuda: needs gcc")
@pytest.mark.parametrize("arch", NATIVE)
def test_the_driver_takes_every_launch(arch: int, tmp_path: Path) -> None:
    """Arguments as the launcher reads them, tensor maps and launches as the CUDA driver's documentation wants them."""
    library = tmp_path / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-DSHARED_LIMIT={ARCHS[arch].shared_limit}"]
    subprocess.run([*command, f"-I{headers}", str(HERE / "libcuda.c"), "-o", str(library)], check=True)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-P", str(HERE / "launches.py"), str(ARCHS[arch]), str(library), "--hungriest"]
    found = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    shipped = resources.hungriest(arch, registry.configurations(arch))
    assert found["failed"] == {}
    assert found["launches"] == len(shipped)
    assert bool(found["maps"]) == (arch >= 90)
