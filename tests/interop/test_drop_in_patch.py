"""torch.save and torch.load replaced: by a call, for a block, for a program."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import holdfast.torch  # noqa: E402
from holdfast.torch import patch  # noqa: E402

OURS = (holdfast.torch.save, holdfast.torch.load)
THEIRS = (torch.save, torch.load)


def current() -> tuple[Any, Any]:
    assert torch.serialization.save is torch.save
    assert torch.serialization.load is torch.load
    return torch.save, torch.load


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    assert current() == THEIRS
    yield
    assert current() == THEIRS


def test_for_a_block(tmp_path: Path) -> None:
    with patch() as made:
        assert current() == OURS
        assert "in force" in repr(made)
        torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
        assert torch.load(tmp_path / "x.pt")["w"].tolist() == [1, 1, 1]
    assert current() == THEIRS
    assert "undone" in repr(made)
    assert torch.load(tmp_path / "x.pt")["w"].tolist() == [1, 1, 1]


def test_by_a_call() -> None:
    made = patch()
    assert current() == OURS
    made.undo()
    assert current() == THEIRS
    made.undo()
    assert current() == THEIRS


def test_after_an_error() -> None:
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert current() == THEIRS


def test_within_each_other() -> None:
    with patch():
        with patch():
            assert current() == OURS
        assert current() == OURS
    first, second = patch(), patch()
    first.undo()
    assert current() == OURS
    second.undo()
    assert current() == THEIRS
    made = patch()
    with made:
        with made:
            assert current() == OURS
        assert current() == OURS
    assert current() == THEIRS
    with made:
        assert current() == OURS


def test_functions_that_others_put_there_stay() -> None:
    calls = []
    made = patch()

    def wrapper(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        return holdfast.torch.load(*arguments, **more)

    torch.load = wrapper
    made.undo()
    assert torch.load is wrapper
    assert torch.save is THEIRS[0] and torch.serialization.load is THEIRS[1]
    with patch():
        assert torch.load is OURS[1]
    assert torch.load is wrapper
    torch.load = THEIRS[1]
    assert calls == []


def test_for_every_thread() -> None:
    seen: list[Any] = []
    with patch():
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [OURS]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                with patch():
                    assert current() == OURS
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import holdfast._engine as engine

    asked: list[bool] = []

    class Publication(engine.Publication):
        def commit(self, durable: bool = True) -> None:
            asked.append(durable)
            super().commit(durable)

    monkeypatch.setattr("holdfast.publish._engine.Publication", Publication)
    holdfast.torch.save(1, tmp_path / "x")
    with patch():
        torch.save(1, tmp_path / "x")
        with patch(durable=True):
            torch.save(1, tmp_path / "x")
            torch.save(1, tmp_path / "x", _use_new_zipfile_serialization=False)
        torch.save(1, tmp_path / "x")
    assert asked == [False, False, True, True, False]
    with pytest.raises(TypeError, match="durable"):
        patch(durable=1)  # type: ignore[arg-type]


def test_what_libraries_do_with_them(tmp_path: Path) -> None:
    """torch.hub and the checkpoints of optimizers call them by their names in torch."""
    net = torch.nn.Linear(3, 2)
    with patch():
        file = io.BytesIO()
        torch.save({"model": net.state_dict()}, file)
        torch.save(net.state_dict(), tmp_path / "w.pt")
        url = (tmp_path / "w.pt").as_uri()
        state = torch.hub.load_state_dict_from_url(
            url, model_dir=str(tmp_path / "hub"), progress=False
        )
    file.seek(0)
    assert torch.equal(torch.load(file)["model"]["weight"], net.weight)
    assert torch.equal(state["weight"], net.weight)


# Programs.

SCRIPT = """
import sys
import torch
import holdfast.torch
class Local:
    pass
if __name__ == "__main__":
    print([torch.save is holdfast.torch.save, torch.load is holdfast.torch.load])
    torch.save([Local(), torch.ones(2)], sys.argv[1])
    got = torch.load(sys.argv[1], weights_only=False)
    print(type(got[0]) is Local, type(got[0]).__module__, __name__)
    print(sys.argv[1:], sys.path[0], __file__)
    import neighbour
    sys.exit(7)
