"""Filling models from OneFlow's folders of before 2020-11, which hold bytes and say no types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast

STEP = "System-Train-TrainStep-train_job"


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    return {
        "conv.weight": rng.random((4, 3, 2), "f4"),
        "conv.bias": rng.random(4),
        "half": rng.random((5, 3)).astype("f2"),
        "ids": rng.integers(-9, 9, (2, 2)),
        "large": rng.random((300, 401), "f4"),
        "mask": rng.random(7) > 0.5,
        "none": np.zeros((0, 3), "f4"),
        "scalar": np.array(2.5),
        STEP: np.array([12]),
    }


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    for name, array in arrays.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "out").write_bytes(array.tobytes())
    (folder / "snapshot_done").write_bytes(b"")
    return folder


def test_arrays(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    folder = write(tmp_path / "old", arrays)
    target = {name: np.zeros_like(array) for name, array in arrays.items()}
    target["large"] = np.zeros((401, 300), "f4").T  # strided
    target["ids"] = np.zeros((2, 2), ">i8")
    assert holdfast.load_into(target, folder) == ([], [])
    for name, array in arrays.items():
        assert np.array_equal(target[name], array), name
    with pytest.warns(UserWarning, match="taken for float32 of one dimension"):
        found = holdfast.load(folder, framework="numpy")
    assert np.array_equal(found["conv.weight"], arrays["conv.weight"].reshape(-1))


def test_a_part_under_other_names(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    folder = write(tmp_path / "old", arrays)
    target = {"weight": np.zeros((4, 3, 2), "f4"), "more": np.zeros(1)}
    keys = holdfast.load_into(target, folder, prefix="conv.", strict=False)
    assert keys == (["more"], ["bias"])
    assert np.array_equal(target["weight"], arrays["conv.weight"])
    target = {"w": np.zeros((12, 2), "f4")}  # any shape of as many bytes
    holdfast.load_into(target, folder, rename={r"conv\.weight": "w"}, strict=False)
    assert np.array_equal(target["w"], arrays["conv.weight"].reshape(12, 2))


def test_a_variable_alone(tmp_path: Path) -> None:
    values = np.arange(6, dtype="i2").reshape(3, 2)
    write(tmp_path, {"one": values})
    target = {"tensor": np.zeros((3, 2), "i2")}
    assert holdfast.load_into(target, tmp_path / "one") == ([], [])
    assert np.array_equal(target["tensor"], values)


def test_bytes_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    folder = write(tmp_path / "old", arrays)
    target = {name: np.zeros_like(array) for name, array in arrays.items()}
    target["half"] = np.zeros((5, 3), "f4")
    target["mask"] = np.zeros(8, "?")
    target["none"] = np.zeros(1, "f4")
    with pytest.raises(RuntimeError) as caught:
        holdfast.load_into(target, folder, strict=False)
    text = str(caught.value)
    assert text.count("size mismatch") == 3
    wanted = {
        "half: float32 of shape (5, 3)": "60 bytes, the checkpoint has 30",
        "mask: bool of shape (8,)": "8 bytes, the checkpoint has 7",
        "none: float32 of shape (1,)": "4 bytes, the checkpoint has 0",
    }
    for name, needed in wanted.items():
        assert f"size mismatch for {name} in the current model needs {needed}" in text
    assert not any(array.any() for array in target.values())


def test_a_module_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def network() -> Any:
        layers = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3, bias=False)
        made = torch.nn.Sequential(*layers)
        made.register_buffer("table", torch.zeros(3, 5, dtype=torch.bfloat16))
        made[2].weight = torch.nn.Parameter(torch.zeros(3, 3).T)
        return made

    rng = np.random.default_rng(2)
    arrays = {
        name: rng.integers(0, 100, tuple(value.shape)).astype(
            "u2" if value.dtype is torch.bfloat16 else str(value.dtype).removeprefix("torch.")
        )
        for name, value in network().state_dict().items()
    }
    target = network()
    assert holdfast.load_into(target, write(tmp_path / "old", arrays)) == ([], [])
    for name, value in target.state_dict().items():
        bits = value.view(torch.int16) if name == "table" else value
        assert np.array_equal(bits.numpy(), arrays[name]), name
    wrong = torch.nn.Sequential(torch.nn.Linear(4, 2))
    words = r"size mismatch for 0.bias: float32 of shape torch.Size\(\[2\]\) in the current "
    with pytest.raises(RuntimeError, match=words + "model needs 8 bytes, the checkpoint has 12 "):
        holdfast.load_into(wrong, tmp_path / "old", strict=False)


def test_a_module_with_code_of_its_own(tmp_path: Path) -> None:
    """It is filled like any other: what it would be given, nobody knows the types of."""
    torch = pytest.importorskip("torch")
    made = torch.nn.Linear(4, 3)
    made.register_load_state_dict_post_hook(lambda module, keys: pytest.fail("it ran"))
    weight = np.random.default_rng(1).random((3, 4), "f4")
    folder = write(tmp_path / "old", {"weight": weight, "bias": np.ones(3, "f4")})
    assert holdfast.load_into(made, folder) == ([], [])
    assert np.array_equal(made.weight.detach().numpy(), weight) and made.bias.sum() == 3
