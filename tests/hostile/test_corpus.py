"""The corpus is what its script makes, byte for byte."""

from __future__ import annotations

from tests.hostile.make_files import FILES, corpus


def test_the_files_are_what_the_script_makes():
    stored = {
        str(path.relative_to(FILES)): path.read_bytes()
        for path in FILES.rglob("*")
        if path.is_file()
    }
    made = corpus()
    assert stored.keys() == made.keys()
    assert [name for name in made if stored[name] != made[name]] == []
