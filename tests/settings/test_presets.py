import pytest

from linfusion_cli import settings
from linfusion_cli.core.errors import ConfigError, InputNotFound, UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.settings.sources.presets import find_built_in_folder

REQUIRED = {"prompt": "a", "size": "64", "output": "a.png", "model": "demo"}


@pytest.mark.parametrize("name", settings.list_preset_names())
def test_every_preset_is_a_request(name):
    layers = [
        settings.read_flag_layer({"size": "64", "output": "a.png"}),
        settings.read_preset_layer(name),
    ]
    request = settings.build_request(settings.merge(layers))
    assert request.prompt and request.steps


def test_flag_before_environment_before_config_before_preset_before_default(tmp_path, monkeypatch):
    config, preset = tmp_path / "config.toml", tmp_path / "mine.toml"
    preset.write_text("steps = 1\nseed = 1\nstrength = 0.1\ndpi = 100")
    config.write_text("steps = 2\nseed = 2\nstrength = 0.2\npreset = 'mine.toml'")
    environ = {"LINFUSION_CONFIG": str(config), "LINFUSION_STEPS": "3", "LINFUSION_SEED": "3"}
    config_layer, preset_name = settings.read_config_layer(environ)
    layers = [
        settings.read_flag_layer(REQUIRED | {"steps": "4", "dtype": None}),
        settings.read_environment_layer(environ),
    ]
    merged = settings.merge([*layers, config_layer, settings.read_preset_layer(str(preset))])
    request = settings.build_request(merged)
    assert (request.steps, request.seed, request.strength, request.dpi, request.dtype) == ((4,), 3, (0.2,), 100, "auto")
    assert preset_name == str(preset)
    origins = merged.origins()
    assert (origins["steps"], origins["seed"], origins["dtype"]) == ("flag", "LINFUSION_SEED", "default")
    assert str(config) in origins["strength"] and str(preset) in origins["dpi"]


def test_types_from_the_environment():
    environ = {"LINFUSION_SIZE": "100x200", "LINFUSION_DPI": "72.5", "LINFUSION_PROMPT_METADATA": "no"}
    values = settings.read_environment_layer(environ).values
    assert values == {"size": Size(100, 200), "dpi": 72.5, "prompt_metadata": False}


@pytest.mark.parametrize(
    ("name", "text"),
    [("STEPS", "ten"), ("STEPS", "1.5"), ("DPI", "x"), ("SIZE", "12"), ("PROMPT_METADATA", "maybe")],
)
def test_a_wrong_variable_is_named(name, text):
    layer = settings.read_environment_layer({f"LINFUSION_{name}": text})
    with pytest.raises(UsageError, match=f"LINFUSION_{name}='{text}'"):
        settings.raise_errors(layer)


def test_a_variable_out_of_range_is_named():
    merged = settings.merge(
        [settings.read_flag_layer(REQUIRED), settings.read_environment_layer({"LINFUSION_STEPS": "0"})]
    )
    with pytest.raises(UsageError, match="LINFUSION_STEPS: --steps 0"):
        settings.build_request(merged)


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("seed = 1\nstepz = 3", 2, "stepz"),
        ("seed = 1\n\nsteps = 'many'", 3, "steps"),
        ("[steps]\na = 1", 1, "steps"),
        ("size = 5", 1, "size"),
        ("output = 'a.png'", 1, "output"),
    ],
)
def test_a_wrong_line_of_a_file_is_named(tmp_path, text, line, named):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"mine.toml:{line}: .*{named}"):
        settings.raise_errors(settings.read_preset_layer(str(path)))


