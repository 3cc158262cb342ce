"""Every symbol of TensorRT that is used exists in the real bindings of both flavours.

TensorRT's own libraries have no place in a test environment (gigabytes, and a GPU to load): its real bindings are
imported over empty stand-ins for them, in a process of its own.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fluxkiln
from fluxkiln.engines.flavour import RTX_TARGETS

ROOT = Path(fluxkiln.__file__).parent.parent
# Variables that hold TensorRT's objects -> their class.
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "optimization": "IOptimizationProfile",
    "layer": "ILayer",
    "refitter": "Refitter",
    "like": "Weights",
    "runtime": "Runtime",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "_cache": "IRuntimeCache",
}
CONFIG = {"export": "IBuilderConfig", "engines": "IRuntimeConfig"}  # of `config`, by folder
# Used only where `Flavour.ahead_of_time` says so.
RTX_ONLY = re.compile(
    r"ComputeCapability\b|CudaGraphStrategy\b|DynamicShapesKernelSpecializationStrategy\b|IRuntimeCache\b"
    r"|IBuilderConfig\.(num_compute_capabilities|set_compute_capability)"
    r"|IRuntimeConfig\.(cuda_graph_strategy|dynamic_shapes_kernel_specialization_strategy|\w+_runtime_cache)"
)
LIBRARIES = re.compile(r"lib(nvinfer|nvinfer_plugin|nvonnxparser)\.so\.\d+")
FUNCTIONS = re.compile(r"\w*(?:Infer|NvOnnx|PluginRegistry)\w*")
PROBE = """
import functools, importlib, json, sys
api = importlib.import_module(sys.argv[1])
def there(symbol):
    try:
        functools.reduce(getattr, symbol.split("."), api)
    except AttributeError:
        return False
    return True
print(json.dumps([symbol for symbol in json.load(sys.stdin) if not there(symbol)]))
"""


@functools.cache
def used() -> list[str]:
    """`Class.member` of everything that the sources ask of TensorRT."""
    found = {f"ComputeCapability.{name}" for name in RTX_TARGETS.values()}
    for folder in CONFIG:
        for file in sorted((ROOT / folder).glob("*.py")):
            nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
            objects = any(isinstance(node, ast.Name) and node.id == "trt" for node in nodes)
            for node in nodes:
                if isinstance(node, ast.Attribute) and (symbol := _symbol(node, CONFIG[folder], objects)):
                    found.add(symbol)
    return sorted(found)


def _symbol(node: ast.Attribute, config: str, objects: bool) -> str | None:
    chain, at = [], node
    while isinstance(at, ast.Attribute):
        chain.append(at.attr)
        at = at.value
    names = [at.id if isinstance(at, ast.Name) else "", *reversed(chain)]
    for i, name in enumerate(names[:-1]):
        rest = names[i + 1 :]
        if name in ("trt", "api") and not rest[0].startswith("__"):
            return ".".join(rest[:2])
        variable = i == 0 or names[:i] == ["self"]
        if objects and variable and (kind := OBJECTS.get(name, config if name == "config" else None)):
            return f"{kind}.{rest[0]}"
    return None


def lacking(module: str, environment: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", PROBE, module]
    run = subprocess.run(command, input=json.dumps(used()), env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_sources_are_read() -> None:
    expected = {
        "Builder", "OnnxParser.parse_model_proto", "BuilderFlag.STRIP_PLAN", "IBuilderConfig.set_flag",
        "ICudaEngine.create_execution_context", "IExecutionContext.execute_async_v3", "Refitter.refit_cuda_engine",
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE", "IRuntimeCache.deserialize", "Runtime.deserialize_cuda_engine",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",  # 10.x: else a network has no types of its own
    }  # fmt: skip
    assert expected <= set(used())
    assert len(used()) > 50


def test_tensorrt_rtx_has_them() -> None:
    pytest.importorskip("tensorrt_rtx", reason="reads its bindings: pip install 'fluxkiln[trt]'")
    assert lacking("tensorrt_rtx", dict(os.environ)) == []


def test_tensorrt_has_all_that_are_not_rtx_only(tmp_path: Path) -> None:
    try:
        files = importlib.metadata.files("tensorrt-cu13-bindings") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("reads TensorRT's bindings: pip install tensorrt-cu13-bindings")
    tools = [shutil.which(name) for name in ("cc", "nm")]
    if None in tools:
        pytest.skip("needs a C compiler and nm to make stand-ins for TensorRT's libraries")
    library = next(Path(str(file.locate())) for file in files if file.name == "tensorrt.so")
    listed = subprocess.run([str(tools[1]), "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    functions = sorted({name for line in listed.splitlines() if FUNCTIONS.fullmatch(name := line.split()[-1])})
    source = tmp_path / "nothing.c"
    source.write_text("\n".join(f"void {name}(void) {{}}" for name in functions))
    for name in sorted({match.group() for match in LIBRARIES.finditer(library.read_bytes().decode("latin-1"))}):
        link = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(tmp_path / name), str(source)]
        subprocess.run([str(tools[0]), *link], check=True)
    missing = lacking("tensorrt_bindings", {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)})
    assert missing == [symbol for symbol in used() if RTX_ONLY.match(symbol)]
