"""A batch: each job is recorded, none ends another, and what one has loaded changes no other's picture."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linfusion_cli.device import free_memory, resident_bytes
from linfusion_cli.errors import CannotCreate, DataError, Stopped, TryAgain, WriteFailed
from linfusion_cli.events import JobStarted, nobody
from linfusion_cli.geometry import Size
from linfusion_cli.jobs import paint
from linfusion_cli.jobs.batch import Batch, looked_for, made
from linfusion_cli.jobs.generate import generate
from linfusion_cli.jobs.joblist import Entry
from linfusion_cli.jobs.kept import VAE
from linfusion_cli.jobs.listing import Listing
from linfusion_cli.jobs.naming import TEMPLATE, Template
from linfusion_cli.jobs.results import Record
from linfusion_cli.jobs.spread import Shard
from linfusion_cli.jobs.watch import watch
from linfusion_cli.report import RunReport
from linfusion_cli.request import GenerateRequest
from tests.fakes import Listener


class Told:
    """Whoever hears of outcomes."""

    def __init__(self) -> None:
        self.outcomes = []

    def __call__(self, outcome, report) -> None:
        self.outcomes.append(outcome)

    def status(self) -> dict[int, str]:
        return {outcome.line: outcome.status for outcome in self.outcomes}


def builder(**defaults):
    """What makes a request of a job that says this."""

    def build(values):
        standing = {"prompt": "a hill", "size": Size(64, 64), "output": Path("x.png"), "model": "demo", "steps": (1,)}
        return {}, GenerateRequest(**standing | {"format": "png"} | defaults | values)

    return build


@pytest.fixture
def batch(tmp_path):
    """Carry out entries in tmp_path/out with this `make` -> what was told, and the batch."""

    def run(entries, make, observer=nobody, build=None, stop_on_error=False, **listed):
        listing = Listing(build or builder(), tmp_path / "out", Template.parse(TEMPLATE), **listed)
        told = Told()
        record = Record(tmp_path / "out" / listing.shard.record)
        carried = Batch(make, record, observer, told, lambda error: f"bug {error}", stop_on_error)
        carried.run(listing.jobs(entries), "jobs.jsonl")
        return told, carried

    return run


def entries(count: int, **values) -> list[Entry]:
    return [Entry(line, {"prompt": f"hill {line}"} | values) for line in range(1, count + 1)]


def report_of(request, complete: bool = False) -> RunReport:
    return RunReport(request.to_json(), {}, {}, {}, output=str(request.output), already_complete=complete)


def record_in(folder: Path, name: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


def failing(errors: dict[str, BaseException], ran: list | None = None):
    """Makes nothing, and raises what `errors` have for a prompt."""

    def make(request, origins, observer, shelf):
        if ran is not None:
            ran.append(request)
        if request.prompt in errors:
            raise errors[request.prompt]
        return report_of(request)

    return make


def test_what_a_job_meets_is_recorded_and_the_next_one_runs(batch, tmp_path):
    errors = {
        "hill 2": DataError("The weights are broken.", "Get others."),
        "hill 3": ZeroDivisionError("oops"),
        "hill 4": MemoryError(),
        "hill 5": TryAgain("Another run is writing this."),
    }
    listener = Listener()
    told, carried = batch([*entries(6), Entry(9, problem="It is wrong.")], failing(errors), listener)
    record = record_in(tmp_path)
    assert [(line["line"], line["status"], line["exit_code"]) for line in record] == [
        (9, "failed", 2),
        (1, "done", 0),
        (2, "failed", 65),
        (3, "failed", 70),
        (4, "failed", 71),
        (5, "held", 75),
        (6, "done", 0),
    ]
    assert [line["error"] for line in record[2:4]] == ["The weights are broken. Get others.", "bug oops"]
    assert record[1]["output"] == str(tmp_path / "out/0001-hill-1-0.png") and record[1]["prompt"] == "hill 1"
    assert record[1]["index"] == 1 and record[1]["seed"] == 0 and record[1]["time"][10] == "T"
    assert carried.tally.exit_code == 3 and len(carried.failures) == 4
    assert [(event.number, event.count, event.name) for event in listener.of(JobStarted)][:2] == [
        (2, 7, "0001-hill-1-0.png"),
        (3, 7, "0002-hill-2-0.png"),
    ]


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ({}, 0),
        ({"hill 1": TryAgain("Held.")}, 75),
        ({"hill 1": TryAgain("Held."), "hill 2": DataError("Broken.")}, 3),
    ],
)
def test_the_exit_code_tells_the_truth(batch, errors, code):
    assert batch(entries(3), failing(errors))[1].tally.exit_code == code


def test_the_first_error_ends_it_where_that_is_wanted(batch, tmp_path):
    batch(entries(4), failing({"hill 2": DataError("Broken.")}), stop_on_error=True)
    assert [line["status"] for line in record_in(tmp_path)] == ["done", "failed"]


def test_a_stop_passes_with_all_that_was_done_on_record(batch, tmp_path):
    with pytest.raises(Stopped):
        batch(entries(4), failing({"hill 3": Stopped(signal.SIGTERM)}))
    assert [line["line"] for line in record_in(tmp_path)] == [1, 2]


def test_jobs_that_share_a_model_run_together_in_the_order_of_the_list(batch):
    ran = []
    models = ["a", "b", "a", "c", "b", "a"]
    batch([Entry(line, {"model": model}) for line, model in enumerate(models, 1)], failing({}, ran))
    assert [(request.model, int(request.output.name[:4])) for request in ran] == [
        ("a", 1), ("a", 3), ("a", 6), ("b", 2), ("b", 5), ("c", 4),
    ]  # fmt: skip


def test_seeds_multiply_jobs_that_have_none_and_shards_divide_them(batch, tmp_path):
    jobs = [*entries(3), Entry(4, {"prompt": "own", "seed": 99}), Entry(5, problem="It is wrong.")]
    seen = []
    for number in (1, 2, 3):
        batch(jobs, failing({}, seen), seeds=(1, 2, 3, 4), shard=Shard(number, 3))
    names = sorted(request.output.name for request in seen)
    hills = [f"000{i}-hill-{i}-{seed}.png" for i in (1, 2, 3) for seed in (1, 2, 3, 4)]
    assert names == [*hills, "0004-own-99.png"]
    records = [record_in(tmp_path, f"results-{number}-of-3.jsonl") for number in (1, 2, 3)]
    assert sorted(map(len, records)) == [4, 5, 5]
    assert sum(line["status"] == "failed" for record in records for line in record) == 1


def test_two_jobs_never_have_one_file(batch, tmp_path):
    ran = []
    names = ["a.png", "sub/a.png", "a.png", "../a.png", "a.gif"]
    jobs = [Entry(line, {"output": name}) for line, name in enumerate(names, 1)]
    told, _ = batch(jobs, failing({}, ran), build=builder(format=None))
    assert [request.output for request in ran] == [tmp_path / "out/a.png", tmp_path / "out/sub/a.png"]
    said = {outcome.line: outcome.error for outcome in told.outcomes if outcome.error}
    assert "is that of line 1" in said[3] and "leaves the folder" in said[4] and "a.gif" in said[5]


def test_a_preview_lies_in_the_folder_too_and_is_nobody_elses(batch, tmp_path):
    ran = []
    jobs = [Entry(1, {"preview": "p.jpg"}), Entry(2, {"preview": "p.jpg"}), Entry(3, {"output": "p.jpg"})]
    told, _ = batch(jobs, failing({}, ran))
    assert [request.preview for request in ran] == [tmp_path / "out/p.jpg"]
    assert told.status() == {1: "done", 2: "failed", 3: "failed"}


def test_a_line_of_the_record_is_whole_or_not_there(batch, tmp_path):
    batch(entries(2), failing({}))
    path = tmp_path / "out/results.jsonl"
    whole = path.read_bytes()
    for half in (b'{"list": "jo', b"x" * 10_000, b"\0"):
        path.write_bytes(whole + half)
        batch(entries(1), failing({}))
        assert path.read_bytes().startswith(whole) and len(record_in(tmp_path)) == 3
    path.write_bytes(b"no line at all")
    batch(entries(1), failing({}))
    assert len(record_in(tmp_path)) == 1


def test_where_no_line_can_be_written_the_batch_ends(batch, tmp_path, monkeypatch):
    monkeypatch.setattr("os.write", lambda fd, data: os.pwrite(fd, data[:10], os.fstat(fd).st_size))
    with pytest.raises(WriteFailed, match="no room for a line"):
        batch(entries(2), failing({}))
    assert (tmp_path / "out/results.jsonl").read_bytes() == b""
    with pytest.raises(CannotCreate):
        Record(tmp_path / "out/results.jsonl/x")


KILLED = """
import sys
from pathlib import Path
from linfusion_cli.events import nobody
from linfusion_cli.jobs.batch import Batch
from linfusion_cli.jobs.results import Record
from tests.jobs.test_batch import builder, entries, failing
from linfusion_cli.jobs.listing import Listing
from linfusion_cli.jobs.naming import TEMPLATE, Template
out = Path(sys.argv[1])
jobs = Listing(builder(), out, Template.parse(TEMPLATE)).jobs(entries(3000))
print("ready", flush=True)
Batch(failing({}), Record(out / "results.jsonl"), nobody, lambda *_: None, str).run(jobs, "jobs")
"""


def test_after_a_kill_no_line_is_half(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for after_sec in (0.05, 0.23):
        run = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "out"], stdout=-1, env=environment)
        assert run.stdout.readline() == b"ready\n"
        time.sleep(after_sec)
        run.kill()
        run.communicate()
    data = (tmp_path / "out/results.jsonl").read_bytes()
    assert data.endswith(b"\n") and len(record_in(tmp_path)) > 1


@pytest.fixture
def lists(tmp_path):
    """A folder to be watched."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def watched(folder: Path, polls: list, carried_out) -> None:
    """Watch `folder`; between polls, what `polls` have happens; after the last the process is stopped."""
    waiting = iter(polls)

    def pause(seconds):
        happens = next(waiting, None)
        if happens is None:
            raise Stopped(signal.SIGTERM)
        happens()

    with pytest.raises(Stopped):
        watch(folder, carried_out, pause)


