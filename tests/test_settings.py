"""Settings: one table defines flags, variables, defaults and help.

A wrong value gives an error of one sentence.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest

import claude_api_bridge as cab

NUMBERS = [row for row in cab.SETTINGS if row.kind == "number"]
SWITCHES = [row for row in cab.SETTINGS if row.kind == "switch"]


def load(flags: Optional[Dict[str, Any]] = None, /, **environ: str) -> cab.Config:
    return cab.load_config(flags or {}, environ)


def test_every_setting_is_a_field_of_config_with_the_same_default() -> None:
    expected = {
        row.name: Path(row.default) if row.kind == "path" else row.default for row in cab.SETTINGS
    }
    assert {row.name: row.default for row in dataclasses.fields(cab.Config)} == expected


def test_every_row_of_the_table_is_complete() -> None:
    for row in cab.SETTINGS:
        assert row.flag == "--" + row.name.replace("_", "-")
        assert "CAB_" + row.name.upper() in row.variables
        assert row.help and row.kind in ("number", "text", "path", "program", "switch")
        assert row.kind != "number" or row.minimum <= row.default <= row.maximum


def test_without_flags_and_variables_all_settings_have_their_defaults() -> None:
    config = load()
    assert dataclasses.replace(config, data_dir=cab.Config().data_dir) == cab.Config()
    assert config.data_dir == Path.home() / ".claude-api-bridge"


@pytest.mark.parametrize(
    "flags, environ, port",
    [
        ({"port": "1"}, {"CAB_PORT": "2", "PORT": "3"}, 1),
        ({"port": None}, {"CAB_PORT": "2", "PORT": "3"}, 2),
        ({}, {"PORT": "3"}, 3),
        ({}, {"CAB_PORT": "", "PORT": "3"}, 3),
        ({}, {"PORT": ""}, 3456),
        ({}, {}, 3456),
        ({"port": "0"}, {"PORT": "3"}, 0),
    ],
)
def test_a_flag_overrides_a_variable_which_overrides_the_default(
    flags: Dict[str, Any], environ: Dict[str, str], port: int
) -> None:
    assert load(flags, **environ).port == port


def test_the_original_s_variables_work(tmp_path: Path) -> None:
    config = load(PORT="8080", CAB_DATA_DIR=str(tmp_path))
    assert (config.port, config.data_dir) == (8080, tmp_path)


@pytest.mark.parametrize("row", SWITCHES, ids=lambda row: row.name)
def test_a_switch_is_read_from_its_variable(row: cab.Setting) -> None:
    for word in ("1", "true", "YES", "on"):
        assert getattr(load(**{row.variables[0]: word}), row.name) is True
    for word in ("0", "False", "no", "off"):
        assert getattr(load(**{row.variables[0]: word}), row.name) is False
    assert getattr(load({row.name: True}, **{row.variables[0]: "0"}), row.name) is True


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
def test_a_number_is_accepted_only_within_its_bounds(row: cab.Setting) -> None:
    for value in (row.minimum, row.maximum):
        assert getattr(load({row.name: str(value)}), row.name) == value
    for value in (row.minimum - 1, row.maximum + 1):
        with pytest.raises(cab.WrongSetting) as wrong:
            load({row.name: str(value)})
        assert row.flag in str(wrong.value)
        assert str(row.minimum) in str(wrong.value)
        assert str(row.maximum) in str(wrong.value)


WRONG: List[Tuple[Dict[str, Any], Dict[str, str], str]] = [
    *(
        ({"port": value}, {}, "--port")
        for value in ("abc", "", " 80", "8_0", "1e3", "80.0", "٣", "0x50", "9" * 5000, "True")
    ),
    ({}, {"CAB_PORT": "abc"}, "CAB_PORT"),
    ({}, {"PORT": "99999"}, "PORT"),
    ({}, {"CAB_RATE_LIMIT": "-1"}, "CAB_RATE_LIMIT"),
    ({}, {"CAB_DEMO": "maybe"}, "CAB_DEMO"),
    ({}, {"CAB_ALLOW_API_KEY": "2"}, "CAB_ALLOW_API_KEY"),
    ({}, {"CAB_PLAN_ONLY": "plan"}, "CAB_PLAN_ONLY"),
    ({"data_dir": ""}, {}, "--data-dir"),
    ({}, {"CAB_DATA_DIR": "  "}, "CAB_DATA_DIR"),
    ({"data_dir": "a\0b"}, {}, "--data-dir"),
    ({"data_dir": "~no-such-user/data"}, {}, "--data-dir"),
    ({"host": "a\0b"}, {}, "--host"),
    ({}, {"CAB_CLAUDE": "a\0b"}, "CAB_CLAUDE"),
    ({"cloudflared": "~no-such-user/cloudflared"}, {}, "--cloudflared"),
    ({}, {"CAB_CLAUDE": "~no-such-user/claude"}, "CAB_CLAUDE"),
]
if os.name == "nt":
    # Windows takes every name for a user.
    WRONG = [row for row in WRONG if "~no-such-user" not in str(row)]


@pytest.mark.parametrize("flags, environ, source", WRONG, ids=lambda value: "%.40r" % (value,))
def test_the_error_of_a_wrong_value_names_its_source(
    flags: Dict[str, Any], environ: Dict[str, str], source: str
) -> None:
    with pytest.raises(cab.WrongSetting) as wrong:
        load(flags, **environ)
    assert str(wrong.value).startswith(source + " ") and "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    "words, environ, plan_only",
    [
        (["start"], {}, False),
        (["start", "--plan-only"], {}, True),
        (["start"], {"CAB_PLAN_ONLY": "1"}, True),
        (["start"], {"CAB_PLAN_ONLY": "0"}, False),
        (["start"], {"CAB_PLAN_ONLY": ""}, False),
        (["start", "--plan-only"], {"CAB_PLAN_ONLY": "0"}, True),
    ],
    ids=str,
)
def test_paid_extra_usage_is_allowed_unless_plan_only_is_set(
    words: List[str], environ: Dict[str, str], plan_only: bool
) -> None:
    config = load(vars(cab.build_parser().parse_args(words)), **environ)
    assert config.plan_only is plan_only and config.allow_api_key is False


def test_a_folder_setting_becomes_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert load({"data_dir": "data"}).data_dir == tmp_path / "data"
    assert load({"data_dir": "~/data"}).data_dir == tmp_path / "home" / "data"


@pytest.mark.parametrize("name", ["claude", "cloudflared"])
def test_the_home_folder_in_the_path_of_a_program_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # A shell does not expand ~ in --claude=~/bin/claude, and systemd never does.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    program = str(tmp_path / "bin" / name)
    assert getattr(load({name: "~/bin/" + name}), name) == program
    assert getattr(load(**{"CAB_" + name.upper(): "~/bin/" + name}), name) == program
    # A name is looked up in PATH, and a relative path stays relative.
    for text in ("", name, "bin/" + name, "./" + name, "/opt/~/" + name, "a~"):
        assert getattr(load({name: text}), name) == text


@pytest.mark.parametrize(
    "host, no_tunnel, listens",
    [
        ("", False, "127.0.0.1"),
        ("", True, "0.0.0.0"),
        ("::1", True, "::1"),
        ("10.0.0.1", False, "10.0.0.1"),
    ],
)
def test_the_bridge_listens_on_the_network_only_without_a_tunnel(
    host: str, no_tunnel: bool, listens: str
) -> None:
    assert cab.Config(host=host, no_tunnel=no_tunnel).listen_host == listens


def test_help_names_every_flag_and_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cab.build_parser().parse_args(["start", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert [
        word for row in cab.SETTINGS for word in (row.flag, *row.variables) if word not in shown
    ] == []


def test_every_flag_reaches_the_config(tmp_path: Path) -> None:
    texts = {
        "public_url": "https://bridge.example.com", "tunnel_protocol": "http2",
        "cloudflared_url": "http://127.0.0.1:1/x",
    }
    words: List[str] = ["start"]
    expected: Dict[str, Any] = {}
    for row in cab.SETTINGS:
        text = texts.get(row.name, "word")
        argument, expected[row.name] = {
            "number": ("1", 1), "text": (text, text), "path": (str(tmp_path), tmp_path),
            "program": (text, text), "switch": ("", True),
        }[row.kind]
        words += [row.flag, argument] if argument else [row.flag]
    config = load(vars(cab.build_parser().parse_args(words)))
    assert {row.name: getattr(config, row.name) for row in cab.SETTINGS} == expected


@pytest.mark.parametrize(
    "words",
    [
        ["start", "--prot", "1"],
        ["start", "--por", "1"],
        ["start", "--port"],
        ["start", "extra"],
        ["start", "--plan"],
        ["start", "--plan-only", "1"],
        ["frobnicate"],
    ],
)
def test_unknown_arguments_are_refused_with_status_2(
    words: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cab.build_parser().parse_args(words)
    assert end.value.code == 2 and words[-1].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["start", "--port", "abc"],
        ["start", "--data-dir", "~no-such-user/data" if os.name == "posix" else ""],
        ["token", "list", "--data-dir", ""],
        ["start", "--public-url", "bridge.example.com"],
        ["start", "--tunnel-protocol", "tcp"],
        ["doctor", "--cloudflared-url", "ftp://x"],
    ],
)
def test_a_wrong_value_exits_with_status_2_and_one_line(
    words: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cab.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.strip().splitlines()) == 1 and words[-2] in shown.err
