"""A checkpoint of another schema or version is rejected with exit code 2, and never removed without --fresh."""

from pathlib import Path

import pytest

from linfusion_cli.checkpoint.store import CheckpointStore
from linfusion_cli.core.errors import Stopped, UsageError
from linfusion_cli.core.events import Notice
from linfusion_cli.core.geometry import Size
from linfusion_cli.run.checkpoint.latents_file import open_latents
from linfusion_cli.run.pipeline import generate
from linfusion_cli.settings.request import GenerateRequest
from tests.run.checkpoint.test_resume import files, stopping_at
from tests.support.fakes import Listener


@pytest.fixture
def make(xl_model, tmp_path, monkeypatch):
    """Return a function that calls generate() with small settings in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(observer=None, **changed):
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(xl_model), "steps": (2,)}
        values |= {"output": Path("a.png"), "checkpoint_every": 0.0, "upscaler": "sdedit"} | changed
        return generate(GenerateRequest(**values), {}, observer or Listener())

    return run


@pytest.fixture
def old_checkpoint(make, tmp_path, request):
    """A run of which another version of linfusion, or an older schema, has left the checkpoint -> its folder."""
    with pytest.raises(Stopped):
        make(stopping_at("write"))
    folder = tmp_path / "a.png.linfusion"
    if request.param == "schema":
        (folder / "checkpoint.json").rename(folder / "journal.json")
    else:
        checkpoint = CheckpointStore(tmp_path / "a.png").read()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linfusion_cli.checkpoint.store.__version__", "0.0.1")
            CheckpointStore(tmp_path / "a.png").save(checkpoint.metadata, checkpoint.state)
    return folder


both = pytest.mark.parametrize("old_checkpoint", ["schema", "version"], indirect=True)


@both
def test_a_checkpoint_of_another_format_or_version_is_rejected_until_fresh_removes_it(make, old_checkpoint, tmp_path):
    before = files(old_checkpoint)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"a\.png\.linfusion .*(schema 1|linfusion 0\.0\.1).*--fresh") as caught:
            make()
        assert caught.value.exit_code == 2 and files(old_checkpoint) == before
        assert [path.name for path in tmp_path.iterdir()] == ["a.png.linfusion"]  # nothing quarantined, no output
    assert make(fresh=True).resumed_from is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@both
def test_latents_in_a_checkpoint_of_another_format_or_version_are_rejected(old_checkpoint):
    with pytest.raises(UsageError, match="(schema 1|linfusion 0.0.1)") as caught:
        open_latents(old_checkpoint)
    assert "--fresh" not in str(caught.value) and caught.value.exit_code == 2


@both
def test_a_complete_file_with_a_checkpoint_of_another_format_or_version_stays(make, old_checkpoint, tmp_path):
    before = files(old_checkpoint)
    old_checkpoint.rename(tmp_path / "hidden")
    make()
    (tmp_path / "hidden").rename(old_checkpoint)
    expected, listener = files(tmp_path), Listener()
    assert make(listener).already_complete and files(tmp_path) == expected and files(old_checkpoint) == before
    assert any("a.png.linfusion" in notice.text for notice in listener.of(Notice))
