"""Every JSON output starts with its schema number."""

import json

COMMANDS = [
    ("models", "list"),
    ("models", "check", "demo"),
    ("doctor",),
    ("plan", "a hill", "--model", "demo", "--size", "64"),
    ("generate", "a hill", "--model", "demo", "--size", "64", "--steps", "1", "-o", "a.png"),
    ("info", "a.png"),
    ("batch", "jobs.txt", "--output-dir", "out", "--model", "demo", "--size", "64", "--dry-run"),
]


def test_every_json_output_starts_with_its_schema_number(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.txt").write_text("a hill\n")
    for command in COMMANDS:
        code, out, err = cli(*command, "--json")
        assert code == 0, err
        values = json.loads(out)
        assert next(iter(values)) == "schema" and values["schema"] >= 1, command
    info = json.loads(cli("info", "a.png", "--json")[1])
    assert info["request"]["schema"] == 2
