"""Only a checkpoint of another schema or other numerics is rejected, with exit code 2; only --fresh removes it."""

from pathlib import Path

import pytest
import torch

from linfusion_cli import __version__
from linfusion_cli.checkpoint.store import CheckpointStore
from linfusion_cli.checkpoint.versions import NUMERICS
from linfusion_cli.core.errors import Stopped, UsageError
from linfusion_cli.core.events import Notice
from linfusion_cli.core.geometry import Size
from linfusion_cli.run.checkpoint.known_keys import KNOWN_KEYS
from linfusion_cli.run.checkpoint.latents_file import open_latents
from linfusion_cli.run.pipeline import generate
from tests.checkpoint.test_store import equal
from tests.run.checkpoint.test_resume import files, in_second_phase, stopping_at
from tests.support.fakes import Listener
from tests.support.requests import make_request

LONG = {"steps": (4,), "strength": (0.7,)}  # three steps in phase 2x


@pytest.fixture
def make(xl_model, tmp_path, monkeypatch):
    """Return a function that calls generate() with small settings in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(observer=None, **changed):
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(xl_model), "steps": (2,)}
        values |= {"output": Path("a.png"), "checkpoint_every": 0.0, "upscaler": "sdedit"} | changed
        return generate(make_request(**values), {}, observer or Listener())

    return run


def save_again(output: Path, name: str, value: object, **more) -> None:
    """Save the checkpoint of `output` as a program would whose store has another `name`, with `more` metadata."""
    checkpoint = CheckpointStore(output).read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"linfusion_cli.checkpoint.store.{name}", value)
        CheckpointStore(output).save({**checkpoint.metadata, **more}, checkpoint.state)


@pytest.fixture
def old_checkpoint(make, tmp_path, request):
    """A run of which an older schema, or a version with other numerics, has left the checkpoint -> its folder."""
    with pytest.raises(Stopped):
        make(stopping_at("write"))
    folder = tmp_path / "a.png.linfusion"
    if request.param == "schema":
        (folder / "checkpoint.json").rename(folder / "journal.json")
    else:
        save_again(tmp_path / "a.png", "NUMERICS", 0)
    return folder


both = pytest.mark.parametrize("old_checkpoint", ["schema", "numerics"], indirect=True)


@both
def test_a_checkpoint_of_another_format_or_numerics_is_rejected_until_fresh_removes_it(make, old_checkpoint, tmp_path):
    before = files(old_checkpoint)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"a\.png\.linfusion .*(schema 1|numerics 0).*--fresh") as caught:
            make()
        assert caught.value.exit_code == 2 and files(old_checkpoint) == before
        assert [path.name for path in tmp_path.iterdir()] == ["a.png.linfusion"]  # nothing quarantined, no output
    assert make(fresh=True).resumed_from is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@both
def test_latents_in_a_checkpoint_of_another_format_or_numerics_are_rejected(old_checkpoint):
    with pytest.raises(UsageError, match="(schema 1|numerics 0)") as caught:
        open_latents(old_checkpoint)
    assert "--fresh" not in str(caught.value) and caught.value.exit_code == 2


@both
def test_a_complete_file_with_a_checkpoint_of_another_format_or_numerics_stays(make, old_checkpoint, tmp_path):
    before = files(old_checkpoint)
    old_checkpoint.rename(tmp_path / "hidden")
    make()
    (tmp_path / "hidden").rename(old_checkpoint)
    expected, listener = files(tmp_path), Listener()
    assert make(listener).already_complete and files(tmp_path) == expected and files(old_checkpoint) == before
    assert any("a.png.linfusion" in notice.text for notice in listener.of(Notice))


def test_a_checkpoint_of_another_version_with_equal_numbers_is_resumed(make, tmp_path):
    make(**LONG)
    expected = files(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Stopped):
        make(in_second_phase, **LONG)
    versions = CheckpointStore(tmp_path / "a.png").read().metadata["versions"]
    save_again(tmp_path / "a.png", "__version__", "9.0.0", versions=versions | {"linfusion": "9.0.0"})
    listener = Listener()
    assert "in phase 2x" in make(listener, **LONG).resumed_from and files(tmp_path) == expected
    (notice,) = [event.text for event in listener.of(Notice) if "Resuming" in event.text]
    assert notice == (
        f"Resuming the checkpoint of linfusion 9.0.0 with linfusion {__version__}: both compute the same latents."
    )


def test_keys_of_a_later_version_are_preserved_and_have_no_effect(make, tmp_path):
    make(**LONG)
    expected = files(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Stopped):
        make(in_second_phase, **LONG)
    checkpoint = CheckpointStore(tmp_path / "a.png").read()
    metadata, state = checkpoint.metadata, {name: dict(section) for name, section in checkpoint.state.items()}
    state["run_state"] |= {"clock": {"now": torch.ones(1)}}
    state["phase_state"] |= {"mask": torch.ones(2)}
    stages = [{**stage, "strategy": stage["strategy"] | {"new": 1}, "since": 0} for stage in metadata["stages"]]
    weights = [file | {"bytes": 1} for file in metadata["weights"]]
    request = metadata["request"] | {"sharpness": 2}
    later = metadata | {"host": "a", "stages": stages, "weights": weights, "request": request}
    CheckpointStore(tmp_path / "a.png").save(later, state | {"history": {"x": torch.ones(3)}})
    with pytest.raises(Stopped):
        make(stopping_at("write"), **LONG)  # saves several times
    saved = CheckpointStore(tmp_path / "a.png").read()
    assert saved.metadata["host"] == "a" and saved.state["run_state"]["is_done"]
    assert saved.metadata["request"] == request and saved.metadata["weights"] == weights
    assert all(stage["since"] == 0 and stage["strategy"]["new"] == 1 for stage in saved.metadata["stages"])
    assert torch.equal(saved.state["run_state"]["clock"]["now"], torch.ones(1))
    assert torch.equal(saved.state["phase_state"]["mask"], torch.ones(2))
    assert torch.equal(saved.state["history"]["x"], torch.ones(3))
    listener = Listener()
    make(listener, **LONG)
    assert files(tmp_path) == expected and not any("Resuming" in event.text for event in listener.of(Notice))


def test_this_version_knows_all_keys_that_it_saves(make, tmp_path):
    with pytest.raises(Stopped):
        make(in_second_phase, upscaler="demofusion", **LONG)
    store = CheckpointStore(tmp_path / "a.png", known=KNOWN_KEYS)
    known, everything = store.read(), CheckpointStore(tmp_path / "a.png").read()
    assert known.metadata == everything.metadata and equal(known.state, everything.state)
    assert known.state["phase_state"]["base_statistics"] is not None


def test_stages_and_strategies_of_unknown_kinds_are_ignored(make, tmp_path):
    make(**LONG)
    expected = files(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Stopped):
        make(in_second_phase, **LONG)
    stages = CheckpointStore(tmp_path / "a.png").read().metadata["stages"]
    unknown = [stage | {"strategy": {"kind": "denoise_tiles"}} for stage in stages] + [{"kind": "refine", "phase": 1}]
    save_again(tmp_path / "a.png", "NUMERICS", NUMERICS, stages=unknown)
    listener = Listener()
    assert "in phase 2x" in make(listener, **LONG).resumed_from and files(tmp_path) == expected
    (notice,) = [event.text for event in listener.of(Notice) if "Resuming" in event.text]
    assert "another plan, because the earlier one cannot be executed here" in notice


def test_another_device_gives_notices_only(make, tmp_path):
    with pytest.raises(Stopped):
        make(in_second_phase, **LONG)
    metadata = CheckpointStore(tmp_path / "a.png").read().metadata
    stages = [stage | {"device": "cuda"} for stage in metadata["stages"]]
    save_again(tmp_path / "a.png", "NUMERICS", NUMERICS, device="cuda:0", stages=stages)
    listener = Listener()
    assert "in phase 2x" in make(listener, device="cpu", **LONG).resumed_from
    assert any("cpu instead of cuda:0" in event.text for event in listener.of(Notice))


def test_a_request_of_an_unknown_schema_is_another_request(make, tmp_path):
    with pytest.raises(Stopped):
        make(in_second_phase, **LONG)
    request = CheckpointStore(tmp_path / "a.png").read().metadata["request"] | {"schema": 99}
    save_again(tmp_path / "a.png", "NUMERICS", NUMERICS, request=request)
    with pytest.raises(UsageError, match="schema 99 is not known to this version.*--fresh"):
        make(**LONG)
