from dataclasses import replace
from pathlib import Path

import pytest

from inverse_flow.training import log
from inverse_flow.training.log import CsvLog, StepReport, read_log


def report(step: int, validation: float | None = None) -> StepReport:
    return StepReport(step, 0, 0.1 * step, -1.5, 4.25, 0.5, 1e-3, 100.0, validation)


def write(path: Path, steps_done: int, reports: list[StepReport]) -> None:
    written = CsvLog(path, steps_done)
    for entry in reports:
        written.append(entry)
    written.close()


def test_reports_survive_the_file(tmp_path: Path) -> None:
    reports = [report(1), replace(report(2, validation=4.5), largest_gain=3.5)]
    write(tmp_path / "log.csv", 0, reports)
    assert read_log(tmp_path / "log.csv") == reports


def test_a_log_from_before_there_was_a_gain_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, 0, [report(1), report(2)])
    lines = [line.rpartition(",")[0] for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write(path, 1, [replace(report(2), largest_gain=2.0)])
    assert read_log(path) == [report(1), replace(report(2), largest_gain=2.0)]


def test_a_resumed_run_replaces_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, 0, [report(step) for step in range(1, 6)])
    write(path, 3, [report(4, validation=1.0)])
    assert read_log(path) == [report(1), report(2), report(3), report(4, validation=1.0)]


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, 0, [report(1), report(2)])
    write(path, 0, [report(1)])
    assert read_log(path) == [report(1)]


@pytest.mark.parametrize("rest", [b"\0" * 200_000, b"\xff\xfe,1\n", b"6,0,\xff"], ids=["zeros", "bytes", "cut"])
def test_what_is_no_text_ends_the_log(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "log.csv"
    write(path, 0, [report(1), report(2)])
    path.write_bytes(path.read_bytes() + rest)
    assert [found.step for found in read_log(path)] == [1, 2]


def test_a_line_cut_short_ends_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, 0, [report(1), report(2)])
    path.write_text(path.read_text()[:-12])
    assert read_log(path) == [report(1)]


def test_a_resumed_run_that_is_killed_at_once_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens while the lines that stay are written, the file is as it was."""
    path = tmp_path / "log.csv"
    write(path, 0, [report(1), report(2), report(3)])

    def killed(file: object, reports: object, columns: object = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(log, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            CsvLog(path, 2)
    assert read_log(path) == [report(1), report(2), report(3)]
    assert list(tmp_path.iterdir()) == [path]


def test_columns_of_a_method_stay_in_their_places(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    reports = [replace(report(step), columns={"part": float(step), "other": 0.5}) for step in (1, 2, 3)]
    write(path, 0, reports[:2])
    write(path, 2, reports[2:])
    assert read_log(path) == reports
    assert path.read_text(encoding="utf-8").count("part,other") == 1