def test_a_value_out_of_range_in_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1\nsteps = 0")
    merged = settings.merge([settings.read_flag_layer(REQUIRED), settings.read_preset_layer(str(path))])
    with pytest.raises(ConfigError, match="mine.toml:2: --steps 0"):
        settings.build_request(merged)


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", b"[[["])
def test_what_is_no_toml_is_refused(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="mine.toml is not TOML"):
        settings.read_preset_layer(str(path))


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UsageError, match="demo, sd15, sd21, sdxl"):
        settings.read_preset_layer("nope")


@pytest.fixture
def own_presets(tmp_path, monkeypatch):
    """A folder in LINFUSION_PRESET_PATH, and the user's config folder, each with presets."""
    shared, own = tmp_path / "shared", tmp_path / "config" / "linfusion" / "presets"
    for folder, names in ((shared, ("team", "demo")), (own, ("mine", "team", ".hidden"))):
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.toml").write_text(f"model = 'demo'\nprompt = 'from {folder.name}'\nsize = 512")
    monkeypatch.setenv("LINFUSION_PRESET_PATH", f"{tmp_path / 'missing'}:{shared}")
    return shared, own


def test_presets_come_from_the_path_the_program_and_the_users_folder(own_presets):
    shared, own = own_presets
    found = {preset.name: preset.source for preset in settings.find_presets() if preset.shadowed_by is None}
    expected = {"demo": str(shared), "sdxl": "built in", "team": str(shared), "mine": str(own)}
    assert found.items() >= expected.items() and ".hidden" not in found
    shadowed = [preset for preset in settings.find_presets() if preset.shadowed_by is not None]
    assert {preset.source for preset in shadowed} == {"built in", str(own)}
    assert {preset.shadowed_by for preset in shadowed} == {shared / "demo.toml", shared / "team.toml"}
    assert settings.read_preset_layer("team").values["prompt"] == "from shared"
    assert settings.read_preset_layer(str(own / "team.toml")).values["prompt"] == "from presets"


def test_a_preset_in_the_users_folder_does_not_replace_a_built_in_one(own_presets, monkeypatch):
    _, own = own_presets
    monkeypatch.delenv("LINFUSION_PRESET_PATH")
    (own / "sdxl.toml").write_text("model = 'demo'")
    assert settings.read_preset_layer("sdxl").values["model"] != "demo"


def test_built_in_presets_are_found_in_a_wheel_and_in_a_checkout(tmp_path):
    package = tmp_path / "linfusion_cli"
    package.mkdir()
    with pytest.raises(ConfigError, match="no presets"):
        find_built_in_folder(package)
    (tmp_path / "presets").mkdir()
    with pytest.raises(ConfigError, match="no presets"):  # next to a wheel, this is somebody else's folder
        find_built_in_folder(package)
    (tmp_path / "pyproject.toml").touch()
    assert find_built_in_folder(package) == tmp_path / "presets"
    (package / "_presets").mkdir()
    assert find_built_in_folder(package) == package / "_presets"


def test_a_preset_in_a_config_file_is_relative_to_that_file(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.toml").write_text("seed = 7")
    config = tmp_path / "conf" / "config.toml"
    config.write_text("preset = 'mine.toml'")
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, preset = settings.read_config_layer({"LINFUSION_CONFIG": str(config)})
    assert preset is not None and settings.read_preset_layer(preset).values == {"seed": 7}
    config.write_text("\npreset = 'nope.toml'")
    with pytest.raises(ConfigError, match=r"config\.toml:2: .*conf/nope\.toml"):
        settings.read_config_layer({"LINFUSION_CONFIG": str(config)})


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputNotFound, match="nope.toml"):
        settings.read_preset_layer(str(tmp_path / "nope.toml"))
    with pytest.raises(InputNotFound, match="none.toml"):
        settings.read_config_layer({"LINFUSION_CONFIG": str(tmp_path / "none.toml")})


def test_without_a_config_file_there_are_no_settings_from_it():
    assert settings.read_config_layer({})[0].values == {}


@pytest.mark.parametrize("missing", ["prompt", "size"])
def test_what_has_no_default_is_asked_for(missing):
    given = {key: value for key, value in REQUIRED.items() if key != missing}
    with pytest.raises(UsageError, match=f"No {missing} was given"):
        settings.build_request(settings.merge([settings.read_flag_layer(given)]))


@pytest.mark.parametrize("missing", ["prompt", "size", "output", "model"])
def test_a_missing_setting_does_not_hide_a_wrong_one(missing):
    given = {key: value for key, value in REQUIRED.items() if key != missing} | {"steps": "0"}
    with pytest.raises(UsageError, match="--steps 0"):
        settings.build_request(settings.merge([settings.read_flag_layer(given)]))


@pytest.mark.parametrize("value", ["3", "'nope'", "true"])
def test_a_config_file_that_names_no_preset_is_wrong_in_that_line(tmp_path, value):
    path = tmp_path / "config.toml"
    path.write_text(f"seed = 1\npreset = {value}")
    with pytest.raises(ConfigError, match=r"config\.toml:2: there is no preset"):
        settings.read_config_layer({"LINFUSION_CONFIG": str(path)})


FILES = ("lora", "textual_inversion", "ip_adapter", "ip_image", "controlnet", "control_image")


@pytest.mark.parametrize("setting", FILES)
def test_a_comma_is_part_of_a_files_name_everywhere(tmp_path, setting):
    """In a preset, a config file, the environment and a job; several files are a list."""
    from linfusion_cli.batch.parsers.schema import read_fields

    name = "My Style, v2.safetensors"
    path = tmp_path / "mine.toml"
    path.write_text(f'{setting} = "{name}"')
    layers = [
        settings.read_preset_layer(str(path)),
        settings.read_config_layer({"LINFUSION_CONFIG": str(path)})[0],
        settings.read_environment_layer({f"LINFUSION_{setting.upper()}": name}),
        settings.read_flag_layer({setting: [name]}),
    ]
    found = [settings.raise_errors(layer).values for layer in layers] + [read_fields({setting: name})]
    assert [tuple(map(str, values[setting])) for values in found] == [(name,)] * 5
    assert tuple(map(str, read_fields({setting: [name, " b, c "]})[setting])) == (name, "b, c")


def test_a_comma_still_separates_numbers_and_words():
    from linfusion_cli.batch.parsers.schema import read_fields

    values = {"steps": "50, 30", "attention": "original,linear", "ip_scale": "0.5,1", "control_phases": "0,2"}
    expected = {"steps": (50, 30), "attention": ("original", "linear"), "ip_scale": (0.5, 1.0)}
    assert read_fields(values) == expected | {"control_phases": ("0", "2")}