"""


def run(
    *arguments: str, cwd: Path, before: tuple[str, ...] = ("-m", "holdfast.torch")
) -> subprocess.CompletedProcess[str]:
    # The package is found as it is here, from wherever the program runs.
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *before, *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
        check=False, timeout=100, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "somewhere" / "package"
    folder.mkdir(parents=True)
    for name in ("script.py", "__main__.py"):
        (folder / name).write_text(SCRIPT)
    (folder / "__init__.py").touch()
    (folder / "neighbour.py").write_text("print('neighbour')")
    (folder.parent / "neighbour.py").write_text("print('neighbour')")
    return folder


def test_a_script(program: Path, tmp_path: Path) -> None:
    script = "somewhere/package/script.py"
    done = run(script, "out.pt", "--flag", "-m", cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "[True, True]",
        "True __main__ __main__",
        f"['out.pt', '--flag', '-m'] {program} {program / 'script.py'}",
        "neighbour",
    ], done.stderr
    assert done.returncode == 7


def test_a_module(program: Path) -> None:
    for name, file in (("package", "__main__.py"), ("package.script", "script.py")):
        done = run("-m", name, "out.pt", "--durable", cwd=program.parent)
        assert done.stdout.splitlines() == [
            "[True, True]",
            "True __main__ __main__",
            f"['out.pt', '--durable'] {program.parent} {program / file}",
            "neighbour",
        ], done.stderr
        assert done.returncode == 7


def test_a_folder(program: Path, tmp_path: Path) -> None:
    done = run("--durable", str(program), "out.pt", cwd=tmp_path)
    assert "[True, True]" in done.stdout and "neighbour" in done.stdout, done.stderr
    assert done.returncode == 7


SHOW = """
import sys
print(sys.argv, sys.path, __name__, __file__, __package__)
print(__spec__ and (__spec__.name, __spec__.origin), type(__loader__).__name__, __doc__)
print(type(__builtins__).__name__, sys.modules["__main__"].__dict__ is globals())
print(sorted(name for name in globals() if name not in ("sys", "__annotations__")))
import multiprocessing, atexit
def work(n):
    return n + 1
if __name__ == "__main__":
    atexit.register(lambda: print("at the end", work(1), __name__))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(work, [1, 2]))
"""


@pytest.mark.parametrize("python", [(), ("-P",), ("-O", "-X", "utf8")], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        ("somewhere/show.py", "a", "-b"),
        ("link.py",),
        ("-m", "somewhere.show", "a"),
        ("-m", "somewhere"),
        ("somewhere",),
        ("packed.zip", "a"),
    ],
    ids=" ".join,
)
def test_as_python_runs_it(
    tmp_path: Path, arguments: tuple[str, ...], python: tuple[str, ...]
) -> None:
    if "-P" in python and sys.version_info < (3, 11):
        pytest.skip("this Python has no -P")
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "__init__.py").touch()
    # A child that is spawned cannot import what is called __main__.py, under Python itself neither.
    alone = SHOW.partition("import multiprocessing")[0]
    (tmp_path / "somewhere" / "show.py").write_text(SHOW)
    (tmp_path / "somewhere" / "__main__.py").write_text(alone)
    (tmp_path / "link.py").symlink_to(tmp_path / "somewhere" / "show.py")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("__main__.py", alone)
    plain = run(*arguments, cwd=tmp_path, before=python)
    ours = run(*arguments, cwd=tmp_path, before=(*python, "-m", "holdfast.torch"))
    assert ours.stdout == plain.stdout
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr)
    assert plain.stdout or "-P" in python


def test_torch_is_imported_when_the_program_does(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "print(torch.save.__module__, torch.serialization.load.__module__)\n"
        "print(type(torch.__loader__).__name__, 'exec_module' in vars(torch.__loader__))\n"
        "print(any('holdfast' in type(f).__module__ for f in sys.meta_path))\n"
    )
    done = run("a.py", cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "holdfast.torch holdfast.torch", "SourceFileLoader False", "False",
    ], done.stderr  # fmt: skip
    (tmp_path / "b.py").write_text("import sys; print('torch' in sys.modules)")
    assert run("b.py", cwd=tmp_path).stdout == "False\n"


def test_errors_of_a_program(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    raise KeyError('mine')\nf()\n")
    done = run("a.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "KeyError: 'mine'" in done.stderr and "raise KeyError('mine')" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "usage"),
        (["--what"], 2, "unknown option --what"),
        (["-m"], 2, "missing"),
        (["none.py"], 2, "none.py': No such file"),
        (["-m", "no_such_module"], 1, "No module named no_such_module"),
        (["-m", "no_such_module.sub"], 1, "no_such_module"),
        (["-m", "xml"], 1, "cannot be run"),
    ],
)
def test_what_cannot_be_run(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_help(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m holdfast.torch")