def nothing() -> None:
    """Happens."""


def test_lists_are_taken_when_they_stand_still_and_put_aside(lists):
    taken = []

    def carried_out(path):
        taken.append(path.name)
        return "bad" not in path.name

    (lists / "a.txt").write_text("a")
    for name in (".hidden", "b.part", "c.tmp"):
        (lists / name).write_text("x")
    (lists / "done").mkdir()
    (lists / "done/a.txt").write_text("older")
    (lists / "done/a-2.txt").write_text("older")
    grows = [lambda n=n: (lists / "bad.csv").write_text("x" * n) for n in (1, 2, 3)]
    again = [lambda: (lists / "a.txt").write_text("again")]
    watched(lists, [*grows, nothing, *again, nothing, nothing, nothing], carried_out)
    assert taken == ["a.txt", "bad.csv", "a.txt"]
    names = {str(path.relative_to(lists)) for path in lists.rglob("*") if path.is_file()}
    done = {f"done/{name}" for name in ("a.txt", "a-2.txt", "a-3.txt", "a-4.txt")}
    assert names == {".hidden", "b.part", "c.tmp", "failed/bad.csv"} | done
    assert (lists / "done/a.txt").read_text() == "older"


def test_a_list_that_changes_while_it_is_carried_out_is_taken_again(lists):
    taken = []

    def carried_out(path):
        taken.append(path.read_text())
        if len(taken) == 1:
            path.write_text("changed")
        return True

    (lists / "a.txt").write_text("a")
    watched(lists, [nothing] * 5, carried_out)
    assert taken == ["a", "changed"] and (lists / "done/a.txt").read_text() == "changed"


