"""Slides staged from an S3 endpoint: whole or not at all, bounded, safe against other processes and kills."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from apacs_ray.errors import ApacsError, BadInput
from apacs_ray.slides.cache import SlideCache, path_inside
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.storage import Entry, open_store

SIZE = 3 << 20


@pytest.fixture
def slides(s3: str) -> tuple[str, list[SlideFiles]]:
    store = open_store(f"{s3}/slides")
    for name in ("a", "b", "c"):
        store.write(f"{name}.mrxs", b"x")
        store.write(f"{name}/Data 0.dat", name.encode() * SIZE)
        store.write(f"{name}/Slidedat.ini", b"ini")
    return store.uri, list(find_slides(store.list()).slides)


def staged(cache: SlideCache) -> int:
    return len([path for path in cache.folder.iterdir() if path.is_dir()])


def test_a_slide_is_staged_once_with_all_its_files(tmp_path: Path, slides: tuple[str, list[SlideFiles]]) -> None:
    store, cache = open_store(slides[0]), SlideCache(tmp_path / "cache", 1 << 30)
    with cache.staged(store, slides[1][0].files) as folder:
        assert (folder / "a.mrxs").read_bytes() == b"x"
        assert (folder / "a/Data 0.dat").stat().st_size == SIZE
        stamp = (folder / "a/Data 0.dat").stat().st_ino
    with cache.staged(store, slides[1][0].files) as folder:
        assert (folder / "a/Data 0.dat").stat().st_ino == stamp
    assert staged(cache) == 1


def test_the_least_recently_used_makes_room(tmp_path: Path, slides: tuple[str, list[SlideFiles]]) -> None:
    store, cache = open_store(slides[0]), SlideCache(tmp_path / "cache", 2 * SIZE + 1000)
    a, b, c = slides[1]
    with cache.staged(store, a.files) as at_a:
        pass
    with cache.staged(store, b.files) as at_b:
        os.utime(at_a, (1, 1))
        os.utime(at_b, (2, 2))
        with cache.staged(store, c.files) as at_c:
            assert not at_a.exists()
            assert at_b.exists()
            os.utime(at_b, (1, 1))
            with cache.staged(store, a.files):  # both others are in use: the limit gives way, they stay
                assert at_b.exists()
                assert at_c.exists()


def test_another_version_is_another_slide(tmp_path: Path, slides: tuple[str, list[SlideFiles]]) -> None:
    store, cache = open_store(slides[0]), SlideCache(tmp_path / "cache", 1 << 30)
    with cache.staged(store, slides[1][0].files):
        pass
    store.write("a/Data 0.dat", b"new")
    fresh = next(iter(find_slides(store.list()).slides))
    with cache.staged(store, fresh.files) as folder:
        assert (folder / "a/Data 0.dat").read_bytes() == b"new"


def test_a_file_that_is_gone_is_named_and_nothing_stays(tmp_path: Path, slides: tuple[str, list[SlideFiles]]) -> None:
    store, cache = open_store(slides[0]), SlideCache(tmp_path / "cache", 1 << 30)
    store.delete("a/Data 0.dat")
    with pytest.raises(BadInput, match=r"a/Data 0\.dat is gone"), cache.staged(store, slides[1][0].files):
        pass
    assert staged(cache) == 0


def test_a_full_disk_is_one_clear_line(
    tmp_path: Path, slides: tuple[str, list[SlideFiles]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cache = open_store(slides[0]), SlideCache(tmp_path / "cache", 1 << 30)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("apacs_ray.slides.cache.copy_object", full)
    with pytest.raises(ApacsError, match=r"no space left .* data\.cache"), cache.staged(store, slides[1][0].files):
        pass
    assert staged(cache) == 0


def _stage(uri: str, folder: str, slide: SlideFiles, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    with SlideCache(Path(folder), 1 << 30).staged(open_store(uri), slide.files) as place:
        queue.put((place / "a/Data 0.dat").stat().st_ino)


def test_two_processes_copy_it_once(tmp_path: Path, slides: tuple[str, list[SlideFiles]]) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_stage, args=(slides[0], str(tmp_path / "cache"), slides[1][0], queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    inodes = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(inodes) == 1


def _hang(uri: str, folder: str, slide: SlideFiles) -> None:
    import apacs_ray.slides.cache as cache

    copy = cache.copy_object

    def half(store: object, entry: Entry, target: Path) -> None:
        copy(store, entry, target)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)

    cache.copy_object = half  # type: ignore[assignment]
    with SlideCache(Path(folder), 1 << 30).staged(open_store(uri), slide.files):
        pass


def test_a_kill_half_way_leaves_nothing_that_looks_whole(tmp_path: Path, slides: tuple[str, list[SlideFiles]]) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_hang, args=(slides[0], str(tmp_path / "cache"), slides[1][0])
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cache = SlideCache(tmp_path / "cache", 1 << 30)
    with cache.staged(open_store(slides[0]), slides[1][0].files) as folder:
        assert (folder / "a/Data 0.dat").stat().st_size == SIZE
    assert staged(cache) == 1


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/etc/passwd", "a//b", "a\0b", "./a", ""])
def test_keys_cannot_leave_the_cache(path: str) -> None:
    with pytest.raises(BadInput, match="bad_name"):
        path_inside(path)


def test_a_local_slide_is_used_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"x")
    store = open_store(str(tmp_path))
    (slide,) = find_slides(store.list()).slides
    with SlideCache(tmp_path / "cache", 1).staged(store, slide.files) as folder:
        assert folder == tmp_path
    assert not (tmp_path / "cache").exists()
