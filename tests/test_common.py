"""
python -m pytest tests/test_common.py

Errors of one line, writes that are complete or absent, folders and devices.
"""
import contextlib
import io
import os
import resource
import sys

import pytest

import common
from common import UserError


@contextlib.contextmanager
def full_disk(room=0):
    """Inside this, no file can grow beyond `room` bytes. The system refuses such a write as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # pytest captures into a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- errors

def test_errors_have_one_line():
    assert str(UserError("found\nthis\r\nand that\u2028too")) == "found this and that too"
    assert common.first_line(ValueError("\n first\nsecond")) == "first"
    assert common.first_line(ValueError()) == common.first_line(ValueError(" \n")) == "ValueError"


@pytest.mark.parametrize("error, status, stderr", [
    (None, None, ""), (UserError("no such\nfile"), 2, "error: no such file\n"), (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n")])
def test_run_cli_exits_with_a_status_and_one_line(monkeypatch, capsys, error, status, stderr):
    def main(argv):
        assert argv == ["--seed", "1"]
        if error:
            raise error
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "1"])
    with pytest.raises(SystemExit) as e:
        common.run_cli(main)
    assert e.value.code == status and capsys.readouterr() == ("", stderr)


def test_run_cli_shows_the_traceback_of_a_bug():
    with pytest.raises(ZeroDivisionError):
        common.run_cli(lambda argv: 1 / 0)


# --- writing

def write(tmp, kind, text, fault=lambda: None):
    """Write a file, or a folder of two files, with a fault in the middle."""
    if kind == "folder":
        tmp.mkdir()
        (tmp / "a").write_text(text)
        fault()
        (tmp / "b").write_text(text)
    else:
        with open(tmp, "w") as f:
            f.write(text)
            f.flush()
            fault()
            f.write(text)


def content(folder):
    """Every file and folder below `folder`: relative path -> bytes, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("leftover", [None, "file", "folder"])
def test_replacing_writes_the_whole_thing(tmp_path, kind, leftover):
    if leftover:
        write(tmp_path / "x.tmp", leftover, "of a process that was killed")
    with common.replacing(tmp_path / "x") as tmp:
        assert not os.path.lexists(tmp)
        write(tmp, kind, "new")
        assert not (tmp_path / "x").exists()
    assert content(tmp_path) == ({"x": b"newnew"} if kind == "file" else {"x": None, "x/a": b"new", "x/b": b"new"})


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), UserError("too loud"), KeyboardInterrupt(), OSError(28, "No space left"),
                                   0, 3, 5], ids=repr)
def test_a_failure_inside_replacing_leaves_what_was_there(tmp_path, exists, kind, error):
    def fail():
        raise error
    if exists:
        write(tmp_path / "x", kind, "old")
    before, room = content(tmp_path), error if isinstance(error, int) else 10**6
    expected = UserError if isinstance(error, int | OSError) else type(error)
    with full_disk(room), pytest.raises(expected) as e, common.replacing(tmp_path / "x") as tmp:
        write(tmp, kind, "longer", (lambda: None) if isinstance(error, int) else fail)
    assert content(tmp_path) == before
    if expected is UserError:
        reason = {int: f"cannot write {tmp_path / 'x'}: File too large; name a folder that exists and has room",
                  OSError: f"cannot write {tmp_path / 'x'}: No space left; name a folder that exists and has room"}
        assert str(e.value) == reason.get(type(error), "too loud")


def test_replacing_never_deletes_a_folder_that_holds_something(tmp_path):
    write(tmp_path / "x", "folder", "old")
    before = content(tmp_path)
    for kind in ("file", "folder"):
        with pytest.raises(UserError, match="cannot write"), common.replacing(tmp_path / "x") as tmp:
            write(tmp, kind, "new")
        assert content(tmp_path) == before


@pytest.mark.parametrize("place", ["none/x", "file/x", "", ".", "x" * 255])
def test_places_where_nothing_can_be_written(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("old")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        common.write_file(place, "new")
    assert content(tmp_path) == {"file": b"old"}


def test_write_file_takes_text_and_bytes(tmp_path):
    common.write_file(tmp_path / "x", "für 5 €\n")
    assert (tmp_path / "x").read_bytes() == "für 5 €\n".encode()
    common.write_file(str(tmp_path / "x"), b"\0\xff")
    assert content(tmp_path) == {"x": b"\0\xff"}


def test_remove_deletes_anything_but_what_a_link_points_to(tmp_path):
    for name in ("folder", "target"):
        write(tmp_path / name, "folder", "x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("folder", "file", "link", "dangling", "missing"):
        common.remove(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["target"] and len(os.listdir(tmp_path / "target")) == 2


def test_make_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert common.make_folder(f"{tmp_path}/a/b") == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=f"cannot write to {place}: "):
            common.make_folder(place)


# --- devices

def test_pick_device():
    assert common.pick_device("cpu").type == "cpu" and common.pick_device().type in ("cpu", "cuda")
    for wrong in ("tpu", "cuda:99", "cpu:x", ""):
        with pytest.raises(UserError, match=f"--device {wrong}: "):
            common.pick_device(wrong)