def test_a_list_that_cannot_be_put_aside_is_not_done_again(lists, monkeypatch):
    taken = []

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr("linfusion_cli.jobs.watch.moved", refuse)
    (lists / "a.txt").write_text("a")
    watched(lists, [nothing] * 5, lambda path: taken.append(path) or True)
    assert len(taken) == 1


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def counted(monkeypatch):
    """How often each kind of model is loaded."""
    counts = {"unet": 0, "vae": 0, "text": 0}

    def counting(name, function):
        def load(*arguments):
            counts[name] += 1
            return function(*arguments)

        return load

    monkeypatch.setattr(paint, "load_unet", counting("unet", paint.load_unet))
    monkeypatch.setattr(paint, "load_vae", counting("vae", paint.load_vae))
    monkeypatch.setattr("linfusion_cli.models.text.load_tokenizer", counting("text", load_tokenizer()))
    return counts


def load_tokenizer():
    from linfusion_cli.models.tokens import load_tokenizer

    return load_tokenizer


def variety(xl: Path, sd: Path, lora: Path) -> list[dict]:
    """Jobs that share models, or parts of them, or nothing."""
    xl, sd = {"model": str(xl)}, {"model": str(sd), "linfusion": "none"}
    return [
        {"prompt": "a hill", "seed": 1, **xl},
        {"prompt": "a sea", "seed": 2, "size": Size(128, 64), **xl},
        {"prompt": "a sea", "seed": 2, **sd},
        {"prompt": "a sea", "seed": 2, "lora": (f"{lora}:0.5",), **xl},
        {"prompt": "a hill", "seed": 1, "attention": ("original",), "clip_skip": 1, **xl},
        {"prompt": "a hill", "seed": 3, "guidance_scale": (1.0,), "vae_statistics": "sampled", **xl},
        {"prompt": "a sea", "seed": 2, "size": Size(72, 64), "upscaler": "demofusion", "dilated_min": 0.0, **xl},
    ]


