"""A terminal or log of any encoding ends no command."""

import io
import os
import subprocess
import sys

import pytest

from inverse_flow.command.encoding import PLAIN, print_anywhere


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8"])
def test_every_text_is_printed_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    print_anywhere()
    text = "5.1 ± 0.2 −1 3 × 3 … log p(x̃) \udcff 猫"
    print(text, flush=True)
    printed = buffer.getvalue().decode(encoding).rstrip("\n")
    able = {sign for sign in PLAIN if sign.encode(encoding, "ignore")}
    expected = "".join(PLAIN[sign] if sign in PLAIN and sign not in able else sign for sign in text)
    assert printed == expected.encode(encoding, "replace").decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.thorough)])
def test_the_command_speaks_it(encoding: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "inverse_flow", "train", "--help"],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert b"or after this" in told.stdout
    assert b"Traceback" not in told.stderr
