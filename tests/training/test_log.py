from pathlib import Path

from inverse_flow.training.log import CsvLog, StepReport, read_log


def report(step: int, validation: float | None = None) -> StepReport:
    return StepReport(step, 0, 0.1 * step, -1.5, 4.25, 0.5, 1e-3, 100.0, validation)


def write(path: Path, steps_done: int, reports: list[StepReport]) -> None:
    log = CsvLog(path, steps_done)
    for entry in reports:
        log.append(entry)
    log.close()


def test_reports_survive_the_file(tmp_path: Path) -> None:
    reports = [report(1), report(2, validation=4.5)]
    write(tmp_path / "log.csv", 0, reports)
    assert read_log(tmp_path / "log.csv") == reports


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


def test_a_line_cut_short_ends_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, 0, [report(1), report(2)])
    path.write_text(path.read_text()[:-12])
    assert read_log(path) == [report(1)]
