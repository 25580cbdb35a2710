import dataclasses

import pytest

from millpond import settings
from millpond.settings import (
    PROGRAMS,
    EdgeSettings,
    HubSettings,
    LearnSettings,
    PoolSettings,
    RegistrySettings,
    SettingsError,
    check_exposure,
    describe,
    is_loopback,
    load,
    variable_of,
)


def test_variables_fill_their_fields_by_type(tmp_path):
    environ = {
        "MILLPOND_EDGE_PORT": "0",
        "MILLPOND_EDGE_SYNC_S": "0.5",
        "MILLPOND_EDGE_HUB": "http://hub",
        "MILLPOND_EDGE_PUBLIC_KEY": str(tmp_path / "key"),
        "MILLPOND_HOME": str(tmp_path),
    }
    loaded = load(EdgeSettings, environ)
    assert (loaded.port, loaded.sync_s, loaded.hub) == (0, 0.5, "http://hub")
    assert loaded.public_key_path == tmp_path / "key"
    assert loaded.home == tmp_path


def test_home_and_data_are_shared_by_all_programs(tmp_path):
    environ = {"MILLPOND_HOME": str(tmp_path), "MILLPOND_DATA": str(tmp_path / "data")}
    assert {load(program, environ).home for program in PROGRAMS.values()} == {tmp_path}
    assert load(LearnSettings, environ).data == tmp_path / "data"


def test_an_override_wins_unless_it_is_none():
    assert load(HubSettings, {"MILLPOND_HUB_PORT": "1"}, port=2).port == 2
    assert load(HubSettings, {"MILLPOND_HUB_PORT": "1"}, port=None).port == 1


def test_empty_variable_is_no_variable():
    assert load(HubSettings, {"MILLPOND_HUB_PORT": "", "MILLPOND_HUB_MODEL": ""}) == load(HubSettings, {})


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("MILLPOND_HUB_PORT", "eighty", "a whole number"),
        ("MILLPOND_EDGE_SYNC_S", "soon", "a number of seconds"),
        ("MILLPOND_POOL_CONFINE", "1", "yes or no"),
    ],
)
def test_value_of_a_wrong_type_names_variable_value_and_what_is_wanted(variable, value, wanted):
    program = PROGRAMS[variable.split("_")[1].lower()]
    with pytest.raises(SettingsError, match=f"{variable} is '{value}', which is not {wanted}"):
        load(program, {variable: value})


def test_a_choice_is_yes_or_no():
    assert load(PoolSettings, {}).confine
    assert not load(PoolSettings, {"MILLPOND_POOL_CONFINE": "no"}).confine
    assert ("MILLPOND_POOL_CONFINE", "no", "environment") in [
        row[:3] for row in describe("pool", {"MILLPOND_POOL_CONFINE": "no"})
    ]


def test_secret_comes_from_a_file(tmp_path):
    (tmp_path / "token").write_text("  s3cret\n")
    environ = {"MILLPOND_POOL_TOKEN_FILE": str(tmp_path / "token")}
    assert load(PoolSettings, environ).token == "s3cret"
    assert load(PoolSettings, environ | {"MILLPOND_POOL_TOKEN": "direct"}).token == "direct"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_secret_file_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(SettingsError, match="MILLPOND_POOL_TOKEN_FILE names"):
        load(PoolSettings, {"MILLPOND_POOL_TOKEN_FILE": str(tmp_path / "token")})


def test_description_masks_secrets_and_names_sources(tmp_path):
    (tmp_path / "token").write_text("hidden2")
    environ = {
        "MILLPOND_HUB_EDGE_TOKEN": "hidden1",
        "MILLPOND_HUB_REVIEWER_TOKEN_FILE": str(tmp_path / "token"),
        "MILLPOND_HUB_MODEL": "sentiment",
    }
    rows = {variable: (value, source) for variable, value, source, _ in describe("hub", environ)}
    assert rows["MILLPOND_HUB_EDGE_TOKEN"] == ("(set)", "environment")
    assert rows["MILLPOND_HUB_REVIEWER_TOKEN"] == ("(set)", "file")
    assert rows["MILLPOND_HUB_OPERATOR_TOKEN"] == ("(not set)", "default")
    assert rows["MILLPOND_HUB_MODEL"] == ("sentiment", "environment")
    assert rows["MILLPOND_HUB_RECIPE"] == ("", "default")
    assert "hidden" not in str(rows)


def test_every_field_has_a_variable_of_its_own_and_help():
    for program, settings_class in PROGRAMS.items():
        variables = [variable_of(program, field) for field in dataclasses.fields(settings_class)]
        assert len(set(variables)) == len(variables)
        assert all(variable.startswith("MILLPOND_") for variable in variables)
        assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(settings_class))


def test_secrets_are_those_with_a_telling_name():
    for settings_class in PROGRAMS.values():
        for field in dataclasses.fields(settings_class):
            tells = field.name.endswith("token") or field.name == "database"  # a URL may hold a password
            assert field.metadata["secret"] == tells, field.name


@pytest.mark.parametrize(
    ("bind", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_loopback_is_told_from_the_world(bind, local):
    assert is_loopback(bind) is local


def test_listening_to_the_world_needs_every_token():
    check_exposure("hub", "127.0.0.1", edge_token="", operator_token="")
    check_exposure("hub", "0.0.0.0", edge_token="a", operator_token="b")
    with pytest.raises(SettingsError, match=r"Set MILLPOND_HUB_OPERATOR_TOKEN \(or MILLPOND_HUB_OPERATOR_TOKEN_FILE\)"):
        check_exposure("hub", "0.0.0.0", edge_token="a", operator_token="")


@pytest.mark.parametrize("home", [None, ""])
def test_home_directory_is_not_needed(monkeypatch, home):
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    assert settings.default_home().is_absolute()


def test_registry_paths_follow_the_home_unless_set(tmp_path):
    loaded = load(RegistrySettings, {"MILLPOND_HOME": str(tmp_path)})
    assert loaded.root_path == tmp_path / "registry"
    assert loaded.private_key_path == tmp_path / "keys/signing.key"
    assert loaded.public_key_path == tmp_path / "keys/signing.pub"
    assert load(RegistrySettings, {"MILLPOND_REGISTRY_ROOT": "/r"}).root_path.as_posix() == "/r"
