"""Finding a model: one copy of it from a hub that a local server plays, with the real client."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

import fluxkiln.hub
from fluxkiln.checkpoint import CheckpointError
from fluxkiln.hub import ModelUnavailableError, choose_files, resolve

SHARDED = [
    *("README.md", "ae.safetensors", "flux1-dev.safetensors", "model_index.json", "scheduler/scheduler_config.json"),
    *("text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
    *("text_encoder_2/config.json", "text_encoder_2/model.safetensors.index.json"),
    *("text_encoder_2/model-00001-of-00002.safetensors", "text_encoder_2/model-00002-of-00002.safetensors"),
    *("tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer_2/spiece.model", "tokenizer_2/tokenizer.json"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json"),
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/model.onnx"),
]
LEFT_OUT = {
    *("README.md", "ae.safetensors", "flux1-dev.safetensors", "text_encoder/pytorch_model.bin", "vae/model.onnx"),
    "transformer/diffusion_pytorch_model.fp16.safetensors",
}


def test_one_copy_of_a_diffusers_repository():
    assert set(choose_files(SHARDED, fluxkiln.hub.PIPELINE_FOLDERS, "a/b")) == set(SHARDED) - LEFT_OUT
    assert choose_files(SHARDED, ["vae"], "a/b") == [
        "model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_shards_are_taken_before_a_whole_file_beside_them():
    names = [*SHARDED, "transformer/diffusion_pytorch_model.safetensors"]
    assert "transformer/diffusion_pytorch_model.safetensors" not in choose_files(names, ["transformer"], "a/b")


def test_repository_of_one_file_or_one_folder():
    assert choose_files(["README.md", "flux1-dev-fp8.safetensors"], [], "a/b") == ["flux1-dev-fp8.safetensors"]
    folder = ["config.json", "diffusion_pytorch_model.safetensors", "other.safetensors"]
    assert choose_files(folder, [], "a/b") == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.safetensors", "b.safetensors"], r"2 safetensors files: name one, e\.g\. a/b/a\.safetensors"),
        (["a.gguf"], "0 safetensors files: nothing here can be read"),
        (["model_index.json", "transformer/diffusion_pytorch_model.bin"], "no safetensors weights .* transformer/"),
    ],
)
def test_repository_that_says_too_little(names, message):
    with pytest.raises(CheckpointError, match=message):
        choose_files(names, ["transformer"], "a/b")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the repository `owner/flux`; `hub.fetched` are the files asked of it, `hub.gated` closes it."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/owner/flux/tree/"):
                tree = [{"type": "file", "path": name, "size": len(name), "oid": oid(name)} for name in server.files]
                return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
            if path.startswith("/api/models/owner/flux"):
                info = {"id": "owner/flux", "sha": "0" * 40, "siblings": [{"rfilename": name} for name in server.files]}
                return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
            if path.startswith("/owner/flux/resolve/"):
                name = path.split("/", 5)[5]
                if server.gated:
                    return self.send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
                if name not in server.files:
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40}, body)
                server.fetched.add(name)
                return self.send(200, name.encode(), {"ETag": f'"{oid(name)}"', "X-Repo-Commit": "0" * 40}, body)
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

        def send(self, status, content, headers, body):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    def oid(name):
        return hashlib.sha1(name.encode()).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.fetched, server.gated = list(SHARDED), set(), False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_one_copy_is_fetched(hub):
    path = resolve("owner/flux")
    assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == set(SHARDED) - LEFT_OUT
    assert hub.fetched == set(SHARDED) - LEFT_OUT


def test_one_folder_is_fetched(hub):
    path = resolve("owner/flux", folders=["vae"])
    assert hub.fetched == {"model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert (path / "vae/config.json").read_text() == "vae/config.json"


def test_one_file_of_a_repository(hub):
    assert resolve("owner/flux/flux1-dev.safetensors").read_text() == "flux1-dev.safetensors"
    assert hub.fetched == {"flux1-dev.safetensors"}
    with pytest.raises(ModelUnavailableError, match=r"owner/flux has no file flux2\.safetensors"):
        resolve("owner/flux/flux2.safetensors")


def test_repository_of_one_file_gives_the_file(hub):
    hub.files[:] = ["README.md", "flux1-dev-fp8.safetensors"]
    assert resolve("owner/flux").name == "flux1-dev-fp8.safetensors"


def test_gated_and_missing_models_print_three_steps(hub):
    hub.gated = True
    with pytest.raises(ModelUnavailableError) as error:
        resolve("owner/flux")
    assert str(error.value) == (
        "owner/flux is gated: its licence has to be accepted before it can be downloaded\n"
        "  1. open https://huggingface.co/owner/flux, log in and accept the licence\n"
        "  2. run `hf auth login` with a read token from https://huggingface.co/settings/tokens\n"
        "  3. give owner/flux as the model again, or the path of a folder or file downloaded by hand"
    )
    for name in ("owner/flux/flux1-dev.safetensors", "owner/other"):
        with pytest.raises(ModelUnavailableError, match=r"(?s)(is gated|is not on the hub).*3\. give owner/"):
            resolve(name)


def test_cache_is_enough_when_the_hub_is_closed_or_gone(hub):
    path = resolve("owner/flux")
    hub.gated = True
    assert resolve("owner/flux") == path
    hub.shutdown()
    hub.server_close()
    assert resolve("owner/flux") == path
    (path / "tokenizer/merges.txt").unlink()
    (path / "tokenizer/vocab.json").unlink()
    (path / "tokenizer").rmdir()
    with pytest.raises(ModelUnavailableError, match="is not in the cache, and the hub did not answer"):
        resolve("owner/flux")


def test_local_paths_and_bundled_models(tmp_path, monkeypatch):
    (tmp_path / "owner/flux").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/flux").samefile(tmp_path / "owner/flux")
    assert resolve(tmp_path) == tmp_path
    assert resolve("shapes").parts[-2:] == ("models", "shapes")


@pytest.mark.parametrize("name", ["flux1-dev.safetensors", "./flux", "../a/b", "/a/b", "~/a", "a/b/c", "C:\\a\\b"])
def test_neither_path_nor_hub_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelUnavailableError, match=r"is not there, and is neither(?s:.*)\n  3\. "):
        resolve(name)