@pytest.fixture
def small_lora(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    shapes = {layer: (16, 16), text: (16, 16)}
    tensors = {f"{name}.lora_{half}.weight": torch.randn(*size) for name, (out, into) in shapes.items()
               for half, size in (("A", (2, into)), ("B", (out, 2)))}  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_a_job_gives_the_picture_it_gives_alone_whatever_ran_before(batch, tmp_path, xl_model, sd_model, small_lora):
    jobs = variety(xl_model, sd_model, small_lora)
    alone = []
    for number, values in enumerate(jobs):
        _, request = builder(strength=(0.5,), output=tmp_path / f"{number}.png")(values)
        generate(request, {}, nobody)
        alone.append(pixels(tmp_path / f"{number}.png"))
    order = [3, 0, 1, 5, 2, 6, 4, 0, 3, 2, 1]  # some again, in other company
    entries = [Entry(line, jobs[number]) for line, number in enumerate(order, 1)]
    told, _ = batch(entries, made, build=builder(strength=(0.5,)))
    assert set(told.status().values()) == {"done"}, [outcome.error for outcome in told.outcomes]
    for outcome in told.outcomes:
        assert np.array_equal(pixels(Path(outcome.output)), alone[order[outcome.line - 1]]), outcome.line


def test_models_are_loaded_once_for_all_jobs_that_share_them(batch, counted, xl_model, sd_model):
    models = [str(xl_model), str(sd_model), str(xl_model), str(sd_model), str(xl_model)]
    jobs = [Entry(line, {"model": model, "prompt": f"hill {line}"}) for line, model in enumerate(models, 1)]
    told, _ = batch(jobs, made, build=builder(linfusion="none"))
    assert set(told.status().values()) == {"done"} and counted == {"unet": 2, "vae": 2, "text": 3}


def test_a_vae_that_went_on_in_another_dtype_is_loaded_again(batch, counted, xl_model):
    def make(request, origins, observer, shelf):
        report = made(request, origins, observer, shelf)
        shelf._things[VAE][1].to(torch.float64)
        return report

    told, _ = batch(entries(2, model=str(xl_model)), make)
    assert set(told.status().values()) == {"done"} and counted == {"unet": 1, "vae": 2, "text": 2}


def test_what_is_complete_is_skipped_by_content_and_nothing_is_loaded(batch, tmp_path, counted, xl_model):
    jobs = entries(3, model=str(xl_model))
    batch(jobs, made)
    before = counted.copy()
    (tmp_path / "out/0002-hill-2-0.png").unlink()
    whole = (tmp_path / "out/0003-hill-3-0.png").read_bytes()
    (tmp_path / "out/0003-hill-3-0.png").write_bytes(whole[:-30])
    told, _ = batch(jobs, looked_for)
    assert told.status() == {1: "skipped", 2: "planned", 3: "failed"} and counted == before
    told, _ = batch(jobs, made, build=builder(overwrite=True, ram=8 << 30))
    assert told.status() == {1: "skipped", 2: "done", 3: "done"}
    assert len((tmp_path / "out/0003-hill-3-0.png").read_bytes()) > len(whole) - 30


def test_another_request_under_the_same_name_is_refused(batch, tmp_path, xl_model):
    jobs = [Entry(1, {"model": str(xl_model), "output": "a.png"})]
    batch(jobs, made)
    before = (tmp_path / "out/a.png").read_bytes()
    for changed in ({"seed": 1}, {"prompt": "a sea"}, {"steps": (2,)}, {"linfusion": "none"}, {"dpi": 72.0}):
        told, _ = batch(jobs, made, build=builder(**changed))
        assert told.outcomes[0].exit_code == 73 and "a.png exists" in told.outcomes[0].error
    assert (tmp_path / "out/a.png").read_bytes() == before
    told, _ = batch(jobs, made, build=builder(seed=1, overwrite=True))
    assert told.status() == {1: "done"} and (tmp_path / "out/a.png").read_bytes() != before


def test_other_weights_or_another_picture_under_the_same_name_are_another_request(batch, tmp_path, xl_model):
    import shutil

    from safetensors.torch import load_file, save_file

    model = shutil.copytree(xl_model, tmp_path / "model")
    jobs = entries(1, model=str(model))
    batch(jobs, made)
    assert batch(jobs, made)[0].status() == {1: "skipped"}
    weights = model / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_out.bias"] += 0.5
    save_file(state, weights, {"format": "pt"})
    assert batch(jobs, made)[0].outcomes[0].exit_code == 73


def test_memory_after_many_jobs_is_that_after_two(batch, xl_model, sd_model):
    """RSS after freeing what can be: with kept models, changing sizes, and a model that comes and goes."""
    sizes, measured = [Size(64, 64), Size(128, 64), Size(96, 128)], []

    def make(request, origins, observer, shelf):
        report = made(request, origins, observer, shelf)
        free_memory(None)
        measured.append(resident_bytes())
        return report

    jobs = [Entry(line, {"model": str(xl_model), "seed": line, "size": sizes[line % 3]}) for line in range(1, 31)]
    told, _ = batch(jobs, make)
    assert set(told.status().values()) == {"done"} and len(measured) == 30
    assert measured[-1] - measured[4] < 16 << 20
