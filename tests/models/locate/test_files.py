"""LoRAs and textual inversions are located as file, folder, hub id or hub file; weights and tokens are parsed."""

from unittest.mock import MagicMock

import pytest

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.models.locate.files import find_inversion, find_lora
from tests.models.locate.test_model import add_to_hub_cache

STANDARD = "pytorch_lora_weights.safetensors"


def make_folder(folder, *files):
    """Create a folder with empty `files`; locating a LoRA opens no file."""
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"")
    return folder


@pytest.fixture
def downloads(monkeypatch):
    """Replace the hub by one that has every file; return the list of requests."""
    requests = []

    def download(repository, file, revision):
        requests.append((repository, file))
        return f"/hub/{repository}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return requests


def test_inversions_are_found_as_loras_are(tmp_path):
    many = make_folder(tmp_path / "many", "a.safetensors", "learned_embeds.safetensors", STANDARD)
    assert find_inversion(str(many)) == many / "learned_embeds.safetensors"
    hub = add_to_hub_cache(
        make_folder(tmp_path / "cat", "learned_embeds.safetensors", "learned_embeds.bin"), "owner/cat"
    )
    assert find_inversion("owner/cat") == hub / "learned_embeds.safetensors"
    for name in ("owner/cat/learned_embeds.bin", str(make_folder(tmp_path / "old", "easy.pt"))):
        with pytest.raises(DataError, match=f"--textual-inversion {name} is a pickle") as caught:
            find_inversion(name)
        assert "safetensors.torch.save_file" in caught.value.hint
    with pytest.raises(Unavailable, match="--textual-inversion owner/dog is not on this machine"):
        find_inversion("owner/dog")


def test_a_file_and_a_folder_are_found(tmp_path):
    one = make_folder(tmp_path / "one", "lcm.safetensors", "README.md", "old.bin")
    many = make_folder(tmp_path / "many", "a.safetensors", STANDARD, "z.safetensors")
    assert find_lora(str(one / "lcm.safetensors")) == find_lora(str(one)) == one / "lcm.safetensors"
    assert find_lora(str(many)) == many / STANDARD


def test_several_files_are_named(tmp_path):
    folder = make_folder(tmp_path / "many", "b.safetensors", "a.safetensors")
    with pytest.raises(DataError, match=r"several safetensors files: a\.safetensors, b\.safetensors") as caught:
        find_lora(f"{folder}/")
    assert f"--lora {folder}/a.safetensors" in caught.value.hint


@pytest.mark.parametrize("file", ["a.bin", "a.pt", "a.ckpt", "a.PTH"])
def test_pickles_are_rejected_in_all_locations(tmp_path, file):
    folder = make_folder(tmp_path / "pickled", file)
    for name in (str(folder), str(folder / file), f"owner/repo/{file}"):
        with pytest.raises(DataError, match="is a pickle") as caught:
            find_lora(name, download=True)
        assert name in caught.value.message and "safetensors" in caught.value.hint


def test_other_files_and_empty_folders_are_refused(tmp_path):
    folder = make_folder(tmp_path / "empty", "README.md")
    with pytest.raises(DataError, match="README.md is not a safetensors file"):
        find_lora(str(folder / "README.md"))
    with pytest.raises(DataError, match="empty has no safetensors file"):
        find_lora(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "no/such/folder/anywhere",
        "nowhere/lcm.safetensors",
        "lcm.safetensors",
        "./a/lcm.safetensors",
        "/a/b/lcm.safetensors",
        "~nosuchuser/a/b.safetensors",
        "owner/repo/",
        "a b",
        "x" * 300,
    ],
)
def test_a_missing_path_is_unavailable(name):
    with pytest.raises(Unavailable, match="does not exist") as caught:
        find_lora(name)
    assert f"--lora {name}" in caught.value.message


def test_a_hub_repository_in_the_cache_is_searched(tmp_path):
    lcm = add_to_hub_cache(make_folder(tmp_path / "lcm", STANDARD, "other.safetensors"), "owner/lcm")
    assert find_lora("owner/lcm") == find_lora("owner/lcm", download=True) == lcm / STANDARD
    hyper = add_to_hub_cache(make_folder(tmp_path / "hyper", "sub/8steps.safetensors"), "owner/hyper")
    assert (
        find_lora("owner/hyper") == find_lora("owner/hyper/sub/8steps.safetensors") == hyper / "sub/8steps.safetensors"
    )
    make_folder(hyper, "sub/4steps.safetensors")
    with pytest.raises(DataError, match=r"several safetensors files: sub/4steps\.safetensors, sub/8steps"):
        find_lora("owner/hyper")


@pytest.mark.parametrize("name", ["owner/hyper/8steps.safetensors", "owner/lcm", "owner/readme"])
def test_the_error_for_an_uncached_file_has_a_hint(tmp_path, downloads, name):
    add_to_hub_cache(make_folder(tmp_path / "hyper", "sub/8steps.safetensors"), "owner/hyper")
    add_to_hub_cache(make_folder(tmp_path / "readme", "README.md"), "owner/readme")
    with pytest.raises(Unavailable, match=f"--lora {name} is not on this machine") as caught:
        find_lora(name)
    assert "--download" in caught.value.hint and not downloads


def test_only_the_selected_file_is_downloaded(tmp_path, downloads, monkeypatch):
    files = ["README.md", "lcm.safetensors", STANDARD]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision: files)
    assert str(find_lora("owner/a/sub/8.safetensors", download=True)) == "/hub/owner/a/sub/8.safetensors"
    find_lora("owner/b", download=True)
    files.remove(STANDARD)
    find_lora("owner/c", download=True)
    assert downloads == [("owner/a", "sub/8.safetensors"), ("owner/b", STANDARD), ("owner/c", "lcm.safetensors")]


def test_with_download_the_files_of_the_hub_count(tmp_path, downloads, monkeypatch):
    """The cache has one file, which was downloaded by its name; the repository has two."""
    add_to_hub_cache(make_folder(tmp_path / "hyper", "8.safetensors"), "owner/hyper")
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision: ["4.safetensors", "8.safetensors"])
    with pytest.raises(DataError, match="several safetensors files"):
        find_lora("owner/hyper", download=True)
    assert find_lora("owner/hyper/8.safetensors", download=True).name == "8.safetensors" and not downloads


def build_hub_error(kind):
    """Build an error of huggingface_hub; its response type depends on the version, so it is a mock."""
    from huggingface_hub import errors

    return getattr(errors, kind)("no\nroute", response=MagicMock())


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (lambda: build_hub_error("RepositoryNotFoundError"), "no such repository"),
        (lambda: build_hub_error("RemoteEntryNotFoundError"), "no such file"),
        (lambda: build_hub_error("HfHubHTTPError"), r"\(no\)"),
        (lambda: OSError("no route\nto host"), r"\(no route\)"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, error, named):
    def refuse(repository, file, revision):
        raise error()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(Unavailable, match=f"--lora owner/a/b.safetensors.*{named}"):
        find_lora("owner/a/b.safetensors", download=True)


def test_offline_downloads_are_unavailable():
    with pytest.raises(Unavailable, match="--lora owner/a/b.safetensors could not be downloaded"):
        find_lora("owner/a/b.safetensors", download=True)
