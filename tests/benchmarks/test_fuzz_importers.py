"""The short form of the fuzzing of importers."""

from __future__ import annotations


def test_spoilt_files_neither_crash_nor_hang_nor_run(load_script):
    result = load_script("benchmarks/fuzz_importers.py").run(400, seed=1)
    assert [(kind, fault) for kind, _, fault in result.bugs] == []
    assert sum(result.counts.values()) > 400
    assert set(result.outcomes) <= {"UnreadableFileError", "CheckpointError"}
