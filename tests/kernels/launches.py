"""Launch what is shipped for an architecture through Triton's own driver code, on a libcuda that only checks:

    python tests/kernels/launches.py sm_90 libcuda.so.1 [--hungriest]

Everything between `Launch()` and the GPU is real: specialisation, compilation, the launcher that Triton makes for a
kernel's signature, tensor maps. Prints a JSON object with the number of launches and of tensor maps, and each failure.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from fluxkiln.kernels import registry, resources
from fluxkiln.kernels.arch import parse


def main(arch: int, library: Path, hungriest: bool) -> None:
    cuda = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # before Triton looks for it
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    class Driver(CudaDriver):
        """Triton's, but for what it asks torch."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    knobs.nvidia.libcuda_path = str(library.parent)
    active = Driver.__new__(Driver)  # its `__init__` asks torch for functions that only a build for CUDA has
    driver.set_active(active)
    active.utils, active.launcher_cls = CudaUtils(), CudaLauncher
    shipped = list(registry.configurations(arch))
    failed = {}
    for each in resources.hungriest(arch, shipped) if hungriest else shipped:
        try:
            each.launch()
        except Exception as error:  # each kernel's own failure, all of them told
            failed[f"{each.op} {each.format} {each.name}"] = f"{type(error).__name__}: {error}"
    print(json.dumps({"launches": cuda.launches_so_far(), "maps": cuda.maps_so_far(), "failed": failed}))


if __name__ == "__main__":
    main(parse(sys.argv[1]), Path(sys.argv[2]).resolve(), "--hungriest" in sys.argv)
