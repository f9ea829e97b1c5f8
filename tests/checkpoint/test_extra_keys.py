"""Keys that only a later version knows survive: reading ignores them, and saving writes them again."""

import pytest
import torch

from linfusion_cli.checkpoint import store as store_module
from linfusion_cli.checkpoint.store import CheckpointStore
from tests.checkpoint.test_store import equal

KNOWN = (
    {"request": None, "last": {"phase": None}},
    {"phase_state": {"phase": None, "base": {"mean": None}}, "run_state": {"latents": None, "scheduler": None}},
)
METADATA = {"request": {"seed": 7}, "last": {"phase": 1}}
STATE = {
    "phase_state": {"phase": 0, "base": {"mean": torch.ones(2)}},
    "run_state": {"latents": torch.zeros(3), "scheduler": {"order": 1}},
}
LATER_METADATA = {"request": {"seed": 7}, "last": {"phase": 1, "name": "2x"}, "host": {"name": "a"}}
LATER_STATE = {
    "phase_state": {"phase": 0, "base": {"mean": torch.ones(2), "median": torch.ones(3)}, "mask": torch.ones(4)},
    "run_state": STATE["run_state"] | {"clock": [1, torch.ones(1)]},
    "history": {"previews": [torch.ones(5)]},
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with a checkpoint that a later version has saved, with additional keys everywhere."""
    with CheckpointStore(tmp_path / "a.png", known=KNOWN).lock() as store:
        digest = store_module._compute_digest
        with monkeypatch.context() as patch:
            # Add a key to the entry of the manifest, before its digest is computed.
            patch.setattr(store_module, "_compute_digest", lambda entry: digest(entry.update(cluster=5) or entry))
            CheckpointStore(store.target).save(LATER_METADATA, LATER_STATE)
        yield store


def test_extra_keys_are_ignored(store):
    checkpoint = store.read()
    assert checkpoint.metadata == METADATA and equal(checkpoint.state, STATE)


def test_extra_keys_survive_later_saves(store):
    store.read()
    moved = STATE["run_state"] | {"latents": torch.ones(3), "scheduler": {}}
    for latents in (torch.full((3,), 2.0), moved["latents"]):
        store.save(METADATA, STATE | {"run_state": moved | {"latents": latents}})
        store.prune()
    later = CheckpointStore(store.target).read()
    assert later.metadata == LATER_METADATA
    assert equal(later.state, LATER_STATE | {"run_state": moved | {"clock": [1, torch.ones(1)]}})
    assert store._read_entry()["cluster"] == 5


def test_a_known_key_that_is_no_longer_saved_does_not_come_back(store):
    store.read()
    store.save({"request": {"seed": 7}}, STATE | {"phase_state": {"phase": 1, "base": None}})
    later = CheckpointStore(store.target).read()
    assert later.metadata == {"request": {"seed": 7}, "host": {"name": "a"}}
    assert equal(later.state["phase_state"], {"phase": 1, "base": None, "mask": torch.ones(4)})


def test_an_unchanged_section_with_extra_keys_is_written_once(store):
    store.read()
    for _ in range(2):
        before = store.saved_bytes
        store.save(METADATA, STATE)
    assert store.saved_bytes == before


@pytest.mark.parametrize("leave", [CheckpointStore.remove, CheckpointStore.quarantine])
def test_a_run_that_starts_over_does_not_take_them(store, leave):
    store.read()
    leave(store)
    store.save(METADATA, STATE)
    checkpoint = CheckpointStore(store.target).read()
    assert checkpoint.metadata == METADATA and equal(checkpoint.state, STATE)
