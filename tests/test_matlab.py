"""The reader of MATLAB files: against files written byte by byte, and by scipy."""

from pathlib import Path

import matlab_files as mat
import numpy as np
import pytest

from cliptteacher.data.matlab import read_matlab_array

LABELS = np.arange(15, dtype=np.uint8).reshape(3, 5)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_numbers_of_every_type(tmp_path: Path, compress: bool, order: str, dtype: str) -> None:
    values = LABELS.astype(dtype)
    other = mat.array("other", np.zeros((7, 1)), order)
    wanted = mat.array("LabelMap", values, order, stored="u1")  # MATLAB stores few bytes
    mat.write(tmp_path / "a.mat", other, wanted, compress=compress, order=order)
    assert np.array_equal(read_matlab_array(tmp_path / "a.mat", "LabelMap"), values)
    mat.write(tmp_path / "b.mat", mat.array("LabelMap", values, order), order=order)
    assert np.array_equal(read_matlab_array(tmp_path / "b.mat", "LabelMap"), values)


def test_a_field_of_a_struct_behind_a_cell(tmp_path: Path) -> None:
    mat.write_sbd(tmp_path / "a.mat", LABELS)
    assert np.array_equal(read_matlab_array(tmp_path / "a.mat", "GTcls.Segmentation"), LABELS)
    present = read_matlab_array(tmp_path / "a.mat", "GTcls.CategoriesPresent")
    assert present.shape == (15, 1) and present[14, 0] == 14


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 2), (5, 1)])
def test_small_elements(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Up to four bytes share eight with their tag."""
    values = np.arange(1, 1 + shape[0] * shape[1], dtype=np.uint8).reshape(shape)
    mat.write(tmp_path / "a.mat", mat.array("a", values), mat.array("b", values), compress=False)
    assert np.array_equal(read_matlab_array(tmp_path / "a.mat", "b"), values)


@pytest.mark.parametrize("compress", [True, False])
def test_what_scipy_writes(tmp_path: Path, compress: bool) -> None:
    io = pytest.importorskip("scipy.io")
    sparse = pytest.importorskip("scipy.sparse")
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 21, (37, 53)).astype(np.uint8)
    ids = generator.integers(0, 460, (37, 53)).astype(np.uint16)
    boundaries = np.empty((20, 1), dtype=object)
    boundaries[:, 0] = [sparse.csc_matrix(labels == i) for i in range(20)]
    content = {"Boundaries": boundaries, "Segmentation": labels, "CategoriesPresent": [1.0, 2.0]}
    io.savemat(tmp_path / "a.mat", {"GTcls": content, "LabelMap": ids}, do_compression=compress)
    assert np.array_equal(read_matlab_array(tmp_path / "a.mat", "GTcls.Segmentation"), labels)
    assert np.array_equal(read_matlab_array(tmp_path / "a.mat", "LabelMap"), ids)


def test_scipy_reads_what_the_tests_write(tmp_path: Path) -> None:
    """So that the trees in the tests are in the official format, not in one of their own."""
    io = pytest.importorskip("scipy.io")
    mat.write_sbd(tmp_path / "a.mat", LABELS)
    found = io.loadmat(tmp_path / "a.mat")["GTcls"]["Segmentation"][0, 0]
    assert np.array_equal(found, LABELS)


def test_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    for content in (b"", b"\x89HDF\r\n\x1a\n".ljust(200, b"\0"), b"text" * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.mat must be a MATLAB file of level 5"):
            read_matlab_array(path, "LabelMap")


def test_missing_names(tmp_path: Path) -> None:
    mat.write_sbd(tmp_path / "a.mat", LABELS)
    for name, message in (
        ("LabelMap", r"no variable 'LabelMap', only \['GTcls'\]"),
        ("GTcls.Labels", r"no field 'Labels', only \['Boundaries', 'Segmentation'"),
        ("GTcls", "is of MATLAB's class 2"),
        ("GTcls.Boundaries", "is of MATLAB's class 1"),
        ("GTcls.Segmentation.x", "must be a struct of one element"),
    ):
        with pytest.raises(ValueError, match=message):
            read_matlab_array(tmp_path / "a.mat", name)


@pytest.mark.parametrize("compress", [True, False])
def test_any_cut_is_told(tmp_path: Path, compress: bool) -> None:
    """A file that ends early gives an error of ours, wherever the cut is."""
    path = tmp_path / "a.mat"
    mat.write(path, mat.array("LabelMap", LABELS), compress=compress)
    whole = path.read_bytes()
    needed = len(whole) - (0 if compress else 1)  # the last byte is padding
    for length in range(needed):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.mat must"):
            read_matlab_array(path, "LabelMap")


def test_nothing_unfolds_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliptteacher.data.matlab._LARGEST", 1 << 20)
    mat.write(tmp_path / "a.mat", mat.array("LabelMap", np.zeros((2048, 1024), np.uint8)))
    with pytest.raises(ValueError, match="larger than 1048576 bytes"):
        read_matlab_array(tmp_path / "a.mat", "LabelMap")
