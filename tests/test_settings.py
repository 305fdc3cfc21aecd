"""Settings out of an environment: defaults, every variable, misspelt names and bad values."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmgraph import settings
from lmgraph.errors import SettingsError


def test_an_empty_environment_gives_the_defaults() -> None:
    read = settings.read({})
    assert (read.graph, read.profile) == (None, "standard")
    assert read.threads >= 1
    assert read.cache.name == "lmgraph"
    assert read.cache.is_absolute()


def test_every_variable_is_read() -> None:
    read = settings.read({"LMGRAPH_CACHE": "/var/cache/x", "LMGRAPH_STORE": "redis://r", "LMGRAPH_GRAPH": "g.yaml", "LMGRAPH_PROFILE": "tiny",
                          "LMGRAPH_THREADS": "3"})
    assert read == settings.Settings(Path("/var/cache/x"), "redis://r", Path("g.yaml"), "tiny", 3)


def test_every_variable_is_described() -> None:
    assert all(name.startswith("LMGRAPH_") and text for name, text in settings.VARIABLES.items())


def test_variables_of_others_do_not_matter() -> None:
    assert settings.read({"PATH": "/bin", "lmgraph_threads": "x", "XLMGRAPH_CACHE": "y"}) == settings.read({})


@pytest.mark.parametrize("name", ["LMGRAPH_CACHE", "LMGRAPH_STORE", "LMGRAPH_GRAPH", "LMGRAPH_THREADS"])
def test_an_empty_variable_counts_as_not_set(name: str) -> None:
    assert settings.read({name: ""}) == settings.read({})


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="those have their own cache folders")
def test_the_cache_folder_of_the_desktop_is_honoured() -> None:
    assert settings.read({"XDG_CACHE_HOME": "/x"}).cache == Path("/x/lmgraph")
    assert settings.read({"XDG_DATA_HOME": "/x"}).store == "sqlite:////x/lmgraph/store.db"


def test_a_tilde_is_the_home_folder() -> None:
    read = settings.read({"LMGRAPH_CACHE": "~/c", "LMGRAPH_GRAPH": "~/g.yaml"})
    assert (read.cache, read.graph) == (Path.home() / "c", Path.home() / "g.yaml")


def test_the_home_folder_of_nobody_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="home folder") as caught:
        settings.read({"LMGRAPH_CACHE": "~no-such-user-of-this-machine/cache"})
    assert "LMGRAPH_CACHE" in caught.value.hint


@pytest.mark.parametrize(("wrong", "right"), [
    ("LMGRAPH_CACH", "LMGRAPH_CACHE"), ("LMGRAPH_TREADS", "LMGRAPH_THREADS"),
    ("LMGRAPH_GRAF", "LMGRAPH_GRAPH"), ("LMGRAPH_PROFIL", "LMGRAPH_PROFILE"),
])
def test_a_misspelt_variable_suggests_the_near_one(wrong: str, right: str) -> None:
    with pytest.raises(SettingsError, match=f"Unknown environment variable {wrong}") as caught:
        settings.read({wrong: "1"})
    assert caught.value.hint == f"Did you mean {right}?"


def test_a_variable_like_no_other_lists_the_valid_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        settings.read({"LMGRAPH_ZZZZZZZZZZZZZZZZZZZZ": ""})
    assert caught.value.hint == f"Valid: {', '.join(settings.VARIABLES)}."


@pytest.mark.parametrize("threads", ["0", "-1", "1025", "four", "1.5", " 2", "1e3", "²", "9" * 5000])
def test_threads_are_a_whole_number_within_reason(threads: str) -> None:
    with pytest.raises(SettingsError, match=r"^LMGRAPH_THREADS is .*, expected a whole number from 1 to 1024"):
        settings.read({"LMGRAPH_THREADS": threads})


@pytest.mark.parametrize("threads", ["1", "1024"])
def test_the_ends_of_the_range_of_threads_are_allowed(threads: str) -> None:
    assert settings.read({"LMGRAPH_THREADS": threads}).threads == int(threads)


def test_an_empty_profile_counts_as_unset() -> None:
    assert settings.read({"LMGRAPH_PROFILE": ""}).profile == settings.read({}).profile


@pytest.mark.parametrize("profile", ["Tiny", "huge", "tiny "])
def test_an_unknown_profile_lists_the_valid_ones(profile: str) -> None:
    with pytest.raises(SettingsError, match=f"LMGRAPH_PROFILE is '{profile}'; valid: standard, tiny"):
        settings.read({"LMGRAPH_PROFILE": profile})
