"""A store on a disk that fills up: what was there stays, and whatever counts is whole."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from latent_records import DICTIONARY, begin, content, fill, record

from exegete.tools.store import Store


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    before = content(fill(tmp_path, [range(10)]))
    script = """
        import sys, pathlib, resource
        sys.path.insert(0, sys.argv[2])
        import latent_records as t
        from exegete.tools.errors import UserError
        store = t.Store.open(pathlib.Path(sys.argv[1]))
        with store.writer() as writer:
            run = t.begin(writer)
            size = max(path.stat().st_size for path in store.folder.glob("*.duckdb"))
            limit = {"part": 4096, "log": 16_384, "checkpoint": size // 2}[sys.argv[3]]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                if sys.argv[3] == "part":
                    writer.record(run, [t.record(latent) for latent in range(10, 2000)])
                else:
                    writer.publish()
            except UserError as error:
                print(error)
    """
    for stage in ("part", "log", "checkpoint"):
        arguments = [
            sys.executable,
            "-c",
            textwrap.dedent(script),
            str(tmp_path),
            str(Path(__file__).parent.parent),
            stage,
        ]
        found = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert "cannot write to the store" in found.stdout and "free some space" in found.stdout, found.stderr
        assert len(found.stdout.splitlines()) == 1
        assert content(Store.open(tmp_path)) == before
    with Store.open(tmp_path).writer() as writer:
        assert writer.labeled(begin(writer), DICTIONARY).tolist() == list(range(10))
        writer.record(begin(writer), [record(11)])
        writer.publish()
    assert len(content(Store.open(tmp_path))["results"]) == 11


def test_wherever_the_disk_ends_the_snapshot_is_whole(tmp_path: Path) -> None:
    """Also where only the last step, bringing the snapshot into one file, finds no room."""
    before = content(fill(tmp_path, [range(200)]))
    size = (tmp_path / "labels.duckdb").stat().st_size
    script = """
        import sys, pathlib, resource
        sys.path.insert(0, sys.argv[2])
        import latent_records as t
        from exegete.tools.errors import UserError
        store = t.Store.open(pathlib.Path(sys.argv[1]))
        for limit in map(int, sys.argv[3:]):
            with store.writer() as writer:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    writer.publish()
                    print(limit, "published")
                except UserError:
                    print(limit, "refused")
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert len(t.content(store)["results"]) == 200
    """
    limits = [str(size * part // 16) for part in range(4, 18)]
    arguments = [
        sys.executable,
        "-c",
        textwrap.dedent(script),
        str(tmp_path),
        str(Path(__file__).parent.parent),
        *limits,
    ]
    found = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    outcomes = [line.split()[1] for line in found.stdout.splitlines()]
    assert len(outcomes) == len(limits) and {outcomes[0], outcomes[-1]} == {"refused", "published"}
    assert content(Store.open(tmp_path)) == before
