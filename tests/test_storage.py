"""storage: a file is finished or absent, damage is noticed, a folder has one process at a time."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.numpy

from lth_tf import storage
from lth_tf.errors import UserError

ARRAYS = {
    "b/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1.5, -0.0, np.nan]),
    "count": np.array(7, np.int64),
    "bits": np.array([255, 1], np.uint8),
    "none": np.zeros((0, 3), np.float32),
}
METADATA = {"level": 3, "names": ["x", "y"], "deep": {"b": 0.1, "a": None}}


def python(code, *arguments, **options):
    """Starts another interpreter on `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "x.safetensors"
    storage.write_tensors(path, ARRAYS, METADATA)
    return path


# Writing.


def test_write(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    storage.write(path, "häßlich\n")
    assert path.read_bytes() == "häßlich\n".encode()
    storage.write(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert os.listdir(path.parent) == ["x.txt"]


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        storage.write(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("place", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "full"), UserError),
        (OSError(errno.EIO, "broken"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failure_half_way_leaves_the_old_file(tmp_path, monkeypatch, place, error, raised):
    path = tmp_path / "x.txt"
    storage.write(path, "old")

    def fail(*_):
        assert len(os.listdir(tmp_path)) == 2  # the temporary file is there
        raise error

    monkeypatch.setattr(os, place, fail)
    with pytest.raises(raised):
        storage.write(path, "new")
    assert os.listdir(tmp_path) == ["x.txt"] and path.read_text() == "old"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only root may mount; test_file_size_limit stands in")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk):
    path = small_disk / "x.safetensors"
    storage.write_tensors(path, {"a": np.zeros(1000, np.float32)}, {})
    with pytest.raises(UserError, match="No space left.*the disk is full; free some space and run"):
        storage.write_tensors(path, {"a": np.zeros(100_000, np.float32)}, {})
    assert os.listdir(small_disk) == ["x.safetensors"]
    assert storage.read_tensors(path)[0]["a"].shape == (1000,)


def test_file_size_limit(tmp_path):
    code = """
        import pathlib, resource, sys
        from lth_tf import storage
        from lth_tf.errors import UserError
        path = pathlib.Path(sys.argv[1])
        storage.write(path, "old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            storage.write(path, "x" * 20_000)
        except UserError as error:
            print(error)
    """
    done = python(code, tmp_path / "x.txt")
    said, _ = done.communicate()
    assert done.returncode == 0
    assert "x.txt" in said and "the disk is full; free some space and run" in said
    assert os.listdir(tmp_path) == ["x.txt"] and (tmp_path / "x.txt").read_text() == "old"


def test_something_is_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deep" / "x", tmp_path / "folder"):
        with pytest.raises(UserError, match="is in the way.*choose another name"):
            storage.write(path, "")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_not_allowed(code):
    with pytest.raises(UserError, match="cannot write '/x'.*choose another --workdir"):
        with storage.explained("/x"):
            raise OSError(code, os.strerror(code))


# Tensors.


def test_round_trip_is_bit_exact(stored):
    arrays, metadata = storage.read_tensors(stored)
    assert metadata == METADATA
    assert sorted(arrays) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()


def test_any_memory_layout(tmp_path):
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for i, array in enumerate((a.T, a[:, ::-1], a[:, 1], np.asfortranarray(a))):
        storage.write_tensors(tmp_path / str(i), {"a": array}, {})
        assert (storage.read_tensors(tmp_path / str(i))[0]["a"] == array).all()
    storage.write_tensors(tmp_path / "plain", {"a": a}, {})
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "3").read_bytes()


def test_any_program_can_read_it(stored):
    loaded = safetensors.numpy.load_file(stored)
    assert (loaded["b/kernel"] == ARRAYS["b/kernel"]).all()


def test_equal_content_is_equal_bytes_in_every_process(stored):
    code = """
        import hashlib, pathlib, sys
        import numpy as np
        from lth_tf import storage
        names = sys.argv[2:]
        path = pathlib.Path(sys.argv[1])
        tensors = {n: np.full((len(n), 2), len(n), np.float32) for n in names}
        storage.write_tensors(path, tensors, {n: {m: 1 for m in names} for n in names})
        print(hashlib.sha256(path.read_bytes()).hexdigest())
    """
    names = ["fc1/kernel", "a", "bb", "ccc", "dddd", "eeeee"]
    running = [
        python(code, stored.parent / seed, *order, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed, order in (("1", names), ("2", names), ("3", names[::-1]))
    ]
    digests = [process.communicate()[0] for process in running]
    assert len(digests[0]) == 65 and len(set(digests)) == 1


def test_other_content_is_other_bytes(stored, tmp_path):
    storage.write_tensors(tmp_path / "level", ARRAYS, {**METADATA, "level": 4})
    storage.write_tensors(tmp_path / "value", {**ARRAYS, "count": np.array(8)}, METADATA)
    assert len({p.read_bytes() for p in (stored, tmp_path / "level", tmp_path / "value")}) == 3


def test_digest():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2)}
    assert storage.digest(base) == storage.digest(dict(reversed(base.items())))
    assert storage.digest(base) == storage.digest(
        {n: np.asfortranarray(a) for n, a in base.items()}
    )
    others = [
        {**base, "a": np.zeros((3, 2), np.float32)},
        {**base, "a": np.zeros((2, 3), np.int32)},
        {**base, "a": np.full((2, 3), -0.0, np.float32)},
        {"a": base["a"]},
        {"a": base["a"], "c": base["b"]},
        {"a": np.zeros(()), "b": base["b"]},
        {"a": np.zeros(1), "b": base["b"]},
    ]
    assert len({storage.digest(x) for x in (base, *others)}) == len(others) + 1


# Damage.


def test_every_truncation_is_noticed(stored):
    content = stored.read_bytes()
    for size in range(len(content)):
        stored.write_bytes(content[:size])
        with pytest.raises(UserError, match="delete it and run the same command again"):
            storage.read_tensors(stored)
    stored.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="delete it"):
        storage.read_tensors(stored)


def test_every_altered_byte_is_noticed(stored):
    content = stored.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert b'level\\": 3' in content[:header] and len(content) > header > 200
    for i in range(len(content)):
        flipped = content[i] ^ (1 << i % 8)
        stored.write_bytes(content[:i] + bytes([flipped]) + content[i + 1 :])
        with pytest.raises(UserError, match="x.safetensors.*delete it"):
            storage.read_tensors(stored)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'level\\": 3', b'level\\": 4'),
        (b"0.1", b"0.2"),
        (b"null", b"1234"),
        (b"b/kernel", b"c/kernel"),
    ],
)
def test_altered_header(stored, old, new):
    content = stored.read_bytes()
    assert content.count(old) == 1
    stored.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match="altered: its checksum does not fit its content"):
        storage.read_tensors(stored)


def test_foreign_files(tmp_path):
    path = tmp_path / "x"
    for content in (
        safetensors.numpy.save({"a": np.zeros(3)}),
        safetensors.numpy.save({"a": np.zeros(3)}, {"format": "pt"}),
        safetensors.numpy.save({"a": np.zeros(3)}, {"lth_tf": "not JSON"}),
        b"PK\3\4 some other file",
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a ticket of lth_tf"):
            storage.read_tensors(path)
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}, {"lth_tf": "{}"}))
    with pytest.raises(UserError, match="checksum"):
        storage.read_tensors(path)


def test_deep_and_long_json_are_damage(tmp_path):
    for text in ("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "[]", "3", '{"a": 1e999}'):
        path = tmp_path / "x.safetensors"
        path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}, {"lth_tf": text}))
        with pytest.raises(UserError, match="delete it and run the same command again"):
            storage.read_tensors(path)
        if "999" not in text:
            (tmp_path / "x.json").write_text(text)
            with pytest.raises(UserError, match="x.json' cannot be read .*; delete it"):
                storage.read_json(tmp_path / "x.json")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="there is no file .*absent"):
        storage.read_tensors(tmp_path / "absent")
    with pytest.raises(UserError, match="is a folder, not a file"):
        storage.read_tensors(tmp_path)


# The lock.

HOLD = """
    import pathlib, sys, time
    from lth_tf import storage
    with storage.lock(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "work"
    holder = python(HOLD, folder)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is working in .*work"):
            with storage.lock(folder):
                pytest.fail("two hold it")
        with storage.lock(tmp_path / "other"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with storage.lock(folder):
        pass


def test_lock_ends_with_its_block(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with storage.lock(tmp_path):
            with pytest.raises(UserError, match="another process"):
                with storage.lock(tmp_path):
                    pass
            raise ZeroDivisionError
    with storage.lock(tmp_path):
        pass


def test_lock_on_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is in the way"):
        with storage.lock(pathlib.Path(tmp_path / "file")):
            pass
